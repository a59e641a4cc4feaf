"""Sums that stay on the device until somebody asks for means: no host sync in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmkd.distributed import sum_over_ranks


class Meter:
    """Adds named sums and their common count; `means` reduces over ranks with one all-reduce and one host sync."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add detached scalars; the names must be the same on every rank."""
        for name, value in sums.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def totals(self) -> dict[str, float]:
        """Sums over everything added, on all ranks; resets the meter."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        values = sum_over_ranks(torch.stack([self.sums[name] for name in names])).tolist()
        self.sums = {}
        return dict(zip(names, values, strict=True))


def passed(history: Sequence[Mapping[str, float]], tokens: float, seconds: float) -> dict[str, float]:
    """`tokens_seen` in training and wall `seconds` since the run began: those of the last entry, and what came since."""
    last = next((entry for entry in reversed(history) if "seconds" in entry), {})
    seen = last.get("tokens_seen", 0) + int(tokens)
    return {"tokens_seen": seen, "seconds": round(last.get("seconds", 0.0) + seconds, 3)}
