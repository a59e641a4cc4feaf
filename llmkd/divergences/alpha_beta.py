"""The alpha-beta divergence, continuous over all its limits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmkd.divergences.closed_form import through_softmax, with_grad
from llmkd.divergences.numerics import expectation, finite_log
from llmkd.errors import ConfigError


def _alpha_beta(log_t: Tensor, log_s: Tensor, *, alpha: float = 0.5, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    a, b = finite_log(log_t), finite_log(log_s)
    power = a - b if alpha == 0 else ((alpha * a).exp() - (alpha * b).exp()) / alpha
    slope = -(beta * b).exp() * power  # q^beta (q^alpha - p^alpha) / alpha
    return alpha_beta(log_t, log_s, alpha=alpha, beta=beta), through_softmax(slope, log_s.exp())


@with_grad(_alpha_beta)
def alpha_beta(log_t: Tensor, log_s: Tensor, *, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """D(p || q) = -1/(a b) sum_v [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], a = alpha, b = beta.

    (1, 0) is the forward KL, (0, 1) the reverse KL, a + b = 1 the alpha-divergence, (0.5, 0.5) 4 (1 - sum sqrt(p q)),
    (1, 1) half the squared distance, (0, 0) half the squared distance of the logs. Zero a, b or a + b give the limits
    exactly. `alpha` says how much the teacher's large events count, `beta` how much the student's do.

    Args:
        log_t, log_s: [n, k] log-probabilities, nats.
        alpha, beta: finite; in [0, 1] as a rule. With a negative one, or (0, 0), events that have hardly any probability
            dominate the sum, which may overflow.

    Returns:
        [n], in [0, inf).

    Raises:
        ConfigError: alpha or beta is not finite.

    Reference: Wang et al. 2025 (ABKD), arXiv 2505.04560.
    Fidelity: checked against the official code of ABKD (five settings).
    """
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise ConfigError(f"alpha_beta: got alpha={alpha}, beta={beta}; expected finite numbers, such as 0.2 and 0.7.")
    a, b = finite_log(log_t), finite_log(log_s)
    lower, higher = (b - a).clamp_max(0.0), (a - b).clamp_max(0.0)  # one is 0, and then adds exactly 0 below
    total = alpha + beta
    return expectation((total * a).exp(), _excess(beta, alpha, lower)) + expectation(
        (total * b).exp(), _excess(alpha, beta, higher)
    )


def _excess(one: float, other: float, d: Tensor) -> Tensor:
    """(f(one + other) - f(one)) / other with f(x) = (e^(x d) - 1) / x: an event's share, relative to its larger side."""
    if other != 0:
        return (_growth(one + other, d) - _growth(one, d)) / other
    return d * d / 2 if one == 0 else (d * (one * d).exp() - _growth(one, d)) / one


def _growth(x: float, d: Tensor) -> Tensor:
    return d if x == 0 else torch.expm1(x * d) / x
