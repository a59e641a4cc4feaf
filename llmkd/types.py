"""The nouns that every module speaks: Batch, Signal, Outputs, Loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from llmkd.combined import Combined
    from llmkd.rows import DenseRows, HeadRows, TopKRows

    Rows = HeadRows | DenseRows | TopKRows | Combined

Batch = Mapping[str, Tensor]
"""input_ids, attention_mask, position_ids [B, T]; labels with -100 = not supervised.

ids [D]: what the documents are called, on the host (`data.ids`), for a teacher that reads a store.
labels [B, T] are tokens, never one at position 0: a row predicts the next token. labels [B] are classes, or values of a
regression: a row an example.
"""

Loss = dict[str, Tensor]
"""`total`: a differentiable SUM over supervised items; every other entry: a detached sum with the same denominator.

A plain dict of tensors, because ZeRO-3's hooks look into dicts and tuples only.
"""


class Kind(StrEnum):
    """What a row of a model is: a distribution over events, given by its logits, or one value."""

    DISTRIBUTION = "distribution"
    VALUE = "value"


class Signal(StrEnum):
    """What a model can show to an objective.

    `samples` are rows drawn from its distribution: enough for what is linear in its probabilities, and for nothing else.
    """

    LOGITS = "logits"
    SAMPLES = "samples"
    HIDDEN_STATES = "hidden_states"
    ATTENTIONS = "attentions"
    LABELS = "labels"


@dataclass(frozen=True)
class Routes:
    """Where a batch's examples are from, on the host: `domains`, a value for each of the B examples; and of the D documents
    that have a supervised row, in batch order, the `examples` [D] that they are in and the number of their `rows` [D]."""

    domains: list[Any]
    examples: Any
    rows: Any


@dataclass
class Outputs:
    """What a model shows: only the signals that were asked for.

    `rows` are the supervised rows only, in batch order: row r predicts the r-th label that is not -100.
    `hidden_states` and `attentions` are Hugging Face's tuples, a tensor [B, T, ...] a layer.
    """

    rows: Rows | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def tensors_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a wrapped model gets of a batch: all but what stays on the host, which is for the teacher."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def supervised_rows(batch: Batch) -> Tensor:
    """Indices [N] of the rows that predict a supervised label, in batch order.

    For tokens, labels [B, T], into [B * T]: the positions whose *next* token is supervised. For classes, labels [B], into
    [B]. The collator computes them as `batch["rows"]` before the batch goes to the device, which spares the step a host
    sync; otherwise they follow from the labels. The causal shift happens here and nowhere else.
    """
    if "rows" in batch:
        return batch["rows"]
    labels = batch["labels"]
    if labels.dim() == 1:
        return (labels != -100).nonzero().squeeze(-1)
    return (labels[:, 1:] != -100).nonzero() @ labels.new_tensor([labels.shape[1], 1])


def row_labels(batch: Batch) -> Tensor:
    """The label [N] that each supervised row predicts."""
    labels = batch["labels"]
    return labels.flatten()[supervised_rows(batch) + (labels.dim() > 1)]
