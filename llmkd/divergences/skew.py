"""Skew KL and skew reverse KL: a share of the first argument mixed into the second keeps both finite."""

from __future__ import annotations

from torch import Tensor

from llmkd.divergences.closed_form import through_softmax, with_grad
from llmkd.divergences.numerics import expectation, finite_log, log_mixture, mixture, open_unit, probabilities


def _skew_kl(log_t: Tensor, log_s: Tensor, *, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    open_unit("alpha", alpha, "use forward_kl", "the value is always 0")
    p, q = probabilities(log_t), probabilities(log_s)
    m = mixture(p, q, alpha)
    share = (p / m).mul_(q).mul_(alpha - 1)  # -(1 - alpha) p q / m
    return expectation(p, finite_log(log_t).sub_(m.log_())), through_softmax(share, q)


@with_grad(_skew_kl)
def skew_kl(log_t: Tensor, log_s: Tensor, *, alpha: float = 0.1) -> Tensor:
    """SKL_a(p, q) = KL(p || a p + (1 - a) q), p = teacher, q = student.

    Args:
        log_t, log_s: [n, k] log-probabilities, nats.
        alpha: share of the teacher in the second argument, in (0, 1).

    Returns:
        [n] nats, in [0, -log alpha].

    Raises:
        ConfigError: alpha is not in (0, 1).

    Reference: Ko et al. 2024 (DistiLLM), arXiv 2402.03898.
    Fidelity: checked against the official code of DistiLLM (CE form minus teacher entropy).
    """
    open_unit("alpha", alpha, "use forward_kl", "the value is always 0")
    p = log_t.exp()
    return expectation(p, finite_log(log_t) - log_mixture(p, log_s.exp(), alpha))


def _skew_reverse_kl(log_t: Tensor, log_s: Tensor, *, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    open_unit("alpha", alpha, "use reverse_kl", "the value is always 0")
    q = probabilities(log_s)
    m = mixture(q, probabilities(log_t), alpha)
    share = (q / m).mul_(-alpha)
    ratio = finite_log(log_s).sub_(m.log_())
    slope = share.add_(ratio).add_(1.0).mul_(q)
    return expectation(q, ratio), through_softmax(slope, q)


@with_grad(_skew_reverse_kl)
def skew_reverse_kl(log_t: Tensor, log_s: Tensor, *, alpha: float = 0.1) -> Tensor:
    """SRKL_a(p, q) = KL(q || (1 - a) p + a q), p = teacher, q = student; the gradient runs through the mixture too.

    Args:
        log_t, log_s: [n, k] log-probabilities, nats.
        alpha: share of the student in the second argument, in (0, 1).

    Returns:
        [n] nats, in [0, -log alpha].

    Raises:
        ConfigError: alpha is not in (0, 1).

    Reference: Ko et al. 2024 (DistiLLM), arXiv 2402.03898.
    Fidelity: checked against the official code of DistiLLM.
    """
    open_unit("alpha", alpha, "use reverse_kl", "the value is always 0")
    q = log_s.exp()
    return expectation(q, finite_log(log_s) - log_mixture(q, log_t.exp(), alpha))
