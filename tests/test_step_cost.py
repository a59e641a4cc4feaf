"""What a training step costs beside the arithmetic: no host sync, no growth, and switches that change speed alone."""

from __future__ import annotations

import gc
import traceback
from collections import Counter

import psutil
import pytest
import torch
from datasets import Dataset
from test_trainer import arguments, mix, rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from llmkd import DistillTrainer, TokenDistill, config
from llmkd.data import Collator

SYNCS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "is_nonzero")
ON_HOST = ("data/collate.py", "accelerate/data_loader.py")  # before a batch goes to the device
MASKS = "transformers/masking_utils.py"  # transformers asks each model's mask whether there is padding


class Syncs(TorchDispatchMode):
    """Counts what would make the host wait for a device, by the file that asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in SYNCS:
            frames = [frame.filename for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.asked[next((name for name in (*ON_HOST, MASKS) if any(name in f for f in frames)), frames[-1])] += 1
        return func(*args, **(kwargs or {}))


def losses(model, teacher, folder, tokenizer, dataset=None, objective=None, **changes) -> list[float]:
    """The loss of each of three steps."""
    trainer = DistillTrainer(
        model=model,
        teacher=teacher,
        objective=objective or mix(),
        args=arguments(folder, **{"max_steps": 3, "per_device_train_batch_size": 4, **changes}),
        train_dataset=dataset or rows(),
        processing_class=tokenizer,
    )
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    "objective", [None, TokenDistill("taid"), TokenDistill("forward_kl", policy="confidence_gate")]
)
def test_no_host_sync_in_a_micro_step(make_model, tokenizer, tmp_path, objective):
    steps, accumulation = 6, 2
    moves = objective is not None and objective.watches_steps
    options = {"max_steps": steps, "logging_steps": 100, "gradient_accumulation_steps": accumulation}
    trainer = DistillTrainer(
        model=make_model(),
        teacher=make_model(seed=9),
        objective=objective or mix(),
        args=arguments(tmp_path, **options),
        train_dataset=rows(),
        processing_class=tokenizer,
    )
    with Syncs() as syncs:
        trainer.train()
    models, questions = 2, 2
    assert syncs.asked.pop(MASKS) <= steps * accumulation * models * questions
    ours = {file: count for file, count in syncs.asked.items() if file not in ON_HOST}
    at_the_end = ours.pop(next((file for file in ours if file.endswith("transformers/trainer.py")), ""), 0)
    assert at_the_end <= 1, "the mean loss of the whole training"
    means = sum(count for file, count in ours.items() if file.endswith("meters.py"))
    assert sum(ours.values()) == means, ours
    assert means <= (steps + 1 if moves else 1), "TAID's t follows each step's loss"


def test_a_sync_is_seen():
    with Syncs() as syncs:
        torch.ones(3).sum().item()
    assert sum(syncs.asked.values()) == 1


class Sizes(TrainerCallback):
    """Live tensors and resident memory after some steps."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at, self.tensors, self.resident = at, [], []

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step in self.at:
            gc.collect()
            self.tensors.append(sum(isinstance(one, Tensor) for one in gc.get_objects()))
            self.resident.append(psutil.Process().memory_info().rss / 2**20)


@pytest.mark.slow
def test_nothing_grows_over_a_thousand_steps(make_model, tokenizer, tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = Sizes(at=(100, 550, 1000))
    trainer = DistillTrainer(
        model=make_model(**small),
        teacher=make_model(seed=9, **small),
        objective=mix(),
        args=arguments(tmp_path, max_steps=1000, logging_steps=100),
        train_dataset=rows(),
        processing_class=tokenizer,
        callbacks=[sizes],
    )
    trainer.train()
    assert len(sizes.tensors) == 3
    assert sizes.tensors[2] - sizes.tensors[0] <= 9, sizes.tensors  # a leak of one in a hundred steps
    assert sizes.resident[2] - sizes.resident[0] < 8, sizes.resident


# Switches that change speed or memory, and nothing else


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"optim": "adamw_torch"}, 1e-6),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 1e-5),
        ({"bf16": True}, 0.02),
    ],
    ids=["checkpointing", "fused AdamW or not", "accumulation", "bf16"],
)
def test_the_losses_are_those_of_the_plain_run(make_model, tokenizer, tmp_path, changes, tolerance):
    data = Dataset.from_list([*rows(), rows(seed=3)[0]])  # eight rows: no window is cut short
    plain = losses(make_model(), make_model(seed=9), tmp_path, tokenizer, data, optim="adamw_torch_fused")
    assert len(plain) == 3
    assert len(set(plain)) == 3
    switched = losses(make_model(), make_model(seed=9), tmp_path, tokenizer, data, **changes)
    assert switched == pytest.approx(plain, rel=tolerance)


@pytest.mark.slow
def test_a_compiled_student_has_the_same_losses(make_model, tokenizer, tmp_path):
    torch._dynamo.reset()
    plain = losses(make_model(), make_model(seed=9), tmp_path, tokenizer)
    compiled, student = {"torch_compile": True, "torch_compile_backend": "aot_eager"}, make_model()
    found = losses(student, make_model(seed=9), tmp_path, tokenizer, **compiled)
    assert found == pytest.approx(plain, rel=1e-5)
    assert torch._dynamo.utils.counters["aot_autograd"]["ok"] >= 1, "the backbone was compiled"
    assert "_orig_mod" not in " ".join(student.state_dict())


# Padding


def test_length_grouping_is_the_default_and_skips_padding(make_model, tokenizer, tmp_path):
    lengths = [(4 + 60 * (i % 2), 2) for i in range(64)]
    padded = {}
    for name, block in {"default": {}, "shuffled": {"train_sampling_strategy": "random"}}.items():
        block = {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", **block}
        trainer = DistillTrainer(
            model=make_model(),
            objective=mix(),
            teacher=make_model(seed=9),
            args=config.training_arguments(block, str(tmp_path)),
            train_dataset=rows(lengths),
            processing_class=tokenizer,
        )
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        padded[name] = sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padded["default"] < 0.15 < 0.3 < padded["shuffled"]


def test_both_backbones_see_packed_rows_without_padding(make_model, tokenizer, tmp_path):
    """One row of three documents: the loss of three padded rows, at fewer positions."""
    data = rows([(9, 4), (5, 1), (4, 3)])
    packed = {
        "input_ids": [[token for row in data["input_ids"] for token in row]],
        "labels": [[token for row in data["labels"] for token in [-100, *row[1:]]]],
        "seq_lengths": [[9, 5, 4]],
    }
    seen: list[torch.Size] = []
    found = []
    for dataset, packing, size in ((data, False, 3), (Dataset.from_dict(packed), True, 1)):
        student, teacher = make_model(), make_model(seed=9)
        for model in (student, teacher):
            model.get_decoder().register_forward_pre_hook(
                lambda _, args, inputs: seen.append(inputs["input_ids"].shape), with_kwargs=True
            )
        trainer = DistillTrainer(
            model=student,
            teacher=teacher,
            objective=mix(),
            args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=size, per_device_eval_batch_size=1),
            train_dataset=dataset,
            processing_class=tokenizer,
            data_collator=Collator(0, packing=packing),
        )
        seen.clear()
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], set(seen)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == {torch.Size([3, 9])}
    assert found[1][1] == {torch.Size([1, 18])}
