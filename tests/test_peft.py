"""LoRA students: trained, saved as adapters, merged on request, resumed; the frozen head costs no weight gradient."""

from __future__ import annotations

import pytest
import torch
from oracles import dense_rows
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from test_rows_cost import in_place_product
from test_trainer import arguments, mix, rows
from test_trainer_state import StopAt, long_rows
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from llmkd import DistillTrainer, LocalTeacher, TokenDistill
from llmkd.adapters.causal_lm import read
from llmkd.data.collate import Collator
from llmkd.divergences import DIVERGENCES
from llmkd.errors import ConfigError

IDS = torch.tensor([[5, 9, 8, 7, 30, 31]])


def lora(**changes) -> LoraConfig:
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(**{**options, **changes})


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(config=None, student=None, folder="run", data=None, **changes) -> DistillTrainer:
        torch.manual_seed(1)
        return DistillTrainer(
            student or make_model(), LocalTeacher(make_model(seed=9), tokenizer), mix(),
            arguments(tmp_path / folder, **{"learning_rate": 1e-2, **changes}),
            train_dataset=data or rows(), eval_dataset=rows(seed=4), processing_class=tokenizer,
            peft_config=config or lora(),
        )  # fmt: skip

    return make


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_only_the_adapter_is_trained(make_trainer, make_model):
    base = make_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = make_trainer(student=base, max_steps=20, logging_steps=50)
    first = trainer.evaluate(rows())["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows())["eval_loss"] < first
    trained = {name for name, parameter in trainer.distiller.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(trained)
    after = {
        name.replace("base_layer.", ""): tensor for name, tensor in base.state_dict().items() if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_checkpoint_is_an_adapter(make_trainer, make_model, tmp_path):
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-1"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    again = PeftModel.from_pretrained(make_model(), str(folder))
    torch.testing.assert_close(logits(again), logits(trainer.distiller.student))


def test_a_merged_student_is_a_plain_model(make_trainer, make_model, tmp_path):
    trainer = make_trainer(lora(target_modules="all-linear"), make_model("qwen2"), max_steps=2)
    trainer.train()
    expected = logits(trainer.distiller.student)
    trainer.save_student(str(tmp_path / "adapter"))
    trainer.save_student(str(tmp_path / "merged"), merge=True)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_wrapped_already_trains_too(make_model, tokenizer, tmp_path):
    student = get_peft_model(make_model(), lora())
    trainer = DistillTrainer(
        student, make_model(seed=9), mix(), arguments(tmp_path), train_dataset=rows(), processing_class=tokenizer
    )
    trainer.train()
    assert trainer.distiller.student is student


def test_a_resumed_adapter_ends_where_the_undisturbed_one_does(make_trainer):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    config = {"lora_dropout": 0.2}
    whole = make_trainer(lora(**config), folder="a", **options)
    whole.train()
    cut = make_trainer(lora(**config), folder="b", **options)
    cut.add_callback(StopAt(2))
    cut.train()
    again = make_trainer(lora(**config), folder="b", **options)
    again.train(resume_from_checkpoint=cut.last_checkpoint())
    for (name, ours), theirs in zip(again.distiller.named_parameters(), whole.distiller.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_frozen_head_costs_no_weight_gradient(make_trainer):
    trainer, count = make_trainer(data=long_rows()), 80
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])

    def flops(model_batch) -> int:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counter:
            loss = trainer.compute_loss(trainer.distiller, model_batch, num_items_in_batch=torch.tensor(count))
            loss.backward()
        return counter.get_total_flops()

    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100), "rows": batch["rows"][:0]}
    assert flops(batch) - flops(nothing) == 3 * 2 * count * 259 * 32
    assert trainer.distiller.student.get_base_model().lm_head.weight.grad is None


HEADS = {
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "scaled lora": {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 32, "use_rslora": True},
    "a trained copy": {"modules_to_save": ["lm_head"]},
    "both tables": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_has_the_gradients_of_the_dense_computation(make_model, kind, tied):
    student = get_peft_model(make_model(tie_word_embeddings=tied), lora(**HEADS[kind])).double()
    teacher = make_model(seed=9).double()
    batch = Collator(0)(list(rows()))
    loss = TokenDistill("forward_kl")(read(student, batch, ()), read(teacher, batch, ()), batch)["total"]
    loss.backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.requires_grad}
    student.zero_grad()
    mask, inputs = batch["labels"][:, 1:] != -100, {name: batch[name] for name in ("input_ids", "attention_mask")}
    z_s, z_t = (model(**inputs).logits[:, :-1][mask] for model in (student, teacher))
    dense = dense_rows(DIVERGENCES["forward_kl"], z_s, z_t).sum()
    torch.testing.assert_close(loss, dense)
    dense.backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["lm_head"], **more)
        for more in ({"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.1})
    ]
    + [IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")],
    ids=["dora", "bias", "dropout", "ia3"],
)
def test_an_adapter_that_does_more_to_the_head_is_an_error(make_trainer, config):
    with pytest.raises(ConfigError, match=r"peft: got .* on the output head.*Take lm_head out of target_modules"):
        make_trainer(config)
