"""The nouns that every module speaks: Batch, Signal, Outputs, Loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from llmkd.rows import DenseRows, HeadRows, TopKRows

    Rows = HeadRows | DenseRows | TopKRows

Batch = Mapping[str, Tensor]
"""input_ids, attention_mask, position_ids [B, T]; labels [B, T] with -100 = not supervised and never a label at position 0."""

Loss = dict[str, Tensor]
"""`total`: a differentiable SUM over supervised items; every other entry: a detached sum with the same denominator.

A plain dict of tensors, because ZeRO-3's hooks look into dicts and tuples only.
"""


class Signal(StrEnum):
    """What a model can show to an objective."""

    LOGITS = "logits"
    HIDDEN_STATES = "hidden_states"
    ATTENTIONS = "attentions"
    LABELS = "labels"


@dataclass
class Outputs:
    """What a model shows: only the signals that were asked for.

    `rows` are the supervised rows only, in batch order: row r predicts the r-th label that is not -100.
    `hidden_states` and `attentions` are Hugging Face's tuples, a tensor [B, T, ...] a layer.
    """

    rows: Rows | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def supervised_rows(batch: Batch) -> Tensor:
    """Flat indices [N] into [B * T] of the positions whose *next* token is supervised, in batch order.

    The collator computes them as `batch["rows"]` before the batch goes to the device, which spares the step a host
    sync; otherwise they follow from the labels. The causal shift happens here and nowhere else.
    """
    if "rows" in batch:
        return batch["rows"]
    return (batch["labels"][:, 1:] != -100).nonzero() @ batch["labels"].new_tensor([batch["labels"].shape[1], 1])


def row_labels(batch: Batch) -> Tensor:
    """The label [N] that each supervised row predicts."""
    return batch["labels"].flatten()[supervised_rows(batch) + 1]
