"""What an objective is, and how several are summed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmkd.errors import ConfigError
from llmkd.rows import Term, reduce
from llmkd.schedules import Schedule, as_schedule
from llmkd.types import Batch, Kind, Loss, Outputs, Signal


class Objective(nn.Module, ABC):
    """(student, teacher, batch) -> Loss: a differentiable sum over supervised items, and detached metric sums.

    An objective never divides by a count and never holds a model, tokenizer or trainer. Parameters and buffers of its
    own train, sync and resume with the student; a parameter needs at least one dimension, or FSDP2 and ZeRO-3 refuse it.

    Attributes:
        needs: the teacher's signals that it reads; empty if it can do without a teacher.
        student_needs: the student's signals that it reads beside those and its rows.
        reads: columns of the batch that it needs beside ids, mask and labels, such as `spans`.
        takes: the kinds of rows that it is defined for.
        linear: whether the teacher's probabilities enter linearly, so that unbiased samples of them are enough.
        watches_steps: whether `after_step` wants the means of each optimizer step (which costs a host sync a step).
    """

    needs: frozenset[Signal] = frozenset()
    student_needs: frozenset[Signal] = frozenset()
    reads: frozenset[str] = frozenset()
    takes: frozenset[Kind] = frozenset({Kind.DISTRIBUTION})
    linear: bool = False
    watches_steps: bool = False

    def temperatures(self) -> frozenset[float]:
        """Those at which it reads the teacher's rows, now or later; a store has rows of one."""
        return frozenset({1.0})

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        """Return `{"total": scalar, "<metric>": scalar, ...}`, all sums over the batch's supervised items."""

    def row_modules(self) -> list[nn.Module]:
        """Modules that run once a chunk of rows, and not once a step as other modules do."""
        return []

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Called before training and as each epoch begins or is resumed: `epoch`, from 0, of `epochs`."""

    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """Called once an optimizer step, in training only: progress = steps before it / all steps; means over all ranks."""

    def step_state(self) -> dict[str, float]:
        """What `after_step` moves, by name: saved with each checkpoint."""
        return {}

    def load_step_state(self, state: Mapping[str, float]) -> None:
        """Take back what `step_state` gave."""

    def logs(self) -> dict[str, float]:
        """What to log beside the loss, as it is now."""
        return {}


class RowObjective(Objective, ABC):
    """An objective that sums a function of each supervised row: it shares one projection with its like in a `Mix`."""

    @abstractmethod
    def terms(self, student: Outputs, batch: Batch) -> dict[str, Term]:
        """The row-wise losses, for `rows.reduce`, by the name of their metric; those of scale 0 are only measured."""

    def row_modules(self) -> list[nn.Module]:
        """Divergences with parameters."""
        return list(self.children())

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        """The sum of the terms over the rows."""
        total, (own,) = _reduced([(self, 1.0)], student, teacher, batch)
        return {"total": total, **own}


class Mix(Objective):
    """sum_j weights[j] * objective_j, over the union of what they need. Row-wise terms share one pass over the head.

    A metric that several parts have is reported as `name`, `name_2` and so on; each part's `after_step` gets its own by `name`.

    Args:
        objectives: at least one. weights: one each, a number or a schedule of it (default: all 1).

    Raises:
        ConfigError: no objective, or another number of weights.
    """

    def __init__(self, objectives: Sequence[Objective], weights: Sequence[float | Schedule] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(objectives) if weights is None else weights
        if not objectives or len(weights) != len(objectives):
            raise ConfigError(
                f"objective: got {len(objectives)} parts and {len(weights)} weights; expected one weight for each of "
                "at least one part."
            )
        self.parts = nn.ModuleList(objectives)
        self.schedules = [as_schedule(weight, "objective.weight") for weight in weights]
        self.needs = frozenset().union(*(part.needs for part in objectives))
        self.student_needs = frozenset().union(*(part.student_needs for part in objectives))
        self.reads = frozenset().union(*(part.reads for part in objectives))
        self.takes = frozenset(Kind).intersection(*(part.takes for part in objectives))
        self.linear = all(part.linear for part in objectives if part.needs)
        self.watches_steps = bool(self._moving()) or any(part.watches_steps for part in objectives)
        self._reported: dict[
            int, dict[str, str]
        ] = {}  # of each part: its metrics, and as what the last call reported them

    @property
    def weights(self) -> list[float]:
        """The weights as they are now."""
        return [schedule.value for schedule in self.schedules]

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        """The weighted total and every part's own, unweighted metrics."""
        pairs = list(zip(self._objectives(), self.weights, strict=True))
        rowwise = {i: (part, weight) for i, (part, weight) in enumerate(pairs) if isinstance(part, RowObjective)}
        totals, metrics = [], {}
        if rowwise:
            total, found = _reduced(list(rowwise.values()), student, teacher, batch)
            totals, metrics = [total], dict(zip(rowwise, found, strict=True))
        for i, (part, weight) in enumerate(pairs):
            if i not in rowwise:
                loss = dict(part(student, teacher, batch))
                totals.append(loss.pop("total") * weight)
                metrics[i] = loss
        out: Loss = {"total": torch.stack(totals).sum()}
        for i, own in metrics.items():
            self._reported[i] = {}
            for name, value in own.items():
                self._reported[i][name] = _unique(name, out)
                out[self._reported[i][name]] = value
        return out

    def temperatures(self) -> frozenset[float]:
        """The parts' that read a teacher."""
        return frozenset().union(*(part.temperatures() for part in self._objectives() if part.needs))

    def row_modules(self) -> list[nn.Module]:
        """The parts' modules."""
        return [module for part in self._objectives() for module in part.row_modules()]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Hand the epoch on to every part."""
        for part in self._objectives():
            part.begin_epoch(epoch, epochs)

    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """Hand the step on to every part, with its own metrics, and move the weights."""
        for schedule in self.schedules:
            schedule.after_step(progress, means)
        for i, part in enumerate(self._objectives()):
            own = {name: means[reported] for name, reported in self._reported.get(i, {}).items() if reported in means}
            part.after_step(progress, {**means, **own})

    def step_state(self) -> dict[str, float]:
        """The parts' states, each name behind its part's number, and how far the weights are."""
        parts = enumerate(self._objectives())
        states = {f"{i}.{name}": value for i, part in parts for name, value in part.step_state().items()}
        return {**states, **{name: schedule.share for name, schedule in self._moving().items()}}

    def load_step_state(self, state: Mapping[str, float]) -> None:
        """Give every part its own back."""
        for name, schedule in self._moving().items():
            schedule.share = state[name]
        for i, part in enumerate(self._objectives()):
            prefix = f"{i}."
            part.load_step_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def logs(self) -> dict[str, float]:
        """The parts' logs, and the weights that move, as they are for the next step."""
        logs: dict[str, float] = {}
        for part in self._objectives():
            logs |= {_unique(name, logs): value for name, value in part.logs().items()}
        return {**logs, **{name: schedule.value for name, schedule in self._moving().items()}}

    def _moving(self) -> dict[str, Schedule]:
        """The weights that move, by the number of their part."""
        return {f"weight_{i}": schedule for i, schedule in enumerate(self.schedules) if schedule.moves}

    def _objectives(self) -> Sequence[Objective]:
        return list(self.parts)  # type: ignore[arg-type]


def _reduced(
    parts: Sequence[tuple[RowObjective, float]], student: Outputs, teacher: Outputs | None, batch: Batch
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The weighted total of row-wise objectives, and of each its metrics."""
    own = [part.terms(student, batch) for part, _ in parts]
    pairs = zip(parts, own, strict=True)
    terms = [replace(term, scale=term.scale * weight) for (_, weight), named in pairs for term in named.values()]
    rows = teacher.rows if teacher is not None and any(term.needs_teacher for term in terms) else None
    if rows is None and any(term.needs_teacher for term in terms):
        raise ConfigError(
            "objective: it needs a teacher's logits, got none; give a teacher or use cross_entropy alone."
        )
    total, sums = reduce(terms, student.rows, rows)  # type: ignore[arg-type]
    values = iter(sums.unbind())
    return total, [{name: next(values) for name in named} for named in own]


def _unique(name: str, taken: Mapping[str, object]) -> str:
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    return unique
