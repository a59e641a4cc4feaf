"""What a store keeps of a teacher's rows: `encode` makes an example's rows bytes, `decode` and `join` bring them back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkd.events import TopKRows
from llmkd.heads import DenseRows, HeadRows
from llmkd.rows import BUDGET_MB, chunk_slices
from llmkd.support import log_softmax
from llmkd.types import Signal


class Codec(ABC):
    """One way to keep rows; its constructor's arguments tell all of it.

    Attributes:
        provides: what a teacher shows whose rows are kept so. temperature: at which they are, or None for any.
        keeps_head: whether the rows are hidden states, and the teacher's head is kept once beside them.
    """

    provides: frozenset[Signal]
    temperature: float | None = None
    keeps_head: bool = False

    @abstractmethod
    def encode(self, rows: HeadRows, labels: Tensor, seed: int) -> bytes:
        """One example's rows [n, V], which predict `labels` [n]; `seed` is the example's own, for what is drawn."""

    @abstractmethod
    def decode(self, data: np.ndarray, rows: int, width: int) -> Any:
        """What `encode` wrote of n rows (uint8), as arrays; `width` is V, or H of hidden states. ValueError if damaged."""

    @abstractmethod
    def join(self, parts: Sequence[Any], device: Any, head: HeadRows | None, vocab_size: int) -> HeadRows | TopKRows:
        """The rows of several examples, end to end; `head` has the teacher's head, where it is kept."""


def log_probs(rows: DenseRows | HeadRows, temperature: float = 1.0) -> Iterator[tuple[slice, Tensor]]:
    """log softmax(z / T) of a few rows at a time, with their place: never all [n, V] at once."""
    rows = rows.cast(autocast=False)
    for part in chunk_slices(rows, rows.tensors(), BUDGET_MB, None, tiled=False):
        yield part, log_softmax(rows.logits(part), temperature)


def padded(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], vocab_size: int, device: Any
) -> tuple[Tensor, Tensor]:
    """(events a row, ids, log-probabilities) of several examples as ids and log-probabilities [n, K], -1 and -inf beyond.

    K is the longest row's; one more if that one alone has all V tokens, as K = V says that every row has.
    """
    nothing = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    counts, ids, values = (np.concatenate(arrays) for arrays in zip(nothing, *parts, strict=True))
    width = int(counts.max(initial=1))
    named = np.arange(width + (width == vocab_size and counts.min(initial=width) < width)) < counts[:, None]
    out_ids, out_values = np.full(named.shape, -1, dtype=np.int64), np.full(named.shape, -np.inf, dtype=np.float32)
    out_ids[named], out_values[named] = ids, values
    return torch.from_numpy(out_ids).to(device), torch.from_numpy(out_values).to(device)
