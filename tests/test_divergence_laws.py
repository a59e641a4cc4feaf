"""Every entry of DIVERGENCES against every law: an entry is tested by being listed, a knob by a line in KNOBS."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import ORACLES, STOPPED, ids_of, instance, oracle
from torch import Tensor, nn

from llmkd.divergences import DIVERGENCES
from llmkd.divergences.numerics import LOG_ZERO
from llmkd.errors import ConfigError

NAMES = sorted(DIVERGENCES)
KNOBS = {
    "jsd": [{"beta": 0.1}, {"beta": 0.9}],
    "skew_kl": [{"alpha": 0.4}, {"alpha": 0.9}],
    "skew_reverse_kl": [{"alpha": 0.4}, {"alpha": 0.9}],
    "adaptive_kl": [{"variant": "dskd"}, {"mu": 0.9}],
    "alpha_beta": [{"alpha": 0.2, "beta": 0.7}],
    "topk_mix": [{"k": 2}],
    "standardised": [{"tau": 0.3}],
    "dac_kl": [{"mode": "renorm"}, {"tau": 0.3}],
}
CASES = [(name, knobs) for name in NAMES for knobs in [{}, *KNOBS.get(name, [])]]
F_DIVERGENCES = {"forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"}
# An event's logit also moves the spread that divides all others: it need not fall where the teacher excludes the event
MOVES_OTHERS = {"standardised"}
# (teacher, student) swapped, as another entry of the table with other knobs
MIRROR = {
    "forward_kl": ("reverse_kl", {}, {}),
    "skew_kl": ("skew_reverse_kl", {"alpha": 0.05}, {"alpha": 0.05}),
    "jsd": ("jsd", {"beta": 0.2}, {"beta": 0.8}),
    "tvd": ("tvd", {}, {}),
}
CLOSED = [case for case in CASES if hasattr(DIVERGENCES[case[0]], "grad")]
each_closed = pytest.mark.parametrize("case", CLOSED, ids=ids_of)
each_case = pytest.mark.parametrize("case", CASES, ids=ids_of)


def build(case: tuple, dtype: torch.dtype = torch.float64):
    return instance(DIVERGENCES, case[0], dtype, **case[1])


def closed_form(case: tuple):
    grad = getattr(build(case), "grad", None) or getattr(DIVERGENCES[case[0]], "grad", None)
    bound = {} if isinstance(DIVERGENCES[case[0]], type) else case[1]
    return lambda log_t, log_s: grad(log_t, log_s, **bound)


def pair(n: int = 6, k: int = 7, spread: float = 2.0, seed: int = 1, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Random logits of a teacher and a student."""
    generator = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(2, n, k, generator=generator, dtype=torch.float64)
    return z[0].to(dtype), z[1].to(dtype)


def adversarial(dtype=torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Almost equal, peaked, disjoint, far in the tail, one event only, and a row of a real vocabulary's width."""
    near_t, near_s = pair(seed=2, spread=1.0)
    far = [([0.0, -120.0], [-120.0, 0.0]), ([0.0, -120.0], [0.0, 0.0]), ([0.0, 0.0], [0.0, -120.0])]
    far += [([0.0, -800.0], [-800.0, 0.0]), ([900.0, 0.0], [0.0, 0.0]), ([0.0, -3e4], [-3e4, 0.0])]
    one_hot = 30 * torch.eye(5)
    peaked = one_hot[[0, 2]], one_hot[[1, 2]] * torch.tensor([[1.0], [0.0]])
    pairs = [(near_t, near_t + 1e-6 * near_s), peaked, pair(2, 3000, 4.0), pair(3, 1)]
    pairs += [(torch.tensor([t]), torch.tensor([s])) for t, s in far]
    return [(t.to(dtype), s.to(dtype)) for t, s in pairs]


def log_softmax(*logits: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.log_softmax(z, -1) for z in logits)


def value_and_grad(fn, z_t: Tensor, z_s: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' divergences and d(sum)/d(student logits)."""
    z_s = z_s.clone().requires_grad_()
    value = fn(*log_softmax(z_t, z_s))
    return value.detach(), torch.autograd.grad(value.sum(), z_s)[0]


def test_every_entry_has_an_oracle():
    assert set(DIVERGENCES) == set(ORACLES), "write the formula of the new divergence as a loop in tests/oracles.py"


@each_case
def test_oracle(case):
    fn = build(case)
    for z_t, z_s in [pair(), pair(spread=0.1), pair(4, 40, 6.0), *adversarial()]:
        log_t, log_s = log_softmax(z_t, z_s)
        torch.testing.assert_close(fn(log_t, log_s), oracle(case[0], log_t, log_s, **case[1]), rtol=1e-9, atol=1e-12)


@each_case
def test_float32_keeps_its_type_and_its_digits(case):
    fn = build(case, torch.float32)
    for z_t, z_s in [pair(dtype=torch.float32), *adversarial(torch.float32)]:
        log_t, log_s = log_softmax(z_t, z_s)
        value = fn(log_t, log_s)
        assert value.dtype == torch.float32
        assert value.shape == z_t.shape[:1]
        torch.testing.assert_close(value.double(), oracle(case[0], log_t, log_s, **case[1]), rtol=2e-5, atol=2e-6)


@each_case
def test_zero_with_zero_gradient_where_the_models_agree(case):
    for z, _ in [pair(), pair(spread=20.0), *adversarial()]:
        value, grad = value_and_grad(build(case), z, z)
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@each_case
def test_not_negative(case):
    for z_t, z_s in [pair(200, 5, 1.0), pair(200, 5, 10.0), *adversarial()]:
        assert (build(case)(*log_softmax(z_t, z_s)) >= -1e-12).all()


@each_case
def test_rows_do_not_see_each_other(case):
    fn, (log_t, log_s) = build(case), log_softmax(*pair())
    alone = torch.cat([fn(log_t[i : i + 1], log_s[i : i + 1]) for i in range(len(log_t))])
    torch.testing.assert_close(fn(log_t, log_s), alone)


@each_case
def test_order_of_events_does_not_matter(case):
    z_t, z_s = pair()
    order = torch.randperm(z_t.shape[1])
    value, grad = value_and_grad(build(case), z_t, z_s)
    moved, moved_grad = value_and_grad(build(case), z_t[:, order], z_s[:, order])
    torch.testing.assert_close(moved, value)
    torch.testing.assert_close(moved_grad, grad[:, order])


@each_case
def test_shift_of_logits_does_not_matter(case):
    z_t, z_s = pair()
    value, grad = value_and_grad(build(case), z_t, z_s)
    moved, moved_grad = value_and_grad(build(case), z_t + 5.0, z_s - torch.arange(6.0).double()[:, None])
    torch.testing.assert_close(moved, value)
    torch.testing.assert_close(moved_grad, grad)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(F_DIVERGENCES))
def test_merging_events_never_increases(name):
    for knobs in [{}, *KNOBS.get(name, [])]:
        fn, (log_t, log_s) = build((name, knobs)), log_softmax(*pair(50, 8, 3.0))
        fine = fn(log_t, log_s)
        for cut in (6, 4, 1):
            merged = [torch.cat([x[:, :cut], x[:, cut:].logsumexp(-1, keepdim=True)], 1) for x in (log_t, log_s)]
            coarse = fn(*merged)
            assert (coarse <= fine + 1e-12).all()
            assert (coarse < fine - 1e-6).any()
            fine = coarse
        one = torch.zeros(50, 1, dtype=torch.float64)
        torch.testing.assert_close(fn(one, one), torch.zeros(50, dtype=torch.float64))


@pytest.mark.parametrize("case", [case for case in CASES if case[0] not in STOPPED], ids=ids_of)
def test_gradcheck(case):
    fn, (z_t, z_s) = build(case), pair(3, 5)
    log_t, z_s = torch.log_softmax(z_t, -1), z_s.requires_grad_()
    own = [p for p in fn.parameters() if p.requires_grad] if isinstance(fn, nn.Module) else []
    assert torch.autograd.gradcheck(lambda z, *_: fn(log_t, torch.log_softmax(z, -1)), (z_s, *own))


@each_closed
def test_closed_form_is_the_derivative(case):
    grad = closed_form(case)
    hidden_t, hidden_s = pair()
    hidden_t[:, 2:4] = -math.inf
    both_t, both_s = pair(seed=5)
    both_t[:, 1], both_s[:, 1] = -math.inf, -math.inf
    for z_t, z_s in [pair(), pair(spread=8.0), *adversarial(), (hidden_t, hidden_s), (both_t, both_s)]:
        expected = value_and_grad(build(case), z_t, z_s)[1]
        torch.testing.assert_close(grad(*log_softmax(z_t, z_s)), expected, rtol=1e-8, atol=1e-12)
    z, _ = pair()
    torch.testing.assert_close(grad(*log_softmax(z, z)), torch.zeros_like(z), rtol=0, atol=1e-12)
    assert grad(torch.empty(0, 5), torch.empty(0, 5)).shape == (0, 5)


@each_case
def test_no_rows(case):
    log_s = torch.empty(0, 5, dtype=torch.float64, requires_grad=True)
    value = build(case)(torch.empty(0, 5, dtype=torch.float64), log_s)
    assert value.shape == (0,)
    assert torch.autograd.grad(value.sum(), log_s)[0].shape == (0, 5)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_events_that_the_teacher_excludes(case, dtype):
    z_t, z_s = pair(dtype=dtype)
    z_t[:, 1:5] = -math.inf
    z_t[0, 1:] = -math.inf
    value, grad = value_and_grad(build(case, dtype), z_t, z_s)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    assert value.sum().isfinite()
    assert (value >= 0).all()
    exact = oracle(case[0], *log_softmax(z_t, z_s), **case[1])
    known = exact.isfinite()  # KL(q || p) is infinite there: all that is asked is that it stays finite and pushes away
    torch.testing.assert_close(value.double()[known], exact[known], rtol=1e-5, atol=1e-6)
    assert case[0] in MOVES_OTHERS or (grad[1:, 1:5].sum(-1) > 0).all()


@each_case
def test_events_that_the_student_excludes(case):
    """Finite, with finite gradients: where the forward KL is infinite, log q counts as LOG_ZERO."""
    z_t, z_s = pair()
    z_s[:, 1:4] = -math.inf
    value, grad = value_and_grad(build(case), z_t, z_s)
    log_t, log_s = log_softmax(z_t, z_s)
    if case[0] == "forward_kl":
        log_s = log_s.clamp_min(LOG_ZERO)
    torch.testing.assert_close(value, oracle(case[0], log_t, log_s, **case[1]), rtol=1e-9, atol=1e-12)
    assert grad.isfinite().all()


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_events_that_both_exclude_do_not_exist(case, dtype):
    z_t, z_s = pair(dtype=dtype)
    value, grad = value_and_grad(build(case, dtype), z_t[:, 2:], z_s[:, 2:])
    z_t[:, :2], z_s[:, :2] = -math.inf, -math.inf
    wide_value, wide_grad = value_and_grad(build(case, dtype), z_t, z_s)
    torch.testing.assert_close(wide_value, value)
    torch.testing.assert_close(wide_grad[:, 2:], grad)
    assert (wide_grad[:, :2] == 0).all()


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(case, dtype):
    for z_t, z_s in adversarial(dtype):
        for teacher, student in ((z_t, z_s), (z_s, z_t)):
            value, grad = value_and_grad(build(case, dtype), teacher, student)
            assert value.isfinite().all()
            assert grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(MIRROR))
def test_direction(name):
    """Swapping the two models gives the mirrored divergence, and (unless symmetric) another number."""
    other, knobs, other_knobs = MIRROR[name]
    log_t, log_s = log_softmax(torch.tensor([[4.0, 0.0, -1.0, -6.0]]).double(), torch.tensor([[0, 0.5, 1, 0]]).double())
    value = DIVERGENCES[name](log_t, log_s, **knobs)
    torch.testing.assert_close(value, DIVERGENCES[other](log_s, log_t, **other_knobs))
    if name != "tvd":
        assert not torch.isclose(value, DIVERGENCES[name](log_s, log_t, **knobs), rtol=1e-2)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_at_most_the_entropy_of_beta(beta):
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    for z_t, z_s in [pair(100, 4, 10.0), *adversarial()]:
        assert (DIVERGENCES["jsd"](*log_softmax(z_t, z_s), beta=beta) <= bound + 1e-12).all()
    disjoint = log_softmax(torch.tensor([[0.0, -900.0]]).double(), torch.tensor([[-900.0, 0.0]]).double())
    torch.testing.assert_close(DIVERGENCES["jsd"](*disjoint, beta=beta).item(), bound)


def test_limits_of_the_knobs():
    logs, small = log_softmax(*pair(spread=1.0)), 1e-6
    forward, reverse = DIVERGENCES["forward_kl"](*logs), DIVERGENCES["reverse_kl"](*logs)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(DIVERGENCES["jsd"](*logs, beta=small) / small, forward, **close)
    torch.testing.assert_close(DIVERGENCES["jsd"](*logs, beta=1 - small) / small, reverse, **close)
    torch.testing.assert_close(DIVERGENCES["skew_kl"](*logs, alpha=small), forward, **close)
    torch.testing.assert_close(DIVERGENCES["skew_reverse_kl"](*logs, alpha=small), reverse, **close)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_jsd_without_a_mixture_is_an_error_that_names_the_kl(beta):
    with pytest.raises(ConfigError) as error:
        DIVERGENCES["jsd"](*log_softmax(*pair()), beta=beta)
    assert "forward_kl" in str(error.value)
    assert "reverse_kl" in str(error.value)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_bounds_of_the_skewed_kl(alpha):
    for z_t, z_s in [pair(100, 4, 3.0), *adversarial()]:
        logs = log_softmax(z_t, z_s)
        for skewed, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
            value = DIVERGENCES[skewed](*logs, alpha=alpha)
            assert (value <= -math.log(alpha) + 1e-12).all()
            assert (value <= (1 - alpha) * DIVERGENCES[plain](*logs) + 1e-12).all()


def test_tvd_is_at_most_one_and_pinsker():
    for z_t, z_s in [pair(300, 4, 0.5), pair(300, 4, 10.0), *adversarial()]:
        logs = log_softmax(z_t, z_s)
        tvd = DIVERGENCES["tvd"](*logs)
        assert (tvd <= 1 + 1e-12).all()
        for name in ("forward_kl", "reverse_kl"):
            assert (2 * tvd**2 <= DIVERGENCES[name](*logs) + 1e-12).all()
