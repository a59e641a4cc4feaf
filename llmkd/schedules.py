"""Numbers that move once an optimizer step: a temperature, a weight of a mix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from llmkd.errors import ConfigError


class Schedule(ABC):
    """start + (end - start) share, where `share` in [0, 1] is how much of the way is done.

    It moves after each optimizer step, in training only, from the progress when that step began: the first two steps see
    `start`. The state is one float; a checkpoint keeps its bits.
    """

    moves = True

    def __init__(self, start: float, end: float) -> None:
        if not (math.isfinite(start) and math.isfinite(end)):
            raise ConfigError(f"schedule: got start={start}, end={end}; expected finite numbers.")
        self.start, self.end, self.share = float(start), float(end), 0.0

    @property
    def value(self) -> float:
        """The number as it is now."""
        return self.start + (self.end - self.start) * self.share

    @abstractmethod
    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """Move: progress = steps before this one / all steps; means of the step over all ranks."""


class Constant(Schedule):
    """value = start, at every step.

    Args:
        start: the value.

    Reference: no paper, the identity.
    """

    moves = False

    def __init__(self, start: float) -> None:
        super().__init__(start, start)

    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """Stay."""


class Linear(Schedule):
    """value = start + (end - start) progress.

    Args:
        start, end: the values at progress 0 and 1.

    Reference: no paper, the usual schedule of optimizers; CTKD (Li et al. 2023, arXiv 2211.16231) learns it.
    """

    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """As far as training is."""
        self.share = min(1.0, progress)


class Cosine(Schedule):
    """value = start + (end - start) (1 - cos(pi progress)) / 2: slow at both ends.

    Args:
        start, end: the values at progress 0 and 1.

    Reference: no paper, the usual schedule of optimizers; Loshchilov and Hutter 2017, arXiv 1608.03983.
    """

    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """As far as training is, along half a wave."""
        self.share = (1 - math.cos(math.pi * min(1.0, progress))) / 2


class ByMetric(Schedule):
    """value = start + (end - start) max over the steps so far of (worst - m) / (worst - best), m = a metric's mean.

    The value follows what the student has learned, and never goes back.

    Args:
        start, end: the values where the metric is at `worst` and at `best`, or beyond.
        metric: a name that the training log shows, such as forward_kl.
        worst, best: two different numbers.

    Raises: ConfigError if worst = best; at the first step if the objective does not report the metric.

    Reference: no paper, the principle of TAID's adaptive step, arXiv 2501.16937.
    """

    def __init__(self, start: float, end: float, metric: str, worst: float, best: float) -> None:
        super().__init__(start, end)
        if worst == best:
            raise ConfigError(f"schedule by_metric: got worst={worst}, best={best}; expected two different numbers.")
        self.metric, self.worst, self.best = metric, worst, best

    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """As far as the metric is."""
        if self.metric not in means:
            raise ConfigError(
                f"schedule by_metric: got metric '{self.metric}'; expected one of {', '.join(sorted(means))}."
            )
        share = (self.worst - means[self.metric]) / (self.worst - self.best)
        self.share = max(self.share, min(1.0, share))


class ByFraction(Schedule):
    """value = alpha = clip(1 - (log10 f + 1) / 2, low, high), f = the kept fraction of the data; it stays as it is.

    The weight of the teacher's term where data are pruned: it grows as fewer rows are left, here from 0.5 at f = 1 to 1 at
    f = 0.1. The labels' term gets what is left.

    Args:
        fraction: f in (0, 1]. low, high: limits of alpha. rest: 1 - alpha instead.

    Raises: ConfigError for a fraction outside (0, 1], or limits that are not 0 <= low <= high <= 1.

    Reference: Ben-Baruch et al. 2024 (Distilling the Knowledge in Data Pruning), arXiv 2403.07854.
    Fidelity: derived (that the best alpha grows as f falls is the paper's; the curve is ours)
    """

    moves = False

    def __init__(self, fraction: float, low: float = 0.5, high: float = 1.0, rest: bool = False) -> None:
        if not 0 < fraction <= 1 or not 0 <= low <= high <= 1:
            raise ConfigError(
                f"schedule by_fraction: got fraction={fraction}, low={low}, high={high}; expected a fraction in (0, 1] and "
                "0 <= low <= high <= 1. Set them so."
            )
        alpha = min(high, max(low, 1 - (math.log10(fraction) + 1) / 2))
        super().__init__(*(2 * [1 - alpha if rest else alpha]))

    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """Stay."""


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "by_metric": ByMetric,
    "by_fraction": ByFraction,
}


def as_schedule(value: Any, what: str) -> Schedule:
    """A number or a schedule as a schedule; ConfigError, naming `what`, for anything else."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"{what}: got {value!r}; expected a number, or a schedule such as {{name: linear, start: 4.0, end: 1.0}}."
        )
    return Constant(value)
