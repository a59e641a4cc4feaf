"""What an adapter is: all that differs by the kind of model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from llmkd.errors import ConfigError
from llmkd.types import Kind, Outputs


@dataclass(frozen=True)
class Adapter:
    """How models of one kind are read, checked and measured.

    Attributes:
        unit: what a row is: the next `token` of a text, or an `example`.
        rows: what a row tells: a distribution, or a value.
        backbone: `(model)` -> the module that `read` runs, for `torch.compile`.
        read: `(model, batch, needs, vocab_size) -> Outputs`, the supervised rows and the signals that are asked for.
        check: `(model)` raises a ConfigError if `read` would not show what the model itself computes.
        check_packing: `(model, batch_size)` raises a ConfigError if the model cannot keep packed documents apart.
        width: `(model)` -> columns of its rows, padding included.
        columns: `(student, teacher, tokenizer)` -> leading columns of both to compare, or None for all of them; raises a
            ConfigError if they do not mean the same.
        head: `(model)` -> parameters of rows that are projected later, and must be whole by then.
        measure: `(student rows, teacher rows or None, labels)` -> sums that every evaluation reports.
        summary: `(means, nats_per_byte)` of them -> what is printed.
    """

    unit: Literal["token", "example"]
    rows: Kind
    backbone: Callable[[nn.Module], nn.Module]
    read: Callable[..., Outputs]
    check: Callable[[nn.Module], None]
    check_packing: Callable[[nn.Module, int], None]
    width: Callable[[nn.Module], int]
    columns: Callable[[nn.Module, Any, Any], int | None]
    head: Callable[[nn.Module], Iterable[Tensor]]
    measure: Callable[..., dict[str, Tensor]]
    summary: Callable[[dict[str, float], dict[str, float]], dict[str, float]]


def unwrap(model: nn.Module) -> Any:
    """The Hugging Face model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def check_takes(adapter: Adapter, takes: Collection[Kind]) -> None:
    """Raise a ConfigError if an objective is not defined for the rows of such a model."""
    if adapter.rows in takes:
        return
    if adapter.rows is Kind.VALUE:
        what, fix = "one value an example", "Use regression, or a model with num_labels of 2 or more"
    else:
        what, fix = "a distribution", "Use cross_entropy or token, or a model with num_labels=1"
    raise ConfigError(f"objective: the model gives {what}, which a part of the objective does not take. {fix}.")


def freeze(model: nn.Module) -> nn.Module:
    """Switch off gradients and dropout."""
    model.requires_grad_(False)
    return model.eval()
