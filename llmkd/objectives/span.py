"""The span loss: how the distributions of neighbouring tokens inside a phrase agree with each other."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkd.errors import ConfigError
from llmkd.objectives.base import Objective
from llmkd.rows import DenseRows, HeadRows, Term, TopKRows, look, pick, reduce
from llmkd.support import name_all
from llmkd.types import Batch, Loss, Outputs, Signal


class SpanLoss(Objective):
    """sum over pairs (i, i + 1) in a span of sum_v (p_i(v) p_{i+1}(v) - q_i(v) q_{i+1}(v))^2, p = teacher, q = student.

    A span is a phrase; `batch["spans"]` [P] holds the first row of each pair: the supervised rows that predict, with the
    row after them, two adjacent tokens of one span (`data.spans` makes them). A span of n tokens gives n - 1 pairs, one
    token gives none.

    `total` is the plain sum over pairs, so that it adds up over micro-batches and devices; the trainer divides it by the
    supervised tokens. The mean over pairs is that times tokens / pairs: the logged `span` / `span_pairs`.

    Memory is bounded: a pair is compared on the teacher's `top_k` best tokens of either row, at most 2 `top_k` columns, and
    on all other tokens together as one event; exact for top_k >= V. Against a teacher of K events and a tail, only the ids
    among both rows' K have a column. 0 at p = q in each case.

    From the paper are the phrases from a chunker and the products of neighbouring probability vectors. Unverified, and ours:
    the squared distance, that all pairs count alike, the columns, the division and which chunkers.

    Args:
        top_k: columns of each row, at least 1. A top-k teacher has its own K, whatever is given here.

    Returns:
        `total` and `span`: squared products of probabilities, at most 2 a pair; `span_pairs`: the number of pairs.

    Raises:
        ConfigError: top_k is below 1, the batch has no spans, there is no teacher, or its rows have another temperature.

    Reference: Liu et al. 2024 (MGSR), arXiv 2407.10068, eq. 10.
    Fidelity: derived (the products of neighbours in phrases are the paper's; the rest is ours).
    """

    needs = frozenset({Signal.LOGITS})
    reads = frozenset({"spans"})

    def __init__(self, top_k: int = 64) -> None:
        super().__init__()
        if top_k < 1:
            raise ConfigError(f"span.top_k: got {top_k}; expected at least 1, such as 64.")
        self.top_k = top_k

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        """The sum over the batch's pairs, with its gradient computed here."""
        if teacher is None or teacher.rows is None:
            raise ConfigError("span: it needs a teacher's logits, got none; give a teacher or take it out.")
        if "spans" not in batch:
            raise ConfigError("span: got a batch without spans; expected batch['spans']. Set data.spans: punctuation.")
        rows = torch.stack([batch["spans"], batch["spans"] + 1])
        total = self._total(pick(student.rows, rows.flatten()), pick(teacher.rows, rows.flatten()))
        return {"total": total, "span": total.detach(), "span_pairs": total.detach().new_tensor(float(rows.shape[1]))}

    def _total(self, student: DenseRows | HeadRows, teacher: DenseRows | HeadRows | TopKRows) -> Tensor:
        """The loss of P pairs, whose 2 P rows are all the first ones, then all the second ones."""
        if teacher.vocab_size != student.vocab_size:
            raise ValueError(
                f"teacher vocabulary is {teacher.vocab_size}, the student's {student.vocab_size}; cut both"
            )
        ids, single, p = _of_top_k(teacher) if isinstance(teacher, TopKRows) else self._of_all(teacher)
        both = ids.repeat(2, 1)
        q = look(_masses, student, both, autocast=True).unflatten(0, (2, -1))
        target = products(p.to(q.dtype) * single)
        if not torch.is_grad_enabled():
            return (products(q * single) - target).square().sum()
        value = (products(q.requires_grad_() * single) - target).square().sum()
        (slope,) = torch.autograd.grad(value, q)
        linear, _ = reduce([Term(_along, per_row=(both, slope.flatten(0, 1)), needs_teacher=False)], student, None)
        return value.detach() + linear - linear.detach()

    def _of_all(self, teacher: DenseRows | HeadRows) -> tuple[Tensor, Tensor, Tensor]:
        """The ids [P, 2 k] among the best of either row, whether each is the first of its kind, and p [2, P, 2 k]."""
        k = min(self.top_k, teacher.vocab_size)
        first, second = look(lambda log_p: log_p.topk(k, dim=-1).indices, teacher).unflatten(0, (2, -1))
        ids = torch.cat([first, second], dim=-1)
        single = torch.cat([torch.ones_like(first, dtype=torch.bool), ~_find(second, first)[0]], dim=-1)
        return ids, single, look(_masses, teacher, ids.repeat(2, 1)).unflatten(0, (2, -1))


def products(masses: Tensor) -> Tensor:
    """c = p_i p_{i+1} on each column and on the rest of the vocabulary as one event, [2, P, C] -> [P, C + 1]."""
    rest = 1 - masses.sum(-1, keepdim=True)
    return torch.cat([masses, rest], dim=-1).prod(0)


def _of_top_k(teacher: TopKRows) -> tuple[Tensor, Tensor, Tensor]:
    """The first row's ids [P, K], whether the second row has each too, and p [2, P, K]."""
    if teacher.temperature != 1.0:
        raise ConfigError(
            f"span: got a teacher's rows recorded at temperature {teacher.temperature}; expected 1. Record them anew."
        )
    first, second = teacher.ids.unflatten(0, (2, -1))
    p_first, p_second = teacher.log_probs.exp().unflatten(0, (2, -1))
    both, place = _find(first, second)
    single = both & (first >= 0)
    return name_all(first), single, torch.stack([p_first, p_second.gather(-1, place)])


def _find(ids: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each id [P, K] is in the same row of `among` [P, K], and where."""
    rising, order = among.sort(-1)
    place = torch.searchsorted(rising, ids.contiguous()).clamp_max(among.shape[-1] - 1)
    return rising.gather(-1, place) == ids, order.gather(-1, place)


def _masses(log_p: Tensor, ids: Tensor) -> Tensor:
    """The probabilities of each row's ids, [m, V] -> [m, C]."""
    return log_p.gather(-1, ids).exp()


def _along(log_t: Tensor | None, log_s: Tensor, ids: Tensor, slope: Tensor) -> Tensor:
    """<slope, masses> of each row: linear, so its gradient is that of the loss whose slope it is given."""
    return (_masses(log_s, ids) * slope).sum(-1)
