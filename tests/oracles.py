"""Slow references, written from the formulas: loops over float64 numbers and dense torch, without code of llmkd."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

INF = math.inf


def log_mix(weight: float, a: float, b: float) -> float:
    """log(weight e^a + (1 - weight) e^b), without leaving the log domain."""
    x, y = math.log(weight) + a, math.log1p(-weight) + b
    top = max(x, y)
    return -INF if top == -INF else top + math.log(math.exp(x - top) + math.exp(y - top))


def kl(a: list[float], b: list[float]) -> float:
    """sum e^a (a - b), with 0 log 0 = 0; infinite where b has no mass and a has."""
    terms = []
    for x, y in zip(a, b, strict=True):
        if x > -INF:
            terms.append(math.exp(x) * (x - y))
    return math.fsum(terms)


def forward_kl(t: list[float], s: list[float]) -> float:
    return kl(t, s)


def reverse_kl(t: list[float], s: list[float]) -> float:
    return kl(s, t)


def jsd(t: list[float], s: list[float], beta: float = 0.5) -> float:
    m = [log_mix(beta, x, y) for x, y in zip(t, s, strict=True)]
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def skew_kl(t: list[float], s: list[float], alpha: float = 0.1) -> float:
    return kl(t, [log_mix(alpha, x, y) for x, y in zip(t, s, strict=True)])


def skew_reverse_kl(t: list[float], s: list[float], alpha: float = 0.1) -> float:
    return kl(s, [log_mix(1 - alpha, x, y) for x, y in zip(t, s, strict=True)])


def tvd(t: list[float], s: list[float]) -> float:
    return 0.5 * math.fsum(abs(math.exp(x) - math.exp(y)) for x, y in zip(t, s, strict=True))


def taid(t: list[float], s: list[float], t_start: float = 0.4, **_: float) -> float:
    """KL(p_t || q) before the first step: p_t is the normalised q^(1 - t) p^t."""
    mixed = [(1 - t_start) * y + t_start * x for x, y in zip(t, s, strict=True)]
    top = max(mixed)
    total = top + math.log(math.fsum(math.exp(x - top) for x in mixed))
    return kl([x - total for x in mixed], s)


ORACLES: dict[str, Callable[..., float]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "taid": taid,
}


# A part of the student is a constant of their target: tests/golden tests the gradient's identity instead of gradcheck
STOPPED = {"taid"}


def oracle(name: str, log_t: Tensor, log_s: Tensor, **knobs: float) -> Tensor:
    """The divergence of every row, [n] float64."""
    rows = zip(log_t.double().tolist(), log_s.double().tolist(), strict=True)
    return torch.tensor([ORACLES[name](t, s, **knobs) for t, s in rows], dtype=torch.float64)


def top_k_with_tail(log_p: Tensor, ids: Tensor) -> Tensor:
    """Gather the events `ids` [n, k] and merge all other events into one last event: [n, k + 1] ([n, V] if k = V)."""
    kept = log_p.gather(1, ids)
    if ids.shape[1] == log_p.shape[1]:
        return kept
    rest = torch.ones_like(log_p, dtype=torch.bool).scatter(1, ids, torch.zeros_like(ids, dtype=torch.bool))
    tail = log_p[rest].view(len(log_p), -1).logsumexp(-1, keepdim=True)
    return torch.cat([kept, tail], 1)


def head_logits(
    hidden: Tensor,
    head: nn.Linear,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """softcap tanh(scale (h W^T + b) / softcap), cut to the first `vocab_size` columns."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if vocab_size is None else logits[:, :vocab_size]


def dense_rows(
    fn: Callable[..., Tensor], z_s: Tensor, z_t: Tensor, *per_row: Tensor, temperature: float = 1.0
) -> Tensor:
    """fn of the two softmaxes at a temperature, in one piece, under plain autograd: [n]."""
    log_t = torch.log_softmax(z_t.detach() / temperature, -1)
    return fn(log_t, torch.log_softmax(z_s / temperature, -1), *per_row)


def instance(table: dict, name: str, dtype: torch.dtype = torch.float64, **knobs: float) -> Callable[..., Tensor]:
    """What a table entry becomes in use: a function as it is or with its knobs bound, a module class built."""
    entry = table[name]
    if inspect.isclass(entry):
        torch.manual_seed(0)
        return entry(**knobs).to(dtype)
    return functools.partial(entry, **knobs) if knobs else entry


def ids_of(case: tuple) -> str:
    """A readable test id for a (name, knobs) pair."""
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])
