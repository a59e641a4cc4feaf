"""How a divergence carries its closed-form gradient, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

ValueAndGrad = Callable[..., tuple[Tensor, Tensor]]
F = TypeVar("F", bound=Callable[..., Tensor])


def with_grad(value_and_grad: ValueAndGrad) -> Callable[[F], F]:
    """Attach a closed form to a divergence; the chunk driver uses it instead of autograd.

    Args:
        value_and_grad: `(log_t, log_s, ...) -> (values [n], slope [n, k])`, slope = d values / d z_s where
            log_s = log_softmax(z_s). The divergence then has `.value_and_grad`, and `.grad` for the slope alone.
    """

    def attach(fn: F) -> F:
        fn.value_and_grad = value_and_grad  # type: ignore[attr-defined]
        fn.grad = lambda *rows, **knobs: value_and_grad(*rows, **knobs)[1]  # type: ignore[attr-defined]
        return fn

    return attach


def closed_form(fn: Callable[..., Any]) -> ValueAndGrad | None:
    """The closed form that a divergence carries, with its knobs bound, or None; a module's is a method of it."""
    if isinstance(fn, partial):
        inner = closed_form(fn.func)
        return partial(inner, *fn.args, **fn.keywords) if inner else None
    return getattr(fn, "value_and_grad", None)


def through_softmax(slope: Tensor, q: Tensor) -> Tensor:
    """d/dz from `slope` = d/dlog_s, where q = exp(log_s) = softmax(z): slope - q * sum(slope), [n, k] -> [n, k]."""
    return torch.addcmul(slope, q, slope.sum(-1, keepdim=True), value=-1)
