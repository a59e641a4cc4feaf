"""What a teacher is: a source of signals about a batch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

from llmkd.types import Batch, Outputs, Signal


@runtime_checkable
class Teacher(Protocol):
    """`provides` says which signals it can show; calling it shows those that are asked for, without a graph.

    Attributes:
        provides: the signals it can show.
        tokenizer: its tokenizer, or None if unknown; vocab_size: the width of its rows, padding included.
    """

    provides: frozenset[Signal]
    tokenizer: Any
    vocab_size: int

    def prepare(self, accelerator: Any) -> None:
        """Called once, when the processes are known: move to the device, shard."""
        ...

    def __call__(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
        """The signals `needs` of a batch; rows are cut to the first `vocab_size` columns."""
        ...
