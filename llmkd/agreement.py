"""How close a student is to its teacher, and how well each predicts the text: what evaluation always reports."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    return _sums(student, teacher, labels, {"nll": _nll})


def measure_classes(
    student: DenseRows | HeadRows, teacher: DenseRows | HeadRows | TopKRows | None, labels: Tensor
) -> dict[str, Tensor]:
    """Sums over the n labelled examples, no gradient.

    Returns:
        accuracy: examples whose most likely class is the label. With a teacher also kl and top1_agreement as in `measure`,
        and teacher_accuracy where the teacher's rows are over all classes.
    """
    return _sums(student, teacher, labels, {"accuracy": _right})


def measure_values(student: DenseRows, teacher: DenseRows | None, labels: Tensor) -> dict[str, Tensor]:
    """Sums over the n labelled examples of a regression, no gradient.

    Returns:
        mse: (s - y)^2. With a teacher also mse_to_teacher: (s - t)^2, and teacher_mse: (t - y)^2.
    """
    ours = student.values.detach().double().squeeze(-1)
    sums = {"mse": (ours - labels).square().sum()}
    if teacher is not None:
        theirs = teacher.values.detach().double().squeeze(-1)
        sums |= {"mse_to_teacher": (ours - theirs).square().sum(), "teacher_mse": (theirs - labels).square().sum()}
    return sums


def _sums(
    student: DenseRows | HeadRows,
    teacher: DenseRows | HeadRows | TopKRows | None,
    labels: Tensor,
    of_one: dict[str, Callable[..., Tensor]],
) -> dict[str, Tensor]:
    """`of_one`, functions of (anything, log_p, labels), of the student and of the teacher; how close the two are."""
    terms = {name: Term(fn, per_row=(labels,), needs_teacher=False) for name, fn in of_one.items()}
    if isinstance(teacher, TopKRows) and (teacher.sampled or teacher.temperature != 1.0):
        teacher = None  # neither draws nor another temperature tell how close the two are
    if teacher is not None:
        terms["kl"] = Term(forward_kl)
        terms["top1_agreement"] = Term(_agrees)
        if not isinstance(teacher, TopKRows):
            terms |= {f"teacher_{name}": Term(_of_teacher(fn), per_row=(labels,)) for name, fn in of_one.items()}
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


def summary_of_classes(means: dict[str, float], nats_per_byte: dict[str, float]) -> dict[str, float]:
    """Per-example means -> kl, top1_agreement, accuracy and teacher_accuracy: the same numbers."""
    return means


def _nll(log_t: Tensor | None, log_s: Tensor, labels: Tensor) -> Tensor:
    return -log_s.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _right(log_t: Tensor | None, log_s: Tensor, labels: Tensor) -> Tensor:
    return (log_s.argmax(-1) == labels).to(log_s.dtype)


def _of_teacher(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda log_t, log_s, labels: fn(None, log_t, labels)


def _agrees(log_t: Tensor, log_s: Tensor) -> Tensor:
    return (log_t.argmax(-1) == log_s.argmax(-1)).to(log_s.dtype)
