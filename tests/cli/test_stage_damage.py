"""A stage's folder that was damaged or that lies: what is wrong is named, and only the damaged shard is made again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from place import files

from llmkd.data.load import SourceSpec, load_rows


def test_verify_of_a_whole_folder(llmkd, whole):
    done = llmkd("stage", "--verify", whole)
    assert done.code == 0
    assert "5 shards and their checksums are whole; 23 rows read, 15 written, rejected: one_word 8" in done.out


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a bit flipped": (flip, "checksum"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "bytes; expected"),
    "missing": (lambda file: file.unlink(), "is missing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_shard_is_named_and_only_it_is_made_again(llmkd, stage_recipe, whole, tmp_path, what):
    before, (break_it, words) = files(whole), DAMAGE[what]
    damaged = whole / "shard-00002.parquet"
    break_it(damaged)
    reader = stage_recipe("reader", data={"path": str(whole)})
    for error in (llmkd("stage", "--verify", whole).error, llmkd("stage", reader).error):
        assert "shard-00002.parquet" in error
        assert words in error
        assert "only this shard" in error
    with pytest.raises(ValueError, match="shard-00002"):
        load_rows(SourceSpec(path=str(whole)))
    damaged.unlink(missing_ok=True)
    times = {path.name: path.stat().st_mtime_ns for path in whole.glob("shard*")}
    assert llmkd("stage", stage_recipe("whole")).code == 0
    assert files(whole) == before
    assert {path.name: path.stat().st_mtime_ns for path in whole.glob("shard*")}.items() >= times.items()


def lie(folder: Path, change) -> None:
    """Change the manifest, and the checksums with it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


LIES = {
    "another row count": (lambda m: m["shards"][1].update(rows=9), "expected 9"),
    "an id of another shard": (lambda m: m["shards"][3].update(first_id=1), "after"),
    "a path that leaves the folder": (lambda m: m["shards"][0].update(file="../rows.jsonl"), "inside the folder"),
    "no checksum": (lambda m: m["shards"][0].update(sha256="none"), "shards.0.sha256"),
    "another version": (lambda m: m.update(version=2), "version"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_manifest_that_lies_is_refused(llmkd, whole, what):
    change, words = LIES[what]
    lie(whole, change)
    assert words in llmkd("stage", "--verify", whole).error


def test_a_shard_with_an_id_twice_is_refused(llmkd, whole):
    table = pq.read_table(whole / "shard-00001.parquet")
    pq.write_table(pa.concat_tables([table, table]), whole / "shard-00001.parquet")
    data = (whole / "shard-00001.parquet").read_bytes()
    lie(whole, lambda m: m["shards"][1].update(rows=6, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    assert "id twice" in llmkd("stage", "--verify", whole).error
