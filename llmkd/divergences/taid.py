"""TAID: the target moves from the student to the teacher, as fast as the student learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmkd.divergences.kl import forward_kl
from llmkd.divergences.numerics import expectation, finite_log
from llmkd.divergences.stateful import StepDivergence
from llmkd.errors import ConfigError

NOTHING = 1e-36  # more than what the target gives an event that counts as LOG_ZERO twice


class TAID(StepDivergence):
    """KL(p_t || q), p_t = softmax((1 - t) stop_grad(z_s) + t z_t), with t rising from t_start to t_end.

    The interpolation is in logit space and its student side is detached, so the gradient is q - p_t: zero at t = 0, the
    forward KL's at t = 1. After each optimizer step, with L = the mean cross-entropy form -sum p_t log q:

        rel = (L_prev - L) / L_prev;  m = beta m + (1 - beta) rel;  delta = alpha sigmoid(m) (1 - t)
        t = min(t_end, max(t_start + (t_end - t_start) progress, t + delta))

    The official code returns the cross-entropy form; the value here is the true divergence (the gradient is the same), and
    the other form is reported as `taid_ce`. It moves t in every forward, also in validation and from each rank's own
    loss; here t moves once an optimizer step, in training only, from the mean over all ranks. On top-k rows the tail is
    interpolated as one event.

    Args:
        t_start: in [0, 1). t_end: in (0, 1], above t_start.
        alpha: size of the adaptive step, in [0, 1]. beta: momentum, in [0, 1).
        adaptive: False leaves the linear rise alone.

    Shapes: log_t, log_s [n, k] nats -> [n] nats, in [0, inf).
    Raises: ConfigError if a knob is out of its range.
    Logs: taid_t (the t that was used), taid_t_next, taid_delta.

    Reference: Shing et al. 2025 (TAID), arXiv 2501.16937, eq. 3 and algorithm 1.
    Fidelity: checked against the official code of TAID (loss at three t, three schedules).
    """

    def __init__(
        self,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        adaptive: bool = True,
    ) -> None:
        super().__init__()
        if not 0.0 <= t_start < t_end <= 1.0:
            raise ConfigError(f"taid: got t_start={t_start}, t_end={t_end}; expected 0 <= t_start < t_end <= 1.")
        if not (0.0 <= alpha <= 1.0 and 0.0 <= beta < 1.0):
            raise ConfigError(f"taid: got alpha={alpha}, beta={beta}; expected alpha in [0, 1] and beta in [0, 1).")
        self.t_start, self.t_end, self.alpha, self.beta, self.adaptive = t_start, t_end, alpha, beta, adaptive
        self.t, self.t_used, self.delta = t_start, t_start, 0.0
        self.momentum, self.previous = 0.0, math.inf

    def forward(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """KL of the moving target from the student, [n] nats."""
        return forward_kl(self.target(log_t, log_s), log_s)

    def target(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """log p_t, [n, k]; no gradient flows through it."""
        mixed = torch.lerp(finite_log(log_s.detach()), finite_log(log_t), self.t)
        return torch.log_softmax(mixed, dim=-1)

    def value_and_grad(self, log_t: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
        """The closed form: as `forward`, and q - p_t, which is 0 where both models exclude an event."""
        values, slope = forward_kl.value_and_grad(self.target(log_t, log_s), log_s)  # type: ignore[attr-defined]
        return values, torch.nn.functional.hardshrink(slope, NOTHING)

    def grad(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """q - p_t, [n, k]."""
        return self.value_and_grad(log_t, log_s)[1]

    def cross_entropy(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """-sum p_t log q, [n] nats: what the schedule watches."""
        return -expectation(self.target(log_t, log_s).exp(), finite_log(log_s))

    def measures(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The cross-entropy form."""
        return {"taid_ce": self.cross_entropy}

    def after_step(self, progress: float, means: Mapping[str, float]) -> None:
        """Move t; the first step only remembers its loss, and the floor always rises."""
        loss = means["taid_ce"]
        self.t_used = self.t
        floor = self.t_start + (self.t_end - self.t_start) * progress
        self.delta = 0.0
        if self.adaptive and math.isfinite(self.previous):
            relative = (self.previous - loss) / (self.previous + 1e-15)
            self.momentum = self.beta * self.momentum + (1 - self.beta) * relative
            self.delta = self.alpha * (1 - self.t) * 0.5 * (1 + math.tanh(self.momentum / 2))  # the sigmoid
        if not self.adaptive or math.isfinite(self.previous):
            self.t = min(self.t_end, max(floor, self.t + self.delta))
        self.previous = loss

    def step_state(self) -> dict[str, float]:
        """t, the momentum and the last loss."""
        return {"t": self.t, "momentum": self.momentum, "previous": self.previous}

    def load_step_state(self, state: Mapping[str, float]) -> None:
        """Go on where a checkpoint stopped."""
        self.t, self.momentum, self.previous = state["t"], state["momentum"], state["previous"]
        self.t_used = self.t

    def logs(self) -> dict[str, float]:
        """t used, t next and the adaptive step."""
        return {"taid_t": self.t_used, "taid_t_next": self.t, "taid_delta": self.delta}
