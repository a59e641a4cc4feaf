"""DDK's domain weights: the numbers of a hand calculation, and every identity of its two equations."""

from __future__ import annotations

import math
import random

import pytest

from llmkd.errors import ConfigError
from llmkd.reweighting import DDK, Fixed

NAMES = ("code", "web", "books")
ROWS = dict(zip(NAMES, (100, 50, 250), strict=True))
TEACHER = dict(zip(NAMES, (8.0, 6.0, 4.5), strict=True))
FIRST, LATER = (dict(zip(NAMES, values, strict=True)) for values in ((12.0, 8.0, 5.0), (10.0, 8.0, 5.0)))


def shares(*values: float) -> dict[str, float]:
    return dict(zip(NAMES, values, strict=True))


def near(*values: float):
    return pytest.approx(shares(*values), abs=5e-9)


def spread(count: int, seed: int) -> dict[str, float]:
    draw = random.Random(seed)
    return {str(i): math.exp(draw.uniform(0.5, 4)) for i in range(count)}


def test_the_golden_numbers():
    ddk = DDK()
    r0 = ddk.start(ROWS, FIRST, TEACHER)
    r1 = ddk.update(r0, FIRST, TEACHER)
    r2 = ddk.update(r1, LATER, TEACHER)
    assert r0 == near(0.39615079, 0.33533441, 0.26851480)
    assert r1 == near(0.39645060, 0.33131405, 0.27223534)
    assert r2 == near(0.36619080, 0.34789973, 0.28590947)


def test_constant_perplexities_move_r_to_a_fixed_point_and_not_at_once():
    ddk = DDK()
    r = ddk.start(ROWS, FIRST, TEACHER)
    assert ddk.update(r, FIRST, TEACHER) != pytest.approx(r, abs=1e-4)
    for _ in range(200):
        r = ddk.update(r, FIRST, TEACHER)
    assert r == near(0.39741910, 0.32775528, 0.27482562)


def test_the_first_interval_draws_rows_whatever_their_domain():
    r0 = DDK().start(ROWS, FIRST, TEACHER)
    assert DDK().first_draw(r0, ROWS) == shares(0.25, 0.125, 0.625)


@pytest.mark.parametrize("seed", range(5))
def test_r_is_a_distribution_within_its_bounds(seed):
    ddk, student, teacher = DDK(alpha=0.5), spread(10, seed), spread(10, seed + 100)
    r = ddk.start(dict.fromkeys(student, 1), student, teacher)
    assert math.fsum(r.values()) == pytest.approx(1, abs=1e-12)
    for _ in range(4):
        r = ddk.update(r, student, teacher)
        assert math.fsum(r.values()) == pytest.approx(1, abs=1e-12)
        assert min(r.values()) >= 0.05 - 1e-12
        assert max(r.values()) <= 0.55 + 1e-12


def test_equal_ratios_leave_uniform_uniform():
    same = {name: 3 * value for name, value in TEACHER.items()}
    r = DDK().start(ROWS, same, TEACHER)
    assert r == pytest.approx(shares(1 / 3, 1 / 3, 1 / 3), abs=1e-15)
    assert DDK().update(r, same, TEACHER) == pytest.approx(r, abs=1e-15)


@pytest.mark.parametrize("perplexity", [1.0, 7.3, 1e6])
def test_all_equal_perplexities_are_uniform(perplexity):
    flat = dict.fromkeys(NAMES, perplexity)
    r = DDK().start(ROWS, flat, flat)
    assert DDK().update(r, flat, flat) == pytest.approx(shares(1 / 3, 1 / 3, 1 / 3), abs=1e-15)


def test_alpha_zero_is_always_uniform():
    assert DDK(alpha=0.0).update(shares(0.9, 0.1, 0.0), FIRST, TEACHER) == pytest.approx(shares(1 / 3, 1 / 3, 1 / 3))


def test_a_rising_ratio_raises_its_domain_and_no_other():
    r = DDK().start(ROWS, FIRST, TEACHER)
    before = DDK().update(r, FIRST, TEACHER)
    after = DDK().update(r, {**FIRST, "web": 9.0}, TEACHER)
    assert after["web"] > before["web"]
    assert after["code"] <= before["code"]
    assert after["books"] <= before["books"]


@pytest.mark.parametrize("start", [(0.98, 0.01, 0.01), (0.0, 0.0, 1.0)])
def test_a_student_that_is_its_teacher_comes_to_uniform_from_anywhere(start):
    r = shares(*start)
    for _ in range(80):
        r = DDK().update(r, TEACHER, TEACHER)
    assert r == pytest.approx(shares(1 / 3, 1 / 3, 1 / 3), abs=1e-12)


def test_logarithms_equal_the_direct_formula_and_do_not_overflow():
    r, alpha = shares(0.2, 0.5, 0.3), 0.7
    psi = {name: r[name] * math.exp(FIRST[name] / TEACHER[name]) for name in NAMES}
    direct = {name: alpha * value / sum(psi.values()) + (1 - alpha) / 3 for name, value in psi.items()}
    assert DDK(alpha=alpha).update(r, FIRST, TEACHER) == pytest.approx(direct, rel=1e-14)
    huge, flat = shares(1000.0, 999.0, 1.0), dict.fromkeys(NAMES, 1.0)
    assert DDK().start(ROWS, huge, flat) == near(1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0)
    assert DDK().update(r, {**huge, "code": 1e304}, flat) == near(2 / 3, 1 / 6, 1 / 6)


def test_fixed_mixtures_stay():
    for weights, expected in (
        ("uniform", shares(1 / 3, 1 / 3, 1 / 3)),
        ("proportional", shares(0.25, 0.125, 0.625)),
        ({"code": 3, "web": 1, "books": 0}, shares(0.75, 0.25, 0.0)),
    ):
        fixed = Fixed(weights=weights)
        r = fixed.start(ROWS, FIRST, TEACHER)
        assert r == pytest.approx(expected)
        assert fixed.update(r, LATER, TEACHER) == r
        assert fixed.first_draw(r, ROWS) == r


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDK(alpha=1.5), ["alpha", "1.5", "0 to 1"]),
        (lambda: DDK(interval=0), ["interval", "0", "at least 1"]),
        (lambda: Fixed({"cod": 1.0}).check(NAMES), ["cod", "did you mean 'code'?"]),
        (lambda: Fixed({"code": 1.0}).check(NAMES), ["web", "books"]),
        (lambda: Fixed(dict.fromkeys(NAMES, 0.0)).check(NAMES), ["above 0"]),
    ],
)
def test_what_cannot_be_is_said_on_one_line(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
