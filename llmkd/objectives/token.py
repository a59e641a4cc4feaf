"""Token-level distillation: any divergence between the two models' next-token distributions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from llmkd.divergences import Divergence, divergence, name_of
from llmkd.divergences.stateful import StepDivergence
from llmkd.errors import ConfigError
from llmkd.objectives.base import RowObjective
from llmkd.rows import Term
from llmkd.types import Batch, Outputs, Signal


class TokenDistill(RowObjective):
    """sum_i D(p_i, q_i), p and q at temperature T; times T^2 only if `scale_by_t2`.

    Args:
        divergence: a name of the divergence table, a callable `(log_t, log_s) -> [n]`, or a Module of that call.
        temperature: T > 0, divides both models' logits.
        scale_by_t2: multiply by T^2, which keeps the size of the gradient as T grows (Hinton et al. 2015).

    Returns:
        `total` and the divergence's own name: nats, summed over the supervised tokens.

    Raises:
        ConfigError: unknown divergence, or a temperature that is not positive.

    Reference: Hinton et al. 2015, arXiv 1503.02531.
    Fidelity: checked against the official code of TAID for the T^2 convention.
    """

    needs = frozenset({Signal.LOGITS})

    def __init__(
        self, divergence: Divergence | str = "forward_kl", temperature: float = 1.0, scale_by_t2: bool = False
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"temperature: got {temperature}; expected a number above 0, such as 1.0.")
        self.fn = _named(divergence) if isinstance(divergence, str) else divergence
        self.temperature = temperature
        self.watches_steps = self._moving is not None
        self.scale = temperature**2 if scale_by_t2 else 1.0

    def terms(self, student: Outputs, batch: Batch) -> dict[str, Term]:
        """The divergence of every supervised row."""
        terms = {name_of(self.fn): Term(self.fn, self.scale, temperature=self.temperature)}
        for name, measure in self._moving.measures().items() if self._moving else ():
            terms[name] = Term(measure, scale=0.0, temperature=self.temperature)
        return terms

    @property
    def _moving(self) -> StepDivergence | None:
        return self.fn if isinstance(self.fn, StepDivergence) else None

    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """Let the divergence move, if it does."""
        if self._moving:
            self._moving.after_step(progress, means)

    def step_state(self) -> dict[str, float]:
        """The divergence's state."""
        return self._moving.step_state() if self._moving else {}

    def load_step_state(self, state: Mapping[str, float]) -> None:
        """Give the divergence its state back."""
        if self._moving:
            self._moving.load_step_state(state)

    def logs(self) -> dict[str, float]:
        """The divergence's logs."""
        return self._moving.logs() if self._moving else {}


def _named(name: str) -> Divergence | nn.Module:
    return divergence(name)
