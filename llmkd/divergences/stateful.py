"""A divergence whose knobs move once an optimizer step, such as TAID's interpolation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor, nn


class StepDivergence(nn.Module, ABC):
    """A divergence with a state of plain floats: no dtype cast or sharding touches it, and a checkpoint keeps its bits."""

    @abstractmethod
    def forward(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """[n, k] and [n, k] nats -> [n] nats."""

    @abstractmethod
    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """Move the state: once an optimizer step, in training only; progress = steps before it / all; means over all ranks."""

    def measures(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """Further row functions to report, by name; their means reach `after_step`."""
        return {}

    @abstractmethod
    def step_state(self) -> dict[str, float]:
        """The state, for a checkpoint."""

    @abstractmethod
    def load_step_state(self, state: Mapping[str, float]) -> None:
        """Take a state back."""

    def logs(self) -> dict[str, float]:
        """What to show in the training log."""
        return {}
