"""Hidden-state MSE: layers of the student imitate layers of the teacher, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkd.errors import ConfigError
from llmkd.objectives.base import Objective
from llmkd.support import wide
from llmkd.types import Batch, Kind, Loss, Outputs, Signal, supervised_rows


class HiddenMSE(Objective):
    """sum over supervised items of the mean over layer pairs (l, m), tokens and dimensions of (h_s^l - h_t^m)^2.

    An item of a causal LM is a supervised row, the token that predicts; an item of a classifier is an example, with all its
    tokens. Both models need the same width, as a student that is cut from a teacher has; there is no projection.

    Args:
        layers: pairs [student's, teacher's] of hidden states, 0 the embeddings; None: each of the student's L layers with
            every M/L-th of the teacher's M, the last with the last.

    Returns:
        `total` and `hidden_mse`: squared units of the hidden states.

    Raises:
        ConfigError: models of different width, a layer that is not there, or no teacher.

    Reference: Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, eq. 8, with the uniform layer mapping.
    Fidelity: paper only (without its projection, and without the embeddings unless they are named).
    """

    needs = frozenset({Signal.HIDDEN_STATES})
    takes = frozenset(Kind)

    def __init__(self, layers: list[tuple[int, int]] | None = None) -> None:
        super().__init__()
        if layers is not None and not layers:
            raise ConfigError("hidden_mse.layers: got an empty list; expected pairs [student, teacher]. Leave it out.")
        self.layers = layers

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        """The sum over the items, in float32 or wider."""
        if teacher is None or teacher.hidden_states is None or student.hidden_states is None:
            raise ConfigError(
                "hidden_mse: it needs both models' hidden states, got none; give a teacher or take it out."
            )
        pairs = self.layers or uniform(len(student.hidden_states) - 1, len(teacher.hidden_states) - 1)
        check_pairs(pairs, student.hidden_states, teacher.hidden_states)
        gaps = [_gap(student.hidden_states[ours], teacher.hidden_states[theirs]) for ours, theirs in pairs]
        total = _per_item(torch.stack(gaps).mean(0), batch).sum()
        return {"total": total, "hidden_mse": total.detach()}


def uniform(ours: int, theirs: int) -> list[tuple[int, int]]:
    """Layer l of `ours` with layer round(l theirs / ours) of `theirs`, l = 1 .. ours."""
    return [(layer, round(layer * theirs / ours)) for layer in range(1, ours + 1)]


def check_pairs(pairs: list[tuple[int, int]], student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> None:
    """Raise a ConfigError for a layer that is not there, or states of different width."""
    for pair in pairs:
        for name, layer, states in zip(("student", "teacher"), pair, (student, teacher), strict=True):
            if not 0 <= layer < len(states):
                raise ConfigError(
                    f"hidden_mse.layers: got {layer} for the {name}, which has 0 to {len(states) - 1}; expected one of these."
                )
    width = student[0].shape[-1]
    if teacher[0].shape[-1] != width:
        raise ConfigError(
            f"hidden_mse: the student's width is {width}, the teacher's {teacher[0].shape[-1]}; expected the same. Use a "
            "student that is cut from the teacher (model: depth), or another objective."
        )


def _gap(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared distance of each token, mean over dimensions, [B, T]."""
    ours = wide(ours)
    return (ours - theirs.detach().to(ours.dtype)).square().mean(-1)


def _per_item(gap: Tensor, batch: Batch) -> Tensor:
    """[B, T] -> [N]: a supervised row's own token, or the mean over an example's real tokens."""
    if batch["labels"].dim() > 1:
        return gap.flatten()[supervised_rows(batch)]
    mask = batch["attention_mask"].to(gap.dtype) if "attention_mask" in batch else torch.ones_like(gap)
    return ((gap * mask).sum(1) / mask.sum(1).clamp_min(1))[supervised_rows(batch)]
