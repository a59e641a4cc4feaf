"""A teacher that reads each sample once: all runs see the same samples, and its decoder is most of its cost."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from llmkd.adapters.causal_lm import head_of, head_settings
from llmkd.data import Collator
from llmkd.data.collate import IGNORE
from llmkd.rows import HeadRows
from llmkd.teachers import LocalTeacher
from llmkd.types import Batch, Outputs, Signal

Sample = tuple[int, ...]


class RecordedTeacher:
    """The rows that a live teacher would show, from its final hidden states, kept since they were first asked for.

    Args:
        teacher: a live causal LM. Batches are padded on the right.
    """

    provides = frozenset({Signal.LOGITS})

    def __init__(self, teacher: LocalTeacher) -> None:
        self.teacher, self.tokenizer, self.vocab_size = teacher, teacher.tokenizer, teacher.vocab_size
        self._hidden: dict[Sample, Tensor] = {}

    def prepare(self, accelerator: Any) -> None:
        """Move to the accelerator's device."""
        self.teacher.prepare(accelerator)

    def __call__(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
        """The rows of a batch."""
        ids, labels = batch["input_ids"], batch["labels"]
        lengths = batch.get("attention_mask", torch.ones_like(ids)).sum(-1).tolist()
        samples = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths, strict=True)]
        self._read([sample for sample in samples if sample not in self._hidden], ids.device)
        said = [row[1 : len(sample)] != IGNORE for row, sample in zip(labels, samples, strict=True)]
        hidden = torch.cat([self._hidden[sample][mask] for sample, mask in zip(samples, said, strict=True)])
        model: Any = self.teacher.model
        scale, softcap = head_settings(model.config)
        return Outputs(rows=HeadRows(hidden, head_of(model), scale=scale, softcap=softcap, vocab_size=vocab_size))

    def _read(self, samples: list[Sample], device: torch.device) -> None:
        """Keep the final hidden states [T - 1, H] that predict each token but the first."""
        if not samples:
            return
        made = Collator(0)([{"input_ids": list(ids), "labels": [IGNORE, *ids[1:]]} for ids in samples])
        rows: Any = self.teacher({name: x.to(device) for name, x in made.items()}, {Signal.LOGITS}).rows
        for ids, hidden in zip(samples, rows.hidden.split([len(ids) - 1 for ids in samples]), strict=True):
            self._hidden[ids] = hidden.clone()
