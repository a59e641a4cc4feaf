"""The chunk drivers equal the dense computation: values, gradients, memory and FLOPs."""

from __future__ import annotations

import pytest
import torch
from oracles import STOPPED, dense_rows, head_logits, ids_of, instance, top_k_with_tail
from test_divergence_laws import CASES, NAMES
from torch import Tensor, nn

from llmkd.divergences import DIVERGENCES
from llmkd.rows import DenseRows, HeadRows, TopKRows, per_row, weighted_sum

N, V, HS, HT = 9, 11, 5, 4
CHUNKS = [1, 7, N, N + 1]
KL = DIVERGENCES["forward_kl"]
# Sums of parts that change when events are merged: no f-divergence, so fewer events may give more
MAY_GROW = {"adaptive_kl", "topk_mix", "standardised", "dac_kl"}
F64 = torch.float64


def head_rows(hidden_size: int, seed: int, columns: int = V, bias: bool = False, n: int = N, **options) -> HeadRows:
    torch.manual_seed(seed)
    head = nn.Linear(hidden_size, columns, bias=bias).double()
    return HeadRows((2 * torch.randn(n, hidden_size, dtype=F64)).requires_grad_(), head, **options)


def models(**options) -> tuple[HeadRows, HeadRows]:
    return head_rows(HS, 1, **options), head_rows(HT, 2, **options)


def weights_of(n: int = N) -> Tensor:
    """Positive, negative and zero weights."""
    weights = torch.linspace(-1, 2, n, dtype=F64)
    weights[1::4] = 0.0
    return weights


def leaves(rows: HeadRows) -> list[Tensor]:
    return [rows.hidden, *(p for p in rows.head.parameters() if p.requires_grad)]


def check(actual: Tensor, expected: Tensor, wrt: list[Tensor], upstream: float = 3.0) -> list[Tensor]:
    """Same value and, under an upstream gradient other than 1, the same gradients; gives the gradients."""
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(upstream * actual, wrt, retain_graph=True)
    for grad, reference in zip(grads, torch.autograd.grad(upstream * expected, wrt, retain_graph=True), strict=True):
        torch.testing.assert_close(grad, reference)
    return list(grads)


def check_heads(fn, student, teacher, options=None, **knobs) -> list[Tensor]:
    """weighted_sum of two heads against dense autograd."""
    z_s = head_logits(student.hidden, student.head, **(options or {}))
    z_t = head_logits(teacher.hidden, teacher.head, **(options or {}))
    weights = weights_of(len(student))
    dense = dense_rows(fn, z_s, z_t, temperature=knobs.get("temperature", 1.0))
    return check(weighted_sum(fn, student, teacher, weights, **knobs), (weights * dense).sum(), leaves(student))


def test_rows_are_the_logits_of_the_head():
    options = {"scale": 0.7, "softcap": 2.0, "vocab_size": V - 2}
    rows = head_rows(HS, 1, bias=True, **options)
    assert len(rows) == N
    torch.testing.assert_close(rows.logits(slice(2, 5)), head_logits(rows.hidden, rows.head, **options)[2:5])
    dense = DenseRows(torch.randn(N, V))
    assert len(dense) == N
    assert torch.equal(dense.logits(slice(2, 5)), dense.logits(slice(0, N))[2:5])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("case", CASES, ids=ids_of)
def test_every_divergence_in_chunks(case, chunk):
    fn = instance(DIVERGENCES, case[0], **case[1])
    grads = check_heads(fn, *models(), chunk_rows=chunk, temperature=1.7)
    assert (grads[0][weights_of() == 0] == 0).all()


@pytest.mark.parametrize("options", [{}, {"scale": 0.6}, {"softcap": 1.5}, {"scale": 2.0, "softcap": 3.0}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocab_size", [None, V - 3])
@pytest.mark.parametrize("fn", [KL, lambda log_t, log_s: KL(log_t, log_s)], ids=["closed", "autograd"])
def test_head_with_bias_scale_softcap_and_cut(options, bias, vocab_size, fn):
    options = {**options, "vocab_size": vocab_size}
    grads = check_heads(fn, *models(bias=bias, **options), options=options, chunk_rows=4, temperature=0.8)
    assert len(grads) == 2 + bias
    if vocab_size:
        assert all((grad[vocab_size:] == 0).all() for grad in grads[1:])


def test_padded_vocabularies_of_different_size():
    student, teacher = head_rows(HS, 1, V + 4, vocab_size=V), head_rows(HT, 2, V + 1, vocab_size=V)
    dense = dense_rows(KL, *(head_logits(x.hidden, x.head, vocab_size=V) for x in (student, teacher)))
    actual = weighted_sum(KL, student, teacher, weights_of(), chunk_rows=4)
    check(actual, (weights_of() * dense).sum(), leaves(student))


def test_head_tied_to_the_embedding():
    """The weight also makes the hidden states and a penalty: all three gradients add up."""
    student, teacher = models()
    weight = student.head.weight
    hidden = torch.tanh(weight[torch.arange(N)]) * 2
    tied = HeadRows(hidden, student.head)
    actual = weighted_sum(KL, tied, teacher, weights_of(), chunk_rows=4) + (weight**3).sum()
    dense = dense_rows(KL, hidden @ weight.T, head_logits(teacher.hidden, teacher.head))
    check(actual, (weights_of() * dense).sum() + (weight**3).sum(), [weight])


def test_frozen_head():
    student, teacher = models(bias=True)
    student.head.requires_grad_(False)
    check_heads(KL, student, teacher, chunk_rows=4)
    weighted_sum(KL, student, teacher, weights_of(), chunk_rows=4).backward()
    assert student.head.weight.grad is None
    assert student.head.bias.grad is None


def test_frozen_backbone():
    student, teacher = models(bias=True)
    student.hidden = student.hidden.detach()
    dense = dense_rows(KL, head_logits(student.hidden, student.head), head_logits(teacher.hidden, teacher.head))
    actual = weighted_sum(KL, student, teacher, weights_of(), chunk_rows=4)
    check(actual, (weights_of() * dense).sum(), list(student.head.parameters()))


def test_the_teacher_gets_no_gradient():
    student, teacher = models(bias=True)
    weighted_sum(KL, student, teacher, weights_of(), chunk_rows=4).backward()
    per_row(KL, student, teacher, chunk_rows=4).sum().backward()
    assert student.hidden.grad is not None
    assert teacher.hidden.grad is None
    assert teacher.head.weight.grad is None
    assert teacher.head.bias.grad is None


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STOPPED])
def test_gradcheck(name):
    student, teacher = models(bias=True, n=5, softcap=4.0)
    fn, weights = instance(DIVERGENCES, name), weights_of(5)

    def loss(*_: Tensor) -> Tensor:
        return weighted_sum(fn, student, teacher, weights, chunk_rows=2)

    assert torch.autograd.gradcheck(loss, leaves(student))


def test_backward_twice_gives_the_same_gradient():
    student, teacher = models()
    loss = weighted_sum(KL, student, teacher, weights_of(), chunk_rows=4)
    first = torch.autograd.grad(2 * loss, leaves(student), retain_graph=True)
    for once, again in zip([g.clone() for g in first], torch.autograd.grad(loss, leaves(student)), strict=True):
        torch.testing.assert_close(once, 2 * again)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_dense_student(chunk):
    z_s, z_t = torch.randn(2, N, V, dtype=F64)
    z_s.requires_grad_()
    for fn in (KL, lambda log_t, log_s: KL(log_t, log_s)):
        expected = (weights_of() * dense_rows(fn, z_s, z_t, temperature=1.3)).sum()
        actual = weighted_sum(fn, DenseRows(z_s), DenseRows(z_t), weights_of(), temperature=1.3, chunk_rows=chunk)
        (grad,) = check(actual, expected, [z_s])
        assert (grad[weights_of() == 0] == 0).all()


class Learned(nn.Module):
    """A divergence with parameters that also takes a gate [n, V] and a label [n]."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.frozen = nn.Parameter(torch.randn(V).double()), nn.Parameter(torch.tensor(0.5).double(), False)
        self.power, self.sizes = nn.Parameter(torch.tensor(0.3).double()), []

    def forward(self, log_t: Tensor, log_s: Tensor, gate: Tensor, label: Tensor) -> Tensor:
        self.sizes.append((len(log_t), len(log_s), len(gate), len(label)))
        terms = nn.functional.softplus(self.gain) * gate * (log_t.exp() * (log_t - log_s)) * self.frozen
        return terms.sum(-1) + self.power**2 * log_s.gather(1, label[:, None])[:, 0] ** 2


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("driver", ["weighted_sum", "per_row"])
def test_learned_divergence_with_arguments_per_row(chunk, driver):
    (student, teacher), fn = models(), Learned()
    extra = torch.rand(N, V, dtype=F64), torch.arange(N) % V
    z_s, z_t = head_logits(student.hidden, student.head), head_logits(teacher.hidden, teacher.head)
    wrt = [*leaves(student), fn.gain, fn.power]
    expected = (weights_of() * dense_rows(fn, z_s, z_t, *extra)).sum()
    fn.sizes.clear()
    if driver == "weighted_sum":
        actual = weighted_sum(fn, student, teacher, weights_of(), *extra, chunk_rows=chunk)
    else:
        actual = (weights_of() * per_row(fn, student, teacher, *extra, chunk_rows=chunk)).sum()
    assert all(len(set(size)) == 1 and size[0] <= chunk for size in fn.sizes)
    assert sum(size[0] for size in fn.sizes) == N
    check(actual, expected, wrt)
    assert fn.frozen.grad is None


@pytest.mark.parametrize("fn", [KL, Learned()], ids=["function", "module"])
def test_no_rows(fn):
    student, teacher = models(n=0, bias=True)
    extra = () if fn is KL else (torch.empty(0, V, dtype=F64), torch.empty(0, dtype=torch.long))
    wrt = leaves(student) + ([] if fn is KL else [fn.gain, fn.power])
    for loss in (
        weighted_sum(fn, student, teacher, torch.empty(0, dtype=F64), *extra),
        per_row(fn, student, teacher, *extra).sum(),
    ):
        assert loss.shape == ()
        assert loss == 0.0
        for leaf, grad in zip(wrt, torch.autograd.grad(loss, wrt), strict=True):
            assert grad.shape == leaf.shape
            assert (grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 4, V])
def test_top_k_teacher(name, k):
    (student, teacher), fn, temperature = models(), instance(DIVERGENCES, name), 1.6
    z_s, z_t = (head_logits(x.hidden, x.head) for x in (student, teacher))
    kept, ids = torch.log_softmax(z_t.detach() / temperature, -1).topk(k)
    top, weights = TopKRows(ids, kept, V, temperature), weights_of().abs()
    log_t, log_s = (top_k_with_tail(torch.log_softmax(z / temperature, -1), ids) for z in (z_t.detach(), z_s))
    actual = weighted_sum(fn, student, top, weights, temperature=temperature, chunk_rows=4)
    check(actual, (weights * fn(log_t, log_s)).sum(), leaves(student))
    full = weighted_sum(fn, student, teacher, weights, temperature=temperature)
    assert name in MAY_GROW or actual <= full + 1e-12
    if k == V:
        torch.testing.assert_close(actual, full)
    part = per_row(fn, student, top, temperature=temperature, chunk_rows=4)
    torch.testing.assert_close(part, fn(log_t, log_s))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("case", CASES, ids=ids_of)
def test_per_row(case, chunk):
    (student, teacher), fn = models(bias=True, softcap=4.0), instance(DIVERGENCES, case[0], **case[1])
    z_s, z_t = (head_logits(x.hidden, x.head, softcap=4.0) for x in (student, teacher))
    rows = per_row(fn, student, teacher, temperature=1.7, chunk_rows=chunk)
    dense = dense_rows(fn, z_s, z_t, temperature=1.7)
    assert rows.shape == (N,)
    torch.testing.assert_close(rows, dense)
    check((rows**2 * weights_of()).sum(), (dense**2 * weights_of()).sum(), leaves(student))


def test_per_row_gradcheck():
    student, teacher = models(bias=True, n=5)
    assert torch.autograd.gradcheck(lambda *_: per_row(KL, student, teacher, chunk_rows=2), leaves(student))
