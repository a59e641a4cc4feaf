"""The chunk drivers where it gets tight: half precision, autocast, excluded events, frozen parts, wrong lengths."""

from __future__ import annotations

import pytest
import torch
from oracles import dense_rows, instance
from test_divergence_laws import NAMES
from test_rows import HS, KL, Learned, N, V, check, head_rows, leaves, models, weights_of
from torch import Tensor, nn

from llmkd.divergences import DIVERGENCES
from llmkd.rows import DenseRows, HeadRows, per_row, weighted_sum


def test_nothing_is_recorded_without_gradients():
    student, teacher = models()
    with torch.no_grad():
        value = weighted_sum(KL, student, teacher, weights_of(), chunk_rows=4)
    assert not value.requires_grad
    torch.testing.assert_close(value, weighted_sum(KL, student, teacher, weights_of()).detach())


@pytest.mark.parametrize("name", NAMES)
def test_excluded_events_stay_finite(name):
    """A teacher that excludes events in every row, and events that both models exclude."""
    z_s, z_t = torch.randn(2, N, V)
    z_t[:, 3:8], z_s[:, 7] = -torch.inf, -torch.inf
    z_s.requires_grad_()
    fn = instance(DIVERGENCES, name, torch.float32)
    loss = weighted_sum(fn, DenseRows(z_s), DenseRows(z_t), torch.ones(N), chunk_rows=4)
    (grad,) = torch.autograd.grad(loss, z_s)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert (grad[:, 7] == 0).all()


@pytest.mark.parametrize("distance", [0.02, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_no_worse_than_dense_bfloat16(name, distance):
    n, size, vocab = 48, 32, 512
    x = (2 * torch.randn(n, size)).bfloat16()
    near = (x.float() + distance * torch.randn(n, size)).bfloat16()
    x.requires_grad_()
    head = nn.Linear(size, vocab, bias=False).bfloat16()
    head.weight.data.copy_(0.4 * torch.randn(vocab, size))
    fn, wide_fn = instance(DIVERGENCES, name, torch.float32), instance(DIVERGENCES, name)

    def gradients(rows: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(rows.sum(), [x, head.weight])
        assert all(grad.dtype == torch.bfloat16 for grad in grads)
        return [part.detach().double() for part in (rows, *grads)]

    weight = head.weight.double()
    truth = gradients(dense_rows(wide_fn, x.double() @ weight.T, near.double() @ weight.T))
    widened = gradients(dense_rows(wide_fn, head(x).double(), head(near).double()))
    dense = gradients(dense_rows(fn, head(x), head(near)))
    student, teacher = HeadRows(x, head), HeadRows(near, head)
    total = weighted_sum(fn, student, teacher, torch.ones(n), chunk_rows=16)
    assert total.dtype == torch.float32
    ours = [gradients(per_row(fn, student, teacher, chunk_rows=16))[0], *gradients(total)[1:]]
    for exact, good, rough, mine in zip(truth, widened, dense, ours, strict=True):
        assert (mine - exact).norm() <= 1.05 * (rough - exact).norm() + 0.01 * exact.norm()
        assert (mine - good).norm() <= 0.01 * good.norm()


def test_autocast_computes_in_half_precision_and_keeps_the_gradients_wide():
    student, teacher = models()
    for rows in (student, teacher):
        rows.hidden, rows.head = rows.hidden.detach().float().requires_grad_(), rows.head.float()
    exact = weighted_sum(KL, student, teacher, torch.ones(N))
    with torch.autocast("cpu", torch.bfloat16):
        rough = weighted_sum(KL, student, teacher, torch.ones(N))
    assert rough.dtype == torch.float32
    assert rough != exact
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)
    for grad, reference in zip(*(torch.autograd.grad(x, leaves(student)) for x in (rough, exact)), strict=True):
        assert grad.dtype == torch.float32
        assert (grad - reference).norm() <= 0.02 * reference.norm()


@pytest.mark.parametrize("fn", [KL, lambda log_t, log_s: KL(log_t, log_s)], ids=["closed", "autograd"])
def test_a_row_of_weight_zero_may_be_infinite(fn):
    """The student rules out what the teacher allows, in a row that does not count."""
    z_s, z_t = torch.randn(2, N, V)
    z_s[2, 0] = -torch.inf
    z_s.requires_grad_()
    weights = torch.ones(N)
    weights[2] = 0.0
    loss = weighted_sum(fn, DenseRows(z_s), DenseRows(z_t), weights, chunk_rows=4)
    kept = weights == 1
    torch.testing.assert_close(loss, KL(z_t[kept].log_softmax(-1), z_s[kept].log_softmax(-1)).sum())
    (grad,) = torch.autograd.grad(loss, z_s)
    assert (grad[2] == 0).all()
    assert grad.isfinite().all()


def test_a_learned_divergence_on_a_frozen_student():
    (student, teacher), fn = models(), Learned()
    student.hidden = student.hidden.detach()
    student.head.requires_grad_(False)
    extra = torch.rand(N, V, dtype=torch.float64), torch.arange(N) % V
    dense = weights_of() * dense_rows(fn, student.logits(slice(0, N)), teacher.logits(slice(0, N)), *extra)
    actual = weighted_sum(fn, student, teacher, weights_of(), *extra, chunk_rows=4)
    check(actual, dense.sum(), [fn.gain, fn.power])


def test_a_non_contiguous_hidden_state():
    student, teacher = models()
    hidden = student.hidden.detach().t().contiguous().t().requires_grad_()
    strided = weighted_sum(KL, HeadRows(hidden, student.head), teacher, weights_of(), chunk_rows=4)
    plain = weighted_sum(KL, student, teacher, weights_of(), chunk_rows=4)
    torch.testing.assert_close(torch.autograd.grad(strided, hidden), torch.autograd.grad(plain, student.hidden))


@pytest.mark.parametrize("length", [1, N - 1, N + 1])
def test_lengths_must_be_those_of_the_rows(length):
    """A shorter or longer tensor means that labels, weights and rows are not aligned."""
    student, teacher = models()

    def picked(log_t: Tensor, log_s: Tensor, label: Tensor) -> Tensor:
        return -log_s.gather(1, label[:, None])[:, 0]

    label = torch.zeros(length, dtype=torch.long)
    with pytest.raises(ValueError, match=str(N)):
        weighted_sum(KL, student, teacher, torch.ones(length))
    with pytest.raises(ValueError, match=str(N)):
        weighted_sum(picked, student, teacher, torch.ones(N), label)
    with pytest.raises(ValueError, match=str(N)):
        per_row(picked, student, teacher, label)
    with pytest.raises(ValueError, match=str(N)):
        weighted_sum(KL, student, head_rows(HS, 3, n=length), torch.ones(N))
    with pytest.raises(ValueError, match=str(N)):
        per_row(KL, student, head_rows(HS, 3, n=length))
