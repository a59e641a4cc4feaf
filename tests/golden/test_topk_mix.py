"""Forward on the teacher's head, reverse on its tail: the identities, and the trap of plain partial sums."""

from __future__ import annotations

import pytest
import torch
from fixture_a import Z_S, Z_T, exact, logs, rows

from llmkd.divergences import forward_kl, reverse_kl, topk_mix
from llmkd.errors import ConfigError


def test_the_ends_are_the_two_kls():
    log_t, log_s = logs(Z_T, Z_S)
    torch.testing.assert_close(topk_mix(log_t, log_s, k=4), forward_kl(log_t, log_s))
    torch.testing.assert_close(topk_mix(log_t, log_s, k=99), forward_kl(log_t, log_s))
    torch.testing.assert_close(topk_mix(log_t, log_s, k=0), reverse_kl(log_t, log_s))


def test_partial_sums_would_be_negative():
    log_t, log_s = rows([0.6, 0.4], [0.9, 0.1])
    p, q = log_t.exp()[0], log_s.exp()[0]
    plain = p[0] * (p[0] / q[0]).log() + q[1] * (q[1] / p[1]).log()
    assert plain.item() == pytest.approx(-0.38, abs=5e-3)
    exact(topk_mix(log_t, log_s, k=1), [plain + (q[0] - p[0]) + (p[1] - q[1])], 1e-12)
    assert topk_mix(log_t, log_s, k=1) > 0


def test_positive_for_every_k_and_zero_only_where_equal():
    z_t, z_s = 3 * torch.randn(2, 200, 6, dtype=torch.float64)
    for k in range(7):
        value = topk_mix(*logs(z_t, z_s), k=k)
        assert (value > 1e-6).all()
        assert topk_mix(*logs(z_t, z_t), k=k).abs().max() < 1e-14


def test_ties_with_the_last_belong_to_the_head():
    log_t, log_s = rows([0.4, 0.2, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(topk_mix(log_t, log_s, k=2), forward_kl(log_t, log_s))
    assert topk_mix(log_t, log_s, k=1) != topk_mix(log_t, log_s, k=2)


def test_k_is_not_negative():
    with pytest.raises(ConfigError, match="k=-1"):
        topk_mix(*logs(Z_T, Z_S), k=-1)
