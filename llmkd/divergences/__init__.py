"""The table of divergences: a function of two rows, `(log_t [n, k], log_s [n, k], **knobs) -> [n]` in nats.

A divergence never masks, shifts, reduces or divides, and never learns where its rows come from. An entry may carry
`.grad(log_t, log_s, **knobs) -> [n, k]`, its gradient with respect to the student's logits in closed form. An entry
with parameters or state is an `nn.Module` class with the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmkd.divergences.jsd import jsd
from llmkd.divergences.kl import forward_kl, reverse_kl
from llmkd.divergences.skew import skew_kl, skew_reverse_kl
from llmkd.divergences.taid import TAID
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
    return type(fn).__name__.lower() if isinstance(fn, nn.Module) else getattr(fn, "__name__", "divergence")


__all__ = ["DIVERGENCES", "TAID", "Divergence", "divergence", "forward_kl", "jsd", "name_of", "reverse_kl", "skew_kl",
           "skew_reverse_kl", "tvd"]  # fmt: skip
