"""Examples to length-bucketed batches, and a model's rows back to one number an example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkd.data.collate import IGNORE, Collator


@dataclass(frozen=True)
class Example:
    """Token ids [T] and labels [T] aligned with them, -100 where a token is not scored."""

    ids: list[int]
    labels: list[int]

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return sum(label != IGNORE for label in self.labels)


def bucketed(examples: Sequence[Example], batch_tokens: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of examples of like length, each of at most `batch_tokens` tokens with padding (or one example).

    Yields:
        (numbers of the examples, batch).
    """
    collate = Collator(pad_token_id=0)  # attention masks and labels tell padding, never the id
    batch: list[int] = []
    for number in sorted(range(len(examples)), key=lambda number: len(examples[number].ids)):
        if batch and (len(batch) + 1) * len(examples[number].ids) > batch_tokens:
            yield batch, _collated(collate, examples, batch)
            batch = []
        batch.append(number)
    if batch:
        yield batch, _collated(collate, examples, batch)


def _collated(collate: Collator, examples: Sequence[Example], numbers: Sequence[int]) -> dict[str, Tensor]:
    return collate([{"input_ids": examples[n].ids, "labels": examples[n].labels} for n in numbers])


def sums_of(values: Tensor, rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Sum a value of each supervised row over its example, in float64: [N] or [N, m] -> [B] or [B, m].

    Args:
        values: of the rows. rows: their flat positions in the batch. size: (B, T) of the batch.
    """
    out = torch.zeros(size[0], *values.shape[1:], dtype=torch.float64, device=values.device)
    return out.index_add_(0, rows // size[1], values.double())
