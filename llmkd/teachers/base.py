"""What a teacher is: a source of signals about a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from llmkd.errors import ConfigError
from llmkd.objectives.base import Objective
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


def check_needs(objective: Objective, teacher: Teacher | None) -> None:
    """Raise a ConfigError if the objective reads what the teacher does not show, or reads it at another temperature."""
    provides = teacher.provides if teacher is not None else frozenset()
    enough = {Signal.LOGITS} if objective.linear and Signal.SAMPLES in provides else set()
    missing = sorted(objective.needs - provides - enough)
    if missing:
        raise ConfigError(
            f"objective: it needs {', '.join(missing)} from the teacher, which provides "
            f"{', '.join(sorted(provides)) or 'nothing (there is none)'}. Use another teacher or objective."
        )
    recorded = getattr(teacher, "temperature", None)
    others = sorted(objective.temperatures() - {recorded}) if objective.needs and recorded is not None else []
    if others:
        raise ConfigError(
            f"objective: it reads the teacher at temperature {', '.join(f'{t:g}' for t in others)}, but its rows are stored at "
            f"{recorded:g}. Set temperature={recorded:g}, write the store anew, or store hidden states."
        )


def check_data(teacher: Teacher | None, *datasets: Any) -> None:
    """Raise a DataError if a teacher that reads a store lacks an example of a tokenised dataset."""
    sized = [dataset for dataset in datasets if hasattr(dataset, "__len__")]
    if hasattr(teacher, "check_data"):
        for dataset in sized:
            teacher.check_data(dataset)  # type: ignore[union-attr]
        return
    for member in getattr(teacher, "members", ()):
        check_data(member, *sized)


def live_models(teacher: Teacher | None) -> list[nn.Module]:
    """The models that a teacher runs in this process."""
    models = (getattr(part, "model", None) for part in parts_of(teacher))
    return [model for model in models if model is not None]


def reads_documents(teacher: Teacher | None) -> bool:
    """Whether a teacher tells a batch's documents apart, for which `data.ids.DocumentCollator` names them."""
    return any(getattr(one, "reads_documents", False) for one in (teacher, *parts_of(teacher)))


def parts_of(teacher: Any) -> list[Teacher]:
    """The teachers that one is made of, those of its members included; itself if it has no members."""
    if teacher is None:
        return []
    members = getattr(teacher, "members", None)
    return [teacher] if members is None else [part for member in members for part in parts_of(member)]
