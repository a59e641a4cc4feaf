"""The two drivers that turn rows of logits into a loss chunk by chunk, at constant memory.

`weighted_sum` (and `reduce`, for several losses at once) computes the gradient in the forward pass; `per_row` keeps
each row's value differentiable by checkpointing. No [rows, vocab] tensor outlives a chunk: a chunk's logits are
projected, used and dropped before the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from llmkd.divergences.closed_form import grad_of
from llmkd.heads import DenseRows, HeadRows, TopKRows, full
from llmkd.support import log_softmax, pair

__all__ = ["DenseRows", "HeadRows", "Term", "TopKRows", "full", "per_row", "reduce", "weighted_sum"]

BUDGET_MB = 256
TENSORS_PER_CHUNK = 6  # [rows, vocab] fp32 tensors alive at once in a chunk: logits, two log-probs, and their work space


@dataclass(frozen=True)
class Term:
    """One row-wise loss: scale * sum_i weights[i] * fn(log_t, log_s, *per_row)[i], at one temperature.

    `fn` is a divergence or any function of two rows and further per-row values; `weights=None` counts every row once;
    `needs_teacher=False` passes None for log_t and never projects the teacher's rows for it.
    """

    fn: Callable[..., Tensor]
    scale: float = 1.0
    weights: Tensor | None = None
    per_row: tuple[Tensor, ...] = ()
    temperature: float = 1.0
    needs_teacher: bool = True


def weighted_sum(
    fn: Callable[..., Tensor],
    student: DenseRows | HeadRows,
    teacher: DenseRows | HeadRows | TopKRows | None,
    weights: Tensor,
    *per_row: Tensor,
    temperature: float = 1.0,
    budget_mb: int = BUDGET_MB,
    chunk_rows: int | None = None,
) -> Tensor:
    """sum_i weights[i] * fn(log_t, log_s, *per_row)[i], with the gradient computed in the forward pass.

    Gradients reach the student's hidden states and head (or its dense logits) and the parameters of `fn`; none reaches
    the teacher or the weights. Costs 4 head GEMMs a row: student, teacher, dH, dW; no dW where the head is frozen.

    Args:
        fn: divergence, `(log_t [m, k], log_s [m, k], *per_row) -> [m]` nats; a Module may have parameters.
        student, teacher: n rows each.
        weights: [n]; a row of weight 0 gets exactly no gradient.
        per_row: further tensors of n rows, handed over chunk by chunk.
        temperature: divides both models' logits; no T^2 factor here.
        budget_mb: work space of a chunk, MiB. chunk_rows: rows a chunk, instead of following from the budget.

    Returns:
        Scalar in at least float32, nats.
    """
    term = Term(fn, weights=weights, per_row=per_row, temperature=temperature)
    return reduce([term], student, teacher, budget_mb=budget_mb, chunk_rows=chunk_rows)[0]


def reduce(
    terms: Sequence[Term],
    student: DenseRows | HeadRows,
    teacher: DenseRows | HeadRows | TopKRows | None,
    *,
    budget_mb: int = BUDGET_MB,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum several row-wise losses that share one projection of each model's rows.

    Returns:
        (total, sums): the weighted total with gradients as in `weighted_sum`, and the detached unweighted sum of each
        term, [len(terms)].
    """
    for term in terms:
        _same_length(len(student), teacher, term.weights, *term.per_row)
    if teacher is not None:
        teacher = teacher.using([t.detach() for t in teacher.tensors()])
    chunks = chunk_slices(len(student), student.vocab_size, budget_mb, chunk_rows)
    modules = nn.ModuleList(term.fn for term in terms if isinstance(term.fn, nn.Module))
    parameters = list(modules.parameters())  # each once, however many terms share it
    tensors = [*student.tensors(), *parameters]
    if not torch.is_grad_enabled():
        tensors = [tensor.detach() for tensor in tensors]  # an autograd.Function does not look at the grad mode
    return FusedSum.apply(list(terms), student, teacher, chunks, *tensors)


def per_row(
    fn: Callable[..., Tensor],
    student: DenseRows | HeadRows,
    teacher: DenseRows | HeadRows | TopKRows,
    *per_row: Tensor,
    temperature: float = 1.0,
    budget_mb: int = BUDGET_MB,
    chunk_rows: int | None = None,
) -> Tensor:
    """fn(log_t, log_s, *per_row) of every row, [n], differentiable: chunks are checkpointed and recomputed in backward.

    For losses that need each row's value before they know its weight. Arguments as in `weighted_sum`.
    """
    _same_length(len(student), teacher, *per_row)
    tensors = student.tensors()
    teacher = teacher.using([t.detach() for t in teacher.tensors()])

    def chunk(rows: slice, *inputs: Tensor) -> Tensor:
        log_t, log_s = pair(student.using(inputs).logits(rows), teacher, rows, temperature)
        return fn(log_t, log_s, *(values[rows] for values in per_row))

    slices = chunk_slices(len(student), student.vocab_size, budget_mb, chunk_rows)
    return torch.cat([checkpoint(chunk, rows, *tensors, use_reentrant=False) for rows in slices])  # type: ignore[arg-type]


def chunk_slices(rows: int, vocab_size: int, budget_mb: int, chunk_rows: int | None) -> list[slice]:
    """Cut n rows into equal chunks whose work space fits the budget; one empty chunk for no rows."""
    size = chunk_rows or max(1, budget_mb * 2**20 // (vocab_size * 4 * TENSORS_PER_CHUNK))
    count = max(1, math.ceil(rows / size))
    size = max(1, math.ceil(rows / count))
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


def _same_length(rows: int, *others: Any) -> None:
    for other in others:
        if other is not None and len(other) != rows:
            raise ValueError(f"the student has {rows} rows; expected as many of everything, got {len(other)}")


class FusedSum(torch.autograd.Function):
    """(total, sums) of `rows.reduce`. Plain autograd inside a chunk: no `torch.func`, which cannot run under DDP."""

    @staticmethod
    def forward(
        ctx: Any,
        terms: list[Term],
        student: DenseRows | HeadRows,
        teacher: DenseRows | HeadRows | TopKRows | None,
        chunks: list[slice],
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[4:]
        count = len(student.tensors())
        work = student.using(_one_dtype([t.detach() for t in tensors[:count]], autocast=True))
        teacher = teacher.using(_one_dtype(teacher.tensors(), autocast=False)) if teacher is not None else None
        grads = [_buffer(t) if need else None for t, need in zip(tensors, needed, strict=True)]
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=tensors[0].device)
        sums = torch.zeros(len(terms), dtype=dtype, device=tensors[0].device)
        with torch.autocast(tensors[0].device.type, enabled=False):
            for rows in chunks:
                logits = work.logits(rows)
                need_logits = any(needed[:count])
                d_logits = _chunk(terms, rows, logits, teacher, need_logits, grads[count:], tensors[count:], total, sums)
                if d_logits is not None:
                    work.pull_back(rows, d_logits, logits, grads[:count])
        ctx.save_for_backward(*(g for g in grads if g is not None))
        ctx.slots = [g is not None for g in grads]
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_sums: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        grads = [
            (next(saved) * grad_total).to(dtype) if slot else None
            for slot, dtype in zip(ctx.slots, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, *grads


def _one_dtype(tensors: Sequence[Tensor], autocast: bool) -> list[Tensor]:
    """Bring hidden states and head to one dtype: autocast's where it is on (the student), else the head's own."""
    if len(tensors) < 2:
        return list(tensors)
    kind = tensors[1].device.type
    dtype = torch.get_autocast_dtype(kind) if autocast and torch.is_autocast_enabled(kind) else tensors[1].dtype
    return [t.to(dtype) for t in tensors]


def _buffer(tensor: Tensor) -> Tensor:
    """Zeros to accumulate a gradient in, in at least float32."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _chunk(
    terms: list[Term],
    rows: slice,
    logits: Tensor,
    teacher: DenseRows | HeadRows | TopKRows | None,
    need_logits: bool,
    parameter_grads: list[Tensor | None],
    parameters: Sequence[Tensor],
    total: Tensor,
    sums: Tensor,
) -> Tensor | None:
    """One chunk of every term: adds to `total`, `sums` and the parameters' gradients, returns d total / d logits."""
    trained = [(p, g) for p, g in zip(parameters, parameter_grads, strict=True) if g is not None]
    closed = [_closed_form(term, teacher) if need_logits else None for term in terms]
    traced = [form is None and (need_logits or bool(trained)) for form in closed]
    leaf = logits.detach().requires_grad_(need_logits and any(traced))
    pairs = _Pairs(leaf, teacher, rows)
    d_logits: Tensor | None = None
    for index, term in enumerate(terms):
        extra = tuple(values[rows] for values in term.per_row)
        with torch.set_grad_enabled(traced[index]):
            log_t, log_s = pairs.at(term)
            values = term.fn(log_t, log_s, *extra)
            weighted = _weigh(values, term, rows)
        sums[index] += values.detach().sum()
        total += weighted.detach()
        slope = None
        if closed[index] is not None:
            slope = _scale(closed[index](log_t, log_s, *extra), term, rows)
        elif weighted.requires_grad:
            slope = _trace_back(weighted, leaf, trained)
        if slope is not None:
            slope = slope if term.weights is None else slope.masked_fill((term.weights[rows] == 0).unsqueeze(-1), 0.0)
            d_logits = slope if d_logits is None else d_logits + slope
    return d_logits


def _weigh(values: Tensor, term: Term, rows: slice) -> Tensor:
    """scale * sum_i weights[i] * values[i]; a row of weight 0 may be infinite."""
    if term.weights is None:
        return values.sum() * term.scale
    weights = term.weights[rows].to(values.dtype)
    return (torch.where(weights == 0, 0.0, values) * weights).sum() * term.scale


def _scale(slope: Tensor, term: Term, rows: slice) -> Tensor:
    """d term / d logits from the closed form, which is that of one unweighted row at temperature 1."""
    factor = term.scale / term.temperature
    if term.weights is not None:
        return slope * (term.weights[rows].to(slope.dtype) * factor).unsqueeze(-1)
    return slope if factor == 1.0 else slope * factor


def _trace_back(loss: Tensor, leaf: Tensor, trained: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Autograd within the chunk: adds to the parameters' gradients, returns d loss / d logits."""
    inputs = [*([leaf] if leaf.requires_grad else []), *(parameter for parameter, _ in trained)]
    grads = list(torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True))  # log_s may be shared
    slope = grads.pop(0) if leaf.requires_grad else None
    for (_, buffer), grad in zip(trained, grads, strict=True):
        if grad is not None:
            buffer += grad
    return slope


def _closed_form(term: Term, teacher: DenseRows | HeadRows | TopKRows | None) -> Any:
    """The term's closed-form gradient, where the events are the student's own V columns."""
    return None if isinstance(teacher, TopKRows) and term.needs_teacher else grad_of(term.fn)


class _Pairs:
    """log_t and log_s of one chunk, computed once for each temperature and grad mode."""

    def __init__(self, logits: Tensor, teacher: DenseRows | HeadRows | TopKRows | None, rows: slice) -> None:
        self.logits, self.teacher, self.rows = logits, teacher, rows
        self.student: dict[tuple[float, bool], Tensor] = {}
        self.both: dict[tuple[float, bool], tuple[Tensor, Tensor]] = {}

    def at(self, term: Term) -> tuple[Tensor | None, Tensor]:
        key = (term.temperature, torch.is_grad_enabled())
        if key not in self.student:
            self.student[key] = log_softmax(self.logits, term.temperature)
        if not term.needs_teacher:
            return None, self.student[key]
        if self.teacher is None:
            raise ValueError("a term needs the teacher's rows, but there is no teacher")
        if key not in self.both:
            self.both[key] = self.teacher.align(self.rows, self.student[key], term.temperature)
        return self.both[key]

