"""What `score` measures of an example: surprise, error, and how far two models are apart, each a mean over its tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from llmkd.divergences import forward_kl
from llmkd.rows import look, per_row
from llmkd.stages.batches import Example, bucketed, sums_of
from llmkd.teachers import LocalTeacher
from llmkd.types import Signal, row_labels


def nll(log_p: Tensor, labels: Tensor) -> Tensor:
    """-log p(y): [n, V], [n] -> [n] nats."""
    return -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def el2n(log_p: Tensor, labels: Tensor) -> Tensor:
    """|p - onehot(y)|_2 = sqrt(sum_v p_v^2 - 2 p_y + 1), in [0, sqrt 2]: [n, V], [n] -> [n].

    Reference: Paul et al. 2021 (EL2N), arXiv 2107.07075.
    """
    p = log_p.exp()
    return (p.square().sum(-1) - 2 * p.gather(-1, labels.unsqueeze(-1)).squeeze(-1) + 1).clamp_min(0).sqrt()


def _nll_and_el2n(log_p: Tensor, labels: Tensor) -> Tensor:
    """Both, of one projection: [n, 2]."""
    return torch.stack([nll(log_p, labels), el2n(log_p, labels)], dim=-1)


@torch.no_grad()
def measure(
    models: Mapping[str, LocalTeacher],
    examples: Sequence[Example],
    measures: Collection[str] = (),
    *,
    columns: int | None = None,
    batch_tokens: int = 16384,
) -> dict[str, list[float]]:
    """Score examples.

    Args:
        models: by part, `teacher` and `reference`, on one device. examples: each with at least one scored token.
        measures: of `el2n` and `disagreement`. columns: leading columns of the heads that are tokens; None for all.
        batch_tokens: tokens of a batch, padding included.

    Returns:
        `{part}_nll_sum`, `{part}_nll_mean`, and `reference_el2n`, `disagreement` if asked for: a float an example, nats.
    """
    sums: dict[str, list[float]] = {}
    device = next(next(iter(models.values())).model.parameters()).device
    for numbers, batch in bucketed(examples, batch_tokens):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        for name, values in _sums(models, batch, measures, columns).items():
            column = sums.setdefault(name, [0.0] * len(examples))
            for number, value in zip(numbers, values.tolist(), strict=True):
                column[number] = value
    return {name: found for total in sums for name, found in _named(total, sums[total], examples).items()}


def _named(name: str, sums: list[float], examples: Sequence[Example]) -> dict[str, list[float]]:
    """The columns that a sum over tokens gives: itself and its mean for an NLL, its mean for all else."""
    means = [total / example.scored for total, example in zip(sums, examples, strict=True)]
    return {f"{name}_sum": sums, f"{name}_mean": means} if name.endswith("_nll") else {name: means}


def _sums(
    models: Mapping[str, LocalTeacher], batch: dict[str, Tensor], measures: Collection[str], columns: int | None
) -> dict[str, Tensor]:
    """Sums over the scored tokens of each example of a batch, [B] float64."""
    shown = {part: model(batch, {Signal.LOGITS}, columns).rows for part, model in models.items()}
    labels, size = row_labels(batch), (batch["input_ids"].shape[0], batch["input_ids"].shape[1])
    out: dict[str, Tensor] = {}
    for part, rows in shown.items():
        both = part == "reference" and "el2n" in measures
        values = sums_of(look(_nll_and_el2n if both else nll, rows, labels), batch["rows"], size)  # type: ignore[arg-type]
        out[f"{part}_nll"] = values[:, 0] if both else values
        if both:
            out[f"{part}_el2n"] = values[:, 1]
    if "disagreement" in measures:
        values = per_row(forward_kl, shown["reference"], shown["teacher"])  # type: ignore[arg-type]
        out["disagreement"] = sums_of(values, batch["rows"], size)
    return out
