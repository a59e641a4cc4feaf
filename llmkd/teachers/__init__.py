"""The table of teachers: `provides` and `(batch, needs) -> Outputs`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from llmkd.teachers.base import SelfTeacher, Teacher, check_data, check_needs, live_models, reads_documents
from llmkd.teachers.cached import CachedTeacher, cached
from llmkd.teachers.ensemble import EnsembleTeacher, ensemble
from llmkd.teachers.local import LocalTeacher, local
from llmkd.teachers.partition import Partition
from llmkd.teachers.routed import RoutedTeacher, routed
from llmkd.teachers.self import EMA, FrozenStart, PreviousEpoch, Votes

TEACHERS: dict[str, Callable[..., Teacher]] = {
    "local": local,
    "cached": cached,
    "ensemble": ensemble,
    "routed": routed,
    "frozen_start": FrozenStart,
    "previous_epoch": PreviousEpoch,
    "ema": EMA,
    "votes": Votes,
    "partition": Partition,
}


def as_teacher(teacher: str | nn.Module | Teacher | None) -> Teacher | None:
    """A live teacher of a name, a path or a causal LM; a `Teacher` as it is."""
    if isinstance(teacher, str):
        return local(path=teacher)
    return LocalTeacher(teacher) if isinstance(teacher, nn.Module) else teacher


__all__ = ["EMA", "TEACHERS", "CachedTeacher", "EnsembleTeacher", "FrozenStart", "LocalTeacher", "Partition",
           "PreviousEpoch", "RoutedTeacher", "SelfTeacher", "Teacher", "Votes", "as_teacher", "cached", "check_data",
           "check_needs", "ensemble", "live_models", "local", "reads_documents", "routed"]  # fmt: skip
