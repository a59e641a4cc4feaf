"""Stored draws: of the right distribution, reproducible, and the forward KL's gradient is right on average."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teacher_rows import head_rows, labels_of, log_p_of, stored

from llmkd.divergences import divergence
from llmkd.errors import ConfigError
from llmkd.events import TopKRows
from llmkd.heads import HeadRows
from llmkd.rows import DenseRows, weighted_sum
from llmkd.store import Sampled, TopK

V, N, MANY = 23, 12, 20_000
SIGMAS = 5.0  # of the mean of MANY rows: a right estimate fails once in some 10^5 runs of all tokens


def repeated(count: int) -> HeadRows:
    """One row of the teacher, many times; flat enough that each token is drawn often."""
    one = head_rows(1, V, sharp=0.4)
    return one.using([one.hidden.expand(count, -1).contiguous(), *one.tensors()[1:]])


def weights_of(rows: TopKRows) -> torch.Tensor:
    """The target of each row over the whole vocabulary, [n, V]."""
    named = rows.ids >= 0
    out = torch.zeros(len(rows), V + 1, dtype=torch.float64)
    return out.scatter(1, torch.where(named, rows.ids, V), rows.log_probs.double().exp())[:, :V]


def mean_gradient(teacher: TopKRows | HeadRows, z_s: torch.Tensor) -> torch.Tensor:
    """d forward KL / d student logits, [n, V], of every row, through the driver that training uses."""
    leaf = z_s.expand(len(teacher), -1).clone().requires_grad_()
    fn = divergence("forward_kl")
    return torch.autograd.grad(weighted_sum(fn, DenseRows(leaf), teacher, torch.ones(len(teacher))), leaf)[0].double()


def too_far(gradients: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest distance of their mean from the truth, in standard errors."""
    error = gradients.std(0) / len(gradients) ** 0.5
    return ((gradients.mean(0) - truth).abs() / error.clamp_min(1e-7)).max().item()


@pytest.mark.parametrize("power", [1.0, 0.5, 1.5])
def test_the_expected_gradient_is_that_of_the_whole_distribution(power):
    rows, z_s = repeated(MANY), torch.randn(1, V)
    drawn = stored(Sampled(N, power), rows, labels_of(MANY, V))
    truth = mean_gradient(repeated(1), z_s)[0]
    assert too_far(mean_gradient(drawn, z_s), truth) < SIGMAS
    estimate = weights_of(drawn)
    assert too_far(estimate, log_p_of(repeated(1))[0].double().exp()) < SIGMAS


def test_a_renormalised_top_k_does_not_pass_that_test():
    rows, z_s = repeated(MANY), torch.randn(1, V)
    top = stored(TopK(N // 2, bits=32), rows, torch.zeros(MANY, dtype=torch.long))
    cut = TopKRows(top.ids, top.log_probs.log_softmax(-1), V, sampled=True)
    gradients = mean_gradient(cut, z_s) + 1e-3 * torch.randn(MANY, V)
    assert too_far(gradients, mean_gradient(repeated(1), z_s)[0]) > SIGMAS


def test_counts_add_up_and_weights_are_the_ratios():
    rows = head_rows(40, V)
    drawn = stored(Sampled(N), rows, labels_of(40, V))
    torch.testing.assert_close(weights_of(drawn).sum(-1), torch.ones(40, dtype=torch.float64))
    assert torch.equal((weights_of(drawn) * N).round(), (weights_of(drawn) * N).float().round().double())
    tempered, log_p = stored(Sampled(1, power=0.5), rows, labels_of(40, V)), log_p_of(rows)
    log_r = torch.log_softmax(log_p * 0.5, -1)
    ids = tempered.ids
    assert ids.shape == (40, 1)
    torch.testing.assert_close(tempered.log_probs, (log_p - log_r).gather(1, ids), atol=1e-5, rtol=1e-5)


def test_draws_depend_on_the_seed_and_the_example_alone():
    rows, labels = head_rows(40, V), labels_of(40, V)
    first = Sampled(N, seed=3).encode(rows, labels, 77)
    torch.rand(5)
    assert Sampled(N, seed=3).encode(rows, labels, 77) == first
    assert Sampled(N, seed=4).encode(rows, labels, 77) != first
    assert Sampled(N, seed=3).encode(rows, labels, -78) != first


def test_the_temperature_is_that_of_the_draws():
    rows = repeated(MANY)
    drawn = stored(Sampled(N, temperature=3.0), rows, labels_of(MANY, V))
    assert drawn.temperature == 3.0
    assert too_far(weights_of(drawn), log_p_of(repeated(1), 3.0)[0].double().exp()) < SIGMAS


@pytest.mark.parametrize("options", [{"draws": 0}, {"power": 0.0}, {"temperature": -1.0}])
def test_what_cannot_be_drawn(options):
    with pytest.raises(ConfigError, match=f"sampled.{next(iter(options))}: got"):
        Sampled(**options)


def test_cut_bytes_are_an_error():
    data = Sampled(N, power=0.5).encode(head_rows(4, V), labels_of(4, V), 0)
    with pytest.raises(ValueError, match="bytes for"):
        Sampled(N, power=0.5).decode(np.frombuffer(data[:-1], np.uint8), 4, V)
