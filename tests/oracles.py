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


def known(row: list[float]) -> list[float]:
    """log 0 counts as the logarithm of the smallest normal float32, -87.3."""
    return [x if x > -INF else math.log(torch.finfo(torch.float32).tiny) for x in row]


def adaptive_kl(t: list[float], s: list[float], mu: float = 0.5, variant: str = "official") -> float:
    """Head and tail by walking down (official) or up (dskd) the sorted teacher; ties at the edge go the same way."""
    p, gap = [math.exp(x) for x in t], [abs(math.exp(x) - math.exp(y)) for x, y in zip(t, s, strict=True)]
    mass, taken = 0.0, []
    for value in sorted(p, reverse=variant == "official"):
        mass += value
        if mass > mu:
            break
        taken.append(value)
    if variant == "official":
        edge = min(taken, default=max(p))
        head = [x >= edge for x in p]
    else:
        head = [not taken or x > max(taken) for x in p]
    total = math.fsum(gap)
    share = math.fsum(g for g, inside in zip(gap, head, strict=True) if inside) / total if total else 0.0
    return (share * kl(t, known(s)) if share else 0.0) + ((1 - share) * kl(s, known(t)) if share < 1 else 0.0)


def alpha_beta(t: list[float], s: list[float], alpha: float = 0.5, beta: float = 0.5) -> float:
    both, a, b = alpha + beta, alpha, beta
    terms = []
    for x, y in zip(t, s, strict=True):
        bracket = math.exp(a * x + b * y) - a / both * math.exp(both * x) - b / both * math.exp(both * y)
        terms.append(-bracket / (a * b))
    return math.fsum(terms)


def topk_mix(t: list[float], s: list[float], k: int = 256) -> float:
    edge = sorted(t, reverse=True)[min(k, len(t)) - 1]
    terms = []
    for x, y in zip(t, s, strict=True):
        first, second = (x, y) if x >= edge else (y, x)
        a, b = known([first, second])
        terms.append(math.exp(first) * (a - b) - math.exp(first) + math.exp(second))
    return math.fsum(terms)


def standardised(t: list[float], s: list[float], tau: float = 1.0) -> float:
    """Forward KL of the two rows, each divided by the standard deviation of its finite entries."""
    rows = []
    for row in (t, s):
        kept = [x for x in row if x > -INF]
        mean = math.fsum(kept) / len(kept)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in kept) / max(1, len(kept) - 1))
        z = [(x - mean) / (max(spread, 1e-6) * tau) for x in row]
        total = math.log(math.fsum(math.exp(x - max(z)) for x in z)) + max(z)
        rows.append([x - total for x in z])
    return kl(rows[0], known(rows[1]))


def dac_kl(t: list[float], s: list[float], mode: str = "bucket", tau: float = 0.02, **_: float) -> float:
    """The window (0.02, 0.98) before the first step, without a label; only the 1024 best events have their own place."""
    p, q = ([math.exp(x) for x in row] for row in (t, s))
    best, sigmoid = sorted(p, reverse=True)[:1024], lambda x: 1 / (1 + math.exp(-x))
    keep = []
    for value in p:
        own = value >= best[-1]
        low = math.fsum(x for x in best if x > value or not own)
        high = math.fsum(x for x in best if x >= value) if own else 1.0
        keep.append(sigmoid((high - 0.02) / tau) * sigmoid((0.98 - low) / tau))
    mass = math.fsum(m * x for m, x in zip(keep, p, strict=True))
    if mass < 0.5:
        keep = [m + (1 - m) * (0.5 - mass) / (1 - mass) for m in keep]
    kept_t, kept_s = ([m * x for m, x in zip(keep, row, strict=True)] for row in (p, q))
    value = math.fsum(m * (x - y) for m, x, y in zip(kept_t, known(t), known(s), strict=True))
    masses = [math.fsum(kept) for kept in (kept_t, kept_s)]
    if mode == "bucket":
        masses = [math.fsum((1 - m) * x for m, x in zip(keep, row, strict=True)) for row in (p, q)]
    log_t, log_s = (math.log(max(x, torch.finfo(torch.float32).tiny)) for x in masses)
    return value + masses[0] * (log_t - log_s) if mode == "bucket" else value / masses[0] - log_t + log_s


ORACLES: dict[str, Callable[..., float]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "taid": taid,
    "dac_kl": dac_kl,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
    "topk_mix": topk_mix,
    "standardised": standardised,
}


# A part of the student is a constant of their target: tests/golden tests the gradient's identity instead of gradcheck
STOPPED = {"taid", "adaptive_kl", "dac_kl"}


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
