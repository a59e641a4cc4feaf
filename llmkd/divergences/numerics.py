"""Products and mixtures of probabilities that stay finite, in value and in gradient, where a probability is zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmkd.errors import ConfigError

LOG_ZERO = math.log(torch.finfo(torch.float32).tiny)
"""What log 0 counts as where it divides (-87.3 nats): an event that the teacher rules out is dear, not infinite."""


def times_log(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio, with 0 * anything = 0."""
    zero = p == 0
    return torch.where(zero, 0.0, p) * torch.where(zero, 0.0, log_ratio)


def floor_log(log_p: Tensor) -> Tensor:
    """log_p with -inf replaced by LOG_ZERO."""
    return torch.where(log_p == -torch.inf, LOG_ZERO, log_p)


def mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight * a + (1 - weight) * b) for 0 < weight < 1; -inf, without a gradient, where both are 0."""
    a, b = log_a + math.log(weight), log_b + math.log1p(-weight)
    empty = torch.maximum(a, b) == -torch.inf
    mixed = torch.logaddexp(torch.where(empty, 0.0, a), torch.where(empty, 0.0, b))
    return torch.where(empty, -torch.inf, mixed)


def open_unit(name: str, value: float, at_zero: str, at_one: str) -> None:
    """Raise a ConfigError unless 0 < value < 1; the message names what the two ends stand for."""
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{name}: got {value}; expected 0 < {name} < 1. For {name}=0 {at_zero}, for {name}=1 {at_one}.")
