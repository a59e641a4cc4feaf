"""Where rows of logits come from: dense logits, a head on hidden states, or a teacher's top-k events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.support import coarsen, log_softmax, log_tail, name_all

WIDENED = 2**13  # rows of a weight gradient in half precision at a time, on their way into float32


def full(weight: Tensor) -> Tensor:
    """The whole tensor of a sharded parameter (FSDP2's DTensor), or the tensor itself."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # type: ignore[operator]


class DenseRows:
    """Logits that exist already: [n, V]."""

    def __init__(self, logits: Tensor) -> None:
        self.values = logits

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.values.shape[-1]

    def tensors(self) -> list[Tensor]:
        """What gradients flow to."""
        return [self.values]

    def parameters(self) -> list[Tensor]:
        """None: no head is left to project with."""
        return []

    def using(self, tensors: Sequence[Tensor]) -> DenseRows:
        """The same rows computed from other tensors (detached, cast or gathered ones)."""
        return DenseRows(tensors[0])

    def logits(self, rows: slice) -> Tensor:
        """Logits of some rows, [m, V]."""
        return self.values[rows]

    def align(self, rows: slice, log_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities on the same V events; see `support.pair`."""
        return _dense_pair(self.logits(rows), log_s, temperature)

    def cast(self, autocast: bool) -> DenseRows:
        """Itself: there is one tensor."""
        return self

    def pick(self, chosen: Tensor) -> DenseRows:
        """The rows of these indices; gradients flow back."""
        return DenseRows(self.values.index_select(0, chosen))

    def space(self, rows: int) -> None:
        """What `project` writes into: nothing, the logits are there."""

    def project(self, rows: slice, space: Tensor | None) -> Tensor:
        """Logits of some rows, [m, V], without a graph."""
        return self.values[rows]

    def block(self, rows: slice, space: Tensor | None) -> DenseRows:
        """Some of the rows."""
        return DenseRows(self.values[rows])

    def through(self, grad: Tensor, logits: Tensor) -> Tensor:
        """From d/dlogits to what `pull_back` takes: the same."""
        return grad

    def pull_back(self, rows: slice, grad: Tensor, into: list[Tensor | None]) -> None:
        """Put the gradient of some rows into those of `tensors()`."""
        if into[0] is not None:
            into[0][rows] = grad.to(into[0].dtype)


class HeadRows:
    """Logits that a head makes of hidden states: z = cap * tanh(scale * head(h) / cap), cut to `vocab_size` columns.

    Args:
        hidden: [n, H], the final hidden states of the supervised rows.
        head: anything with `.weight` [V, H] and `.bias` [V] or None, such as `nn.Linear`; read once a step, when the
            loss runs, so that sharding frameworks have gathered it by then.
        scale: the config's logit scale. softcap: the config's final soft-cap, or None.
        vocab_size: keep these first columns only; what lies beyond is padding and gets exactly no gradient.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Any,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.hidden, self.head = hidden, head
        self.scale, self.softcap, self._columns = scale, softcap, vocab_size

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        return self._columns or self.head.weight.shape[0]

    def tensors(self) -> list[Tensor]:
        """What gradients flow to: hidden, weight and, if there is one, bias."""
        return [self.hidden, *(full(parameter) for parameter in self.parameters())]

    def parameters(self) -> list[Tensor]:
        """The head's weight and bias as they lie, perhaps sharded."""
        bias = getattr(self.head, "bias", None)
        return [self.head.weight, *([] if bias is None else [bias])]

    def using(self, tensors: Sequence[Tensor]) -> HeadRows:
        """The same rows computed from other tensors (detached, cast or gathered ones)."""
        head = _Head(tensors[1], tensors[2] if len(tensors) > 2 else None)
        return HeadRows(tensors[0], head, scale=self.scale, softcap=self.softcap, vocab_size=self._columns)

    def cast(self, autocast: bool) -> HeadRows:
        """Hidden states and head in one dtype: autocast's where that is on and wanted, else the head's own."""
        return self.using(one_dtype(self.tensors(), autocast))

    def pick(self, chosen: Tensor) -> HeadRows:
        """The rows of these indices; gradients flow back."""
        hidden, *head = self.tensors()
        return self.using([hidden.index_select(0, chosen), *head])

    def logits(self, rows: slice) -> Tensor:
        """Logits of some rows, [m, V]."""
        weight, bias = self.head.weight[: self._columns], self.head.bias
        z = nn.functional.linear(self.hidden[rows], weight, None if bias is None else bias[: self._columns])
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def align(self, rows: slice, log_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities on the same V events; see `support.pair`."""
        return _dense_pair(self.logits(rows), log_s, temperature)

    def space(self, rows: int) -> Tensor:
        """Room for the logits of so many rows: chunks share it, as fresh memory costs a tenth of a projection."""
        return self.hidden.new_empty(rows, self.vocab_size)

    def project(self, rows: slice, space: Tensor | None) -> Tensor:
        """`logits` without a graph, written into `space`."""
        weight, bias, hidden = self.head.weight[: self._columns].t(), self.head.bias, self.hidden[rows]
        z = space[: len(hidden)]  # type: ignore[index]
        if bias is None:
            torch.mm(hidden, weight, out=z)
        else:
            torch.addmm(bias[: self._columns], hidden, weight, out=z)
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def block(self, rows: slice, space: Tensor | None) -> DenseRows:
        """Some of the rows, projected now into `space`."""
        return DenseRows(self.project(rows, space))

    def through(self, grad: Tensor, logits: Tensor) -> Tensor:
        """From d/dlogits to d/d(head output): back through soft-cap and scale."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad

    def pull_back(self, rows: slice, grad: Tensor, into: list[Tensor | None]) -> None:
        """Add d/d(head output) of some rows to the gradients of `tensors()`: the GEMMs for dH and, if wanted, dW."""
        hidden, weight = self.hidden[rows], self.head.weight[: self._columns]
        if into[0] is not None:
            into[0][rows] = (grad @ weight).to(into[0].dtype)
        if into[1] is not None:
            _add_product(into[1][: self._columns], grad, hidden)
        if len(into) > 2 and into[2] is not None:
            into[2][: self._columns] += grad.sum(0, dtype=into[2].dtype)


class TopKRows:
    """A teacher's K events a row; whatever mass they leave is one tail event (none when K = V).

    Args:
        ids: [n, K] token ids, distinct in a row; -1 is no event, for rows that have fewer (K = V if every row has all).
        log_probs: [n, K] nats, over the whole vocabulary; -inf where there is no event.
        vocab_size: V. temperature: at which the log-probabilities were recorded.
        sampled: the events are drawn, and their weights an unbiased estimate of all probabilities: there is no tail.
    """

    def __init__(
        self, ids: Tensor, log_probs: Tensor, vocab_size: int, temperature: float = 1.0, sampled: bool = False
    ) -> None:
        self.ids, self.log_probs, self.vocab_size, self.temperature = ids, log_probs, vocab_size, temperature
        self.sampled = sampled

    def __len__(self) -> int:
        return self.ids.shape[0]

    def tensors(self) -> list[Tensor]:
        """Nothing that could have a gradient."""
        return []

    def using(self, tensors: Sequence[Tensor]) -> TopKRows:
        """Itself: there is nothing to gather."""
        return self

    def cast(self, autocast: bool) -> TopKRows:
        """Itself: there is nothing to cast."""
        return self

    def space(self, rows: int) -> None:
        """Nothing is projected."""

    def block(self, rows: slice, space: Tensor | None) -> TopKRows:
        """Some of the rows."""
        return self.pick(rows)

    def pick(self, rows: slice | Tensor) -> TopKRows:
        """Some of the rows, by a slice or by their numbers."""
        return TopKRows(self.ids[rows], self.log_probs[rows], self.vocab_size, self.temperature, self.sampled)

    def align(self, rows: slice, log_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities on the same K events and the tail; see `support.pair`."""
        if log_s.shape[-1] != self.vocab_size:
            raise ValueError(
                f"student vocabulary is {log_s.shape[-1]}, the teacher's rows were made with {self.vocab_size}"
            )
        if temperature != self.temperature:
            raise ValueError(f"temperature is {temperature}, the teacher's rows were recorded at {self.temperature}")
        ids, log_t = self.ids[rows], self.log_probs[rows].to(log_s.dtype)
        if self.sampled:
            return log_t, log_s.gather(-1, name_all(ids)).masked_fill(ids < 0, float("-inf"))
        if ids.shape[-1] != self.vocab_size:
            log_t = torch.cat([log_t, log_tail(log_t)], dim=-1)
        return log_t, coarsen(log_s, ids)

    def spread(self, rows: slice, slope: Tensor, log_s: Tensor) -> Tensor:
        """From the derivative by the events' logits, [m, K] or [m, K + 1], to that by the logits z of log_s, [m, V].

        d/dz_v is that of the event v; what the tail is due goes to its tokens by their share of it.
        """
        ids, kept = self.ids[rows], slope[:, : self.ids.shape[-1]]
        if kept.shape == slope.shape:
            return slope.new_empty(log_s.shape).scatter_(-1, ids, kept)
        kept, ids = kept.masked_fill(ids < 0, 0.0), name_all(ids)
        shares = torch.softmax(log_s.scatter(-1, ids, float("-inf")), -1)  # 0 at the ids
        return shares.nan_to_num_(0.0).mul_(slope[:, -1:]).scatter_add_(-1, ids, kept)

    def find(self, rows: slice, label: Tensor) -> Tensor:
        """The event [m] of each label: its place among the K ids, or K, the tail."""
        found = self.ids[rows] == label.unsqueeze(-1)
        return torch.where(found.any(-1), found.int().argmax(-1), found.shape[-1])


@dataclass(frozen=True)
class _Head:
    weight: Tensor
    bias: Tensor | None


def one_dtype(tensors: Sequence[Tensor], autocast: bool) -> list[Tensor]:
    """Bring hidden states and head to one dtype: autocast's where it is on (the student), else the head's own."""
    if len(tensors) < 2:
        return list(tensors)
    kind = tensors[1].device.type
    dtype = torch.get_autocast_dtype(kind) if autocast and torch.is_autocast_enabled(kind) else tensors[1].dtype
    return [t.to(dtype) for t in tensors]


def _add_product(into: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """into += grad^T hidden, [V, H]: of half precision into float32, some columns of `grad` at a time."""
    if into.dtype == grad.dtype:
        into.addmm_(grad.t(), hidden)
        return
    for part, columns in zip(into.split(WIDENED), grad.split(WIDENED, dim=-1), strict=True):
        part += columns.t() @ hidden


def _dense_pair(teacher_logits: Tensor, log_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_t = log_softmax(teacher_logits, temperature)
    if log_t.shape[-1] != log_s.shape[-1]:
        raise ValueError(
            f"teacher vocabulary is {log_t.shape[-1]}, the student's {log_s.shape[-1]}; cut both to the tokenizer"
        )
    return log_t.to(log_s.dtype), log_s
