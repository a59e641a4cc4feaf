"""Real text of several domains: a folder of `*.jsonl` or `*.jsonl.gz` files with `text` and `domain`, dealt out by document."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

from llmkd.errors import DataError

PARTS = {"test": 1, "validation": 1, "reference": 1, "train": 5}  # shares of the documents
Texts = dict[str, list[str]]  # domain -> documents


def read(folder: Path) -> tuple[dict[str, Texts], str]:
    """part -> domain -> documents in an order of their own, and a digest of all.

    Raises:
        DataError: no file, a row without text or domain, or a domain with too few documents for every part.
    """
    files = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if not files:
        raise DataError(f"--data: got '{folder}'; expected a folder with *.jsonl or *.jsonl.gz files. Name another.")
    domains: Texts = {}
    digest = hashlib.sha256()
    for file in files:
        for number, row in enumerate(_rows(file)):
            if not isinstance(row.get("text"), str) or not isinstance(row.get("domain"), str):
                raise DataError(f"{file}:{number + 1}: expected the strings `text` and `domain`. Fix the row.")
            digest.update(row["text"].encode())
            domains.setdefault(row["domain"], []).append(row["text"])
    return {part: dict(pieces) for part, pieces in _dealt(dict(sorted(domains.items()))).items()}, digest.hexdigest()


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        yield from map(json.loads, lines)


def _dealt(domains: Texts) -> dict[str, Texts]:
    dealt: dict[str, Texts] = {part: {} for part in PARTS}
    total = sum(PARTS.values())
    for name, texts in domains.items():
        if len(texts) < total:
            raise DataError(f"domain '{name}': got {len(texts)} documents; expected at least {total}. Add some.")
        order = random.Random(name).sample(texts, len(texts))
        start = 0
        for part, share in PARTS.items():
            end = start + len(texts) * share // total
            dealt[part][name] = order[start:end]
            start = end
    return dealt


def shares(domains: Mapping[str, list[str]]) -> dict[str, float]:
    """A domain's part of all characters."""
    sizes = {name: sum(map(len, texts)) for name, texts in domains.items()}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def chunks(texts: Texts, counts: Mapping[str, int], length: int, tokenizer: Any) -> Dataset:
    """The first `counts` windows of `length` tokens of each domain, every token but a window's first supervised."""
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": [], "domain": []}
    for number, (name, documents) in enumerate(texts.items()):
        found = 0
        for document in documents:
            if found == counts[name]:
                break
            ids = tokenizer(document, verbose=False)["input_ids"]
            for start in range(0, len(ids) - length + 1, length):
                if found < counts[name]:
                    window = ids[start : start + length]
                    for column, value in zip(columns, (window, [-100, *window[1:]], length, number), strict=True):
                        columns[column].append(value)
                    found += 1
        if found < counts[name]:
            raise DataError(
                f"domain '{name}': got {found} windows of {length} tokens; expected {counts[name]}. Add text."
            )
    return Dataset.from_dict(columns).cast_column("domain", ClassLabel(names=list(texts)))
