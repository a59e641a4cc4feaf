"""SinKD: optimal transport between the two models' distributions over the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmkd.divergences.tvd import tvd
from llmkd.errors import ConfigError, unknown_name
from llmkd.objectives.base import Objective
from llmkd.rows import DenseRows, HeadRows, Term, TopKRows, look, pick, reduce
from llmkd.types import Batch, Loss, Outputs, Signal, row_labels, supervised_rows

BLOCK_ELEMENTS = 2**22  # of one block of the pairwise cost against a top-k teacher


class SinKD(Objective):
    """sum_ij P_ij W_ij over a batch's rows, W_ij = |q_i - p_j|_1 at temperature T, P = Sinkhorn's plan of exp(-W / epsilon).

    The plan has mass 1 for each row and each column and may give any student row to any teacher row, so the loss cannot
    say which row gets which distribution, and it is not 0 between identical batches: keep a divergence beside it.

    `total` is N * (loss of the batch), N its supervised rows, so that the trainer's division by all supervised rows leaves
    the loss itself: under `mean` sum_ij P_ij W_ij / n, in [0, 2] however large the batch is; under `sum` the plan's
    whole cost, in [0, 2n], to be weighted with 0.001 or 0.0008 as the official code does. Over several micro-batches or
    devices the loss is their mean, weighted by rows. Rows are coupled within a micro-batch only: 1 x 8 examples and
    2 x 4 have different losses by nature, at any granularity but `sample`. With `sequence` they have the same loss if a
    micro-batch has no more than `max_rows` rows and `top_k` covers the vocabulary. Both hold under `mean` alone.

    Memory is bounded: `max_rows` evenly spaced rows take part, and where the vocabulary is wider than `top_k`, they keep
    the ids that are among the teacher's best `top_k` of any of them or their labels, and the sum of all others as one
    more column. Against a teacher of K ids and a tail, W_ij is taken over the events of teacher row j (a lower bound).

    Args:
        temperature: T > 0, divides both models' logits. epsilon: weight of the plan's entropy, > 0.
        iterations: of Sinkhorn, in the log domain; each ends on the columns, whose sums are exactly 1.
        granularity: rows are coupled within a `batch`, within a `sequence` (a row of input_ids; packed documents of one
            row are together), or not at all, `sample`: 2 TVD of every row over the whole vocabulary, without a limit on rows
            (the official variant has temperature 1).
        gradient: through the `plan` as well as the cost, or of the cost alone with the plan held fixed (`envelope`).
        normalize: `mean` or `sum`, see above. top_k, max_rows: see above.

    Returns:
        `total` and `sinkd`: L1 distances of probabilities.

    Raises:
        ConfigError: an unknown choice, a number that is not positive, or an option that `sample` has no use for.

    Reference: Cui et al. 2024 (SinKD), arXiv 2402.17110.
    Fidelity: checked against the official code of SinKD (value and gradient); its vocabulary reduction is derived.
    """

    needs = frozenset({Signal.LOGITS})

    def __init__(
        self,
        temperature: float = 2.0,
        epsilon: float = 0.1,
        iterations: int = 20,
        granularity: Literal["batch", "sequence", "sample"] = "batch",
        gradient: Literal["plan", "envelope"] = "plan",
        normalize: Literal["mean", "sum"] = "mean",
        top_k: int = 100,
        max_rows: int = 512,
    ) -> None:
        super().__init__()
        _one_of("granularity", granularity, ("batch", "sequence", "sample"))
        _one_of("gradient", gradient, ("plan", "envelope"))
        _one_of("normalize", normalize, ("mean", "sum"))
        transport = {"epsilon": epsilon, "iterations": iterations, "top_k": top_k, "max_rows": max_rows}
        for name, value in {"temperature": temperature, **transport}.items():
            if value <= 0:
                raise ConfigError(f"sinkd.{name}: got {value}; expected a number above 0. Raise it.")
        if granularity == "sample":
            _refuse_options({**transport, "gradient": gradient})
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.granularity, self.gradient, self.normalize = granularity, gradient, normalize
        self.top_k, self.max_rows = top_k, max_rows

    def temperatures(self) -> frozenset[float]:
        """T."""
        return frozenset({self.temperature})

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        """The transport's cost, with its gradient computed here."""
        if teacher is None or teacher.rows is None:
            raise ConfigError("sinkd: it needs a teacher's logits, got none; give a teacher or take it out.")
        count = len(student.rows)  # type: ignore[arg-type]
        if self.granularity == "sample":
            factor = 2.0 * (count if self.normalize == "sum" else 1)
            term = Term(tvd, factor, temperature=self.temperature)
            total, _ = reduce([term], student.rows, teacher.rows)  # type: ignore[arg-type]
        else:
            total = self._coupled(student.rows, teacher.rows, batch, count)  # type: ignore[arg-type]
        return {"total": total, "sinkd": total.detach()}

    def _coupled(
        self, student: DenseRows | HeadRows, teacher: DenseRows | HeadRows | TopKRows, batch: Batch, count: int
    ) -> Tensor:
        """N times the loss of the batch: the student's columns, then the cost's slope in them, then the driver."""
        labels = row_labels(batch)
        chosen = evenly_spaced(count, self.max_rows, labels.device)
        student, teacher = pick(student, chosen), pick(teacher, chosen)
        columns, cost = self._cost(teacher, labels[chosen], student.vocab_size)
        q = look(partial(kept_columns, ids=columns), student, temperature=self.temperature, autocast=True)
        factor = count / max(1, len(q)) if self.normalize == "mean" else count
        apart = self._apart(batch, chosen)
        if not torch.is_grad_enabled():
            return factor * self._loss(cost(q), apart)
        q.requires_grad_()
        value = factor * self._loss(cost(q), apart)
        (slope,) = torch.autograd.grad(value, q)
        term = Term(partial(_along, ids=columns), per_row=(slope,), temperature=self.temperature, needs_teacher=False)
        linear, _ = reduce([term], student, None)
        return value.detach() + linear - linear.detach()

    def _loss(self, cost: Tensor, apart: Tensor | None) -> Tensor:
        plan = sinkhorn(cost, self.epsilon, self.iterations, apart)
        return ((plan.detach() if self.gradient == "envelope" else plan) * cost).sum()

    def _cost(
        self, teacher: DenseRows | HeadRows | TopKRows, labels: Tensor, vocab_size: int
    ) -> tuple[Tensor | None, Callable[[Tensor], Tensor]]:
        """The ids that stay columns (None: all), and the cost [n, n] as a function of the student's columns."""
        if teacher.vocab_size != vocab_size:
            raise ValueError(f"teacher vocabulary is {teacher.vocab_size}, the student's {vocab_size}; cut both")
        if isinstance(teacher, TopKRows):
            if teacher.temperature != self.temperature:
                raise ConfigError(
                    f"sinkd.temperature: got {self.temperature}, but the teacher's rows were recorded at "
                    f"{teacher.temperature}; expected the same. Set temperature={teacher.temperature}."
                )
            ids = teacher.ids[teacher.ids >= 0].unique()
            return ids, partial(_cost_to_top_k, teacher=teacher, place=torch.searchsorted(ids, teacher.ids))
        ids = None
        if self.top_k < vocab_size:
            best = look(lambda log_p: log_p.topk(self.top_k, dim=-1).indices, teacher)
            ids = torch.cat([best.flatten(), labels]).unique()
        p = look(partial(kept_columns, ids=ids), teacher, temperature=self.temperature)
        return ids, lambda q: torch.cdist(q, p.to(q.dtype), p=1)

    def _apart(self, batch: Batch, chosen: Tensor) -> Tensor | None:
        """[n, n], true where two rows are of different sequences; None where all rows are coupled."""
        if self.granularity == "batch":
            return None
        width = batch["labels"].shape[1] if batch["labels"].dim() > 1 else 1
        sequence = supervised_rows(batch)[chosen] // width
        return sequence.unsqueeze(1) != sequence


def sinkhorn(cost: Tensor, epsilon: float, iterations: int, apart: Tensor | None = None) -> Tensor:
    """P = diag(u) exp(-W / epsilon) diag(v) with all row and column sums 1; column sums exactly, rows in the limit.

    Args:
        cost: W, [n, n]. epsilon: > 0. iterations: rows, then columns, in the log domain.
        apart: [n, n] bool, pairs that get no mass; never a whole row or column.

    Returns:
        P, [n, n].
    """
    log_p = -cost / epsilon
    if apart is not None:
        log_p = log_p.masked_fill(apart, float("-inf"))
    for _ in range(iterations):
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
        log_p = log_p - log_p.logsumexp(0, keepdim=True)
    return log_p.exp()


def evenly_spaced(count: int, most: int, device: torch.device) -> Tensor:
    """Indices of at most `most` of `count` rows, at equal distances: the same on every machine and after a resume."""
    size = min(count, most)
    return torch.arange(size, device=device) * count // max(1, size)


def kept_columns(log_p: Tensor, ids: Tensor | None) -> Tensor:
    """Probabilities of the events `ids` [C] and of all others together, [n, V] -> [n, C + 1]; [n, V] if they are all."""
    if ids is None:
        return log_p.exp()
    kept = log_p.index_select(-1, ids).exp()
    return kept if len(ids) == log_p.shape[-1] else torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)


def _along(log_t: Tensor | None, log_s: Tensor, slope: Tensor, *, ids: Tensor | None) -> Tensor:
    """<slope_i, columns of row i>, [n]: linear, so its gradient is that of the loss whose slope it is given."""
    return (kept_columns(log_s, ids) * slope).sum(-1)


def _cost_to_top_k(q: Tensor, teacher: TopKRows, place: Tensor) -> Tensor:
    """W_ij over the K ids of teacher row j and its tail, [n, n]; `place` [n, K] are the ids' columns in `q`."""
    p = teacher.log_probs.to(q.dtype).exp()
    named = (teacher.ids >= 0).to(q.dtype)
    tail = place.shape[-1] != teacher.vocab_size

    def block(q: Tensor, place: Tensor, p: Tensor, named: Tensor) -> Tensor:
        gap = (q[:, place] - p) * named
        distance = gap.abs().sum(-1)
        return distance + gap.sum(-1).abs() if tail else distance  # the tails differ by what the ids do not

    size = max(1, BLOCK_ELEMENTS // max(1, len(q) * place.shape[-1]))
    parts = zip(place.split(size), p.split(size), named.split(size), strict=True)
    return torch.cat([checkpoint(block, q, *part, use_reentrant=False) for part in parts], dim=1)  # type: ignore[arg-type]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown_name(f"sinkd.{name}", value, known)


def _refuse_options(given: dict[str, float | str]) -> None:
    """Raise a ConfigError if an option was set that independent rows have no use for."""
    defaults = {"epsilon": 0.1, "iterations": 20, "top_k": 100, "max_rows": 512, "gradient": "plan"}
    for name, value in given.items():
        if value != defaults[name]:
            raise ConfigError(
                f"sinkd.{name}: got {value}, which has no effect with granularity=sample, where no row is coupled. "
                "Remove it."
            )
