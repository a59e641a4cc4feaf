"""What a teacher is: a source of signals about a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from llmkd.types import Batch, Outputs, Signal


@runtime_checkable
class Teacher(Protocol):
    """`provides` says which signals it can show; calling it shows those that are asked for, without a graph.

    Attributes:
        provides: the signals it can show.
        tokenizer: its tokenizer, or None if unknown; vocab_size: the width of its rows, padding included, or None if the
            student's.
    """

    provides: frozenset[Signal]
    tokenizer: Any

    @property
    def vocab_size(self) -> int | None: ...

    def prepare(self, accelerator: Any) -> None:
        """Called once, when the processes are known: move to the device, shard."""
        ...

    def __call__(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
        """The signals `needs` of a batch; rows are cut to the first `vocab_size` columns."""
        ...


@runtime_checkable
class SelfTeacher(Teacher, Protocol):
    """A teacher that is made of the student's own weights, and learns of them through `observe` alone.

    Attributes:
        snapshots: copies of the trained weights that it keeps, at most.
    """

    snapshots: int

    def observe(self, student: nn.Module, step: int, epoch: int) -> None:
        """Called with the student that a trainer was given, and before each optimizer step, on every rank.

        `step` and `epoch` count from 0 what is done. Called again at the same time, or after a resume, it changes nothing.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What each checkpoint keeps of it."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        ...
