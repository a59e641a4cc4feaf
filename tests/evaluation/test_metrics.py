"""GLUE's metrics: against loops from the formulas, evaluate's documented examples, and evaluate itself where it loads."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest

from llmkd.evaluation import metrics


def pairs_of_classes(seed: int, count: int = 200) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    return [(known := int(draw.random() < 0.4), known if draw.random() < 0.7 else 1 - known) for _ in range(count)]


def pairs_of_values(seed: int, count: int = 60) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    return [(known := round(5 * draw.random(), 1), known + draw.gauss(0, 1)) for _ in range(count)]


def counts(pairs) -> tuple[int, int, int, int]:
    """tp, fp, fn, tn of class 1."""
    return tuple(sum(pair == kind for pair in pairs) for kind in ((1, 1), (0, 1), (1, 0), (0, 0)))


def ranks(values) -> list[float]:
    """From 1; equal values share the mean of their places."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def correlation(pairs) -> float:
    xs, ys = zip(*pairs, strict=True)
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    top = sum((x - mx) * (y - my) for x, y in pairs)
    return top / math.sqrt(sum((x - mx) ** 2 for x in xs) * sum((y - my) ** 2 for y in ys))


@pytest.mark.parametrize("seed", range(3))
def test_formulas(seed):
    pairs = pairs_of_classes(seed)
    tp, fp, fn, tn = counts(pairs)
    assert metrics.accuracy(pairs) == pytest.approx((tp + tn) / len(pairs))
    assert metrics.f1(pairs) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.matthews_correlation(pairs) == pytest.approx((tp * tn - fp * fn) / root)
    values = pairs_of_values(seed)
    assert metrics.pearson(values) == pytest.approx(correlation(values))
    ranked = list(zip(*(ranks(column) for column in zip(*values, strict=True)), strict=True))
    assert metrics.spearmanr(values) == pytest.approx(correlation(ranked))


@pytest.mark.parametrize(
    ("task", "references", "predictions", "known"),
    [
        ("sst2", [0, 1], [0, 1], {"accuracy": 1.0}),
        ("mrpc", [0, 1], [0, 1], {"accuracy": 1.0, "f1": 1.0}),
        ("qqp", [0, 1], [0, 1], {"accuracy": 1.0, "f1": 1.0}),
        ("stsb", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], {"pearson": 1.0, "spearmanr": 1.0}),
        ("cola", [0, 1], [0, 1], {"matthews_correlation": 1.0}),
        ("cola", [1, 3, 2, 0, 3, 2], [1, 2, 2, 0, 3, 3], {"matthews_correlation": 0.54}),
        ("mrpc", [0, 1, 0, 1, 0], [0, 0, 1, 1, 0], {"accuracy": 0.6, "f1": 0.5}),
        ("stsb", [1, 2, 3, 4, 5], [10, 9, 2.5, 6, 4], {"pearson": -0.74, "spearmanr": -0.7}),
    ],
)
def test_the_examples_of_evaluates_documentation(task, references, predictions, known):
    found = metrics.compute(metrics.names_of(task, False), list(zip(references, predictions, strict=True)), None)
    assert {metric: round(value, 2) for metric, value in found.items()} == known


def test_every_task_has_its_metrics():
    found = {task: metrics.names_of(task, task == "stsb") for task in metrics.TASKS}
    assert found["cola"] == ("matthews_correlation",)
    assert found["mrpc"] == found["qqp"] == ("accuracy", "f1")
    assert found["stsb"] == metrics.names_of("other", True) == ("pearson", "spearmanr")
    assert {found[task] for task in ("mnli", "qnli", "rte", "sst2", "wnli")} == {("accuracy",)}
    assert metrics.names_of("other", False) == ("accuracy",)


def test_evaluates_script_comes_first(monkeypatch):
    """What stands in its place where the Hub is out of reach is asked for the task's configuration."""
    import evaluate

    asked = []

    def load(*names):
        asked.append(names)
        return SimpleNamespace(
            compute=lambda predictions, references: {"accuracy": len(predictions), "f1": references[0]}
        )

    monkeypatch.setattr(evaluate, "load", load)
    script = metrics.script_of("mrpc")
    assert asked == [("evaluate-metric/glue", "mrpc")]
    assert metrics.compute(("accuracy", "f1"), [(1, 0), (0, 0)], script) == {"accuracy": 2.0, "f1": 1.0}
    assert metrics.scored_by(script).startswith("evaluate ")


def test_without_a_network_it_is_scikit_learn(monkeypatch):
    import evaluate

    def load(*names):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(evaluate, "load", load)
    assert metrics.script_of("cola") is None
    assert metrics.script_of("my_task") is None
    assert metrics.scored_by(None).startswith("scikit-learn ")
