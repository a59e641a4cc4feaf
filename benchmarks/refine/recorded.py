"""A teacher that reads each sample once: all runs see the same samples, and its decoder is most of its cost."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from llmkd.adapters.causal_lm import head_of, head_settings
from llmkd.rows import HeadRows
from llmkd.teachers import LocalTeacher
from llmkd.types import Batch, Outputs, Signal


class RecordedTeacher:
    """The rows that a live teacher would show, from its final hidden states, kept since they were first asked for.

    Args:
        teacher: a live causal LM. Batches have no padding, and every token but the first is supervised.
    """

    provides = frozenset({Signal.LOGITS})

    def __init__(self, teacher: LocalTeacher) -> None:
        self.teacher, self.tokenizer, self.vocab_size = teacher, teacher.tokenizer, teacher.vocab_size
        self._hidden: dict[tuple[int, ...], Tensor] = {}

    def prepare(self, accelerator: Any) -> None:
        """Move to the accelerator's device."""
        self.teacher.prepare(accelerator)

    def __call__(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
        """The rows of a batch."""
        samples = [tuple(ids) for ids in batch["input_ids"].tolist()]
        new = [number for number, ids in enumerate(samples) if ids not in self._hidden]
        if new:
            ids = batch["input_ids"][new]
            rows: Any = self.teacher({"input_ids": ids, "labels": _all_said(ids)}, {Signal.LOGITS}).rows
            for number, hidden in zip(new, rows.hidden.split(len(samples[0]) - 1), strict=True):
                self._hidden[samples[number]] = hidden.clone()
        said = batch["labels"][:, 1:] != -100  # none of a row that only fills up a batch
        kept = [self._hidden[ids][mask] for ids, mask in zip(samples, said, strict=True)]
        model: Any = self.teacher.model
        scale, softcap = head_settings(model.config)
        rows = HeadRows(torch.cat(kept), head_of(model), scale=scale, softcap=softcap, vocab_size=vocab_size)
        return Outputs(rows=rows)


def _all_said(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:, 0] = -100
    return labels
