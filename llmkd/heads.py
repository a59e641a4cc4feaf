"""Where rows of logits come from: dense logits, or a head on hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.support import log_softmax

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
