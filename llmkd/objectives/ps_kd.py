"""Progressive self-distillation: the labels, softened by what the student itself said an epoch ago."""

from __future__ import annotations

import sys
from functools import partial

from torch import Tensor

from llmkd.divergences.closed_form import with_grad
from llmkd.divergences.numerics import expectation, finite_log
from llmkd.errors import ConfigError
from llmkd.objectives.base import RowObjective
from llmkd.objectives.cross_entropy import nll
from llmkd.rows import Term
from llmkd.types import Batch, Outputs, Signal, row_labels


def _softened(log_t: Tensor, log_s: Tensor, label: Tensor, *, share: float) -> tuple[Tensor, Tensor]:
    target = softened_label(log_t, label, share)
    return -expectation(target, finite_log(log_s)), log_s.exp().sub_(target)


@with_grad(_softened)
def softened_cross_entropy(log_t: Tensor, log_s: Tensor, label: Tensor, *, share: float) -> Tensor:
    """-sum_c [(1 - share) 1[c = y] + share p_c] log q_c, [n] nats."""
    return -expectation(softened_label(log_t, label, share), finite_log(log_s))


def softened_label(log_t: Tensor, label: Tensor, share: float) -> Tensor:
    """(1 - share) 1[y] + share p, [n, k]: it sums to 1."""
    target = log_t.exp().mul_(share)
    return target.scatter_add_(-1, label.unsqueeze(-1), target.new_full((len(label), 1), 1 - share))


class PSKD(RowObjective):
    """sum_i -sum_c [(1 - a) 1[c = y] + a p_c] log q_c, a = alpha (e + 1) / E in epoch e of E, but 0 in the first epoch.

    Give it the teacher `previous_epoch`. In the first epoch, which has no previous one, it is the labels' cross-entropy and
    projects no teacher. The gradient in q's logits is q - target. On top-k rows the labels outside them are the tail's.

    Args:
        alpha: the previous epoch's share of the target in the last epoch, above 0 and at most 1.

    Returns:
        `total` and `ps_kd`: nats, summed over the supervised tokens.

    Raises:
        ConfigError: alpha is out of range; in training, a run of one epoch, or of data whose length is unknown.

    Reference: Kim et al. 2021 (PS-KD), ICCV, arXiv 2006.12000.
    Fidelity: checked against the official code PS-KD-Pytorch (by reading; it stores what was said during the last epoch).
    """

    needs = frozenset({Signal.LOGITS})

    def __init__(self, alpha: float = 0.8) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise ConfigError(f"ps_kd.alpha: got {alpha}; expected above 0 and at most 1, such as 0.8.")
        self.alpha = self.share = alpha

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """The share of this epoch."""
        if not 1 < epochs < sys.maxsize:
            got = "a run of one epoch" if epochs == 1 else "data of unknown length"
            raise ConfigError(
                f"ps_kd: got {got}; expected at least 2 epochs, as the first has no previous one. "
                "Set train.num_train_epochs=2 or more, or train.max_steps to more steps than an epoch has."
            )
        self.share = self.alpha * (epoch + 1) / epochs if epoch else 0.0

    def terms(self, student: Outputs, batch: Batch) -> dict[str, Term]:
        """The cross-entropy of every supervised row with its softened label."""
        label = row_labels(batch)
        if self.share == 0:
            return {"ps_kd": Term(nll, label=label, needs_teacher=False)}
        return {"ps_kd": Term(partial(softened_cross_entropy, share=self.share), label=label)}

    def logs(self) -> dict[str, float]:
        """The previous epoch's share of the target."""
        return {"ps_kd_share": self.share}
