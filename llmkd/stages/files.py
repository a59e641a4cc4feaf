"""Files that are whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from llmkd.disk import saving


def put(target: Path, partial: Path, write: Callable[[Path], Any]) -> None:
    """Write to `partial`, on the same disk, bring it to the disk, then give it its name: a file that exists is whole.

    Raises:
        TrainingError: the disk is full.
    """
    with saving(target, "run again: finished shards are kept"):
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too
        finally:
            os.close(folder)


def put_json(target: Path, partial: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    put(target, partial, lambda file: file.write_text(json.dumps(value, indent=1) + "\n"))


def write_parquet(file: Path, columns: dict[str, list], features: Features) -> None:
    """Columns as one Parquet file; the same columns give the same bytes."""
    table = pa.Table.from_pydict({name: columns[name] for name in features}, schema=features.arrow_schema)
    pq.write_table(table, file, compression="zstd")
