"""The table of divergences: a function of two rows, `(log_t [n, k], log_s [n, k], **knobs) -> [n]` in nats.

A divergence never masks, shifts, reduces or divides, and never learns where its rows come from. An entry may carry
`.grad(log_t, log_s, **knobs) -> [n, k]`, its gradient with respect to the student's logits in closed form. An entry
with parameters or state is an `nn.Module` class with the same call. One that has `reads_label` true gets the index of the
label's event [n] as a third argument; one that has `measures() -> {name: (log_t, log_s, *label) -> [n]}` gets them reported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmkd.divergences.adaptive_kl import adaptive_kl
from llmkd.divergences.alpha_beta import alpha_beta
from llmkd.divergences.dac_kl import DACKL
from llmkd.divergences.jsd import jsd
from llmkd.divergences.kl import forward_kl, reverse_kl
from llmkd.divergences.skew import skew_kl, skew_reverse_kl
from llmkd.divergences.standardised import Standardised
from llmkd.divergences.taid import TAID
from llmkd.divergences.topk_mix import topk_mix
from llmkd.divergences.tvd import tvd
from llmkd.errors import unknown_name

Divergence = Callable[..., Tensor]

DIVERGENCES: dict[str, Callable[..., Any]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "taid": TAID,
    "dac_kl": DACKL,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
    "topk_mix": topk_mix,
    "standardised": Standardised,
}


def divergence(name: str, **knobs: Any) -> Divergence:
    """The entry `name` with its knobs set: `divergence("jsd", beta=0.1)(log_t, log_s)`."""
    if name not in DIVERGENCES:
        raise unknown_name("divergence", name, DIVERGENCES)
    entry = DIVERGENCES[name]
    return entry(**knobs) if isinstance(entry, type) else partial(entry, **knobs)


def name_of(fn: Divergence) -> str:
    """What a divergence is called in logs: its function's or class's name."""
    if isinstance(fn, partial):
        return name_of(fn.func)
    if isinstance(fn, nn.Module):
        listed = (name for name, entry in DIVERGENCES.items() if type(fn) is entry)
        return next(listed, type(fn).__name__.lower())
    return getattr(fn, "__name__", "divergence")


def reads_label(fn: Divergence) -> bool:
    """Whether a divergence takes the label's event as a third argument."""
    return reads_label(fn.func) if isinstance(fn, partial) else getattr(fn, "reads_label", False)


__all__ = ["DACKL", "DIVERGENCES", "TAID", "Divergence", "Standardised", "adaptive_kl", "alpha_beta", "divergence",
           "forward_kl", "jsd", "name_of", "reads_label", "reverse_kl", "skew_kl", "skew_reverse_kl", "topk_mix",
           "tvd"]  # fmt: skip
