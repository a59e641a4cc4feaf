"""Run the teacher once over a corpus and store its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Features, Value
from torch import Tensor

from llmkd.adapters.causal_lm import head_settings
from llmkd.data.collate import Collator
from llmkd.data.ids import content_id
from llmkd.data.manifest import EXAMPLE_ID
from llmkd.data.samples import format_of, samples_of
from llmkd.errors import ConfigError
from llmkd.stages.base import REJECTED, Stage
from llmkd.stages.models import Models
from llmkd.stages.source import Source
from llmkd.store import STORES, Codec
from llmkd.store.shards import write_shard
from llmkd.types import Signal, row_labels

COLUMNS = Features({"id": Value("int64"), "rows": Value("int32"), "data": Value("binary")})


class CacheTeacher(Stage):
    """data(x) = store(p(. | x_<i) for each supervised token i of x): the teacher's rows, which teacher `cached` reads.

    Samples are made as training makes them, held-out rows included, so that a training recipe with the same data,
    max_length and tokenizer finds each of them by its content, packed or not.

    Args:
        teacher: a path, or a mapping of the keys of teacher `local`.
        store: topk, sampled or hidden, see `llmkd list store`.
        max_length: tokens a sample, as in the training recipe's data. batch_size: samples that the teacher sees at once.

    Raises:
        ConfigError: the teacher is no causal LM, has a key that it does not know, or reads fewer tokens.

    Reference: Anshumann et al. 2025 (Sparse Logit Sampling), arXiv 2503.16870, for a teacher that is run once.
    Fidelity: derived (the format is ours).
    """

    suffix, given_as = ".safetensors", "teacher.path, with teacher.name=cached"

    def __init__(self, *, teacher: str | dict, store: Codec, max_length: int = 1024, batch_size: int = 8) -> None:
        for name, value, least in (("max_length", max_length, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise ConfigError(f"stage cache_teacher.{name}: got {value}; expected at least {least}.")
        self.name = next((name for name, kind in STORES.items() if kind is type(store)), None)
        if self.name is None:
            raise ConfigError(f"stage cache_teacher.store: got {type(store).__name__}; expected {', '.join(STORES)}.")
        self.models = Models({"teacher": teacher}, max_length)
        self.tokenizer = self.models.tokenizer
        self.kind, self.max_length, self.batch_size = store, max_length, batch_size
        self._first_id, self._is_first = -1, False

    def identity(self) -> dict[str, Any]:
        """The teacher's and the tokenizer's revisions."""
        return self.models.identity()

    def features(self, given: Features) -> Features:
        """An id, the number of rows and the bytes of each sample."""
        format_of([name for name in given if name != EXAMPLE_ID], {}, "data")
        return COLUMNS

    def begin(self, source: Source) -> None:
        """Load the teacher."""
        self._first_id = source.read(0, 1, [EXAMPLE_ID])[EXAMPLE_ID][0]
        self.teacher = self.models.load()["teacher"]
        self.device = next(self.teacher.model.parameters()).device
        self.vocab_size = self.models.columns or self.teacher.vocab_size

    def process(self, columns: dict[str, list]) -> dict[str, list]:
        """Rows of a corpus to stored samples; one that stands twice in a shard is stored once."""
        first = columns[EXAMPLE_ID][0]
        self._is_first = first == self._first_id
        rows = {name: values for name, values in columns.items() if name != EXAMPLE_ID}
        samples = samples_of(rows, self.tokenizer, self.max_length, first)
        examples = [
            {"input_ids": np.array(ids), "labels": np.array(labels)}
            for ids, labels in zip(samples["input_ids"], samples["labels"], strict=True)
        ]
        ids = [content_id(**example) for example in examples]
        seen: set[int] = set()
        rejected = [
            reason or _repeated(example, seen) for example, reason in zip(ids, samples["rejected"], strict=True)
        ]
        kept = [place for place, reason in enumerate(rejected) if not reason]
        data = dict(zip(kept, self._encode([examples[place] for place in kept]), strict=True))
        counts = [_supervised(example) if place in data else 0 for place, example in enumerate(examples)]
        return {
            "id": ids,
            "rows": counts,
            "data": [data.get(place, b"") for place in range(len(ids))],
            REJECTED: rejected,
        }

    def write(self, file: Path, columns: dict[str, list], features: Features) -> None:
        """A shard; the first one also keeps the head, if the kind needs it, and what else there is to know."""
        shared, note = self._shared() if self._is_first else ({}, None)
        write_shard(file, columns["id"], columns["rows"], columns["data"], shared, note)

    @torch.no_grad()
    def _encode(self, examples: list[dict[str, np.ndarray]]) -> list[bytes]:
        """The stored bytes of samples, which run in batches of like length."""
        found: dict[int, bytes] = {}
        order = sorted(range(len(examples)), key=lambda place: -len(examples[place]["input_ids"]))
        collate = Collator(self.tokenizer.pad_token_id)
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = collate([examples[place] for place in places])
            batch = {name: x.to(self.device) for name, x in batch.items()}
            rows: Any = self.teacher(batch, {Signal.LOGITS}, self.vocab_size).rows
            labels, at = row_labels(batch), 0
            for place in places:
                part = slice(at, at + _supervised(examples[place]))
                own = rows.using([rows.hidden[part], *rows.tensors()[1:]])
                found[place] = self.kind.encode(own, labels[part], content_id(**examples[place]))
                at = part.stop
        return [found[place] for place in range(len(examples))]

    def _shared(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The head, and the note of `store.shards.StoreFolder`."""
        head = [p.detach()[: self.vocab_size].cpu().clone() for p in self.teacher.adapter.head(self.teacher.model)]
        scale, softcap = head_settings(self.teacher.model.config)
        note = {
            "kind": {"name": self.name, **vars(self.kind)},
            "vocab_size": self.vocab_size,
            "width": head[0].shape[1],
            "scale": scale,
            "softcap": softcap,
            "max_length": self.max_length,
            "vocabulary": self.tokenizer.get_vocab(),
        }
        names = ("head.weight", "head.bias")
        return dict(zip(names, head, strict=False)) if self.kind.keeps_head else {}, note


def _repeated(example: int, seen: set[int]) -> str:
    """ "repeated" if an id was seen before, else ""; it is seen from now on."""
    again = example in seen
    seen.add(example)
    return "repeated" if again else ""


def _supervised(example: dict[str, np.ndarray]) -> int:
    return int((example["labels"][1:] != -100).sum())
