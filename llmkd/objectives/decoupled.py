"""Losses that treat the label apart from all other tokens: decoupled (DKD) and normalised (NKD) distillation."""

from __future__ import annotations

from torch import Tensor

from llmkd.divergences.numerics import expectation, finite_log, log_ratio
from llmkd.errors import ConfigError
from llmkd.objectives.base import RowObjective
from llmkd.rows import Term
from llmkd.types import Batch, Outputs, Signal, row_labels

NOTHING = -1e30  # the logarithm of no mass at all, finite


def tckd(log_t: Tensor, log_s: Tensor, label: Tensor) -> Tensor:
    """KL of (p_y, 1 - p_y) from (q_y, 1 - q_y), [n] nats: how sure the models are of the label."""
    (label_t, rest_t), (label_s, rest_s) = _split(log_t, label), _split(log_s, label)
    return label_t.exp() * (label_t - label_s) + rest_t.exp() * (rest_t - rest_s)


def nckd(log_t: Tensor, log_s: Tensor, label: Tensor) -> Tensor:
    """KL of p from q among all events but the label, each renormalised, [n] nats; 0 if there is no other event."""
    others, rest_t, rest_s = _others(log_t, log_s, label)
    return expectation(others, log_ratio(log_t, log_s)) - others.sum(-1) * (rest_t - rest_s)


def label_cross_entropy(log_t: Tensor, log_s: Tensor, label: Tensor) -> Tensor:
    """-p_y log q_y, [n] nats."""
    log_p, log_q = (finite_log(x.gather(-1, label.unsqueeze(-1)).squeeze(-1)) for x in (log_t, log_s))
    return -log_p.exp() * log_q


def others_cross_entropy(log_t: Tensor, log_s: Tensor, label: Tensor) -> Tensor:
    """-sum over all events but the label of p^ log q^, renormalised, [n] nats; 0 if there is no other event."""
    others, _, rest_s = _others(log_t, log_s, label)
    return others.sum(-1) * rest_s - expectation(others, finite_log(log_s))


def _others(log_t: Tensor, log_s: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's distribution [n, k] over all events but the label, and log(1 - p_y) of both models, [n]."""
    rest_t, rest_s = _split(log_t, label)[1], _split(log_s, label)[1]
    others = (log_t - rest_t.unsqueeze(-1)).clamp_max(0.0).exp()
    return others.scatter(-1, label.unsqueeze(-1), 0.0), rest_t, rest_s


def _split(log_p: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """log p_y and log(1 - p_y), [n]; the latter from the other events, which keeps its digits where p_y is almost 1."""
    index, log_p = label.unsqueeze(-1), finite_log(log_p)
    return log_p.gather(-1, index).squeeze(-1), log_p.scatter(-1, index, NOTHING).logsumexp(-1)


class DKD(RowObjective):
    """T^2 sum_i (alpha TCKD_i + beta NCKD_i): KL(p || q) = TCKD + (1 - p_y) NCKD, with the factor 1 - p_y let go.

    TCKD compares the two-event distributions (label, rest), NCKD the models' distributions over the rest. Both are true
    divergences. The label is left out exactly, not by a large number on its logit, and the mean is over the supervised
    tokens alone. If the label is not among a teacher's top-k events, the tail event stands for it.

    Args:
        alpha, beta: weights of TCKD and NCKD.
        temperature: T > 0, divides both models' logits.

    Returns:
        `total`, `tckd` and `nckd` (without weights and T^2): nats, summed over the supervised tokens.

    Raises:
        ConfigError: a temperature that is not positive.

    Reference: Zhao et al. 2022 (DKD), arXiv 2203.08679.
    Fidelity: checked against the DKD of TAID's official code (which divides by all positions).
    """

    needs = frozenset({Signal.LOGITS})

    def __init__(self, alpha: float = 1.0, beta: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, _positive("temperature", temperature)

    def temperatures(self) -> frozenset[float]:
        """T."""
        return frozenset({self.temperature})

    def terms(self, student: Outputs, batch: Batch) -> dict[str, Term]:
        """TCKD and NCKD of every supervised row."""
        t2, label = self.temperature**2, row_labels(batch)
        return {
            "tckd": Term(tckd, t2 * self.alpha, temperature=self.temperature, label=label),
            "nckd": Term(nckd, t2 * self.beta, temperature=self.temperature, label=label),
        }


class NKD(RowObjective):
    """sum_i (-p_y log q_y - gamma lambda^2 sum_{c != y} p^_c log q^_c), p^ and q^ renormalised without y, at temperature
    lambda.

    The paper adds the label's cross-entropy: mix it with `cross_entropy`. Both terms are cross-entropies, as published:
    the second is NCKD plus the entropy of p^, which the student cannot change. If the label is not among a teacher's
    top-k events, the tail event stands for it.

    Args:
        gamma: weight of the second term.
        temperature: lambda > 0, of the second term alone.

    Returns:
        `total`, `nkd_label` and `nkd_others` (without gamma lambda^2): nats, summed over the supervised tokens.

    Raises:
        ConfigError: a temperature that is not positive.

    Reference: Yang et al. 2023 (NKD), ICCV, arXiv 2303.13005.
    Fidelity: checked against the official code cls_KD (by reading: the formula, no numbers).
    """

    needs = frozenset({Signal.LOGITS})

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.gamma, self.temperature = gamma, _positive("temperature", temperature)

    def temperatures(self) -> frozenset[float]:
        """1 for the label's term, lambda for the others'."""
        return frozenset({1.0, self.temperature})

    def terms(self, student: Outputs, batch: Batch) -> dict[str, Term]:
        """The label's term and that of all other tokens."""
        label, scale = row_labels(batch), self.gamma * self.temperature**2
        return {
            "nkd_label": Term(label_cross_entropy, label=label),
            "nkd_others": Term(others_cross_entropy, scale, temperature=self.temperature, label=label),
        }


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise ConfigError(f"{name}: got {value}; expected a number above 0, such as 1.0.")
    return value
