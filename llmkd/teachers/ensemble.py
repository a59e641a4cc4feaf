"""Several teachers as one: the weighted average of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from llmkd import config as recipes
from llmkd.errors import ConfigError
from llmkd.mixture import mix
from llmkd.teachers.base import SelfTeacher, Teacher
from llmkd.types import Batch, Outputs, Signal
from llmkd.vocabulary import same_tokens


class Members:
    """Teachers of one tokenizer, and what they have in common.

    Raises:
        ConfigError: none, the student's own weights, other tokenizers, or logits of some and draws of others.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        if not teachers:
            raise ConfigError("teacher: got no teachers; expected at least one. Name some.")
        if any(isinstance(teacher, SelfTeacher) for teacher in teachers):
            raise ConfigError(
                "teacher: got a member made of the student's own weights; expected other models. Remove it."
            )
        self.teachers = list(teachers)
        self.provides = _common(self.teachers)
        self.temperatures: set[float | None] = {getattr(teacher, "temperature", None) for teacher in teachers}
        known = [teacher.tokenizer for teacher in teachers if teacher.tokenizer is not None]
        self.tokenizer: Any = known[0] if known else None
        for tokenizer in known[1:]:
            same_tokens(self.tokenizer, tokenizer)
        self.vocab_size = min(teacher.vocab_size for teacher in teachers if teacher.vocab_size is not None)

    def __iter__(self) -> Iterator[Teacher]:
        return iter(self.teachers)

    def prepare(self, accelerator: Any) -> None:
        """Prepare each."""
        for teacher in self.teachers:
            teacher.prepare(accelerator)


class EnsembleTeacher:
    """Shows sum_j w_j p_j of its members, live and cached in any mix; see `mixture.mix` for the events.

    Args:
        teachers: of one tokenizer. weights: one each, above 0; they are divided by their sum.

    Raises:
        ConfigError: another number of weights, one that is not above 0, or rows that do not go together.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] | None = None) -> None:
        self.members = Members(teachers)
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or min(weights) <= 0:
            raise ConfigError(
                f"ensemble.weights: got {weights} for {len(teachers)} teachers; expected a number above 0 for each."
            )
        others = sorted(t for t in self.members.temperatures if t not in (None, 1.0))
        if others:
            raise ConfigError(
                f"ensemble: got rows stored at temperature {', '.join(f'{t:g}' for t in others)}; expected 1: averages are of "
                "the probabilities themselves. Store them at temperature 1, or hidden states."
            )
        self.weights = [weight / math.fsum(weights) for weight in weights]
        self.provides, self.tokenizer = self.members.provides, self.members.tokenizer
        self.vocab_size = self.members.vocab_size
        self.temperature = 1.0 if 1.0 in self.members.temperatures else None

    def prepare(self, accelerator: Any) -> None:
        """Prepare each member."""
        self.members.prepare(accelerator)

    def __call__(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
        """The mixed rows of a batch."""
        width = self.vocab_size if vocab_size is None else vocab_size
        rows: list[Any] = [teacher(batch, {Signal.LOGITS}, width).rows for teacher in self.members]
        return Outputs(rows=mix(rows, self.weights))  # type: ignore[arg-type]


def ensemble(*, teachers: list[str | dict], weights: list[float] | None = None) -> EnsembleTeacher:
    """p = sum_j w_j p_j / sum_j w_j over several teachers, each live or cached.

    Args:
        teachers: specs as `teacher:` takes them, of one tokenizer: paths or mappings. weights: default all 1.

    Reference: Hinton et al. 2015, arXiv 1503.02531, section 5.
    """
    return EnsembleTeacher([built(spec) for spec in teachers], weights)


def built(spec: str | dict) -> Teacher:
    """A member, as `teacher:` would name it."""
    from llmkd.teachers import TEACHERS

    options = {"path": spec} if isinstance(spec, str) else dict(spec)
    return recipes.build("teacher", {"name": "local", **options}, {"teacher": TEACHERS})


def _common(teachers: Sequence[Teacher]) -> frozenset[Signal]:
    """Logits if all show them, draws if all are drawn."""
    for signal in (Signal.LOGITS, Signal.SAMPLES):
        if all(signal in teacher.provides for teacher in teachers):
            return frozenset({signal})
    shown = "; ".join(", ".join(sorted(teacher.provides)) for teacher in teachers)
    raise ConfigError(
        f"teacher: got members that show {shown}; expected logits of all, or samples of all. "
        "Store top-k rows or hidden states instead of draws."
    )
