"""A teacher's rows made of several models' rows, chunk by chunk: the mean of their probabilities, or the surer's row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkd.heads import DenseRows, HeadRows
from llmkd.support import log_softmax, wide


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

    def space(self, rows: int) -> None:
        """What `block` writes into: nothing."""

    def block(self, rows: slice, space: Tensor | None = None) -> DenseRows:
        """Some of the rows, computed now."""
        return DenseRows(self.logits(rows))

    def align(self, rows: slice, log_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities on the same V events; see `support.pair`."""
        return self.block(rows).align(slice(None), log_s, temperature)


class SurerRows:
    """Row i is the first model's where it is surer than the second, p_y > r_y or else max p > max r; else the second's.

    Args:
        first, second: rows of one vocabulary, n each. label: [n] token ids, or None to compare the largest probabilities.
    """

    def __init__(self, first: Any, second: DenseRows | HeadRows, label: Tensor | None) -> None:
        self.first, self.second, self.label = first, second, label

    def __len__(self) -> int:
        return len(self.second)

    @property
    def vocab_size(self) -> int:
        return self.second.vocab_size

    def tensors(self) -> list[Tensor]:
        """The first's tensors, then the second's."""
        return [*self.first.tensors(), *self.second.tensors()]

    def using(self, tensors: Sequence[Tensor]) -> SurerRows:
        """The same rows computed from other tensors."""
        cut = len(self.first.tensors())
        return SurerRows(self.first.using(tensors[:cut]), self.second.using(tensors[cut:]), self.label)

    def cast(self, autocast: bool) -> SurerRows:
        """Each in one dtype."""
        return SurerRows(self.first.cast(autocast), self.second.cast(autocast), self.label)

    def pick(self, chosen: Tensor) -> SurerRows:
        """The rows of these indices."""
        label = None if self.label is None else self.label[chosen]
        return SurerRows(self.first.pick(chosen), self.second.pick(chosen), label)

    def logits(self, rows: slice) -> Tensor:
        """Logits of some rows, [m, V], each of one of the models."""
        first, second = wide(self.first.logits(rows)), wide(self.second.logits(rows))
        if first.shape != second.shape:
            raise ValueError(f"teacher vocabulary is {first.shape[-1]}, the student's {second.shape[-1]}; cut both")
        label = None if self.label is None else self.label[rows]
        chosen = _log_sureness(first, label) > _log_sureness(second, label)
        return torch.where(chosen.unsqueeze(-1), first, second)

    def space(self, rows: int) -> None:
        """What `block` writes into: nothing."""

    def block(self, rows: slice, space: Tensor | None = None) -> DenseRows:
        """Some of the rows, computed now."""
        return DenseRows(self.logits(rows))

    def align(self, rows: slice, log_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities on the same V events; see `support.pair`."""
        return self.block(rows).align(slice(None), log_s, temperature)


def _log_sureness(z: Tensor, label: Tensor | None) -> Tensor:
    """log p_y, or log max p without labels, of logits [m, V]: [m] nats."""
    best = z.amax(-1) if label is None else z.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    return best - z.logsumexp(-1)
