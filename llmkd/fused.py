"""The gradient-in-forward pass behind `rows.reduce`: one look at each chunk gives the losses and all gradients.

A chunk is as many rows as the budget allows, so that its four GEMMs are large. Within it, the elementwise part runs tile
by tile: on a CPU a tile fits the cache, elsewhere it is the chunk. A tile's logits are overwritten by their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkd.divergences.closed_form import closed_form
from llmkd.events import TopKRows
from llmkd.heads import DenseRows, HeadRows
from llmkd.support import log_softmax

CACHED_ELEMENTS = 2**18  # 1 MiB of float32: a few such tensors stay in a CPU's cache


@dataclass(frozen=True)
class Term:
    """One row-wise loss: scale * sum_i weights[i] * fn(log_t, log_s, *per_row)[i], at one temperature.

    `fn` is a divergence or any function of two rows and further per-row values; `weights=None` counts every row once;
    `scale=0` only measures. `needs_teacher=False` passes None for log_t and never projects the teacher's rows for it.
    `label` [n], token ids, reaches `fn` and `policy` as the index of the label's event (the tail's, if it is not among a
    teacher's top-k), ahead of `per_row`. `policy(log_t, log_s, *label) -> [n]` is a further weight without a gradient.
    `linear` says that `fn` is the forward KL: within a tail of which tokens were drawn, the student learns from these.
    """

    fn: Callable[..., Tensor]
    scale: float = 1.0
    weights: Tensor | None = None
    per_row: tuple[Tensor, ...] = ()
    temperature: float = 1.0
    needs_teacher: bool = True
    label: Tensor | None = None
    policy: Callable[..., Tensor] | None = None
    linear: bool = False


class FusedSum(torch.autograd.Function):
    """(total, sums) of `rows.reduce`. Plain autograd inside a tile: no `torch.func`, which cannot run under DDP."""

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
        work = student.using([t.detach() for t in tensors[:count]]).cast(autocast=True)
        teacher = teacher.cast(autocast=False) if teacher is not None else None
        grads = [_buffer(t) if need else None for t, need in zip(tensors, needed, strict=True)]
        trained = [(t, g) for t, g in zip(tensors[count:], grads[count:], strict=True) if g is not None]
        longest = max(rows.stop - rows.start for rows in chunks)
        tally = _Tally(terms, teacher, any(needed[:count]), trained, tensors[0], longest)
        space = work.space(longest)
        with torch.autocast(tensors[0].device.type, enabled=False):
            for rows in chunks:
                logits = tally.chunk(work.project(rows, space), rows, work)
                if tally.need_logits:
                    work.pull_back(rows, logits, grads[:count])
        ctx.grads = grads
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.mark_non_differentiable(tally.sums)
        return tally.total, tally.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_sums: Tensor) -> tuple[Any, ...]:
        grads: list[Tensor | None] | None = ctx.grads
        if grads is None:
            raise RuntimeError("this loss went backward before; expected retain_graph=True there. Add it.")
        if torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined]  # another backward may follow
            grads = [None if grad is None else grad * grad_total for grad in grads]
        else:  # scaled in place and handed over: a copy of dW costs as much as a fifth of its GEMM
            ctx.grads = None
            for grad in grads:
                if grad is not None:
                    grad *= grad_total
        pairs = zip(grads, ctx.dtypes, strict=True)
        return None, None, None, None, *(None if grad is None else grad.to(dtype) for grad, dtype in pairs)


def _buffer(tensor: Tensor) -> Tensor:
    """Zeros to accumulate a gradient in, in at least float32."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


class _Tally:
    """What a pass over the rows adds up: the total, each term's sum, the gradients of learned divergences."""

    def __init__(
        self,
        terms: list[Term],
        teacher: DenseRows | HeadRows | TopKRows | None,
        need_logits: bool,
        trained: list[tuple[Tensor, Tensor]],
        like: Tensor,
        longest: int,
    ) -> None:
        self.terms, self.need_logits, self.trained = terms, need_logits, trained
        self.teacher = teacher if any(term.needs_teacher for term in terms) else None
        self.space = None if self.teacher is None else self.teacher.space(longest)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.total = torch.zeros((), dtype=dtype, device=like.device)
        self.sums = torch.zeros(len(terms), dtype=dtype, device=like.device)
        drawn = isinstance(teacher, TopKRows) and teacher.sampled  # closed forms need all the mass
        closed = (closed_form(term.fn, one_kernel=like.is_cuda) for term in terms)
        self.closed = [
            form if need_logits and not drawn and term.scale != 0 else None
            for form, term in zip(closed, terms, strict=True)
        ]
        learns = need_logits or bool(trained)
        pairs = zip(terms, self.closed, strict=True)
        self.traced = [learns and form is None and term.scale != 0 for term, form in pairs]

    def chunk(self, logits: Tensor, rows: slice, student: DenseRows | HeadRows) -> Tensor:
        """Add up one chunk [m, V]; returns d total / d (head output), in place of the logits where there is room."""
        teacher = None if self.teacher is None else self.teacher.block(rows, self.space)
        out = logits if isinstance(student, HeadRows) else torch.empty_like(logits)
        for tile in _tiles(logits):
            slope = self.tile(logits[tile], teacher, tile, slice(rows.start + tile.start, rows.start + tile.stop))
            if self.need_logits:
                out[tile] = 0.0 if slope is None else student.through(slope, logits[tile])
        return out

    def tile(self, logits: Tensor, teacher: DenseRows | TopKRows | None, tile: slice, rows: slice) -> Tensor | None:
        """Add up one tile of every term; returns d total / d logits."""
        leaf = logits.detach().requires_grad_(self.need_logits and any(self.traced))
        pairs = _Pairs(leaf, teacher, tile)
        slopes, sums, total = [], [], torch.zeros_like(self.total)
        for term, closed, traced in zip(self.terms, self.closed, self.traced, strict=True):
            slope = None
            with torch.set_grad_enabled(traced):
                log_t, log_s = pairs.at(term)
                event = () if term.label is None else (pairs.event(term, rows),)
                extra = (*event, *(values[rows] for values in term.per_row))
                weights = _weights(term, rows, log_t, log_s, event)
                if closed is not None:
                    values, slope = closed(log_t, log_s, *extra)
                    slope = pairs.spread(slope, term)
                else:
                    values = term.fn(log_t, log_s, *extra)
                if term.linear and pairs.has_tail(log_s):
                    values = values + pairs.within(term, log_s)
                weighted = _weigh(values, weights) * term.scale
            if slope is not None:
                slope = _scale(slope, term.scale / term.temperature, weights)
            elif weighted.requires_grad:
                slope = self._trace_back(weighted, leaf)
            if slope is not None and weights is not None:
                slope = slope.masked_fill((weights == 0).unsqueeze(-1), 0.0)
            slopes.append(slope)
            sums.append(values.detach().sum())
            total = total + weighted.detach() if term.scale else total
        self.sums += torch.stack(sums)
        self.total += total
        return _sum(slopes)

    def _trace_back(self, loss: Tensor, leaf: Tensor) -> Tensor | None:
        """Autograd within the tile: adds to the parameters' gradients, returns d loss / d logits."""
        inputs = [*([leaf] if leaf.requires_grad else []), *(parameter for parameter, _ in self.trained)]
        grads = list(torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True))  # log_s may be shared
        slope = grads.pop(0) if leaf.requires_grad else None
        for (_, buffer), grad in zip(self.trained, grads, strict=True):
            if grad is not None:
                buffer += grad
        return slope


def _tiles(logits: Tensor) -> Iterator[slice]:
    """Rows of a chunk [m, V] that are worked on together: on a CPU as many as the cache likes, at most a quarter."""
    rows, vocab = logits.shape
    most = min(CACHED_ELEMENTS, logits.numel() // 4) if logits.device.type == "cpu" else logits.numel()
    size = max(1, most // max(1, vocab))
    return (slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size))


def _weights(term: Term, rows: slice, log_t: Tensor | None, log_s: Tensor, event: tuple[Tensor, ...]) -> Tensor | None:
    """The tile's row weights, the policy's included; None if every row counts once."""
    weights = None if term.weights is None else term.weights[rows].to(log_s.dtype)
    if term.policy is not None:
        with torch.no_grad():
            chosen = term.policy(log_t, log_s, *event)
        weights = chosen if weights is None else weights * chosen
    return weights


def _weigh(values: Tensor, weights: Tensor | None) -> Tensor:
    """sum_i weights[i] * values[i]; a row of weight 0 may be infinite."""
    return values.sum() if weights is None else (torch.where(weights == 0, 0.0, values) * weights).sum()


def _scale(slope: Tensor, factor: float, weights: Tensor | None) -> Tensor:
    """d term / d logits from the closed form, which is that of one unweighted row at temperature 1."""
    if weights is not None:
        return slope.mul_((weights * factor).unsqueeze(-1))
    return slope if factor == 1.0 else slope.mul_(factor)


def _sum(slopes: list[Tensor | None]) -> Tensor | None:
    given = [slope for slope in slopes if slope is not None]
    for other in given[1:]:
        given[0] = given[0].add_(other)
    return given[0] if given else None


class _Pairs:
    """log_t and log_s of one tile, computed once for each temperature and grad mode."""

    def __init__(self, logits: Tensor, teacher: DenseRows | TopKRows | None, tile: slice) -> None:
        self.logits, self.teacher, self.tile = logits, teacher, tile
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
            self.both[key] = self.teacher.align(self.tile, self.student[key], term.temperature)
        return self.both[key]

    def spread(self, slope: Tensor, term: Term) -> Tensor:
        """From the derivative by the events' logits to that by the student's V, at the term's temperature."""
        if not (isinstance(self.teacher, TopKRows) and term.needs_teacher):
            return slope
        of_tokens = self.student[term.temperature, torch.is_grad_enabled()]
        return self.teacher.spread(self.tile, slope, of_tokens, term.linear)

    def has_tail(self, log_s: Tensor) -> bool:
        """Whether the events [m, K + 1] end with a tail."""
        return isinstance(self.teacher, TopKRows) and log_s.shape[-1] > self.teacher.ids.shape[-1]

    def within(self, term: Term, log_s: Tensor) -> Tensor:
        """What a linear term is more than on the events, log_s [m, K + 1]."""
        of_tokens = self.student[term.temperature, torch.is_grad_enabled()]
        return self.teacher.within(self.tile, of_tokens, log_s[:, -1])  # type: ignore[union-attr]

    def event(self, term: Term, rows: slice) -> Tensor:
        """The index of each row's label among the events."""
        label = term.label[rows]  # type: ignore[index]
        coarse = isinstance(self.teacher, TopKRows) and term.needs_teacher
        return self.teacher.find(self.tile, label) if coarse else label  # type: ignore[union-attr]
