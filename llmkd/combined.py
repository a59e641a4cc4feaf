"""A teacher's rows made of several models' rows, chunk by chunk: the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmkd.heads import DenseRows, HeadRows
from llmkd.support import log_softmax


def mean_rows(parts: Sequence[DenseRows | HeadRows]) -> DenseRows | HeadRows | MeanRows:
    """The rows of one model as they are, those of several as their mean."""
    return parts[0] if len(parts) == 1 else MeanRows(parts)


class MeanRows:
    """z = log (1/K sum_k softmax(z_k)): rows whose probabilities are the mean of K models'; a temperature acts on the mean.

    Args:
        parts: K rows of one vocabulary, n each.
    """

    def __init__(self, parts: Sequence[DenseRows | HeadRows]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def vocab_size(self) -> int:
        return self.parts[0].vocab_size

    def tensors(self) -> list[Tensor]:
        """The tensors of all parts, one after the other."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def using(self, tensors: Sequence[Tensor]) -> MeanRows:
        """The same rows computed from other tensors."""
        given = iter(tensors)
        return MeanRows([part.using([next(given) for _ in part.tensors()]) for part in self.parts])

    def cast(self, autocast: bool) -> MeanRows:
        """Each part in one dtype."""
        return MeanRows([part.cast(autocast) for part in self.parts])

    def pick(self, chosen: Tensor) -> MeanRows:
        """The rows of these indices."""
        return MeanRows([part.pick(chosen) for part in self.parts])

    def logits(self, rows: slice) -> Tensor:
        """log of the mean probability of some rows, [m, V]."""
        total = log_softmax(self.parts[0].logits(rows))
        for part in self.parts[1:]:
            total = torch.logaddexp(total, log_softmax(part.logits(rows)))
        return total - math.log(len(self.parts))

    def block(self, rows: slice) -> DenseRows:
        """Some of the rows, computed now."""
        return DenseRows(self.logits(rows))

    def align(self, rows: slice, log_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities on the same V events; see `support.pair`."""
        return self.block(rows).align(slice(None), log_s, temperature)
