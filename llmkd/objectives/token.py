"""Token-level distillation: any divergence between the two models' next-token distributions."""

from __future__ import annotations

from torch import nn

from llmkd.divergences import Divergence, divergence, name_of
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
        self.scale = temperature**2 if scale_by_t2 else 1.0

    @property
    def label(self) -> str:
        """The divergence's name."""
        return name_of(self.fn)

    def term(self, student: Outputs, batch: Batch) -> Term:
        """The divergence of every supervised row."""
        return Term(self.fn, self.scale, temperature=self.temperature)


def _named(name: str) -> Divergence | nn.Module:
    return divergence(name)
