"""Universal self-distillation: soft labels that the student makes itself, with a weak head on its middle layer."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor, nn

from llmkd.divergences.closed_form import with_grad
from llmkd.divergences.numerics import expectation, finite_log
from llmkd.errors import ConfigError
from llmkd.objectives.base import Objective
from llmkd.objectives.cross_entropy import nll
from llmkd.rows import DenseRows, HeadRows, Term, look, reduce
from llmkd.support import wide
from llmkd.types import Batch, Loss, Outputs, Signal, row_labels, supervised_rows

NOTHING = -1e30  # the logarithm of no mass at all, finite
SMOOTHING = 0.1


class USKD(Objective):
    """sum_i (-alpha P log q_y - beta sum_{c != y} Z_c log q^_c - mu sum_c y~_c log w_c), q^ renormalised without y.

    P = q_y^2 + 1 - mean(q_y^2) over the batch; Z is Zipf's law, 1 / rank, over all classes but y, ranked by w^_c + q^_c; w is
    the weak head and y~ the label smoothed by 0.1. P and Z have no gradient. The paper adds the label's cross-entropy: mix
    it with `cross_entropy`. The weak head of a causal LM is its own head, frozen, on the middle layer's hidden states,
    brought to the last ones' size: that layer learns to be read. A classifier needs a `weak_head`, on the mean of the
    middle layer's states of each example. The mean in P is one micro-batch's, so its parts do not add up.

    Args:
        alpha, beta, mu: weights of the three terms.
        top_k: classes with a rank of their own; all others share equally what Zipf's law gives them together.
        weak_head: a trainable linear layer, hidden size -> classes, with `weight` and `bias`.

    Returns:
        `total`, `uskd_others` and `uskd_weak` (unweighted): nats, summed over the supervised items.

    Raises:
        ConfigError: top_k below 1, or a classifier without a weak head.

    Reference: Yang et al. 2023 (USKD), ICCV, arXiv 2303.13005.
    Fidelity: checked against the official code cls_KD (by reading; it ranks by log q where the paper has q, and counts y's
    own rank; the port to causal LMs and top_k are derived).
    """

    student_needs = frozenset({Signal.HIDDEN_STATES})

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        top_k: int = 100,
        weak_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if top_k < 1:
            raise ConfigError(f"uskd.top_k: got {top_k}; expected at least 1, such as 100.")
        self.alpha, self.beta, self.mu, self.top_k, self.weak_head = alpha, beta, mu, top_k, weak_head

    def row_modules(self) -> list[nn.Module]:
        """The weak head, whose weights are used chunk by chunk."""
        return list(self.children())

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        """Look at q_y, then the label's and the others' terms in one pass over the head, then the weak head's."""
        rows, label = student.rows, row_labels(batch)
        weak = self._weak_rows(student, batch)
        worth = look(_label_probability, rows, label, autocast=True).square()  # type: ignore[arg-type]
        weights = worth + 1 - worth.sum() / max(1, len(worth))
        others = partial(zipf_cross_entropy, top_k=self.top_k)
        terms = [
            Term(nll, self.alpha, weights=weights, label=label, needs_teacher=False),
            Term(others, self.beta, label=label),
        ]
        total, sums = reduce(terms, rows, weak.cast(autocast=True))  # type: ignore[arg-type]
        smoothed = Term(smoothed_nll, self.mu, label=label, needs_teacher=False)
        weak_total, weak_sums = reduce([smoothed], weak, None)
        return {"total": total + weak_total, "uskd_others": sums[1], "uskd_weak": weak_sums[0]}

    def _weak_rows(self, student: Outputs, batch: Batch) -> HeadRows:
        """Rows of the weak head; gradients reach the middle layer and a head of its own."""
        states: tuple[Tensor, ...] = student.hidden_states  # type: ignore[assignment]
        middle, rows = _of_items(states[(len(states) - 1) // 2], batch), student.rows
        if self.weak_head is not None:
            return HeadRows(middle, self.weak_head, vocab_size=rows.vocab_size)  # type: ignore[union-attr]
        if isinstance(rows, DenseRows):
            raise ConfigError(
                f"uskd: got a classifier without a weak head; expected one. Set weak_head=nn.Linear({middle.shape[-1]}, "
                f"{rows.vocab_size})."
            )
        hidden, *head = rows.tensors()  # type: ignore[union-attr]
        scaled = middle * (_size(hidden.detach()) / _size(middle)).to(middle.dtype)
        return rows.using([scaled, *(tensor.detach() for tensor in head)])  # type: ignore[union-attr, return-value]


def zipf_labels(log_w: Tensor, log_s: Tensor, label: Tensor, top_k: int) -> Tensor:
    """Z [n, k]: 1 / rank of w^_c + q^_c among all events but the label, where it is 0; every row sums to 1."""
    index, others = label.unsqueeze(-1), log_s.shape[-1] - 1
    score = _without(log_w, index).softmax(-1) + _without(log_s, index).softmax(-1)
    ranked = min(top_k, others)
    best = score.scatter(-1, index, -1.0).topk(ranked, dim=-1).indices
    head = 1.0 / torch.arange(1, ranked + 1, device=log_s.device, dtype=log_s.dtype)
    tail = (_harmonic(others) - _harmonic(ranked)) / max(1, others - ranked)
    zipf = torch.full_like(log_s, tail).scatter(-1, best, head.expand_as(best)).scatter(-1, index, 0.0)
    return zipf / _harmonic(others)


def _zipf(log_w: Tensor, log_s: Tensor, label: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
    target, rest = zipf_labels(log_w, log_s, label, top_k), _without(log_s, label.unsqueeze(-1))
    value = rest.logsumexp(-1) - expectation(target, finite_log(log_s))
    return value, rest.softmax(-1).sub_(target)


@with_grad(_zipf)
def zipf_cross_entropy(log_w: Tensor, log_s: Tensor, label: Tensor, *, top_k: int) -> Tensor:
    """-sum_{c != y} Z_c log q^_c, [n] nats; Z has no gradient."""
    target = zipf_labels(log_w, log_s.detach(), label, top_k)
    return _without(log_s, label.unsqueeze(-1)).logsumexp(-1) - expectation(target, finite_log(log_s))


def _smoothed(log_t: Tensor | None, log_w: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    slope, index = log_w.exp() - SMOOTHING / log_w.shape[-1], label.unsqueeze(-1)
    return smoothed_nll(log_t, log_w, label), slope.scatter_add_(-1, index, slope.new_full(index.shape, SMOOTHING - 1))


@with_grad(_smoothed)
def smoothed_nll(log_t: Tensor | None, log_w: Tensor, label: Tensor) -> Tensor:
    """-0.9 log w_y - 0.1 mean_c log w_c, [n] nats."""
    return (1 - SMOOTHING) * nll(log_t, log_w, label) - SMOOTHING * finite_log(log_w).mean(-1)


def _without(log_p: Tensor, index: Tensor) -> Tensor:
    return finite_log(log_p).scatter(-1, index, NOTHING)


def _label_probability(log_p: Tensor, label: Tensor) -> Tensor:
    return log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1).exp()


def _of_items(states: Tensor, batch: Batch) -> Tensor:
    """[B, T, H] -> [N, H]: of a text the supervised positions, of an example the mean over its tokens."""
    if batch["labels"].dim() > 1:
        return states.flatten(0, 1).index_select(0, supervised_rows(batch))
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return ((states * mask).sum(1) / mask.sum(1)).index_select(0, supervised_rows(batch))


def _size(hidden: Tensor) -> Tensor:
    """Root mean square of each row, [n, H] -> [n, 1]."""
    return wide(hidden).square().mean(-1, keepdim=True).add(1e-12).sqrt()


@cache
def _harmonic(count: int) -> float:
    """1 + 1/2 + ... + 1/count."""
    return sum(1 / i for i in range(1, count + 1))
