"""Logits of unit spread: what the loss does not see, and where it stops being defined."""

from __future__ import annotations

import pytest
import torch
from fixture_a import Z_S, Z_T, logs

from llmkd.divergences import TAID, Standardised, forward_kl, jsd, reverse_kl
from llmkd.errors import ConfigError
from llmkd.objectives import TokenDistill
from llmkd.rows import DenseRows, weighted_sum


@pytest.mark.parametrize("inner", [forward_kl, reverse_kl, jsd])
def test_it_is_the_divergence_of_logits_over_their_standard_deviation(inner):
    expected = inner(*logs(*(z / z.std(-1, keepdim=True) for z in (Z_T, Z_S))))
    torch.testing.assert_close(Standardised(inner)(*logs(Z_T, Z_S)), expected)
    sharper = inner(*logs(*(z / z.std(-1, keepdim=True) / 0.4 for z in (Z_T, Z_S))))
    torch.testing.assert_close(Standardised(inner, tau=0.4)(*logs(Z_T, Z_S)), sharper)


def test_scale_and_offset_of_either_model_do_not_matter():
    fn = Standardised()
    value = fn(*logs(Z_T, Z_S))
    torch.testing.assert_close(fn(*logs(3.0 * Z_T + 1.0, Z_S)), value)
    torch.testing.assert_close(fn(*logs(Z_T, 0.2 * Z_S - 7.0)), value)
    same = fn(*logs(Z_T, 5.0 * Z_T + 2.0))
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)
    assert (fn(*logs(Z_T, -Z_T)) > 0.1).all()


def test_a_temperature_outside_would_have_no_effect_and_is_refused():
    student, teacher, ones = DenseRows(Z_S), DenseRows(Z_T), torch.ones(2).double()
    warm, cold = (weighted_sum(Standardised(), student, teacher, ones, temperature=t) for t in (0.5, 4.0))
    torch.testing.assert_close(warm, cold)
    with pytest.raises(ConfigError, match=r"temperature: got 4\.0.*tau"):
        TokenDistill(Standardised(), temperature=4.0)


def test_the_gradient_does_not_see_the_scale():
    """Moving along z, that is scaling it, changes nothing: the gradient is orthogonal to z and to 1."""
    z_s = Z_S.clone().requires_grad_()
    (grad,) = torch.autograd.grad(Standardised()(*logs(Z_T, z_s)).sum(), z_s)
    assert (grad * Z_S).sum(-1).abs().max() < 1e-12
    assert grad.sum(-1).abs().max() < 1e-12


def test_uniform_logits_stay_finite():
    z_s = torch.zeros(2, 4, requires_grad=True)
    value = Standardised()(*logs(Z_T.float(), z_s))
    (grad,) = torch.autograd.grad(value.sum(), z_s)
    assert value.isfinite().all()
    assert grad.isfinite().all()


def test_parameters_of_the_inner_divergence_are_its_own():
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(1))

        def forward(self, log_t, log_s):
            return self.gain * forward_kl(log_t, log_s)

    assert len(list(TokenDistill(Standardised(Learned())).parameters())) == 1


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="tau: got 0"):
        Standardised(tau=0)
    with pytest.raises(ConfigError, match="TAID"):
        Standardised(TAID())
