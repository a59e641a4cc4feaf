"""One event space for two models: V tokens, or K tokens and a tail."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import head_logits, top_k_with_tail
from torch import Tensor, nn

from llmkd.rows import DenseRows, HeadRows, TopKRows
from llmkd.support import pair, wide

N, V = 6, 9
ALL = slice(0, N)


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def top_k(z_t: Tensor, k: int, temperature: float = 1.0) -> TopKRows:
    kept, ids = torch.log_softmax(z_t / temperature, -1).topk(k)
    return TopKRows(ids, kept, z_t.shape[-1], temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_widens_half_precision_only(dtype):
    x = torch.randn(4).to(dtype).requires_grad_()
    assert wide(x).dtype == torch.float32
    assert torch.equal(wide(x), x.float())
    assert torch.autograd.grad(wide(x).sum(), x)[0].dtype == dtype
    for kept in (torch.float32, torch.float64):
        assert wide(x.detach().to(kept)).dtype == kept


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_dense_rows(temperature):
    z_s, z_t = logits(1).requires_grad_(), logits(2)
    log_t, log_s = pair(z_s, DenseRows(z_t), ALL, temperature)
    torch.testing.assert_close(log_t, torch.log_softmax(z_t / temperature, -1))
    torch.testing.assert_close(log_s, torch.log_softmax(z_s / temperature, -1))
    assert log_s.requires_grad
    assert not log_t.requires_grad


def test_head_rows():
    hidden, head = torch.randn(N, 4).double(), nn.Linear(4, V + 3).double()
    options = {"scale": 0.5, "softcap": 3.0, "vocab_size": V}
    log_t, _ = pair(logits(1), HeadRows(hidden, head, **options), ALL)
    expected = head_logits(hidden, head, **options)
    torch.testing.assert_close(log_t, torch.log_softmax(expected, -1))


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_rows(k, temperature):
    z_s, z_t = logits(1).requires_grad_(), logits(2)
    teacher = top_k(z_t, k, temperature)
    log_t, log_s = pair(z_s, teacher, ALL, temperature)
    assert log_t.shape == log_s.shape == (N, k if k == V else k + 1)
    full_t, full_s = torch.log_softmax(z_t / temperature, -1), torch.log_softmax(z_s / temperature, -1)
    torch.testing.assert_close(log_t, top_k_with_tail(full_t, teacher.ids))
    torch.testing.assert_close(log_s, top_k_with_tail(full_s, teacher.ids))
    weights = torch.randn(log_s.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((weights * x).sum(), z_s)[0] for x in (log_s, top_k_with_tail(full_s, teacher.ids))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["dense", "head", "top_k"])
def test_a_slice_of_rows_is_those_rows(kind):
    head = nn.Linear(4, V).double()
    dense = DenseRows(logits(2))
    teacher = {"dense": dense, "head": HeadRows(torch.randn(N, 4).double(), head), "top_k": top_k(logits(2), 3)}[kind]
    z_s = logits(1)
    for whole, part in zip(pair(z_s, teacher, ALL), pair(z_s[2:5], teacher, slice(2, 5)), strict=True):
        torch.testing.assert_close(part, whole[2:5])
    assert all(x.shape[0] == 0 for x in pair(z_s[:0], teacher, slice(0, 0)))
    assert len(teacher) == N


def test_mass_is_one():
    for teacher in (DenseRows(logits(2)), top_k(logits(2), 3), top_k(logits(2), V)):
        for log_p in pair(logits(1), teacher, ALL):
            torch.testing.assert_close(log_p.logsumexp(-1), torch.zeros(N, dtype=torch.float64))


@pytest.mark.parametrize("excess", [0.0, 1e-3])
def test_a_teacher_whose_top_k_holds_all_the_mass_stays_finite(excess):
    """Stored log-probs are rounded: their sum may be 1 or a little more, which must not become log of a negative."""
    ids = torch.arange(3).expand(N, 3)
    log_p = torch.tensor([0.5, 0.3, 0.2 + excess]).log().expand(N, 3)
    z_s = logits(1, torch.float32).requires_grad_()
    log_t, log_s = pair(z_s, TopKRows(ids, log_p, V), ALL)
    assert not log_t.isnan().any()
    assert (log_t[:, -1] < math.log(1e-6)).all()
    loss = (log_t.exp() * (log_t.clamp_min(-1e4) - log_s)).sum()
    assert loss.isfinite()
    assert torch.autograd.grad(loss, z_s)[0].isfinite().all()


def test_the_student_s_tail_keeps_its_digits_in_float32():
    """A tail of 1e-13 is far below the rounding of 1 - sum(q): it has to be summed, not subtracted."""
    z_s = torch.tensor([[0.0, -30.0, -31.0, -32.0]], requires_grad=True)
    _, log_s = pair(z_s, TopKRows(torch.tensor([[0]]), torch.tensor([[-0.1]]), 4), slice(0, 1))
    exact = torch.log_softmax(z_s.detach().double(), -1)[:, 1:].logsumexp(-1)
    torch.testing.assert_close(log_s[:, 1].double(), exact, rtol=1e-6, atol=1e-6)
    grad = torch.autograd.grad(log_s[0, 1], z_s)[0]
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[0, 1:], torch.tensor([0.66524096, 0.24472847, 0.09003057]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened_before_the_softmax(dtype):
    z_s, z_t = logits(1).to(dtype), logits(2).to(dtype)
    for teacher in (DenseRows(z_t), top_k(z_t.float(), 3)):
        log_t, log_s = pair(z_s, teacher, ALL)
        assert log_t.dtype == log_s.dtype == torch.float32
    torch.testing.assert_close(pair(z_s, DenseRows(z_t), ALL)[1], torch.log_softmax(z_s.float(), -1))


@pytest.mark.parametrize("width", [V - 1, V + 1])
def test_different_vocabularies_are_an_error(width):
    z_t = torch.randn(N, width).double()
    head = HeadRows(torch.randn(N, 4).double(), nn.Linear(4, width).double())
    for teacher in (DenseRows(z_t), head, top_k(z_t, 3)):
        with pytest.raises(ValueError, match=str(width)) as error:
            pair(logits(1), teacher, ALL)
        assert str(V) in str(error.value)


def test_another_temperature_than_the_recorded_one_is_an_error():
    """The tail's logits are unknown, so a top-k row cannot be moved to another temperature."""
    with pytest.raises(ValueError, match="temperature"):
        pair(logits(1), top_k(logits(2), 3, temperature=1.0), ALL, 2.0)
