"""A stage's folder as others read it: shards, and a manifest with the size and the checksum of each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NoReturn

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmkd.errors import DataError

MANIFEST = "manifest.json"
PROGRESS = "progress"  # what an unfinished stage keeps beside its shards
EXAMPLE_ID = "example_id"
FORMAT = "llmkd-stage"
REPAIR = "Delete that file and run the stage again with the same recipe: only this shard is made again"


class Shard(BaseModel):
    """One file: rows it was made of and holds, its size and checksum, its first and last id, rejected rows by reason."""

    model_config = ConfigDict(extra="forbid")

    file: str
    read: int = Field(ge=0)
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    first_id: int | None
    last_id: int | None
    rejected: dict[str, int]


class Manifest(BaseModel):
    """A whole stage: what it was made by and of (`identity`), and its shards in order."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["llmkd-stage"] = FORMAT
    version: Literal[1] = 1
    identity: dict[str, Any]
    shards: list[Shard]

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def rejected(self) -> dict[str, int]:
        """Rejected rows of all shards, by reason in alphabetical order."""
        reasons = sorted({reason for shard in self.shards for reason in shard.rejected})
        return {reason: sum(shard.rejected.get(reason, 0) for shard in self.shards) for reason in reasons}

    def checksum(self) -> str:
        """SHA-256 over the shards' checksums: what a stage that reads this folder depends on."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


def is_stage(folder: Path) -> bool:
    """Whether a folder is a stage's, whole or unfinished."""
    if (folder / PROGRESS / "identity.json").is_file():
        return True
    try:
        return json.loads((folder / MANIFEST).read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a whole stage.

    Raises:
        DataError: the stage is unfinished, the manifest is damaged, names a file outside the folder, or ids repeat.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise DataError(f"data.path: got '{folder}', an unfinished stage; expected a {MANIFEST}. Run the stage again.")
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{file}: {place or 'it'} is damaged ({first['msg']}); expected a whole manifest.") from error
    last = None
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file or shard.file.startswith("."):
            raise DataError(f"{file}: got the file name '{shard.file}'; expected one inside the folder. Do not use it.")
        if shard.first_id is not None:
            if last is not None and shard.first_id <= last:
                raise DataError(
                    f"{folder / shard.file}: begins with id {shard.first_id} after {last}; expected ids that increase "
                    "and none twice. Make the stage again."
                )
            last = shard.last_id
    return manifest


def check_size(folder: Path, shard: Shard) -> Path:
    """The path of a shard that is there and as long as the manifest says; a DataError otherwise."""
    file = folder / shard.file
    size = file.stat().st_size if file.is_file() else None
    if size != shard.bytes:
        seen = "is missing" if size is None else f"has {size} bytes"
        _damaged(file, f"{seen}; expected {shard.bytes} bytes, as the manifest says")
    return file


def check_shard(folder: Path, shard: Shard) -> Path:
    """`check_size`, and its bytes have the checksum of the manifest."""
    file = check_size(folder, shard)
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != shard.sha256:
        _damaged(file, f"has the checksum {found[:12]}; expected {shard.sha256[:12]}, as the manifest says")
    return file


def verify(folder: Path) -> Manifest:
    """Check every byte, row count and id of a whole stage.

    Raises:
        DataError: the first thing that is wrong, and how to repair it.
    """
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        file = check_shard(folder, shard)
        if file.suffix == ".parquet":
            check_rows(file, shard)
    return manifest


def check_rows(file: Path, shard: Shard) -> None:
    """A Parquet shard has as many rows as the manifest says, and its ids increase; a DataError otherwise."""
    rows = pq.read_metadata(file).num_rows
    if rows != shard.rows:
        _damaged(file, f"has {rows} rows; expected {shard.rows}, as the manifest says")
    ids = pq.read_table(file, columns=[EXAMPLE_ID]).column(0).to_numpy()
    if (ids[1:] <= ids[:-1]).any():
        _damaged(file, "has an id twice or out of order; expected ids that increase")


def _damaged(file: Path, what: str) -> NoReturn:
    raise DataError(f"{file}: {what}. {REPAIR}.")
