"""Token-level distillation: any divergence between the two models' next-token distributions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from llmkd.divergences import Divergence, divergence, name_of, reads_label
from llmkd.divergences.kl import forward_kl
from llmkd.divergences.stateful import StepDivergence
from llmkd.errors import ConfigError
from llmkd.objectives.base import RowObjective
from llmkd.policies import Policy, for_events, policy_named, without_label
from llmkd.rows import Term
from llmkd.schedules import Schedule, as_schedule
from llmkd.types import Batch, Outputs, Signal, row_labels


class TokenDistill(RowObjective):
    """sum_i w_i D(p_i, q_i), p and q at temperature T; times T^2 only if `scale_by_t2`; w = 1 unless there is a policy.

    Args:
        divergence: a name of the divergence table, a callable `(log_t, log_s) -> [n]`, or a Module of that call; with
            `reads_label` it is called with the label's event [n] as well, and what its `measures()` name is reported.
        temperature: T > 0, divides both models' logits; a number, or a schedule that moves it once an optimizer step.
        scale_by_t2: multiply by T^2, which keeps the size of the gradient as T grows (Hinton et al. 2015).
        policy: a name of the policy table, or a callable of that table's signature: a weight for each token.

    Returns:
        `total`, and without weights the divergence's own name: nats, summed over the supervised tokens; with a policy
        also the sum of its weights, by its name.

    Raises:
        ConfigError: unknown divergence or policy, or a temperature that is not positive or has no effect.

    Reference: Hinton et al. 2015, arXiv 1503.02531.
    Fidelity: checked against the official code of TAID for the T^2 convention.
    """

    needs = frozenset({Signal.LOGITS})

    def __init__(
        self,
        divergence: Divergence | str = "forward_kl",
        temperature: float | Schedule = 1.0,
        scale_by_t2: bool = False,
        policy: Policy | str | None = None,
    ) -> None:
        super().__init__()
        self.fn = _named(divergence) if isinstance(divergence, str) else divergence
        self.policy = policy_named(policy) if isinstance(policy, str) else policy
        self.schedule, self.scale_by_t2 = as_schedule(temperature, "temperature"), scale_by_t2
        _check_temperature(self.schedule, self.fn)
        self.linear = getattr(self.fn, "func", self.fn) is forward_kl and policy is None
        self.watches_steps = self._moving is not None or self.schedule.moves

    @property
    def temperature(self) -> float:
        """T, as it is now."""
        return self.schedule.value

    def temperatures(self) -> frozenset[float]:
        """T, or both ends of its schedule."""
        return frozenset({self.schedule.start, self.schedule.end})

    def terms(self, student: Outputs, batch: Batch) -> dict[str, Term]:
        """The divergence of every supervised row, and what is measured beside it."""
        temperature, name = self.temperature, name_of(self.fn)
        scale = temperature**2 if self.scale_by_t2 else 1.0
        asks = reads_label(self.fn)
        label = row_labels(batch) if asks or self.policy is not None else None
        weigh = for_events(self.policy, student.rows.vocab_size) if self.policy is not None else None  # type: ignore[union-attr]
        fn = self.fn if asks or weigh is None else without_label(self.fn)
        terms = {name: Term(fn, scale, temperature=temperature, label=label, policy=weigh, linear=self.linear)}
        if self.policy is not None and weigh is not None:
            terms[name_of(self.policy)] = Term(weigh, scale=0.0, temperature=temperature, label=label)
        measures = self.fn.measures() if hasattr(self.fn, "measures") else {}  # type: ignore[union-attr]
        for name, measure in measures.items():
            terms[name] = Term(measure, scale=0.0, temperature=temperature, label=label if asks else None)
        return terms

    @property
    def _moving(self) -> StepDivergence | None:
        return self.fn if isinstance(self.fn, StepDivergence) else None

    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """Let the divergence and the temperature move, if they do."""
        self.schedule.after_step(progress, means)
        if self._moving:
            self._moving.after_step(progress, means)

    def step_state(self) -> dict[str, float]:
        """The divergence's state, and how far the temperature is."""
        own = {"temperature": self.schedule.share} if self.schedule.moves else {}
        return {**own, **(self._moving.step_state() if self._moving else {})}

    def load_step_state(self, state: Mapping[str, float]) -> None:
        """Go on where a checkpoint stopped."""
        if self.schedule.moves:
            self.schedule.share = state["temperature"]
        if self._moving:
            self._moving.load_step_state(state)

    def logs(self) -> dict[str, float]:
        """The divergence's logs, and the temperature of the next step."""
        own = {"temperature": self.temperature} if self.schedule.moves else {}
        return {**own, **(self._moving.logs() if self._moving else {})}


def _named(name: str) -> Divergence | nn.Module:
    return divergence(name)


def _check_temperature(schedule: Schedule, fn: Divergence) -> None:
    lowest = min(schedule.start, schedule.end)
    if lowest <= 0:
        raise ConfigError(f"temperature: got {lowest}; expected a number above 0, such as 1.0.")
    if getattr(fn, "sets_temperature", False) and (schedule.moves or lowest != 1.0):
        raise ConfigError(
            f"temperature: got {lowest}; expected 1.0, as {name_of(fn)} divides the logits by their own spread. "
            "Set its tau instead."
        )
