"""How close a student is to its teacher, and how well each predicts the text: what evaluation always reports."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmkd.divergences.kl import forward_kl
from llmkd.rows import DenseRows, HeadRows, Term, TopKRows, reduce


def measure(
    student: DenseRows | HeadRows, teacher: DenseRows | HeadRows | TopKRows | None, labels: Tensor
) -> dict[str, Tensor]:
    """Sums over the n supervised rows, no gradient.

    Returns:
        nll: -log q(y), nats. With a teacher also kl: KL(p || q), nats; top1_agreement: rows where both have the same
        most likely event; teacher_nll: -log p(y), nats, where the teacher's rows are over the whole vocabulary.
    """
    terms = {"nll": Term(_nll, per_row=(labels,), needs_teacher=False)}
    if teacher is not None:
        terms["kl"] = Term(forward_kl)
        terms["top1_agreement"] = Term(_agrees)
        if not isinstance(teacher, TopKRows):
            terms["teacher_nll"] = Term(_teacher_nll, per_row=(labels,))
    with torch.no_grad():
        _, sums = reduce(list(terms.values()), student, teacher)
    return dict(zip(terms, sums, strict=True))


def summary(means: dict[str, float], nats_per_byte: dict[str, float]) -> dict[str, float]:
    """Per-token means and nats per byte -> kl, top1_agreement, perplexity and bits_per_byte, also the teacher's."""
    out = {name: means[name] for name in ("kl", "top1_agreement") if name in means}
    for prefix in ("", "teacher_"):
        if f"{prefix}nll" in means:
            out[f"{prefix}perplexity"] = math.exp(min(means[f"{prefix}nll"], 700.0))
        if f"{prefix}nll" in nats_per_byte:
            out[f"{prefix}bits_per_byte"] = nats_per_byte[f"{prefix}nll"] / math.log(2)
    return out


def _nll(log_t: Tensor | None, log_s: Tensor, labels: Tensor) -> Tensor:
    return -log_s.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _teacher_nll(log_t: Tensor, log_s: Tensor, labels: Tensor) -> Tensor:
    return _nll(None, log_t, labels)


def _agrees(log_t: Tensor, log_s: Tensor) -> Tensor:
    return (log_t.argmax(-1) == log_s.argmax(-1)).to(log_s.dtype)
