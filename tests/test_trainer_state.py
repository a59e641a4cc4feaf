"""What a step and a checkpoint hold: the objective's own state, the student alone, bounded memory, packed documents."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from test_rows_cost import Watch, in_place_product
from test_trainer import arguments, mix, rows
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, TrainerCallback

from llmkd import CrossEntropy, DistillTrainer, LocalTeacher, Mix, Objective, TokenDistill
from llmkd.data.collate import Collator
from llmkd.errors import ConfigError
from llmkd.types import Outputs, row_labels

V, H = 264, 32


class Projected(Objective):
    """Cross-entropy through a trainable matrix, with a record of the steps."""

    watches_steps = True

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(H, H, bias=False)
        nn.init.eye_(self.projector.weight)
        self.steps: list[tuple[float, dict[str, float]]] = []

    def forward(self, student: Outputs, teacher: Outputs | None, batch) -> dict[str, Tensor]:
        rows = student.rows
        logits = self.projector(rows.hidden) @ rows.head.weight.t()
        total = nn.functional.cross_entropy(logits, row_labels(batch), reduction="sum")
        return {"total": total, "projected": total.detach()}

    def after_step(self, progress, means) -> None:
        self.steps.append((progress, dict(means)))


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(objective, student=None, teacher=None, folder="run", **changes) -> DistillTrainer:
        options = {"train_dataset": changes.pop("data", rows()), "data_collator": changes.pop("collator", None)}
        torch.manual_seed(1)
        return DistillTrainer(
            student or make_model(), teacher, objective, arguments(tmp_path / folder, **changes),
            eval_dataset=rows(seed=4), processing_class=tokenizer, **options,
        )  # fmt: skip

    return make


def test_an_objective_sees_the_means_of_each_optimizer_step(make_trainer):
    goal = Projected()
    trainer = make_trainer(goal, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    trainer.train()
    assert [progress for progress, _ in goal.steps] == pytest.approx([0.0, 1 / 3, 2 / 3])
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [means["projected"] for _, means in goal.steps] == pytest.approx(losses, rel=1e-5)


def test_an_objective_that_does_not_watch_is_not_told(make_trainer):
    class Quiet(Projected):
        watches_steps = False

    goal = Quiet()
    make_trainer(goal).train()
    assert goal.steps == []


def test_a_mix_hands_the_step_on(make_trainer):
    goal = Projected()
    make_trainer(Mix([CrossEntropy(), goal], [1.0, 2.0])).train()
    assert len(goal.steps) == 2
    assert {"cross_entropy", "projected"} <= goal.steps[0][1].keys()


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_resumed_run_ends_where_the_undisturbed_one_does(make_trainer, make_model, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}

    def student(seed: int = 0):
        return make_model("gpt2", seed=seed, resid_pdrop=0.1, tie_word_embeddings=True)

    whole = make_trainer(Projected(), student(), folder="a", **options)
    whole.train()
    cut = make_trainer(Projected(), student(), folder="b", **options)
    cut.add_callback(StopAt(2))
    cut.train()
    again = make_trainer(
        Projected(), make_model("gpt2", seed=5, resid_pdrop=0.1, tie_word_embeddings=True), folder="b", **options
    )
    torch.manual_seed(77)
    again.train(resume_from_checkpoint=cut.last_checkpoint())
    for (name, ours), theirs in zip(again.distiller.named_parameters(), whole.distiller.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    saved = safetensors.torch.load_file(tmp_path / "a" / "checkpoint-4" / "objective.safetensors")
    assert torch.equal(saved["projector.weight"], whole.distiller.objective.projector.weight)
    assert not torch.equal(saved["projector.weight"], torch.eye(H)), "it was trained"


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_a_plain_model(make_trainer, make_model, tokenizer, tmp_path, tied):
    student = make_model("qwen2", tie_word_embeddings=tied)
    trainer = make_trainer(
        mix(), student, LocalTeacher(make_model(seed=9), tokenizer), max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_student(str(tmp_path / "student"))
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "student"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, student.state_dict()[name]), name
        assert (folder / "tokenizer.json").is_file()
        assert (folder / "generation_config.json").is_file()
        assert not (folder / "objective.safetensors").exists()


def test_no_copy_of_a_bf16_model_in_fp32_is_made(make_trainer, make_model, tokenizer):
    student, teacher = make_model().bfloat16(), make_model(seed=9).bfloat16()
    trainer = make_trainer(mix(), student, LocalTeacher(teacher, tokenizer), bf16=True, max_steps=1)
    big = V * H

    class Wide(Watch):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(out, Tensor) and out.dtype == torch.float32 and out.shape == (V, H):
                seen.append(str(func))
            return out

    seen: list[str] = []
    with Wide():
        trainer.train()
    assert {parameter.dtype for parameter in (*student.parameters(), *teacher.parameters())} == {torch.bfloat16}
    assert {t.dtype for state in trainer.optimizer.state.values() for t in state.values() if t.numel() >= big} == {
        torch.bfloat16
    }
    made = [name for name in seen if "zeros" not in name and "mul" not in name]  # dW is summed in fp32
    assert not made, made


def long_rows(count: int = 2, prompt: int = 60, answer: int = 40) -> Dataset:
    ids = [torch.randint(3, 259, (prompt + answer,)).tolist() for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * prompt + row[prompt:] for row in ids]})


def test_a_step_makes_no_tensor_of_rows_times_vocabulary_beyond_a_chunk(make_trainer, make_model, monkeypatch):
    wide, count = 4096, 80
    student, teacher = (make_model(seed=seed, vocab_size=wide, tie_word_embeddings=True) for seed in (0, 9))
    trainer = make_trainer(mix(), student, teacher, data=long_rows(), max_steps=1)
    trainer.distiller.vocab_size = None  # all columns, so that rows times columns outgrow every weight
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])

    def largest() -> int:
        with Watch() as watch:
            trainer.compute_loss(trainer.distiller, batch, num_items_in_batch=torch.tensor(count)).backward()
        return watch.largest

    assert largest() >= count * wide, "all rows fit the default budget"
    monkeypatch.setattr("llmkd.rows.reduce.__kwdefaults__", {"budget_mb": 1, "chunk_rows": None})
    assert largest() == wide * H, "nothing is larger than the gradient of the head"


def test_only_supervised_positions_are_projected(make_trainer, make_model):
    """4 products of the head's size: student, teacher, dH and dW; prompts and padding cost none."""
    trainer = make_trainer(mix(), make_model(), make_model("qwen2", seed=9), data=long_rows(), max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    count = 80

    def flops(model_batch) -> int:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counter:
            loss = trainer.compute_loss(trainer.distiller, model_batch, num_items_in_batch=torch.tensor(count))
            loss.backward()
        return counter.get_total_flops()

    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100), "rows": batch["rows"][:0]}
    assert flops(batch) - flops(nothing) == 4 * 2 * count * 259 * H


# Packing


def documents() -> list[dict[str, list[int]]]:
    return list(rows())


def packed() -> Dataset:
    """The same documents, several in a row, rows of unequal length."""
    one, two = documents()[:4], documents()[4:]
    return Dataset.from_list(
        [
            {key: [token for document in row for token in document[key]] for key in ("input_ids", "labels")}
            | {"seq_lengths": [len(document["input_ids"]) for document in row]}
            for row in (one, two)
        ]
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_packed_documents_train_as_they_do_alone(make_trainer, make_model, tokenizer, name):
    results = []
    for data, collator, size in ((rows(), None, 7), (packed(), Collator(0, packing=True), 2)):
        options = {
            "max_steps": 3,
            "per_device_train_batch_size": size,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
        }
        teacher = LocalTeacher(make_model(seed=9), tokenizer)
        student = make_model(
            name, **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
        )
        trainer = make_trainer(mix(), student, teacher, data=data, collator=collator, **options)
        trainer.train()
        logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
        results.append((torch.tensor(logs), trainer.distiller.student.state_dict()))
    (alone, weights), (together, others) = results
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    for key, weight in weights.items():
        torch.testing.assert_close(others[key], weight, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("name", ["bloom", "opt"])
def test_packing_with_a_model_that_mixes_documents_is_refused(make_trainer, make_model, who, name):
    models = {"student": make_model(), "teacher": make_model(seed=9), who: make_model(name)}
    with pytest.raises(ConfigError, match=rf"packing: model type '{name}' lets packed documents see each other"):
        make_trainer(mix(), models["student"], models["teacher"], data=packed(), collator=Collator(0, packing=True))


def test_terms_of_one_kind_are_told_apart_in_the_logs(make_trainer, make_model):
    goal = Mix([TokenDistill("forward_kl"), TokenDistill("forward_kl", temperature=2.0)])
    trainer = make_trainer(goal, None, make_model(seed=9))
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["forward_kl"] > first["forward_kl_2"] > 0
