"""How a divergence carries its closed-form gradient, and the two small pieces that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Tensor])


def with_grad(grad: Callable[..., Tensor]) -> Callable[[F], F]:
    """Attach `grad(log_t, log_s, ...) -> d/dz_s` to a divergence; the chunk driver uses it instead of autograd."""

    def attach(fn: F) -> F:
        fn.grad = grad  # type: ignore[attr-defined]
        return fn

    return attach


def grad_of(fn: Callable[..., Any]) -> Callable[..., Tensor] | None:
    """The closed form that a divergence carries, with its knobs bound, or None."""
    if isinstance(fn, nn.Module):
        return None
    if isinstance(fn, partial):
        inner = grad_of(fn.func)
        return partial(inner, *fn.args, **fn.keywords) if inner else None
    return getattr(fn, "grad", None)


def through_softmax(slope: Tensor, log_s: Tensor) -> Tensor:
    """d/dz from `slope` = d/dlog_s, where log_s = log_softmax(z): slope - q * sum(slope), [n, k] -> [n, k]."""
    return slope - log_s.exp() * slope.sum(-1, keepdim=True)


