"""How sure a number is: a standard error and a 95 % interval over the examples that it was computed from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
RESAMPLES = 1000
SEED = 0


def shares(values: Sequence[float]) -> dict[str, Any]:
    """A mean of n values in [0, 1]: stderr = s / sqrt(n), and Wilson's interval of the mean with n.

    Exact in form where values are 0 or 1. For other values in [0, 1], such as a problem's share of right answers, it is
    too wide rather than too narrow, as their variance is at most m (1 - m). Unlike m +- 1.96 stderr it is not empty at 0 of n.

    Returns:
        `value`, `stderr`, `interval`.

    Reference: Wilson 1927, J. Am. Stat. Assoc. 22.
    """
    n, mean = len(values), float(np.mean(values))
    middle = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    stderr = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"value": mean, "stderr": stderr, "interval": [max(0.0, middle - half), min(1.0, middle + half)]}


def bootstrap(statistic: Callable[[list[Any]], float], items: Sequence[Any]) -> dict[str, Any]:
    """Any statistic of examples: the 2.5 % and 97.5 % quantiles and the deviation of 1000 resamples with replacement.

    Args:
        statistic: items -> number. items: one each example; the resamples are the same for the same number of items.

    Returns:
        `value`, `stderr`, `interval`; stderr and interval are None where it is not finite.

    Reference: Efron 1979, Ann. Stat. 7.
    """
    generator = np.random.default_rng(SEED)
    value = float(statistic(list(items)))
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):  # a resample may be of one class
        draws = np.array([_draw(statistic, items, generator) for _ in range(RESAMPLES)], dtype=float)
    draws = draws[np.isfinite(draws)]
    if not math.isfinite(value) or len(draws) < RESAMPLES / 2:
        return {"value": value if math.isfinite(value) else None, "stderr": None, "interval": None}
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": value, "stderr": float(draws.std(ddof=1)), "interval": [float(low), float(high)]}


def _draw(statistic: Callable[[list[Any]], float], items: Sequence[Any], generator: np.random.Generator) -> float:
    chosen = generator.integers(0, len(items), len(items))
    return statistic([items[index] for index in chosen])


def bare(value: float) -> dict[str, Any]:
    """A number whose spread is not estimated."""
    return {"value": value if math.isfinite(value) else None, "stderr": None, "interval": None}


def of_items(statistic: Callable[[list[Any]], float], items: Sequence[Any], is_mean: bool) -> dict[str, Any]:
    """`shares` for a mean of numbers in [0, 1], else `bootstrap`."""
    numbers = is_mean and all(isinstance(item, int | float | np.number) and 0 <= item <= 1 for item in items)
    return shares([float(item) for item in items]) if numbers else bootstrap(statistic, items)
