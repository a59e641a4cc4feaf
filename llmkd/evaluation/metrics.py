"""GLUE's metrics: by `evaluate` where its script can be loaded, else the same formulas from scikit-learn and scipy."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from typing import Any

from llmkd.errors import need
from llmkd.evaluation.suite import INSTALL

OF_TASK = {
    "cola": ("matthews_correlation",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
}
TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
Pair = tuple[float, float]  # (reference, prediction)


def names_of(task: str, values: bool) -> tuple[str, ...]:
    """The metrics of a GLUE task, and of any other one accuracy, or of values the correlations."""
    return OF_TASK.get(task, ("pearson", "spearmanr") if values else ("accuracy",))


def formula(metric: str) -> Callable[[Sequence[Pair]], float]:
    """The statistic of (reference, prediction) pairs that a metric is."""
    return {
        "accuracy": accuracy,
        "f1": f1,
        "matthews_correlation": matthews_correlation,
        "pearson": pearson,
        "spearmanr": spearmanr,
    }[metric]


def accuracy(pairs: Sequence[Pair]) -> float:
    """The share of examples whose prediction is the reference."""
    return float(need("sklearn.metrics", INSTALL).accuracy_score(*zip(*pairs, strict=True)))


def f1(pairs: Sequence[Pair]) -> float:
    """2 tp / (2 tp + fp + fn) of class 1; 0 where it is neither known nor predicted."""
    return float(need("sklearn.metrics", INSTALL).f1_score(*zip(*pairs, strict=True), zero_division=0.0))


def matthews_correlation(pairs: Sequence[Pair]) -> float:
    """The correlation of references and predictions as classes; 0 where either is constant."""
    return float(need("sklearn.metrics", INSTALL).matthews_corrcoef(*zip(*pairs, strict=True)))


def pearson(pairs: Sequence[Pair]) -> float:
    """Pearson's correlation; not a number where either is constant."""
    return float(need("scipy.stats", INSTALL).pearsonr(*zip(*pairs, strict=True)).statistic)


def spearmanr(pairs: Sequence[Pair]) -> float:
    """Spearman's rank correlation; not a number where either is constant."""
    return float(need("scipy.stats", INSTALL).spearmanr(*zip(*pairs, strict=True)).statistic)


def script_of(task: str) -> Any:
    """`evaluate`'s metric of a GLUE task, or None if there is no network and no copy."""
    if task not in TASKS:
        return None
    evaluate = need("evaluate", INSTALL)
    try:
        return evaluate.load("evaluate-metric/glue", task)
    except Exception as error:  # whatever the Hub, a proxy or a cache may raise
        logging.getLogger(__name__).debug(
            "evaluate's glue script cannot be loaded: %s", " ".join(str(error).split())[:200]
        )
        return None


def compute(metrics: Sequence[str], pairs: Sequence[Pair], script: Any) -> dict[str, float]:
    """The values of metrics, by evaluate's script if there is one."""
    if script is None:
        return {metric: formula(metric)(pairs) for metric in metrics}
    references, predictions = zip(*pairs, strict=True)
    found = script.compute(predictions=list(predictions), references=list(references))
    return {metric: float(found[metric]) for metric in metrics}


def scored_by(script: Any) -> str:
    """Which library computed the values, and its version."""
    name = "scikit-learn" if script is None else "evaluate"
    return f"{name} {importlib.metadata.version(name)}"
