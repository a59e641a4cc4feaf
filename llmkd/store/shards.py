"""The files of a store: a shard holds examples by their ids, with a checksum each; the first one holds the teacher's head."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmkd.data.ids import id_name
from llmkd.data.manifest import REPAIR, Manifest, check_size, read_manifest
from llmkd.errors import ConfigError, DataError
from llmkd.heads import HeadRows

STAGE = "cache_teacher"
NOTE = "llmkd-store"  # key of the first shard's metadata


def write_shard(
    file: Path, ids: Sequence[int], rows: Sequence[int], data: Sequence[bytes], shared: Mapping[str, Tensor], note: Any
) -> None:
    """Write examples: their ids [E], how many rows [E] each has, and their bytes; the same input gives the same file.

    Args:
        shared: tensors of the whole store, and note: what else there is to know of it; {} and None but in its first shard.
    """
    ends = np.cumsum([0, *(len(part) for part in data)], dtype=np.int64)
    tensors = {
        "ids": torch.tensor(ids, dtype=torch.int64),
        "rows": torch.tensor(rows, dtype=torch.int32),
        "ends": torch.from_numpy(ends),
        "checks": torch.tensor([zlib.crc32(part) for part in data], dtype=torch.int64),
        "data": torch.frombuffer(bytearray(b"".join(data) or b"\0"), dtype=torch.uint8),
    }
    save_file({**tensors, **shared}, file, metadata=None if note is None else {NOTE: json.dumps(note, sort_keys=True)})


class ShardFile:
    """A shard, memory-mapped: nothing but its index is read before an example is asked for.

    Raises:
        DataError: it is no shard.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._open = safe_open(file, "numpy")
            self.ids, self.rows, self.ends, self.checks = (
                self._open.get_tensor(name) for name in ("ids", "rows", "ends", "checks")
            )
            self._data = self._open.get_slice("data")
        except (SafetensorError, OSError, ValueError) as error:
            self.damaged(error)

    def read(self, place: int) -> np.ndarray:
        """The bytes of an example, by its place in the shard.

        Raises:
            DataError: they are not what was written.
        """
        try:
            data = self._data[int(self.ends[place]) : int(self.ends[place + 1])]
        except SafetensorError as error:
            self.damaged(error)
        if zlib.crc32(data) != self.checks[place]:
            self.damaged(ValueError(f"the checksum of example {id_name(self.ids[place])} is another"))
        return data

    def damaged(self, error: Exception) -> NoReturn:
        """Raise the DataError that names this file and how to make it again."""
        raise DataError(f"{self.file}: it is damaged ({' '.join(str(error).split())[:200]}). {REPAIR}.") from error


class StoreFolder:
    """A store on the disk: `note` says what it is, `find` and `read` give examples by id in any order.

    `note` holds kind, vocab_size, width (of hidden states), scale, softcap, vocabulary, max_length, teacher, data.

    Raises:
        DataError: no store, an unfinished or a damaged one.
    """

    def __init__(self, path: str) -> None:
        self.folder = Path(path).expanduser()
        self.manifest = _manifest(self.folder)
        self.shards = [ShardFile(check_size(self.folder, shard)) for shard in self.manifest.shards]
        ids = [shard.ids for shard in self.shards]
        order = np.argsort(np.concatenate(ids), kind="stable")
        self.ids = np.concatenate(ids)[order]
        numbers = np.repeat(np.arange(len(ids), dtype=np.int32), [len(part) for part in ids])
        places = np.concatenate([np.arange(len(part), dtype=np.int32) for part in ids])
        self._shard, self._place = numbers[order], places[order]
        with safe_open(self.shards[0].file, "numpy") as first:
            self.note: dict[str, Any] = json.loads(first.metadata()[NOTE])
        identity = self.manifest.identity
        self.note |= {"teacher": identity["models"]["teacher"], "data": identity["recipe"]["data"]}

    def has(self, ids: np.ndarray) -> np.ndarray:
        """Which of the ids [n] are here."""
        places = np.searchsorted(self.ids, ids)
        return self.ids[np.minimum(places, len(self.ids) - 1)] == ids if len(self.ids) else np.zeros(len(ids), bool)

    def find(self, example: int) -> tuple[ShardFile, int]:
        """The shard and the place of an example that is here."""
        place = int(np.searchsorted(self.ids, example))
        return self.shards[self._shard[place]], int(self._place[place])

    def head(self, device: Any) -> HeadRows | None:
        """No rows with the teacher's head on a device, or None if the store does not keep it."""
        with safe_open(self.shards[0].file, "pt") as first:
            names = [name for name in ("head.weight", "head.bias") if name in first.keys()]  # noqa: SIM118
            tensors = [first.get_tensor(name).to(device) for name in names]
        if not tensors:
            return None
        none = tensors[0].new_empty(0, tensors[0].shape[1])
        rows = HeadRows(none, torch.nn.Identity(), scale=self.note["scale"], softcap=self.note["softcap"])
        return rows.using([none, *tensors])


def _manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise DataError(
            f"teacher.path: got '{folder}', which does not exist; expected a store. Write it first: llmkd stage RECIPE."
        )
    manifest = read_manifest(folder)
    stage = manifest.identity.get("recipe", {}).get("stage", {})
    if (stage if isinstance(stage, str) else stage.get("name")) != STAGE:
        raise ConfigError(f"teacher.path: got '{folder}', the folder of another stage; expected one of {STAGE}.")
    return manifest
