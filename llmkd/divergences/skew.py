"""Skew KL and skew reverse KL: a share of the first argument mixed into the second keeps both finite."""

from __future__ import annotations

import math

from torch import Tensor

from llmkd.divergences.closed_form import through_softmax, with_grad
from llmkd.divergences.numerics import floor_log, mixture, open_unit, times_log


def _skew_kl_grad(log_t: Tensor, log_s: Tensor, *, alpha: float = 0.1) -> Tensor:
    log_m = floor_log(mixture(log_t, log_s, alpha))
    return through_softmax(-(log_t + log_s + math.log1p(-alpha) - log_m).exp(), log_s)


@with_grad(_skew_kl_grad)
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
    return times_log(log_t.exp(), log_t - mixture(log_t, log_s, alpha)).sum(-1)


def _skew_reverse_kl_grad(log_t: Tensor, log_s: Tensor, *, alpha: float = 0.1) -> Tensor:
    log_m = floor_log(mixture(log_s, log_t, alpha))
    share = (log_s + math.log(alpha) - log_m).exp()
    return through_softmax(log_s.exp() * (floor_log(log_s) - log_m + 1.0 - share), log_s)


@with_grad(_skew_reverse_kl_grad)
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
    return times_log(log_s.exp(), log_s - mixture(log_s, log_t, alpha)).sum(-1)
