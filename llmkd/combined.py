"""A teacher's rows made of several models' rows, chunk by chunk: the mean of their probabilities, the surer's, the owner's."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from llmkd.heads import DenseRows, HeadRows
from llmkd.support import log_softmax, wide


def mean_rows(parts: Sequence[Any]) -> Any:
    """The rows of one model as they are, those of several as their mean."""
    return parts[0] if len(parts) == 1 else MeanRows(parts)


class Combined(ABC):
    """What they share: rows over the whole vocabulary of one tokenizer, computed from `parts` when a chunk is read."""

    parts: list[Any]

    @abstractmethod
    def of(self, parts: list[Any]) -> Self:
        """The same combination of other parts."""

    @abstractmethod
    def pick(self, chosen: Tensor) -> Self:
        """The rows of these indices."""

    @abstractmethod
    def logits(self, rows: slice) -> Tensor:
        """Logits of some rows, [m, V]."""

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def vocab_size(self) -> int:
        return self.parts[0].vocab_size

    def tensors(self) -> list[Tensor]:
        """The tensors of all parts, one after the other."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def using(self, tensors: Sequence[Tensor]) -> Self:
        """The same rows computed from other tensors."""
        given = iter(tensors)
        return self.of([part.using([next(given) for _ in part.tensors()]) for part in self.parts])

    def cast(self, autocast: bool) -> Self:
        """Each part in one dtype."""
        return self.of([part.cast(autocast) for part in self.parts])

    def space(self, rows: int) -> Tensor | None:
        """What `block` writes into: nothing."""
        return None

    def block(self, rows: slice, space: Tensor | None = None) -> DenseRows:
        """Some of the rows, computed now."""
        return DenseRows(self.logits(rows))

    def align(self, rows: slice, log_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities on the same V events; see `support.pair`."""
        return self.block(rows).align(slice(None), log_s, temperature)


class MeanRows(Combined):
    """z = log sum_k w_k softmax(z_k): rows whose probabilities are the mean of K models'; a temperature acts on the mean.

    Args:
        parts: K rows of one vocabulary, n each. weights: w, which add up to 1; default 1/K each.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        self.parts = list(parts)
        self.weights = [1 / len(self.parts)] * len(self.parts) if weights is None else list(weights)

    def of(self, parts: list[Any]) -> MeanRows:
        """The same mean of other parts."""
        return MeanRows(parts, self.weights)

    def pick(self, chosen: Tensor) -> MeanRows:
        """The rows of these indices."""
        return self.of([part.pick(chosen) for part in self.parts])

    def logits(self, rows: slice) -> Tensor:
        """log of the mean probability of some rows, [m, V]."""
        total: Tensor | None = None
        for part, weight in zip(self.parts, self.weights, strict=True):
            log_p = log_softmax(part.logits(rows)) + math.log(weight)
            total = log_p if total is None else torch.logaddexp(total, log_p.to(total.dtype))
        assert total is not None
        return total


class SurerRows(Combined):
    """Row i is the first model's where it is surer than the second, p_y > r_y or else max p > max r; else the second's.

    Args:
        first, second: rows of one vocabulary, n each. label: [n] token ids, or None to compare the largest probabilities.
    """

    def __init__(self, first: Any, second: DenseRows | HeadRows, label: Tensor | None) -> None:
        self.parts, self.label = [first, second], label

    def of(self, parts: list[Any]) -> SurerRows:
        """The same choice between two others."""
        first, second = parts
        return SurerRows(first, second, self.label)

    def pick(self, chosen: Tensor) -> SurerRows:
        """The rows of these indices."""
        label = None if self.label is None else self.label[chosen]
        first, second = self.parts
        return SurerRows(first.pick(chosen), second.pick(chosen), label)

    def logits(self, rows: slice) -> Tensor:
        """Logits of some rows, [m, V], each of one of the models."""
        first, second = (wide(part.logits(rows)) for part in self.parts)
        if first.shape != second.shape:
            raise ValueError(f"teacher vocabulary is {first.shape[-1]}, the student's {second.shape[-1]}; cut both")
        label = None if self.label is None else self.label[rows]
        chosen = _log_sureness(first, label) > _log_sureness(second, label)
        return torch.where(chosen.unsqueeze(-1), first, second)


class RoutedRows(Combined):
    """Row i is row place[i] of the model owner[i].

    Args:
        parts: rows of one vocabulary. owner, place: [n] on the host.
    """

    def __init__(self, parts: Sequence[Any], owner: np.ndarray, place: np.ndarray) -> None:
        self.parts, self.owner, self.place = list(parts), owner, place

    def __len__(self) -> int:
        return len(self.owner)

    def of(self, parts: list[Any]) -> RoutedRows:
        """The same rows of other parts."""
        return RoutedRows(parts, self.owner, self.place)

    def pick(self, chosen: Tensor) -> RoutedRows:
        """The rows of these indices, which come to the host."""
        numbers = chosen.cpu().numpy()
        return RoutedRows(self.parts, self.owner[numbers], self.place[numbers])

    def logits(self, rows: slice) -> Tensor:
        """Log-probabilities of some rows, [m, V]."""
        owner, place = self.owner[rows], self.place[rows]
        device = self.tensors()[0].device
        out = torch.empty(len(owner), self.vocab_size, device=device)
        for number, part in enumerate(self.parts):
            mine = np.flatnonzero(owner == number)
            if len(mine):
                own = part.pick(torch.from_numpy(place[mine]).to(device))
                out[torch.from_numpy(mine).to(device)] = log_softmax(own.logits(slice(None))).to(out.dtype)
        return out


def _log_sureness(z: Tensor, label: Tensor | None) -> Tensor:
    """log p_y, or log max p without labels, of logits [m, V]: [m] nats."""
    best = z.amax(-1) if label is None else z.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    return best - z.logsumexp(-1)
