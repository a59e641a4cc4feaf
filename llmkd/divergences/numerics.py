"""Sums over events that stay finite, in value and in gradient, where a probability is zero.

Written with adds, products and clamps alone: on a CPU a comparison or `where` costs as much as ten of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmkd.errors import ConfigError

LOG_ZERO = math.log(torch.finfo(torch.float32).tiny)
"""What log 0 counts as (-87.3 nats): an event that one model rules out is dear to the other, not infinitely so."""


def log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a - log b, where -inf counts as LOG_ZERO."""
    return finite_log(log_a) - finite_log(log_b)


def finite_log(log_p: Tensor) -> Tensor:
    """log p with -inf replaced by LOG_ZERO."""
    return torch.nan_to_num(log_p, nan=math.nan, neginf=LOG_ZERO)


def probabilities(log_p: Tensor) -> Tensor:
    """exp(log_p) of rows that sum to 1, without a graph; on a CPU a softmax is the fastest way to it."""
    return torch.softmax(log_p, -1) if log_p.device.type == "cpu" else log_p.exp()


def expectation(p: Tensor, values: Tensor) -> Tensor:
    """sum_v p(v) values(v), [n, k] x [n, k] -> [n]."""
    return torch.linalg.vecdot(p, values)


def log_mixture(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """log(weight * p + (1 - weight) * q) of probabilities; without a gradient where both are 0."""
    return mixture(p, q, weight).log()


def mixture(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """weight * p + (1 - weight) * q of probabilities, and never 0."""
    return torch.lerp(q, p, weight).clamp_min(torch.finfo(p.dtype).tiny)


def open_unit(name: str, value: float, at_zero: str, at_one: str) -> None:
    """Raise a ConfigError unless 0 < value < 1; the message names what the two ends stand for."""
    if not 0.0 < value < 1.0:
        raise ConfigError(
            f"{name}: got {value}; expected 0 < {name} < 1. For {name}=0 {at_zero}, for {name}=1 {at_one}."
        )
