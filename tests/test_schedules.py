"""Schedules: their values, and that a temperature or a weight moves once an optimizer step and resumes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from llmkd import build
from llmkd.errors import ConfigError
from llmkd.objectives import CrossEntropy, Mix, TokenDistill
from llmkd.rows import DenseRows
from llmkd.schedules import SCHEDULES, ByFraction, ByMetric, Constant, Cosine, Linear, as_schedule
from llmkd.types import Outputs

KNOBS = {
    "constant": {"start": 2.0},
    "by_fraction": {"fraction": 0.3},
    "by_metric": {"start": 4.0, "end": 1.0, "metric": "m", "worst": 3.0, "best": 1.0},
}


def values(schedule, steps: int = 4, metric: list[float] | None = None) -> list[float]:
    """The value before the first step and after each."""
    seen = [schedule.value]
    for step in range(steps + 1):
        schedule.after_step(step / steps, {"m": metric[step]} if metric else {})
        seen.append(schedule.value)
    return seen


def test_values():
    assert values(Constant(2.0)) == [2.0] * 6
    assert values(Linear(4.0, 1.0)) == pytest.approx([4.0, 4.0, 3.25, 2.5, 1.75, 1.0])
    assert values(Cosine(0.0, 1.0)) == pytest.approx([0.0, 0.0, 0.146446609, 0.5, 0.853553391, 1.0])


def test_by_metric_follows_the_metric_and_never_goes_back():
    losses = [5.0, 2.5, 2.8, 1.5, 0.2]
    assert values(ByMetric(4.0, 1.0, "m", worst=3.0, best=1.0), metric=losses) == pytest.approx(
        [4.0, 4.0, 3.25, 3.25, 1.75, 1.0]
    )
    rising = [0.1, 0.3, 0.2, 0.6, 0.9]
    assert values(ByMetric(0.0, 1.0, "m", worst=0.2, best=0.6), metric=rising) == pytest.approx(
        [0.0, 0.0, 0.25, 0.25, 1.0, 1.0]
    )


@pytest.mark.parametrize("name", sorted({*SCHEDULES} - {"by_fraction"}))
def test_every_schedule_is_built_by_name_and_stays_between_its_ends(name):
    knobs = KNOBS.get(name, {"start": 4.0, "end": 1.0})
    schedule = build.recipes.build("schedule", {"name": name, **knobs}, build.TABLES)
    assert schedule.value == knobs["start"]
    seen = values(schedule, metric=[9.0, 0.0, 2.0, 1.0, 5.0])
    assert all(knobs.get("end", knobs["start"]) <= value <= knobs["start"] for value in seen)
    assert schedule.moves == (name != "constant")
    assert TokenDistill(temperature=schedule).watches_steps == schedule.moves


def test_a_number_is_a_constant():
    assert as_schedule(3, "x").value == 3.0
    for wrong in ("hot", True, None, [1.0], {"start": 1.0}):
        with pytest.raises(ConfigError, match=r"x: got .*expected a number, or a schedule"):
            as_schedule(wrong, "x")


def test_errors():
    with pytest.raises(ConfigError, match=r"worst=1\.0, best=1\.0"):
        ByMetric(0.0, 1.0, "m", 1.0, 1.0)
    with pytest.raises(ConfigError, match="metric 'kl'; expected one of forward_kl"):
        ByMetric(0.0, 1.0, "kl", 2.0, 1.0).after_step(0.0, {"forward_kl": 1.0})
    with pytest.raises(ConfigError, match="end=nan"):
        Linear(0.0, float("nan"))
    with pytest.raises(ConfigError, match=r"temperature: got 0\.0"):
        TokenDistill(temperature=Linear(4.0, 0.0))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "liner", "start": 1.0, "end": 2.0}, "did you mean 'linear'"),
        ({"name": "linear", "start": 1.0, "stop": 2.0}, "'stop'"),
        ({"name": "linear", "start": 1.0}, "missing end"),
        ({"name": "linear", "start": "hot", "end": 2.0}, "start: got 'hot'; expected a number"),
        ("hot", "expected a number"),
        (True, "expected a number"),
    ],
)
@pytest.mark.parametrize("key", ["temperature", "weight"])
def test_errors_of_a_recipe(key, spec, words):
    with pytest.raises(ConfigError, match=words) as caught:
        build.objective([{"name": "token", key: spec}])
    assert "\n" not in str(caught.value)


def test_the_temperature_of_a_step_is_the_schedule_s():
    """Also the T^2 of `scale_by_t2` follows."""
    z_s, z_t = torch.randn(2, 3, 5)
    batch = {"labels": torch.tensor([[-100, 1, 2, 3]])}
    moving = build.objective(
        {"name": "token", "temperature": {"name": "linear", "start": 4.0, "end": 1.0}, "scale_by_t2": True}
    )
    assert moving.watches_steps
    for step in range(3):
        fixed = TokenDistill(temperature=moving.logs()["temperature"], scale_by_t2=True)
        totals = [goal(Outputs(DenseRows(z_s)), Outputs(DenseRows(z_t)), batch)["total"] for goal in (moving, fixed)]
        assert torch.equal(*totals)
        moving.after_step((step + 1) / 4, {})
    assert moving.logs()["temperature"] == pytest.approx(1.75)


@pytest.fixture
def make_trainer(split_trainer):
    def objective():
        parts = [TokenDistill(temperature=Linear(4.0, 1.0)), CrossEntropy()]
        return Mix(parts, [1.0, ByMetric(0.0, 1.0, "cross_entropy", 6.0, 4.0)])

    return partial(split_trainer, objective, max_steps=6, save_steps=3, optim="sgd", learning_rate=1.0)


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_they_move_once_an_optimizer_step_and_not_in_evaluation(make_trainer):
    whole, split = make_trainer(8, 1, eval_strategy="steps", eval_steps=1), make_trainer(1, 8)
    whole.train()
    split.train()
    assert logged(whole, "temperature") == pytest.approx([4.0, 3.5, 3.0, 2.5, 2.0, 1.5])
    weights = logged(whole, "weight_1")
    assert weights == sorted(weights)
    assert 0 < weights[-1] <= 1
    assert logged(split, "temperature") == logged(whole, "temperature")
    assert logged(split, "weight_1") == pytest.approx(weights, abs=1e-6)


def test_resume_keeps_every_bit(make_trainer):
    whole = make_trainer()
    whole.train()
    again = make_trainer()
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-3")
    states = [trainer.distiller.objective.step_state() for trainer in (whole, again)]
    assert states[0] == states[1]
    assert set(states[0]) == {"0.temperature", "weight_1"}
    for ours, theirs in zip(whole.distiller.parameters(), again.distiller.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("fraction", "alpha"), [(1.0, 0.5), (0.1, 1.0), (0.01, 1.0), (10**-0.5, 0.75), (0.3, 1 - (math.log10(0.3) + 1) / 2)]
)
def test_by_fraction_gives_the_teacher_more_as_less_is_kept(fraction, alpha):
    schedule, rest = ByFraction(fraction), ByFraction(fraction, rest=True)
    assert schedule.value == pytest.approx(alpha)
    assert schedule.value + rest.value == pytest.approx(1.0)
    assert ByFraction(fraction, low=0.6, high=0.9).value == pytest.approx(min(0.9, max(0.6, alpha)))


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"fraction": 1.2}, {"fraction": 0.5, "low": 0.9, "high": 0.6}])
def test_by_fraction_refuses_what_is_no_fraction(options):
    with pytest.raises(ConfigError, match="by_fraction"):
        ByFraction(**options)
