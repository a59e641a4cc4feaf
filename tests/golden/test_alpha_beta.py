"""The alpha-beta divergence against the numbers of its official code, and continuous at every limit."""

from __future__ import annotations

import math

import pytest
import torch
from fixture_a import Z_S, Z_T, exact, logs

from llmkd.divergences import alpha_beta, forward_kl, reverse_kl
from llmkd.errors import ConfigError

MEANS = {
    (1.0, 0.0): 0.21795999,
    (0.0, 1.0): 0.22951803,
    (0.5, 0.5): 0.21966398,
    (0.2, 0.7): 0.26000958,
    (1.0, 1.0): 0.05917571,
}
LIMITS = [(1.0, 0.0), (0.0, 1.0), (0.4, 0.0), (0.0, 0.3), (0.0, 0.0), (0.6, -0.6), (-0.3, 0.3), (-0.5, 0.0)]


@pytest.mark.parametrize(("knobs", "mean"), MEANS.items())
def test_value(knobs, mean):
    exact(alpha_beta(*logs(Z_T, Z_S), alpha=knobs[0], beta=knobs[1]).mean(), mean)


def test_what_the_corners_are():
    log_t, log_s = logs(Z_T, Z_S)
    p, q = log_t.exp(), log_s.exp()
    torch.testing.assert_close(alpha_beta(log_t, log_s, alpha=1, beta=0), forward_kl(log_t, log_s))
    torch.testing.assert_close(alpha_beta(log_t, log_s, alpha=0, beta=1), reverse_kl(log_t, log_s))
    torch.testing.assert_close(alpha_beta(log_t, log_s), 4 * (1 - (p * q).sqrt().sum(-1)))
    torch.testing.assert_close(alpha_beta(log_t, log_s, alpha=1, beta=1), (p - q).square().sum(-1) / 2)
    torch.testing.assert_close(alpha_beta(log_t, log_s, alpha=0, beta=0), (log_t - log_s).square().sum(-1) / 2)
    ratio = 0.6 * (log_t - log_s)
    torch.testing.assert_close(alpha_beta(log_t, log_s, alpha=0.6, beta=-0.6), (ratio.exp() - ratio - 1).sum(-1) / 0.36)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("limit", LIMITS)
def test_continuous(limit, dtype):
    """Close to a limit the value is close to the limit's: no 0/0, and no digits lost on the way."""
    log_t, log_s = (x.to(dtype) for x in logs(Z_T, Z_S))
    at = alpha_beta(log_t, log_s, alpha=limit[0], beta=limit[1])
    for step in ([1e-4, 0], [0, 1e-4], [1e-4, 1e-4], [-1e-4, 2e-4]):
        near = alpha_beta(log_t, log_s, alpha=limit[0] + step[0], beta=limit[1] + step[1])
        torch.testing.assert_close(near, at, rtol=3e-3, atol=1e-4)


@pytest.mark.parametrize("knobs", [*MEANS, *LIMITS])
def test_gradient_and_symmetry(knobs):
    """Its closed form is what autograd finds; swapping the models swaps the knobs."""
    alpha, beta = knobs
    z_s = Z_S.clone().requires_grad_()
    log_t, log_s = logs(Z_T, z_s)
    value = alpha_beta(log_t, log_s, alpha=alpha, beta=beta)
    (grad,) = torch.autograd.grad(value.sum(), z_s, retain_graph=True)
    torch.testing.assert_close(alpha_beta.grad(log_t, log_s.detach(), alpha=alpha, beta=beta), grad)
    torch.testing.assert_close(alpha_beta(log_s, log_t, alpha=beta, beta=alpha), value)
    assert torch.autograd.gradcheck(lambda z: alpha_beta(log_t, z.log_softmax(-1), alpha=alpha, beta=beta), (z_s,))


def test_float32_keeps_its_digits_near_equal_rows():
    near = Z_T + 1e-3 * Z_S
    exactly = alpha_beta(*logs(Z_T, near), alpha=0.2, beta=0.7)
    rough = alpha_beta(*(x.float() for x in logs(Z_T, near)), alpha=0.2, beta=0.7)
    torch.testing.assert_close(rough.double(), exactly, rtol=0, atol=1e-7)


def test_knobs_must_be_finite():
    with pytest.raises(ConfigError, match="alpha_beta"):
        alpha_beta(*logs(Z_T, Z_S), alpha=math.inf)
