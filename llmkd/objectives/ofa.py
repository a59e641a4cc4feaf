"""One-for-all distillation: a target that believes the label more than the teacher does."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from llmkd.divergences.closed_form import with_grad
from llmkd.divergences.numerics import expectation, finite_log
from llmkd.errors import ConfigError
from llmkd.objectives.base import RowObjective
from llmkd.rows import Term
from llmkd.types import Batch, Outputs, Signal, row_labels


def _ofa(log_t: Tensor, log_s: Tensor, label: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
    target = ofa_target(log_t, label, gamma)
    value = -expectation(target, finite_log(log_s))
    return value, (log_s.exp() * target.sum(-1, keepdim=True)).sub_(target)


@with_grad(_ofa)
def ofa(log_t: Tensor, log_s: Tensor, label: Tensor, *, gamma: float) -> Tensor:
    """-sum_c [(p_c + 1[c = y])^gamma - 1[c = y]] log q_c, [n] nats."""
    return -expectation(ofa_target(log_t, label, gamma), finite_log(log_s))


def ofa_target(log_t: Tensor, label: Tensor, gamma: float) -> Tensor:
    """(p + 1[y])^gamma - 1[y], [n, k]: the teacher's p at gamma = 1; above, more on the label and less on all others."""
    p, index = log_t.exp(), label.unsqueeze(-1)
    return p.pow(gamma).scatter(-1, index, (p.gather(-1, index) + 1).pow(gamma) - 1)


class OFA(RowObjective):
    """sum_i -sum_c [(p_c + 1[c = y])^gamma - 1[c = y]] log q_c: cross-entropy with a target that favours the label.

    gamma = 1 is the forward KL plus the teacher's entropy. The target does not sum to 1. The paper adds the label's
    cross-entropy (mix it with `cross_entropy`) and the same loss on exits of inner layers, which are not here. On top-k
    rows the powers are those of the K events and the tail; if the label is not among them, the tail stands for it.

    Args:
        gamma: at least 1; the paper's range is [1, 1.5].

    Returns:
        `total` and `ofa`: nats, summed over the supervised tokens.

    Raises:
        ConfigError: gamma is below 1.

    Reference: Hao et al. 2023 (OFA-KD), arXiv 2310.19444.
    Fidelity: checked against the official code OFAKD (by reading: the formula, no numbers; the final logits alone).
    """

    needs = frozenset({Signal.LOGITS})

    def __init__(self, gamma: float = 1.5) -> None:
        super().__init__()
        if gamma < 1:
            raise ConfigError(f"ofa.gamma: got {gamma}; expected at least 1, such as 1.5.")
        self.gamma = gamma

    def terms(self, student: Outputs, batch: Batch) -> dict[str, Term]:
        """The cross-entropy of every supervised row."""
        return {"ofa": Term(partial(ofa, gamma=self.gamma), label=row_labels(batch))}
