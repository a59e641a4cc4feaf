"""Adaptive KL against the numbers of three implementations, and their traps."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from fixture_a import Z_S, Z_T, exact, logs, rows

from llmkd.divergences import adaptive_kl, forward_kl, reverse_kl
from llmkd.divergences.adaptive_kl import head_share
from llmkd.errors import ConfigError

P, Q = [0.4, 0.3, 0.2, 0.1], [0.45, 0.15, 0.25, 0.15]  # tells the three implementations apart
VALUES = {"official": (1 / 6, 0.06730591), "dskd": (2 / 3, 0.07231579)}
MISALIGNED = 0.06897587  # TAID's code: a mask in sorted order on gaps in vocabulary order


@pytest.mark.parametrize("variant", sorted(VALUES))
def test_value_and_weight(variant):
    share, value = VALUES[variant]
    log_t, log_s = rows(P, Q)
    exact(head_share(log_t.exp(), log_s.exp(), 0.5, variant), [share], 1e-12)
    exact(adaptive_kl(log_t, log_s, variant=variant), [value])


@pytest.mark.parametrize("variant", sorted(VALUES))
def test_the_mask_stands_in_the_order_of_the_vocabulary(variant):
    """Whatever the order of the tokens, the value is the same, and never that of a mask left in sorted order."""
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        log_t, log_s = rows([P[i] for i in order], [Q[i] for i in order])
        value = adaptive_kl(log_t, log_s, variant=variant)
        exact(value, [VALUES[variant][1]])
        assert abs(value.item() - MISALIGNED) > 1e-3


def test_official_is_the_default_and_a_head_of_all_the_teacher_likes_more_weighs_half():
    log_t, log_s = logs(Z_T, Z_S)
    torch.testing.assert_close(adaptive_kl(log_t, log_s), adaptive_kl(log_t, log_s, mu=0.5, variant="official"))
    exact(head_share(log_t.exp(), log_s.exp(), 0.5, "official")[0], 0.5, 1e-12)
    exact(adaptive_kl(log_t, log_s)[0], (0.16858368 + 0.20502446) / 2)


@pytest.mark.parametrize("variant", sorted(VALUES))
def test_equal_rows_are_zero_and_not_nan(variant):
    z = Z_T.clone().requires_grad_()
    value = adaptive_kl(*logs(Z_T, z), variant=variant)
    assert value.abs().max() < 1e-15
    assert torch.autograd.grad(value.sum(), z)[0].abs().max() < 1e-12


def test_it_is_made_of_true_divergences_with_weights_that_carry_no_gradient():
    """TAID's code takes the cross-entropy form of the forward part, and lets the gradient run through the weights."""
    z_s = Z_S.clone().requires_grad_()
    log_t, log_s = logs(Z_T, z_s)
    share = head_share(log_t.exp(), log_s.detach().exp(), 0.5, "official")
    parts = share * forward_kl(log_t, log_s) + (1 - share) * reverse_kl(log_t, log_s)
    torch.testing.assert_close(adaptive_kl(log_t, log_s), parts)
    (grad,) = torch.autograd.grad(adaptive_kl(log_t, log_s).sum(), z_s, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(parts.sum(), z_s)[0])


def test_the_head_is_never_empty_and_ties_stay_together():
    log_t, log_s = rows([0.9, 0.06, 0.04], [0.5, 0.3, 0.2])
    exact(head_share(log_t.exp(), log_s.exp(), 0.5, "official"), [0.5], 1e-12)
    log_t, log_s = rows([0.25] * 4, P)
    exact(head_share(log_t.exp(), log_s.exp(), 0.3, "official"), [1.0], 1e-12)
    exact(head_share(log_t.exp(), log_s.exp(), 0.3, "dskd"), [0.0], 1e-12)


@pytest.mark.parametrize("spread", [0.1, 4.0])
@pytest.mark.parametrize("variant", sorted(VALUES))
def test_a_wide_row_has_the_same_head_sorted_whole_or_in_part(monkeypatch, variant, spread):
    """Also where the head is wider than the part that is sorted first."""
    z_t, z_s = spread * torch.randn(2, 3, 5000, dtype=torch.float64)
    values = []
    for few in (8, 1024, 5000):
        monkeypatch.setattr(import_module("llmkd.divergences.adaptive_kl"), "FEW", few)
        values.append(adaptive_kl(*logs(z_t, z_s), variant=variant, mu=0.4))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])


def test_knobs_out_of_range():
    for knobs in ({"mu": 0.0}, {"mu": 1.0}, {"variant": "oficial"}):
        with pytest.raises(ConfigError, match=r"mu|official"):
            adaptive_kl(*logs(Z_T, Z_S), **knobs)
