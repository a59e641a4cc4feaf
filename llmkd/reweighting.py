"""Which domains are sampled how often: from one interval of training to the next, by how far the student is behind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Literal

from pydantic import Field

from llmkd.errors import ConfigError, unknown_name

Shares = dict[str, float]  # a number a domain


class Reweighting(ABC):
    """r, a probability a domain, moved once an interval from both models' perplexities on the domains' validation sets.

    Attributes:
        interval: optimizer steps between two looks at the validation sets.
        needs_teacher: whether it reads the teacher's perplexities.
    """

    needs_teacher = False

    def __init__(self, interval: int) -> None:
        if interval < 1:
            raise ConfigError(f"reweighting.interval: got {interval}; expected at least 1 optimizer step.")
        self.interval = interval

    def check(self, domains: Collection[str]) -> None:
        """Raise a ConfigError if the domains are not those that it was made for."""
        return

    @abstractmethod
    def start(self, rows: Mapping[str, int], student: Shares, teacher: Shares) -> Shares:
        """r before the first step; `rows` are the training rows a domain, the others perplexities."""

    @abstractmethod
    def update(self, r: Shares, student: Shares, teacher: Shares) -> Shares:
        """r of the next interval, from this one's and the student's perplexities at its end."""

    def first_draw(self, r: Shares, rows: Mapping[str, int]) -> Shares:
        """The probabilities that the first interval samples with."""
        return r


class DDK(Reweighting):
    """r' = alpha psi / sum(psi) + (1 - alpha) / N, psi = r exp(l_S / l_T), with a domain's perplexities l of student, teacher.

    r starts as the softmax of l_S / l_T. As in algorithm 1 the first interval draws rows at random, whatever their domain;
    r is used from the second on. Constant perplexities move r to a fixed point, not at once: psi holds the r before. The
    paper also stops once r is nearly uniform, without a threshold: here only `max_steps` ends a training.

    Args:
        alpha: in [0, 1]; 1 - alpha is spread evenly, so that no domain falls below (1 - alpha) / N.
        interval: optimizer steps between updates (K in the paper).

    Raises: ConfigError for an alpha or interval out of range.

    Reference: Liu et al. 2024 (DDK), arXiv 2407.16154, eq. 1 and 2, algorithm 1.
    Fidelity: paper only (there is no official code); that `random` means by the number of rows is our reading.
    """

    needs_teacher = True

    def __init__(self, alpha: float = 0.5, interval: int = 1000) -> None:
        super().__init__(interval)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"reweighting ddk.alpha: got {alpha}; expected a number from 0 to 1.")
        self.alpha = alpha

    def start(self, rows: Mapping[str, int], student: Shares, teacher: Shares) -> Shares:
        """r0 = softmax(l_S / l_T) (eq. 1)."""
        return softmax({name: student[name] / teacher[name] for name in student})

    def update(self, r: Shares, student: Shares, teacher: Shares) -> Shares:
        """Eq. 2, in logarithms: no ratio overflows."""
        log_psi = {
            name: (math.log(r[name]) if r[name] > 0 else -math.inf) + student[name] / teacher[name] for name in r
        }
        return {name: self.alpha * share + (1 - self.alpha) / len(r) for name, share in softmax(log_psi).items()}

    def first_draw(self, r: Shares, rows: Mapping[str, int]) -> Shares:
        """Every row alike: a domain's share of the rows."""
        return normalised(rows)


class Fixed(Reweighting):
    """r = the same probabilities throughout: uniform, proportional to the domains' rows, or given.

    The perplexities are measured and reported as for a method that reads them: the control of every re-weighting.

    Args:
        weights: uniform, proportional, or a number a domain (they need not sum to 1).
        interval: optimizer steps between two looks at the validation sets.

    Raises: ConfigError for an unknown or missing domain.

    Reference: no paper, the mixtures that every pre-training run starts from.
    Fidelity: derived (nothing to check).
    """

    def __init__(
        self,
        weights: Literal["uniform", "proportional"] | dict[str, Annotated[float, Field(ge=0)]] = "uniform",
        interval: int = 1000,
    ) -> None:
        super().__init__(interval)
        self.weights = weights

    def check(self, domains: Collection[str]) -> None:
        """Each of them must have a number, and nothing else."""
        if isinstance(self.weights, str):
            return
        for name in self.weights:
            if name not in domains:
                raise unknown_name("domain of reweighting fixed.weights:", name, domains)
        if {*domains} - {*self.weights} or not sum(self.weights.values()):
            raise ConfigError(
                f"reweighting fixed.weights: got {self.weights}; expected a number for each of {', '.join(domains)}, at "
                "least one above 0. Add what is missing; 0 leaves a domain out."
            )

    def start(self, rows: Mapping[str, int], student: Shares, teacher: Shares) -> Shares:
        """The probabilities."""
        if isinstance(self.weights, str):
            return normalised(rows if self.weights == "proportional" else dict.fromkeys(rows, 1))
        return normalised({name: self.weights[name] for name in rows})

    def update(self, r: Shares, student: Shares, teacher: Shares) -> Shares:
        """r, unchanged."""
        return r


REWEIGHTINGS: dict[str, Callable[..., Reweighting]] = {
    "ddk": DDK,
    "fixed": Fixed,
}


def softmax(values: Mapping[str, float]) -> Shares:
    """exp(v) / sum exp(v), at least one v finite; no v is too large."""
    top = max(values.values())
    return normalised({name: math.exp(value - top) for name, value in values.items()})


def normalised(values: Mapping[str, float]) -> Shares:
    """The values over their sum."""
    total = math.fsum(values.values())
    return {name: value / total for name, value in values.items()}
