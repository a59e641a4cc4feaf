"""Intervals against closed forms, known values and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from llmkd.evaluation.intervals import bare, bootstrap, of_items, shares


@pytest.mark.parametrize(("right", "n"), [(0, 30), (1, 30), (15, 30), (30, 30), (7, 9), (500, 1000)])
def test_shares_are_wilsons(right, n):
    found = shares([1.0] * right + [0.0] * (n - right))
    known = binomtest(right, n).proportion_ci(method="wilson")
    assert found["value"] == pytest.approx(right / n)
    assert found["interval"] == pytest.approx([known.low, known.high], abs=1e-9)
    assert found["stderr"] == pytest.approx(math.sqrt(right / n * (1 - right / n) / (n - 1)))


def test_shares_of_one_example_have_no_standard_error():
    assert shares([1.0])["stderr"] is None


def test_shares_cover_means_of_repeats():
    """Problems of unequal difficulty, 8 answers each: the interval covers the true mean at least as often as it says."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        difficulty = generator.beta(0.5, 0.5, 30)
        low, high = shares(list(generator.binomial(8, difficulty) / 8))["interval"]
        covered += low <= 0.5 <= high
    assert covered >= 0.93 * 400


def test_bootstrap_of_a_mean_is_its_standard_error():
    items = list(np.random.default_rng(1).normal(3.0, 2.0, 200))
    found = bootstrap(lambda values: float(np.mean(values)), items)
    spread = np.std(items, ddof=1) / math.sqrt(len(items))
    assert found["stderr"] == pytest.approx(spread, rel=0.1)
    assert found["interval"] == pytest.approx([found["value"] - 1.96 * spread, found["value"] + 1.96 * spread], abs=0.1)
    assert bootstrap(lambda values: float(np.mean(values)), items) == found


def test_what_is_not_finite_is_none():
    nothing = {"value": None, "stderr": None, "interval": None}
    assert bootstrap(lambda values: math.nan, [1, 2]) == nothing
    assert bare(math.inf) == nothing


def test_only_means_of_shares_are_shares():
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert of_items(mean, [0, 1, 1], True) == shares([0, 1, 1])
    assert of_items(mean, [0, 1, 1], False) == bootstrap(mean, [0, 1, 1])
    assert of_items(mean, [0, 3, 1], True) == bootstrap(mean, [0, 3, 1])
