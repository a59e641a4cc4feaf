"""What an example is called: by its content, so that a store of teacher rows knows it however the data are arranged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from llmkd.types import Routes

BLOCK = 1024
DOMAIN = "domain"  # the column that says where an example is from; of prepared samples a ClassLabel
COLUMNS = ("input_ids", "labels", "seq_lengths")


def content_id(input_ids: np.ndarray, labels: np.ndarray) -> int:
    """The first 64 bits of BLAKE2b of a sample's token ids and labels (int32), as a signed integer.

    A teacher's rows are a function of exactly these, so nothing has to travel with a sample: packing, shuffling, length
    grouping, mixing domains, selecting rows, repeating or splitting a corpus keep every id. What does change a sample (another
    tokenizer, chat template, max_length, label mask, augmentation) changes its id, so that rows of another text are never
    taken for it; an id column of the data would say nothing about that. Equal samples share an id and their rows. Among
    10^8 different samples the chance that any two share one is 3 in 10^4.
    """
    digest = blake2b(input_ids.astype("<i4").tobytes(), digest_size=8)
    digest.update(labels.astype("<i4").tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def id_name(example: int) -> str:
    """An id as errors show it: 16 hexadecimal digits."""
    return f"{int(example) % 2**64:016x}"


def document_ids(examples: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """The ids, int64 [D], of all documents with a supervised token, in order; a packed example has several."""
    return documents(examples)[:, 0]


class DocumentCollator:
    """Adds to a collator's batches what a teacher finds stored rows and its own examples by; both stay on the host.

    `ids` [D] name the documents with a supervised token, in order, as a numpy array; `routes`, if the examples have a
    column `domain`, say whose each is. DistillTrainer puts it around its collator where a teacher asks for it.

    Args:
        collate: examples with `input_ids` and `labels` -> a batch of these in the same order.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the collator's batch, and `ids` and `routes`."""
        found = documents(examples)
        batch = {**self.collate(examples), "ids": found[:, 0]}
        if DOMAIN in examples[0]:
            batch["routes"] = Routes([example[DOMAIN] for example in examples], found[:, 1], found[:, 2])
        return batch


def documents(examples: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Of all documents with a supervised token, in order: id, number of the example, number of rows, int64 [D, 3]."""
    return np.array(list(_documents(examples)), dtype=np.int64).reshape(-1, 3)


def _documents(examples: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, int, int]]:
    for number, example in enumerate(examples):
        ids, labels = np.asarray(example["input_ids"]), np.asarray(example["labels"])
        start = 0
        for length in example.get("seq_lengths", [len(ids)]):
            part = slice(start, start + length)
            start += length
            rows = int((labels[part][1:] != -100).sum())
            if rows:
                yield content_id(ids[part], labels[part]), number, rows


def dataset_ids(dataset: Any) -> Iterator[np.ndarray]:
    """`document_ids` of a tokenised dataset, block by block: a `datasets.Dataset`, or anything with rows by number."""
    columns = [name for name in COLUMNS if name in getattr(dataset, "column_names", ())]
    view = dataset.select_columns(columns).with_format("numpy") if columns else dataset
    for start in range(0, len(dataset), BLOCK):
        rows = range(start, min(start + BLOCK, len(dataset)))
        if columns:
            block = view[rows.start : rows.stop]
            yield document_ids(dict(zip(block, row, strict=True)) for row in zip(*block.values(), strict=True))
        else:
            yield document_ids(dataset[row] for row in rows)
