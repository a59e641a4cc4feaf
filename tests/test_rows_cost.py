"""What the chunk drivers cost: no tensor of all rows times the vocabulary, and no head GEMM too many."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracles import dense_rows, head_logits, instance
from test_divergence_laws import NAMES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llmkd.divergences import DIVERGENCES
from llmkd.divergences.closed_form import closed_form, fused
from llmkd.divergences.dac_kl import WIDTH
from llmkd.objectives.cross_entropy import nll
from llmkd.rows import DenseRows, HeadRows, Term, TopKRows, per_row, reduce, weighted_sum

N, V, HS, HT, CHUNK = 60, 97, 4, 3, 5
KL = DIVERGENCES["forward_kl"]


def by_autograd(log_t: Tensor, log_s: Tensor) -> Tensor:
    return KL(log_t, log_s)


class Watch(TorchDispatchMode):
    """The largest tensor that is made, and the most elements of new tensors that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.most, self.alive = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.alive[id(tensor)] = weakref.ref(tensor)
        self.most = max(self.most, self.living())
        return out

    def living(self) -> int:
        """Elements of the storages that are still referenced."""
        tensors = [tensor for tensor in (ref() for ref in self.alive.values()) if tensor is not None]
        self.alive = {id(tensor): weakref.ref(tensor) for tensor in tensors}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in tensors}
        return sum(storages.values())


def models(n: int = N, vocab: int = V) -> tuple[HeadRows, HeadRows]:
    student, teacher = nn.Linear(HS, vocab, bias=False), nn.Linear(HT, vocab, bias=False)
    return HeadRows(torch.randn(n, HS).requires_grad_(), student), HeadRows(torch.randn(n, HT), teacher)


def drive(driver: str, fn, student, teacher, **knobs) -> Tensor:
    if driver == "weighted_sum":
        return weighted_sum(fn, student, teacher, torch.ones(len(student)), **knobs)
    return per_row(fn, student, teacher, **knobs).sum()


def test_the_watch_sees_what_the_dense_computation_keeps():
    student, teacher = models()
    with Watch() as watch:
        loss = dense_rows(KL, *(head_logits(x.hidden, x.head) for x in (student, teacher))).sum()
        assert watch.living() >= N * V
        loss.backward()
    assert watch.largest >= N * V
    assert watch.most >= 3 * N * V


@pytest.mark.parametrize("driver", ["weighted_sum", "per_row"])
@pytest.mark.parametrize("name", [*NAMES, "autograd", "top_k"])
def test_no_tensor_of_all_rows_times_the_vocabulary(driver, name):
    student, teacher = models()
    if name == "top_k":
        ids = torch.arange(8).expand(N, 8)
        teacher = TopKRows(ids, torch.full((N, 8), 0.1).log(), V)
    small, widest = ({"top_k": 1}, max(V, WIDTH)) if name == "dac_kl" else ({}, V)  # its network is wider than V here
    fn = instance(DIVERGENCES, name, torch.float32, **small) if name in NAMES else by_autograd
    with Watch() as watch:
        loss = drive(driver, fn, student, teacher, chunk_rows=CHUNK)
        kept = watch.living()
        loss.backward()
    assert watch.largest <= CHUNK * widest
    assert kept < N * V / 4, "what is kept for backward: dH and dW, or the inputs of the checkpoints"
    assert watch.most < 40 * CHUNK * V < N * V * 5


@pytest.mark.parametrize("driver", ["weighted_sum", "per_row"])
def test_the_budget_bounds_a_chunk(driver):
    student, teacher = models(n=1500, vocab=1000)
    with Watch() as watch:
        drive(driver, KL, student, teacher, budget_mb=1).backward()
    assert watch.largest * 4 <= 2**20
    assert watch.most * 4 <= 2 * 2**20
    whole = drive(driver, KL, student, teacher)
    torch.testing.assert_close(whole, drive(driver, KL, student, teacher, budget_mb=1))


def in_place_product(into, a, b, **_) -> int:
    """FLOPs of `into.addmm_(a, b)`, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def flops(driver: str, fn, student, teacher) -> int:
    """Of the forward and the backward pass, in-place products included."""
    return flops_of(lambda: drive(driver, fn, student, teacher, chunk_rows=CHUNK))


def flops_of(make_loss: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counter:
        loss = make_loss()
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("fn", [KL, by_autograd], ids=["closed", "autograd"])
def test_head_products_of_the_weighted_sum(fn):
    student, teacher = models()
    assert flops("weighted_sum", fn, student, teacher) == 2 * N * V * (3 * HS + HT)
    student.head.requires_grad_(False)
    assert flops("weighted_sum", fn, student, teacher) == 2 * N * V * (2 * HS + HT)
    with torch.no_grad():
        assert flops("weighted_sum", fn, student, teacher) == 2 * N * V * (HS + HT)
    ids = torch.arange(8).expand(N, 8)
    top = TopKRows(ids, torch.full((N, 8), 0.1).log(), V)
    assert flops("weighted_sum", fn, student, top) == 2 * N * V * 2 * HS


def test_a_mix_shares_one_projection():
    student, teacher = models()
    label = torch.arange(N) % V
    taid = instance(DIVERGENCES, "taid", torch.float32)
    terms = [Term(fn, weight) for fn, weight in ((KL, 1.0), (DIVERGENCES["jsd"], 0.5), (taid, 2.0), (by_autograd, 1.0))]
    terms += [Term(KL, temperature=2.0), Term(nll, 0.1, label=label, needs_teacher=False), Term(KL, 0.0)]
    whole = flops_of(lambda: reduce(terms, student, teacher, chunk_rows=CHUNK)[0])
    assert whole == 2 * N * V * (3 * HS + HT)
    alone = flops_of(lambda: reduce([terms[-2]], student, teacher, chunk_rows=CHUNK)[0])
    assert alone == 2 * N * V * 3 * HS, "no term asks for the teacher's rows"


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "taid"])
@pytest.mark.parametrize("top_k", [False, True])
def test_the_closed_form_is_what_runs(name, top_k, monkeypatch):
    monkeypatch.setattr("llmkd.fused._Tally._trace_back", None)
    student, teacher = models()
    if top_k:
        teacher = TopKRows(torch.arange(8).expand(N, 8), torch.full((N, 8), 0.1).log(), V)
    terms = [Term(instance(DIVERGENCES, name, torch.float32))]
    terms += [Term(nll, 0.1, label=torch.zeros(N, dtype=torch.long), needs_teacher=False)]
    reduce(terms, student, teacher)[0].backward()
    assert student.hidden.grad.abs().sum() > 0


def test_the_gradient_is_handed_over_without_a_copy():
    student, teacher = models()
    loss = weighted_sum(KL, student, teacher, torch.ones(N))
    kept = torch.autograd.grad(3 * loss, [student.hidden, student.head.weight], retain_graph=True)
    made = [grad.data_ptr() for grad in loss.grad_fn.grads]
    last = torch.autograd.grad(3 * loss, [student.hidden, student.head.weight])
    assert [grad.data_ptr() for grad in last] == made
    assert all(torch.equal(a, b) for a, b in zip(kept, last, strict=True))
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, [student.hidden])


def test_a_cut_vocabulary_costs_nothing_beyond_the_cut():
    (student, teacher), cut = models(), V - 30
    student, teacher = (HeadRows(x.hidden, x.head, vocab_size=cut) for x in (student, teacher))
    assert flops("weighted_sum", KL, student, teacher) == 2 * N * cut * (3 * HS + HT)


def test_dense_logits_cost_no_product():
    student, teacher = DenseRows(torch.randn(N, V).requires_grad_()), DenseRows(torch.randn(N, V))
    assert flops("weighted_sum", KL, student, teacher) == 0


def test_head_products_of_the_rows_that_stay_differentiable():
    """Both projections twice (checkpointed), dH and dW."""
    assert flops("per_row", KL, *models()) <= 2 * N * V * (4 * HS + 2 * HT)


FORMS = sorted(name for name in NAMES if not isinstance(DIVERGENCES[name], type) and hasattr(DIVERGENCES[name], "grad"))


@pytest.mark.parametrize("name", FORMS)
def test_the_fused_closed_form_is_the_plain_one(name, monkeypatch):
    """As on a GPU; but the kernel's own code generation needs one, or minutes."""
    made = []
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda form, **knobs: made.append(compile_(form, backend="aot_eager")) or made[0]
    )
    fused.cache_clear()
    form = closed_form(partial(DIVERGENCES[name]), one_kernel=True)
    plain = closed_form(DIVERGENCES[name])
    for rows in (6, 3):
        pair = [torch.randn(rows, 40).log_softmax(-1) for _ in range(2)]
        torch.testing.assert_close(form(*pair), plain(*pair))
    assert len(made) == 1
    fused.cache_clear()


def test_where_it_cannot_be_compiled_the_plain_form_runs(monkeypatch, caplog):
    def broken(form, **_):
        def raises(*_):
            raise RuntimeError("no compiler\nand a long trace")

        return raises

    monkeypatch.setattr(torch, "compile", broken)
    fused.cache_clear()
    form, pair = closed_form(KL, one_kernel=True), [torch.randn(3, 5).log_softmax(-1) for _ in range(2)]
    for _ in range(2):
        torch.testing.assert_close(form(*pair), closed_form(KL)(*pair))
    assert [record.message for record in caplog.records] == ["_forward_kl is not fused into one kernel: no compiler"]
    fused.cache_clear()
