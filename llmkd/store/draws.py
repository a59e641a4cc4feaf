"""Draws at equal steps: as many teeth of a comb as there are draws fall on the line on which tokens lie end to end."""

from __future__ import annotations

import torch
from torch import Tensor

EDGE = 1e-9  # keeps an offset from 0 and 1, so that rounding cannot lose a draw or add one


def offsets(rows: int, seed: int) -> Tensor:
    """Where each row's comb begins, [rows] in (0, 1): of a seed alone, whatever the device."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(rows, dtype=torch.float64, generator=generator).clamp(EDGE, 1.0 - EDGE)


def comb(expected: Tensor, offset: Tensor, most: int) -> Tensor:
    """The drawn tokens of each row, rising: v as often as j - u, j = 1, 2, ..., falls between S_(v-1) and S_v.

    S is the running sum of `expected`. Over u a token is drawn expected_v times in the mean, and always that number rounded
    down or up; so is the number of a row's draws: no other draws of that mean have a smaller variance of each.

    Args:
        expected: [n, V], at least 0. offset: u, [n]. most: draws of a row, as many as its sum rounded up.

    Returns:
        [n, most] token ids, V where a row has fewer.

    Reference: Madow 1949 (systematic sampling), Annals of Mathematical Statistics 20(3).
    """
    ends = expected.cumsum(-1, dtype=torch.float64)
    teeth = torch.arange(1, most + 1, device=ends.device) - offset.to(ends.device).unsqueeze(-1)
    return torch.searchsorted(ends, teeth)
