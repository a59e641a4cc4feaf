"""The two drivers that turn rows of logits into a loss chunk by chunk, at constant memory.

`weighted_sum` (and `reduce`, for several losses at once) computes the gradient in the forward pass; `per_row` keeps
each row's value differentiable by checkpointing. No [rows, vocab] tensor outlives a chunk: a chunk's logits are
projected, used and dropped before the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkd.events import TopKRows
from llmkd.fused import FusedSum, Term
from llmkd.heads import DenseRows, HeadRows, full
from llmkd.support import log_softmax, pair

__all__ = ["DenseRows", "HeadRows", "Term", "TopKRows", "full", "look", "per_row", "pick", "reduce", "weighted_sum"]

BUDGET_MB = 256
CHUNK_TENSORS = 6  # [rows, vocab] fp32 tensors alive at once: both models' logits, log-probabilities, work space
TILED_TENSORS = 2.25  # where a chunk's elementwise part runs in small tiles (`fused.py`): logits, and a few tiles


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
        _same_length(len(student), teacher, term.weights, term.label, *term.per_row)
    if teacher is not None:
        teacher = teacher.using([t.detach() for t in teacher.tensors()])
    modules = nn.ModuleList(term.fn for term in terms if isinstance(term.fn, nn.Module))
    parameters = list(modules.parameters())  # each once, however many terms share it
    tensors = [*student.tensors(), *parameters]
    chunks = chunk_slices(student, tensors[: len(tensors) - len(parameters)], budget_mb, chunk_rows, tiled=True)
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

    slices = chunk_slices(student, tensors, budget_mb, chunk_rows, tiled=False)
    return torch.cat([checkpoint(chunk, rows, *tensors, use_reentrant=False) for rows in slices])  # type: ignore[arg-type]


@torch.no_grad()
def look(
    fn: Callable[..., Tensor],
    rows: DenseRows | HeadRows,
    *per_row: Tensor,
    temperature: float = 1.0,
    autocast: bool = False,
    budget_mb: int = BUDGET_MB,
    chunk_rows: int | None = None,
) -> Tensor:
    """fn(log_p, *per_row) of every row, chunk by chunk and without a graph: for what one model alone shows.

    Args:
        fn: `(log_p [m, V], *per_row) -> [m, ...]`. rows: n rows of one model. per_row: as in `weighted_sum`.
        autocast: project in autocast's dtype, as `reduce` does the student, instead of the head's own.
        temperature, budget_mb, chunk_rows: as in `weighted_sum`.

    Returns:
        [n, ...].
    """
    rows = rows.cast(autocast)
    slices = chunk_slices(rows, rows.tensors(), budget_mb, chunk_rows, tiled=False)
    with torch.autocast(rows.tensors()[0].device.type, enabled=False):
        given = ((log_softmax(rows.logits(part), temperature), *(x[part] for x in per_row)) for part in slices)
        return torch.cat([fn(*values) for values in given])


def pick(rows: Any, chosen: Tensor) -> Any:
    """The rows of these indices, in that order and perhaps repeated; gradients flow back to where they came from."""
    return rows.pick(chosen)


def chunk_slices(
    student: DenseRows | HeadRows, tensors: Sequence[Tensor], budget_mb: int, chunk_rows: int | None, tiled: bool
) -> list[slice]:
    """Cut n rows into equal chunks whose work space fits the budget; one empty chunk for no rows.

    `tensors` are the student's; `tiled`: what a chunk holds on a CPU is logits, in their own dtype.
    """
    rows, kind = len(student), tensors[0].device.type
    row_bytes = student.vocab_size * 4 * CHUNK_TENSORS
    if tiled and kind == "cpu":
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[-1].dtype
        row_bytes = student.vocab_size * dtype.itemsize * TILED_TENSORS
    size = chunk_rows or max(1, int(budget_mb * 2**20 / row_bytes))
    count = max(1, math.ceil(rows / size))
    size = max(1, math.ceil(rows / count))
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


def _same_length(rows: int, *others: Any) -> None:
    for other in others:
        if other is not None and len(other) != rows:
            raise ValueError(f"the student has {rows} rows; expected as many of everything, got {len(other)}")
