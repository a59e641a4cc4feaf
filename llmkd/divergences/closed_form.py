"""How a divergence carries its closed-form gradient, and what all of them share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from inspect import isfunction
from typing import Any, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)
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


def closed_form(fn: Callable[..., Any], one_kernel: bool = False) -> ValueAndGrad | None:
    """The closed form that a divergence carries, with its knobs bound, or None; a module's is a method of it.

    `one_kernel` asks for it as `fused` makes it, if it is a function: what a module holds may move with the steps.
    """
    if isinstance(fn, partial):
        inner = closed_form(fn.func, one_kernel)
        return partial(inner, *fn.args, **fn.keywords) if inner else None
    form = getattr(fn, "value_and_grad", None)
    return fused(form) if one_kernel and isfunction(form) else form


@cache
def fused(form: ValueAndGrad) -> ValueAndGrad:
    """The closed form as torch.compile fuses it; from the first failure on, as it is."""
    compiled, works = torch.compile(form, dynamic=True), True

    def call(*rows: Tensor, **knobs: Any) -> tuple[Tensor, Tensor]:
        nonlocal works
        if works:
            try:
                return compiled(*rows, **knobs)
            except Exception as error:  # no Triton, no compiler, a wrong knob: the plain form works, or says more
                works = False
                log.warning(
                    "%s is not fused into one kernel: %s", form.__name__, next(iter(str(error).splitlines()), "")
                )
        return form(*rows, **knobs)

    return call


def through_softmax(slope: Tensor, q: Tensor) -> Tensor:
    """d/dz from `slope` = d/dlog_s, where q = exp(log_s) = softmax(z): slope - q * sum(slope), [n, k] -> [n, k]."""
    return torch.addcmul(slope, q, slope.sum(-1, keepdim=True), value=-1)
