"""Adaptive KL: forward and reverse KL, weighted by how far the models are apart on the teacher's head and tail."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmkd.divergences.closed_form import with_grad
from llmkd.divergences.kl import forward_kl, reverse_kl
from llmkd.divergences.numerics import expectation, log_ratio, open_unit, probabilities
from llmkd.errors import unknown_name

Variant = Literal["official", "dskd"]
FEW = 4096  # events that hold most rows' heads
MARGIN = 1e-3  # of mass, far above what rounding can move


def _adaptive_kl(
    log_t: Tensor, log_s: Tensor, *, mu: float = 0.5, variant: Variant = "official"
) -> tuple[Tensor, Tensor]:
    p, q, ratio = probabilities(log_t), probabilities(log_s), log_ratio(log_s, log_t)
    share = head_share(p, q, mu, variant).unsqueeze(-1)
    reverse = expectation(q, ratio)
    value = torch.lerp(reverse, -expectation(p, ratio), share.squeeze(-1))
    slope = ratio.sub_(reverse.unsqueeze(-1)).mul_(q).mul_(1 - share)
    return value, slope.add_(q.sub_(p).mul_(share))


@with_grad(_adaptive_kl)
def adaptive_kl(log_t: Tensor, log_s: Tensor, *, mu: float = 0.5, variant: Variant = "official") -> Tensor:
    """AKL = w KL(p || q) + (1 - w) KL(q || p), w = g(head) / (g(head) + g(tail)), g(A) = sum over A of |p - q|, detached.

    The head is the teacher's most probable part, about `mu` of its mass: where the models differ there, the forward KL
    counts more. Events of equal probability fall on the same side. Both KLs are true divergences and the mask is aligned
    with the vocabulary; at p = q, where the official weights are 0/0, the value is 0. On top-k rows the tail event is one
    event like any other.

    Args:
        log_t, log_s: [n, k] log-probabilities, nats.
        mu: teacher mass of the head, in (0, 1).
        variant: "official" head = {descending cumulative mass <= mu} and always the top-1; "dskd" (DSKD's code) tail =
            {ascending cumulative mass <= mu}, so that the event on the boundary belongs to the head.

    Returns:
        [n] nats, in [0, inf), between the two KLs.

    Raises:
        ConfigError: mu is not in (0, 1), or an unknown variant.

    Reference: Wu et al. 2024 (AKL), arXiv 2404.02657.
    Fidelity: checked against the official code of AKL and against DSKD's variant.
    """
    share = head_share(log_t.exp(), log_s.detach().exp(), mu, variant)
    return torch.lerp(reverse_kl(log_t, log_s), forward_kl(log_t, log_s), share)


def head_share(p: Tensor, q: Tensor, mu: float, variant: Variant) -> Tensor:
    """w, [n]: the share of sum |p - q| that lies in the teacher's head; 0 where p = q."""
    open_unit("mu", mu, "use reverse_kl", "use forward_kl")
    if variant not in _HEADS:
        raise unknown_name("variant of adaptive_kl", variant, _HEADS)
    gap = (p - q).abs()
    return expectation(gap, _HEADS[variant](p, mu).to(p.dtype)) / gap.sum(-1).clamp_min(torch.finfo(p.dtype).tiny)


def _official(p: Tensor, mu: float) -> Tensor:
    ordered = _leading(p, mu)
    size = (ordered.cumsum(-1) <= mu).sum(-1, keepdim=True).clamp_min(1)
    return p >= ordered.gather(-1, size - 1)


def _dskd(p: Tensor, mu: float) -> Tensor:
    """The tail is what leaves at most mu from an event downwards: the head ends before its most probable event."""
    ordered, rest = _leading(p, 1 - mu), p.sum(-1, keepdim=True) - mu
    before = ordered.cumsum(-1) - ordered
    size = (before < rest).sum(-1, keepdim=True)
    most = ordered.gather(-1, size.clamp_max(ordered.shape[-1] - 1))
    return (p > most) | (size == p.shape[-1])


def _leading(p: Tensor, mass: float) -> Tensor:
    """The most probable events of each row, in falling order: all, or on a CPU, where a sort is dear, enough for `mass`."""
    if p.device.type == "cpu" and p.shape[-1] > 4 * FEW:
        few = p.topk(FEW, -1).values
        if bool((few[:, :-1].sum(-1) > mass + MARGIN).all()):
            return few
    return p.sort(-1, descending=True).values


_HEADS = {"official": _official, "dskd": _dskd}
