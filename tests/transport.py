"""SinKD in slow motion: the plain-domain loop of the official code, and batches to try it on."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkd.objectives import SinKD
from llmkd.rows import DenseRows
from llmkd.types import Outputs


def examples(z_s: Tensor, z_t: Tensor, **options) -> Tensor:
    """The loss that the trainer makes of one batch of examples: total over the number of its rows."""
    batch = {"labels": torch.zeros(len(z_s), dtype=torch.int64)}
    loss = SinKD(**options)(Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t)), batch)
    assert loss["sinkd"] == loss["total"]
    return loss["total"] / max(1, len(z_s))


def cost_of(z_s: Tensor, z_t: Tensor, tau: float = 2.0) -> Tensor:
    q, p = (z_s / tau).softmax(-1), (z_t / tau).softmax(-1)
    return torch.stack([torch.stack([(a - b).abs().sum() for b in p]) for a in q])


def official(z_s: Tensor, z_t: Tensor, tau: float = 2.0, epsilon: float = 0.1, iterations: int = 20) -> Tensor:
    """The plain-domain loop: K <- K / rows, K <- K / columns; not divided by the number of examples."""
    cost = cost_of(z_s, z_t, tau)
    k = (-cost / epsilon).exp()
    for _ in range(iterations):
        k = k / k.sum(1, keepdim=True)
        k = k / k.sum(0, keepdim=True)
    return (k * cost).sum()


def language_rows(sequences: int = 3, tokens: int = 6, vocab: int = 13, seed: int = 0):
    """Rows of a batch of token sequences, with a prompt and padding that are not supervised."""
    torch.manual_seed(seed)
    labels = torch.randint(vocab, (sequences, tokens))
    labels[:, 0], labels[0, 4:], labels[1, 1:3] = -100, -100, -100
    kept = labels != -100
    z_s, z_t = (2 * torch.randn(sequences, tokens, vocab).double() for _ in range(2))
    return z_s[kept], z_t[kept], {"labels": labels, "input_ids": labels.clamp_min(0)}
