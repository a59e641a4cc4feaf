"""Folders laid out as Hub datasets: a folder a configuration, files named after their split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llmkd.errors import DataError

SPLIT = re.compile(r"(?:train|validation|dev|test)(?:_[a-z]+)?(?=[-.])")


def inner(path: str, name: str | None) -> str | None:
    """The folder of configuration `name` inside a local copy of a dataset, or None."""
    folder = Path(path).expanduser() / (name or "")
    return str(folder) if name and folder.is_dir() else None


def of_split(files: Sequence[Path], split: str, path: str) -> list[Path] | None:
    """The files of a split, where every file is named after one (train-00000.parquet, validation_matched.jsonl); else None.

    Raises:
        DataError: no file is of that split.
    """
    named = {file: found.group() for file in files if (found := SPLIT.match(file.name))}
    if len(named) < len(files):
        return None
    chosen = [file for file, name in named.items() if name == split]
    if not chosen:
        known = ", ".join(sorted(set(named.values())))
        raise DataError(
            f"data.split: got '{split}' for '{path}', which has {known}; expected one of these. Fix data.split."
        )
    return chosen


def suffix_of(file: Path) -> str:
    """`.jsonl` of rows.jsonl, and of rows.jsonl.gz too: datasets unpacks what it reads."""
    return Path(file.name.lower().removesuffix(".gz")).suffix
