"""Fixture A of the method notes: four tokens, two positions that count, and the labels they predict."""

from __future__ import annotations

import torch
from torch import Tensor

Z_S = torch.tensor([[1.0, 0.5, -0.5, 0.0], [0.2, -0.1, 0.4, 0.3]], dtype=torch.float64)
Z_T = torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.0, 1.0, -0.5, 0.25]], dtype=torch.float64)
LABEL = torch.tensor([0, 1])


def logs(*logits: Tensor) -> tuple[Tensor, ...]:
    """log softmax of each."""
    return tuple(z.log_softmax(-1) for z in logits)


def rows(*probabilities: list[float]) -> tuple[Tensor, ...]:
    """One row of log-probabilities each."""
    return tuple(torch.tensor([p], dtype=torch.float64).log() for p in probabilities)


def exact(actual: Tensor, expected: object, atol: float = 1e-8) -> None:
    """Equal to the last digit that was noted."""
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)
