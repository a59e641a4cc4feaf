"""Supervised cross-entropy on the labels, through the same driver as the divergences."""

from __future__ import annotations

from torch import Tensor

from llmkd.divergences.closed_form import with_grad
from llmkd.divergences.numerics import probabilities
from llmkd.objectives.base import RowObjective
from llmkd.rows import Term
from llmkd.types import Batch, Outputs, row_labels


def _nll(log_t: Tensor | None, log_s: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    index = label.unsqueeze(-1)
    slope = probabilities(log_s)
    return nll(log_t, log_s, label), slope.scatter_add_(-1, index, slope.new_full(index.shape, -1.0))


@with_grad(_nll)
def nll(log_t: Tensor | None, log_s: Tensor, label: Tensor) -> Tensor:
    """-log q(y), [n] nats; the teacher's rows are not read."""
    return -log_s.gather(-1, label.unsqueeze(-1)).squeeze(-1)


class CrossEntropy(RowObjective):
    """-sum_i log q_i(y_i): the language-modelling loss on the supervised tokens. It needs no teacher.

    Returns:
        `total` and `cross_entropy`: nats, summed over the supervised tokens.

    Reference: the maximum-likelihood baseline of every distillation paper.
    Fidelity: checked against torch's cross_entropy.
    """

    def terms(self, student: Outputs, batch: Batch) -> dict[str, Term]:
        """The negative log-likelihood of every supervised row's label."""
        return {"cross_entropy": Term(nll, label=row_labels(batch), needs_teacher=False)}
