"""The training order: a function of the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """A shuffle of each epoch; with a group size, batches of that many rows hold rows of like length.

    Args:
        dataset: with a `length` column, or rows with `input_ids`, where lengths are needed.
        seed: with the epoch number, all that the order depends on.
        group: rows of one optimizer step over all ranks, or 0 for a plain shuffle.
    """

    def __init__(self, dataset: Any, seed: int, group: int = 0) -> None:
        self.size, self.seed, self.group, self.epoch = len(dataset), seed, group, 0
        self.lengths = _lengths(dataset) if group else []

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if not self.group:
            return iter(torch.randperm(self.size, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


def _lengths(dataset: Any) -> list[int]:
    if "length" in getattr(dataset, "column_names", ()):
        return list(dataset["length"])
    return [len(row["input_ids"]) for row in dataset]
