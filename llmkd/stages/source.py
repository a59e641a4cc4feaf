"""What a stage reads: rows by number, from any data that llmkd loads, or from another stage's folder."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value

from llmkd.data.load import SourceSpec, load_rows
from llmkd.data.manifest import EXAMPLE_ID, check_rows, check_shard, check_size, is_stage, read_manifest
from llmkd.errors import DataError, did_you_mean

SAMPLED = 1024  # rows that tell one corpus from another
BLOCK = 65536


class Source(Protocol):
    """Rows of a corpus by number, each with an `example_id` that increases; nothing but the rows asked for is held."""

    features: Features
    revision: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int, columns: Sequence[str] | None = None) -> dict[str, list]:
        """Some columns (default: all) of the rows from `start` to before `stop`."""
        ...


def blocks(source: Source, columns: Sequence[str], size: int = BLOCK) -> Iterator[dict[str, list]]:
    """All rows in order, `size` at a time."""
    for start in range(0, len(source), size):
        yield source.read(start, min(start + size, len(source)), columns)


def open_source(spec: SourceSpec) -> Source:
    """The rows of a `data:` block: of a stage's folder where it is one.

    Raises:
        DataError: missing, empty, damaged or unfinished data, a column that is not there, or one of domains.
    """
    path = spec.path
    if spec.domain_column is not None:
        raise DataError(
            f"data.domain_column: got '{spec.domain_column}'; expected none: a stage keeps every column and reads no domains. "
            "Remove it."
        )
    if isinstance(path, str) and is_stage(Path(path).expanduser()):
        if spec.columns or spec.name or spec.revision or spec.split != "train":
            raise DataError(
                f"data: got '{path}', a stage's folder, with columns, name, revision or split; expected none of them, "
                "which a stage has not. Remove them."
            )
        return StageRows(Path(path).expanduser(), spec.max_samples)
    return LoadedRows(_renamed(load_rows(spec), spec.columns))


def _renamed(rows: Dataset, columns: dict[str, str]) -> Dataset:
    """The dataset with our names for its columns."""
    for ours, theirs in columns.items():
        if theirs not in rows.column_names:
            have, hint = ", ".join(rows.column_names), did_you_mean(theirs, rows.column_names)
            raise DataError(f"data.columns: got {ours}: '{theirs}'; the columns are: {have}{hint or '. Name one.'}")
    taken = [ours for ours, theirs in columns.items() if ours in rows.column_names and ours != theirs]
    moved = {theirs: ours for ours, theirs in columns.items() if ours != theirs}
    return rows.remove_columns(taken).rename_columns(moved)


class LoadedRows:
    """A `datasets.Dataset`, which lies memory-mapped on the disk; the ids are the row numbers.

    `revision` tells the corpus by its length, its columns and 1024 evenly spaced rows.
    """

    def __init__(self, rows: Dataset) -> None:
        if EXAMPLE_ID in rows.column_names:
            raise DataError(f"data: got a column '{EXAMPLE_ID}', which is llmkd's own; expected none. Rename it.")
        self._rows = rows.with_format(None)
        self.features = Features({**rows.features, EXAMPLE_ID: Value("int64")})
        self.revision = {"rows": len(rows), "columns": sorted(rows.column_names), "sample": self._sample()}

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int, columns: Sequence[str] | None = None) -> dict[str, list]:
        """Rows by number."""
        wanted = list(self.features if columns is None else columns)
        theirs = [name for name in wanted if name != EXAMPLE_ID]
        rows = self._rows if columns is None else self._rows.select_columns(theirs)
        out = rows[start:stop] if theirs else {}
        return {**out, EXAMPLE_ID: list(range(start, stop))} if EXAMPLE_ID in wanted else out

    def _sample(self) -> str:
        count = min(SAMPLED, len(self._rows))
        chosen = self._rows.select([index * len(self._rows) // count for index in range(count)])
        digest = hashlib.sha256()
        for row in chosen:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()


class StageRows:
    """The rows of a whole stage, shard by shard; a shard's checksum is checked when all of it is read.

    Raises:
        DataError: the stage is unfinished, empty or damaged, or its shards are no Parquet files.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        manifest = read_manifest(folder)
        self.folder, self._shards = folder, manifest.shards
        self._starts = list(accumulate((shard.rows for shard in manifest.shards), initial=0))
        self._length = min(manifest.rows, limit or manifest.rows)
        if not self._length:
            raise DataError(f"data.path: got '{folder}', which is empty; expected at least one row. Point it at data.")
        if not self._shards[0].file.endswith(".parquet"):
            raise DataError(
                f"data.path: got '{folder}', whose shards are no rows; expected Parquet. Use another stage."
            )
        self.revision = {"rows": self._length, "stage": manifest.checksum()}
        self.features = Features.from_arrow_schema(pq.read_schema(check_size(folder, self._shards[0])))
        self._held: tuple[tuple[int, Sequence[str] | None], pa.Table] | None = None

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int, columns: Sequence[str] | None = None) -> dict[str, list]:
        """Rows by number, over as many shards as they lie in."""
        out: dict[str, list] = {name: [] for name in (self.features if columns is None else columns)}
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first, end = self._starts[number], min(stop, self._starts[number + 1])
            if start < end:
                part = self._table(number, columns).slice(start - first, end - start)
                for name, values in out.items():
                    values += part.column(name).to_pylist()
            start, number = end, number + 1
        return out

    def _table(self, number: int, columns: Sequence[str] | None) -> pa.Table:
        """A shard, kept until another is asked for: some columns without its checksum, or all of it, checked."""
        if self._held is None or self._held[0] != (number, columns):
            shard, self._held = self._shards[number], None
            file = check_size(self.folder, shard) if columns is not None else check_shard(self.folder, shard)
            if columns is None:
                check_rows(file, shard)
            self._held = ((number, columns), pq.read_table(file, columns=columns))
        return self._held[1]


class Joined:
    """The rows of one source with the columns that only another has; both have the same ids.

    Raises:
        DataError: other row counts, or an id that only one of them has.
    """

    def __init__(self, left: Source, right: Source) -> None:
        self._left, self._right = left, right
        if len(left) != len(right):
            raise DataError(
                f"join: got {len(right):,} rows for {len(left):,}; expected the same rows. Score both alike."
            )
        self.revision = {"rows": len(left), "data": left.revision, "join": right.revision}
        self.features = Features({**right.features, **left.features})

    def __len__(self) -> int:
        return len(self._left)

    def read(self, start: int, stop: int, columns: Sequence[str] | None = None) -> dict[str, list]:
        """Rows by number, their ids compared."""
        wanted = list(self.features if columns is None else columns)
        ours = [name for name in wanted if name in self._left.features]
        theirs = [name for name in wanted if name not in self._left.features]
        left = self._left.read(start, stop, None if columns is None else list(dict.fromkeys([EXAMPLE_ID, *ours])))
        right = self._right.read(start, stop, None if columns is None else [EXAMPLE_ID, *theirs])
        for mine, other in zip(left[EXAMPLE_ID], right[EXAMPLE_ID], strict=True):
            if mine != other:
                raise DataError(
                    f"join: got id {other} for {mine}; expected the same ids. Score both from the same data."
                )
        return {**{name: left[name] for name in ours}, **{name: right[name] for name in theirs}}
