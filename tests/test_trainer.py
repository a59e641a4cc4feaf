"""DistillTrainer: one global token mean, honest logs and evaluation, a teacher that stays outside."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from llmkd import CrossEntropy, DistillTrainer, LocalTeacher, Mix, Objective, TokenDistill
from llmkd.errors import ConfigError, TrainingError
from llmkd.types import Outputs, Signal

LENGTHS = [(9, 4), (5, 1), (12, 9), (3, 2), (7, 6), (10, 1), (6, 3)]  # tokens, of which the first are a prompt


def rows(lengths=LENGTHS, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 259, (length,), generator=generator).tolist() for length, _ in lengths]
    labels = [[-100] * prompt + row[prompt:] for row, (_, prompt) in zip(ids, lengths, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def arguments(folder, **changes) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**options, **changes})


def mix() -> Mix:
    return Mix([TokenDistill("forward_kl"), CrossEntropy()], weights=[1.0, 0.1])


class Recording(LocalTeacher):
    """A teacher that counts its calls."""

    def __init__(self, model, tokenizer=None):
        super().__init__(model, tokenizer)
        self.calls = []

    def __call__(self, batch, needs, vocab_size=None):
        self.calls.append(set(needs))
        return super().__call__(batch, needs, vocab_size)


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(objective=None, student=None, teacher="local", **options) -> DistillTrainer:
        changes = options.pop("args", {})
        if teacher == "local":
            teacher = Recording(make_model(seed=9), tokenizer)
        return DistillTrainer(
            model=student or make_model(),
            teacher=teacher,
            objective=objective or mix(),
            args=arguments(tmp_path, **changes),
            **{"train_dataset": rows(), "eval_dataset": rows(seed=4), "processing_class": tokenizer, **options},
        )

    return make


def token_means(student, teacher, dataset: Dataset) -> dict[str, float]:
    """Means over every supervised token of a data set, one sequence and one token at a time, in float64."""
    student, teacher = student.double().eval(), teacher.double()
    sums, count, size = dict.fromkeys(("kl", "nll", "agree", "teacher_nll"), 0.0), 0, 0
    with torch.no_grad():
        for row in dataset:
            ids = torch.tensor([row["input_ids"]])
            log_s, log_t = (m(input_ids=ids).logits[0, :, :259].log_softmax(-1) for m in (student, teacher))
            for t, label in enumerate(row["labels"]):
                if label == -100:
                    continue
                p, q = log_t[t - 1], log_s[t - 1]
                sums["kl"] += (p.exp() * (p - q)).sum().item()
                sums["nll"] -= q[label].item()
                sums["teacher_nll"] -= p[label].item()
                sums["agree"] += float(p.argmax() == q.argmax())
                count += 1
    student.float()
    teacher.float()
    return {name: value / count for name, value in sums.items()} | {"count": count, "size": size}


# Building one


def test_the_example_of_the_docstring_trains(make_model, tokenizer, tmp_path):
    objective = Mix([TokenDistill("forward_kl"), CrossEntropy()], weights=[1.0, 0.1])
    student = make_model()
    before = student.lm_head.weight.detach().clone()
    trainer = DistillTrainer(
        model=student,
        teacher=make_model(seed=9),
        objective=objective,
        args=arguments(tmp_path),
        train_dataset=rows(),
        processing_class=tokenizer,
    )
    assert math.isfinite(trainer.train().training_loss)
    assert not torch.equal(student.lm_head.weight, before)


def test_models_may_be_paths(make_model, tokenizer, tmp_path):
    for name, seed in (("s", 0), ("t", 9)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    trainer = DistillTrainer(
        str(tmp_path / "s"), str(tmp_path / "t"), mix(), arguments(tmp_path / "run"), train_dataset=rows()
    )
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab(), "the student's own tokenizer"
    assert trainer.distiller.vocab_size == 259
    trainer.train()


def test_an_objective_is_needed(make_model):
    with pytest.raises(ConfigError, match=r"objective: got None; expected an Objective"):
        DistillTrainer(make_model())


@pytest.mark.parametrize("provides", [None, {Signal.HIDDEN_STATES}])
def test_a_teacher_must_show_what_the_objective_needs(make_trainer, make_model, provides):
    teacher = None
    if provides:
        teacher = LocalTeacher(make_model())
        teacher.provides = frozenset(provides)
    with pytest.raises(ConfigError, match=r"needs logits from the teacher, which provides (nothing|hidden_states)"):
        make_trainer(teacher=teacher)


@pytest.mark.parametrize("changes", [{"average_tokens_across_devices": False}, {"label_smoothing_factor": 0.1}])
def test_arguments_that_would_change_the_loss_silently_are_refused(make_trainer, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        make_trainer(args=changes)


# The loss


@pytest.mark.parametrize(("batch", "accumulation"), [(7, 1), (3, 3), (1, 7)])
def test_the_loss_is_the_mean_over_all_tokens_of_the_step(make_trainer, make_model, batch, accumulation):
    expected = token_means(make_model(), make_model(seed=9), rows())
    changes = {"max_steps": 1, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(args={**changes, "num_train_epochs": 1})
    loss = trainer.train().training_loss
    assert loss == pytest.approx(expected["kl"] + 0.1 * expected["nll"], rel=1e-5)
    log = trainer.state.log_history[0]
    assert log["forward_kl"] == pytest.approx(expected["kl"], rel=1e-5)
    assert log["cross_entropy"] == pytest.approx(expected["nll"], rel=1e-5)
    assert log["tokens_per_second"] > 0
    assert log["grad_norm"] > 0


def test_logs_are_means_over_the_steps_since_the_last_log(make_trainer):
    trainer = make_trainer(args={"max_steps": 4, "logging_steps": 2, "learning_rate": 0.0})
    trainer.train()
    logs = [log for log in trainer.state.log_history if "forward_kl" in log]
    assert [log["step"] for log in logs] == [2, 4]
    assert "items" not in logs[0]
    assert "tokens" not in logs[0]


def test_a_batch_without_a_supervised_token_costs_nothing(make_trainer):
    nothing = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2, "labels": [[-100] * 3] * 2})
    trainer = make_trainer(train_dataset=nothing, args={"max_steps": 1, "weight_decay": 0.0})
    before = [parameter.detach().clone() for parameter in trainer.distiller.parameters()]
    assert trainer.train().training_loss == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.distiller.parameters(), strict=True))


class Explodes(Objective):
    """NaN from its third call on."""

    calls = 0

    def forward(self, student: Outputs, teacher: Outputs | None, batch) -> dict[str, Tensor]:
        self.calls += self.training
        total = student.rows.logits(slice(None)).sum() * (math.nan if self.calls > 2 else 1.0)
        return {"total": total, "sum": total.detach()}


@pytest.mark.parametrize("every", [1, 5])
def test_a_loss_that_is_not_finite_stops_and_names_the_step(make_trainer, every):
    trainer = make_trainer(
        Explodes(), args={"max_steps": 10, "logging_steps": every, "save_strategy": "steps", "save_steps": 2}
    )
    with pytest.raises(TrainingError, match=r"not finite at step 3; .*checkpoint-2\.") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


# The teacher


def test_a_teacher_that_the_objective_does_not_need_runs_in_evaluation_only(make_trainer):
    trainer = make_trainer(CrossEntropy())
    trainer.train()
    assert trainer.teacher.calls == []
    metrics = trainer.evaluate()
    assert trainer.teacher.calls == [{Signal.LOGITS}] * 4
    assert metrics["eval_kl"] > 0


def test_the_teacher_is_called_once_a_batch_with_what_is_needed(make_trainer):
    trainer = make_trainer(args={"gradient_accumulation_steps": 2})
    trainer.train()
    assert trainer.teacher.calls == [{Signal.LOGITS}] * 4


def test_the_teacher_is_neither_trained_nor_saved(make_trainer, tmp_path):
    trainer = make_trainer(args={"save_strategy": "steps", "save_steps": 1})
    before = {name: tensor.clone() for name, tensor in trainer.teacher.model.state_dict().items()}
    trainer.train()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in trainer.distiller.parameters()}
    assert not trained & {id(parameter) for parameter in trainer.teacher.model.parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.teacher.model.state_dict().items())
    size = sum(4 * parameter.numel() for parameter in trainer.distiller.student.parameters())
    assert (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size < 1.1 * size + 10_000


# Evaluation


def test_evaluation_is_the_mean_over_tokens_for_any_batch_size(make_trainer, make_model):
    expected = token_means(make_model(), make_model(seed=9), rows(seed=4))
    reports = [make_trainer(args={"per_device_eval_batch_size": size}).evaluate() for size in (1, 3, 8)]
    for report in reports:
        assert report["eval_kl"] == pytest.approx(expected["kl"], abs=1e-6)
        assert report["eval_forward_kl"] == pytest.approx(expected["kl"], abs=1e-6)
        assert report["eval_cross_entropy"] == pytest.approx(expected["nll"], abs=1e-6)
        assert report["eval_loss"] == pytest.approx(expected["kl"] + 0.1 * expected["nll"], abs=1e-6)
        assert report["eval_top1_agreement"] == pytest.approx(expected["agree"], abs=1e-6)
        assert report["eval_perplexity"] == pytest.approx(math.exp(expected["nll"]), rel=1e-6)
        assert report["eval_teacher_perplexity"] == pytest.approx(math.exp(expected["teacher_nll"]), rel=1e-6)
        assert report["eval_bits_per_byte"] == pytest.approx(reports[0]["eval_bits_per_byte"], rel=1e-6)


def test_bits_per_byte_counts_the_bytes_of_the_supervised_text(make_trainer, tokenizer):
    text = "Größe: 3 €, naïve."
    ids = tokenizer(text)["input_ids"]
    data = Dataset.from_dict({"input_ids": [[40, *ids]], "labels": [[-100, *ids]]})
    report = make_trainer(eval_dataset=data).evaluate()
    nats = math.log(report["eval_perplexity"]) * len(ids)
    assert report["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()))


def test_evaluation_is_deterministic_and_leaves_training_alone(make_trainer, make_model):
    def losses(**changes) -> list[list[float]]:
        student = make_model("gpt2", resid_pdrop=0.2)
        trainer = make_trainer(student=student, args={"max_steps": 3, "learning_rate": 1e-2, **changes})
        trainer.train()
        history = trainer.state.log_history
        return [log["loss"] for log in history if "loss" in log], [
            log["eval_kl"] for log in history if "eval_kl" in log
        ]

    plain, evaluated, again = losses(), *(losses(eval_strategy="steps", eval_steps=1) for _ in range(2))
    assert len(evaluated[1]) == 3
    assert plain[0] == evaluated[0] == again[0]
    assert evaluated[1] == again[1]


def test_evaluation_equals_the_training_objective_on_the_same_data(make_trainer):
    changes = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 7}
    trainer = make_trainer(eval_dataset=rows(), args=changes)
    loss = trainer.train().training_loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)


def test_evaluation_takes_several_data_sets_and_plain_lists(make_trainer):
    sets = {"a": rows(seed=4), "b": list(rows(seed=5))}
    report = make_trainer(eval_dataset=sets, args={"per_device_eval_batch_size": 3}).evaluate()
    alone = make_trainer(eval_dataset=rows(seed=5)).evaluate()
    assert report["eval_b_kl"] == pytest.approx(alone["eval_kl"], rel=1e-5)  # in other batches
    assert report["eval_a_kl"] != pytest.approx(report["eval_b_kl"])


def test_evaluation_without_a_supervised_token_or_without_data_is_an_error(make_trainer):
    nothing = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[-100, -100]]})
    with pytest.raises(ConfigError, match="no supervised token"):
        make_trainer(eval_dataset=nothing).evaluate()
    with pytest.raises(ConfigError, match="eval_dataset: got None"):
        make_trainer(eval_dataset=None).evaluate()
