"""A classifier is distilled: exact for any split, saved as a plain model, resumed bit for bit, measured by accuracy."""

from __future__ import annotations

import pytest
import torch
from classes import classifier, data, own_logits, targets
from datasets import ClassLabel, Dataset, Features, List, Value
from oracles import dense_rows
from peft import LoraConfig
from test_trainer import arguments
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmkd import DistillTrainer, LocalTeacher
from llmkd.adapters import CLASSIFIER, adapter_of
from llmkd.data.collate import pad_with_unsupervised
from llmkd.divergences import DIVERGENCES
from llmkd.objectives import CrossEntropy, Mix, SinKD, TokenDistill
from llmkd.students import pretrained


def mix() -> Mix:
    return Mix([TokenDistill("forward_kl", temperature=2.0), CrossEntropy()], weights=[1.0, 0.1])


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    def make(objective=None, student=None, teacher=None, folder="run", args=None, **options) -> DistillTrainer:
        torch.manual_seed(1)
        return DistillTrainer(
            model=student or classifier(),
            teacher=teacher or LocalTeacher(classifier(seed=9, size=48), tokenizer),
            objective=objective or mix(),
            args=arguments(tmp_path / folder, **(args or {})),
            **{"train_dataset": data(), "eval_dataset": data(4), "processing_class": tokenizer, **options},
        )

    return make


# Training


@pytest.mark.parametrize(("size", "accumulation"), [(9, 1), (4, 3), (1, 9)])
@pytest.mark.parametrize("coupled", [False, True])
def test_a_step_is_the_mean_over_all_labelled_examples(make_trainer, size, accumulation, coupled):
    """SinKD without coupling adds up as well."""
    goal = Mix([mix(), SinKD(granularity="sample")], weights=[1.0, 0.5]) if coupled else mix()
    changes = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    student, teacher = (
        classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        classifier(seed=9, size=48),
    )
    z_s, z_t = own_logits(student).detach().double(), own_logits(teacher).detach().double()
    dense = dense_rows(DIVERGENCES["forward_kl"], z_s, z_t, temperature=2.0).mean()
    expected = dense + 0.1 * nn.functional.cross_entropy(z_s, targets())
    if coupled:
        expected = expected + 0.5 * ((z_s / 2).softmax(-1) - (z_t / 2).softmax(-1)).abs().sum(-1).mean()
    trainer = make_trainer(goal, student=student, args={**changes, "optim": "sgd", "num_train_epochs": 1})
    assert trainer.train().training_loss == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.state.log_history[0]["forward_kl"] == pytest.approx(dense.item(), rel=1e-5)


def test_the_weights_after_some_steps_do_not_depend_on_the_split(make_trainer):
    def weights(size: int, accumulation: int) -> dict[str, Tensor]:
        student = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        rows = data().select(range(8))
        make_trainer(student=student, train_dataset=rows, args={**changes, "max_steps": 3, "optim": "sgd"}).train()
        return student.state_dict()

    whole = weights(8, 1)
    for split in ((4, 2), (1, 8)):
        for name, tensor in weights(*split).items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6, msg=name)


def test_it_learns_and_is_saved_as_a_plain_classifier(make_trainer, tmp_path):
    args = {"max_steps": 30, "learning_rate": 3e-3, "per_device_train_batch_size": 9}
    trainer = make_trainer(Mix([TokenDistill(), SinKD()], [1.0, 0.1]), eval_dataset=data(), args=args)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] < 0.5 * before
    trainer.save_student(str(tmp_path / "student"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    trainer.distiller.student.eval()
    torch.testing.assert_close(own_logits(loaded), own_logits(trainer.distiller.student))


def test_models_may_be_paths(tokenizer, tmp_path):
    for name, seed in (("s", 0), ("t", 9)):
        classifier(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    trainer = DistillTrainer(
        str(tmp_path / "s"), str(tmp_path / "t"), mix(), arguments(tmp_path / "run"), train_dataset=data()
    )
    assert adapter_of(trainer.teacher.model) is adapter_of(trainer.distiller.student) is CLASSIFIER
    trainer.train()


def test_a_run_goes_on_where_it_stopped(make_trainer):
    steps = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(SinKD(), folder="a", args={"max_steps": 4})
    whole.train()
    make_trainer(SinKD(), folder="b", args={"max_steps": 4, **steps}).train()
    again = make_trainer(SinKD(), folder="b", args={"max_steps": 4, **steps})
    again.train(resume_from_checkpoint=str(again.args.output_dir) + "/checkpoint-2")
    pairs = zip(whole.distiller.student.parameters(), again.distiller.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_adapter_is_trained(make_trainer):
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    trainer = make_trainer(peft_config=lora)
    trainer.train()
    names = {name for name, parameter in trainer.distiller.named_parameters() if parameter.requires_grad}
    assert any("classifier" in name for name in names)
    assert all("lora" in name or "classifier" in name for name in names)
    assert trainer.evaluate()["eval_kl"] > 0


def test_a_decoder_is_trained(make_trainer):
    trainer = make_trainer(student=classifier("llama"), teacher=classifier("qwen2", seed=9, size=64))
    assert trainer.train().training_loss > 0


# Evaluation


def test_evaluation_reports_accuracy_for_any_batch_size(make_trainer):
    student, teacher = classifier(), classifier(seed=9, size=48)
    z_s, z_t = own_logits(student, 4).detach(), own_logits(teacher, 4).detach()
    expected = {
        "kl": dense_rows(DIVERGENCES["forward_kl"], z_s, z_t).mean(),
        "top1_agreement": (z_s.argmax(-1) == z_t.argmax(-1)).double().mean(),
        "accuracy": (z_s.argmax(-1) == targets()).double().mean(),
        "teacher_accuracy": (z_t.argmax(-1) == targets()).double().mean(),
        "cross_entropy": nn.functional.cross_entropy(z_s, targets()),
    }
    for size in (1, 4, 9):
        report = make_trainer(args={"per_device_eval_batch_size": size}).evaluate()
        for name, value in expected.items():
            assert report[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4), name
        assert not any("perplexity" in name or "bits" in name for name in report)


def test_padding_with_examples_that_have_no_label():
    named = ClassLabel(names=["a", "b", "c"])
    features = Features({"input_ids": List(Value("int64")), "label": named})
    dataset = Dataset.from_dict({"input_ids": [[5], [6]], "label": [1, 2]}, features=features)
    padded = pad_with_unsupervised(dataset, 3)
    assert list(padded["label"]) == [1, 2, -100]
    listed = pad_with_unsupervised([{"input_ids": [5], "labels": 1}], 2)
    assert [row["labels"] for row in listed] == [1, -100]


def test_a_causal_lm_is_still_read_as_one(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert type(pretrained(path=str(tmp_path))) is type(AutoModelForCausalLM.from_pretrained(tmp_path))
