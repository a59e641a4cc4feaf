"""Forward KL on the tokens that top-k sampling can emit, reverse KL on all others."""

from __future__ import annotations

from torch import Tensor

from llmkd.divergences.closed_form import through_softmax, with_grad
from llmkd.divergences.numerics import expectation, log_ratio, probabilities
from llmkd.errors import ConfigError


def _topk_mix(log_t: Tensor, log_s: Tensor, *, k: int = 256) -> tuple[Tensor, Tensor]:
    p, q, ratio = probabilities(log_t), probabilities(log_s), log_ratio(log_t, log_s)
    head = _head(p, k)
    value = _value(p, q, ratio, head)
    tail = ratio.mul_(-q)  # d g(q, p) / d log q
    return value, through_softmax((q - p).sub_(tail).mul_(head).add_(tail), q)


@with_grad(_topk_mix)
def topk_mix(log_t: Tensor, log_s: Tensor, *, k: int = 256) -> Tensor:
    """sum over the teacher's top k of g(p, q) + sum over the rest of g(q, p), with g(a, b) = a log(a / b) - a + b.

    Part of a sum of p log(p / q) is no divergence and can be negative; every g is at least 0. k = 0 is the reverse KL, k
    of all events the forward KL. Events as probable as the k-th belong to the top k, as in top-k sampling. On top-k rows
    the tail event is one event like any other: record more than k events.

    Args:
        log_t, log_s: [n, events] log-probabilities, nats.
        k: size of the teacher's head, at least 0.

    Returns:
        [n] nats, in [0, inf); 0 only at p = q.

    Raises:
        ConfigError: k is below 0.

    Reference: TopKLD 2025, arXiv 2501.06218.
    Fidelity: derived (the split is the paper's, the generalised terms are ours).
    """
    p, q = log_t.exp(), log_s.exp()
    return _value(p, q, log_ratio(log_t, log_s), _head(p, k))


def _value(p: Tensor, q: Tensor, ratio: Tensor, head: Tensor) -> Tensor:
    """sum of (p - q) - q ratio, and on the head of (p + q) ratio - 2 (p - q) besides."""
    gap = p - q
    return expectation(head, (p + q) * ratio - 2 * gap) - expectation(q, ratio) + gap.sum(-1)


def _head(p: Tensor, k: int) -> Tensor:
    """1 for the k most probable events of a row and what ties with the last, else 0."""
    if k < 0:
        raise ConfigError(f"topk_mix: got k={k}; expected at least 0, such as 256.")
    if k == 0:
        return p.new_zeros(p.shape)
    least = p.topk(min(k, p.shape[-1]), -1).values[..., -1:]
    return (p >= least).to(p.dtype)
