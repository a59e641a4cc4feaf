"""Models with one value an example: reading, the objective, refusing what has no softmax, training."""

from __future__ import annotations

import pytest
import torch
from classes import classifier, examples
from datasets import Dataset
from test_trainer import arguments
from torch import nn

from llmkd import DistillTrainer, LocalTeacher
from llmkd.adapters import REGRESSOR, adapter_of
from llmkd.adapters.regressor import check
from llmkd.data.collate import ExampleCollator
from llmkd.distiller import Distiller
from llmkd.errors import ConfigError
from llmkd.objectives import CrossEntropy, HiddenMSE, Mix, Regression, SinKD, TokenDistill
from llmkd.types import Signal

VALUES = [0.5, 2.0, 4.5, 1.0, 3.25, 0.0, 5.0, 2.5, 1.5]


def regressor(**changes):
    return classifier(num_labels=1, **changes)


def rows() -> list[dict]:
    return [{**row, "label": value} for row, value in zip(examples(), VALUES, strict=True)]


@pytest.fixture
def batch(tokenizer):
    return ExampleCollator(tokenizer)(rows())


def own_values(model) -> torch.Tensor:
    """Each example alone and unpadded."""
    return torch.stack([model(input_ids=torch.tensor([row["input_ids"]])).logits[0, 0] for row in rows()])


def test_one_output_makes_a_regressor(batch):
    model = regressor()
    assert adapter_of(model) is REGRESSOR
    check(model)
    found = REGRESSOR.read(model, batch, ()).rows.values.squeeze(-1)
    torch.testing.assert_close(found, own_values(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["label", "teacher"])
def test_it_is_torchs_sum_of_squares(batch, target):
    student, teacher = regressor().double(), regressor(seed=9, size=48).double()
    shown = LocalTeacher(teacher)(batch, {Signal.LOGITS})
    goal = torch.tensor(VALUES).double() if target == "label" else own_values(teacher).detach()
    loss = Regression(target)(REGRESSOR.read(student, batch, ()), shown, batch)
    expected = nn.functional.mse_loss(own_values(student), goal, reduction="sum")
    torch.testing.assert_close(loss["total"], expected)
    assert {name for name in loss if name != "total"} == {"mse" if target == "label" else "teacher_mse"}
    pairs = [torch.autograd.grad(x, student.classifier.weight)[0] for x in (loss["total"], expected)]
    torch.testing.assert_close(*pairs)


def test_the_teacher_is_read_only_where_it_is_the_target(batch):
    student = REGRESSOR.read(regressor(), batch, ())
    assert not Regression("label").needs
    assert Regression("teacher").needs == {Signal.LOGITS}
    Regression("label")(student, None, batch)
    with pytest.raises(ConfigError, match="it needs a teacher's values"):
        Regression("teacher")(student, None, batch)
    with pytest.raises(ConfigError, match=r"regression.target: got 'mean'; expected label or teacher"):
        Regression("mean")


@pytest.mark.parametrize("goal", [CrossEntropy(), TokenDistill(), SinKD(), Mix([Regression(), CrossEntropy()])])
def test_a_loss_of_distributions_is_refused(goal):
    """log softmax of one column is 0: the loss would be 0, and nobody would know why."""
    with pytest.raises(ConfigError, match=r"the model gives one value an example.*Use regression"):
        Distiller(regressor(), goal)


def test_regression_of_classes_is_refused(make_model):
    for model in (classifier(), make_model()):
        with pytest.raises(ConfigError, match=r"the model gives a distribution.*num_labels=1"):
            Distiller(model, Regression())
    Distiller(regressor(), Mix([Regression(), HiddenMSE()]))


@pytest.mark.parametrize("changes", [{"problem_type": "multi_label_classification"}])
def test_one_value_that_is_meant_otherwise_is_refused(changes):
    with pytest.raises(ConfigError, match=r"got num_labels=1 and problem_type=multi.*one value of a regression"):
        check(regressor(**changes))


def test_it_learns_from_a_teacher_and_reports_squared_errors(tokenizer, tmp_path):
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["label"]} for row in rows()])
    teacher = regressor(seed=9, size=48)
    trainer = DistillTrainer(
        regressor(), LocalTeacher(teacher, tokenizer), Mix([Regression("label"), Regression("teacher")], [0.5, 0.5]),
        arguments(tmp_path, max_steps=60, learning_rate=1e-2, per_device_train_batch_size=9), train_dataset=data,
        eval_dataset=data, processing_class=tokenizer,
    )  # fmt: skip
    before = trainer.evaluate()
    expected = nn.functional.mse_loss(own_values(teacher), torch.tensor(VALUES)).item()
    assert before["eval_teacher_mse"] == pytest.approx(expected, rel=1e-4)
    trainer.train()
    after = trainer.evaluate()
    least = expected / 4  # half way between label and teacher
    assert after["eval_loss"] - least < 0.5 * (before["eval_loss"] - least)
    assert {"eval_mse", "eval_mse_to_teacher"} <= set(after)
    assert not any("kl" in name or "accuracy" in name for name in after)


def test_padding_of_the_evaluation_counts_for_nothing(tokenizer, tmp_path):
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["label"]} for row in rows()])
    found = [
        DistillTrainer(regressor(), None, Regression(), arguments(tmp_path, per_device_eval_batch_size=size),
                       train_dataset=data, eval_dataset=data, processing_class=tokenizer).evaluate()["eval_mse"]
        for size in (1, 4, 9)
    ]  # fmt: skip
    assert found[1:] == [pytest.approx(found[0], rel=1e-5)] * 2
