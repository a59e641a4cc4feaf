"""Logits of unit standard deviation instead of a temperature, under any divergence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmkd.divergences.kl import forward_kl
from llmkd.divergences.stateful import StepDivergence
from llmkd.errors import ConfigError

FLAT = 1e-6  # a standard deviation below counts as this: uniform logits stay uniform


class Standardised(nn.Module):
    """D(p', q'), p' = softmax(z_t / (tau std z_t)), q' = softmax(z_s / (tau std z_s)): a row's own spread is its temperature.

    Invariant to z -> a z + b of either model (a > 0), so that a student of another scale of logits need not imitate the
    teacher's, and a temperature outside has no effect. It is computed from log-probabilities, which differ from logits by
    a constant of the row. Over a large vocabulary a unit spread is a flat distribution: lower `tau` sharpens it.

    On top-k rows the spread is that of the K events and the tail: another loss than on whole rows, whose spread K events
    do not tell. Prefer whole rows.

    Args:
        divergence: D, of two rows without a schedule; default forward_kl.
        tau: base temperature > 0; 1 is the published form.

    Shapes: log_t, log_s [n, k] nats -> [n], in D's unit and range.
    Raises: ConfigError if tau is not above 0, or D moves with the steps.

    Reference: Choi et al. 2023 (mixup in KD), WACV; tau: Sun et al. 2024, arXiv 2403.01427.
    Fidelity: derived (the standard deviation is MIX-KD's; log-probabilities instead of logits, any divergence).
    """

    sets_temperature = True

    def __init__(self, divergence: Callable[..., Tensor] = forward_kl, tau: float = 1.0) -> None:
        super().__init__()
        if tau <= 0:
            raise ConfigError(f"standardised.tau: got {tau}; expected a number above 0, such as 1.0.")
        if isinstance(divergence, StepDivergence):
            raise ConfigError(
                f"standardised.divergence: got {type(divergence).__name__}, which moves with the steps; expected one that "
                "does not, such as forward_kl."
            )
        self.fn, self.tau, self.reads_label = divergence, tau, getattr(divergence, "reads_label", False)

    def forward(self, log_t: Tensor, log_s: Tensor, *label: Tensor) -> Tensor:
        """The divergence of the standardised rows, [n]."""
        return self.fn(standardise(log_t, self.tau), standardise(log_s, self.tau), *label)


def standardise(log_p: Tensor, tau: float = 1.0) -> Tensor:
    """log softmax(z / (tau std z)), [n, k] -> [n, k]; events that are excluded stay so and do not count."""
    known = log_p.isfinite()
    count = known.sum(-1, keepdim=True)
    mean = log_p.masked_fill(~known, 0.0).sum(-1, keepdim=True) / count
    centred = (log_p - mean).masked_fill(~known, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)
    spread = variance.clamp_min(FLAT**2).sqrt() * tau
    return torch.log_softmax((centred / spread).masked_fill(~known, float("-inf")), -1)
