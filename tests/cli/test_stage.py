"""`llmkd stage`: shards, resume after a kill at any moment, several ranks, and everything that can be wrong on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from place import STAGE_ROWS, files, write_rows

from llmkd.data.load import SourceSpec, load_rows
from llmkd.data.manifest import read_manifest


def same_bytes(folder: Path, whole: Path) -> bool:
    return files(folder) == files(whole)


def test_rows_are_written_in_order_with_their_ids_and_rejects_are_counted(whole):
    rows = load_rows(SourceSpec(path=str(whole)))
    kept = [number for number in range(23) if number % 3]
    assert rows["example_id"] == kept
    assert rows["text"] == [f"ROW {number}!" for number in kept]
    manifest = read_manifest(whole)
    assert manifest.rejected == {"one_word": 8}
    assert [shard.read for shard in manifest.shards] == [5, 5, 5, 5, 3]
    assert {path.name for path in whole.iterdir()} == {"manifest.json", *(shard.file for shard in manifest.shards)}


def test_running_a_finished_stage_again_changes_nothing(llmkd, stage_recipe, whole):
    before = files(whole)
    done = llmkd("stage", stage_recipe("whole"))
    assert done.code == 0
    assert "nothing to do" in done.out
    assert files(whole) == before


def test_a_row_made_anew_gets_an_id_of_its_shard(llmkd, stage_recipe, tmp_path):
    assert llmkd("stage", stage_recipe(stage="stages:Twice")).code == 0
    ids = load_rows(SourceSpec(path=str(tmp_path / "stage")))["example_id"]
    assert ids[:3] == [0, 1, 2]
    assert ids[10] == 1 << 32
    assert ids == sorted(set(ids))
    assert len(ids) == 46


def test_a_stage_reads_a_stage(llmkd, stage_recipe, whole, tmp_path):
    second = stage_recipe(
        "second", data={"path": str(whole)}, rows_per_shard=4, stage={"name": "stages:Shout", "mark": "?"}
    )
    assert llmkd("stage", second).code == 0
    rows = load_rows(SourceSpec(path=str(tmp_path / "second")))
    assert rows["text"] == [f"ROW {number}!?" for number in range(23) if number % 3]
    assert rows["example_id"] == [number for number in range(23) if number % 3]


def test_a_stage_may_write_another_kind_of_file(llmkd, stage_recipe, tmp_path):
    assert llmkd("stage", stage_recipe(stage="stages:Lines")).code == 0
    assert llmkd("stage", "--verify", tmp_path / "stage").code == 0
    rows = load_rows(SourceSpec(path=str(tmp_path / "stage")))
    assert rows["text"] == [f"ROW {number}!" for number in range(23) if number % 3]
    assert "Parquet" in llmkd("stage", stage_recipe("next", data={"path": str(tmp_path / "stage")})).error


def test_a_default_that_is_spelled_out_is_the_same_stage(llmkd, stage_recipe, tmp_path):
    recipe = stage_recipe()
    recipe.write_text(recipe.read_text().replace("rows_per_shard: 5\n", ""))
    assert llmkd("stage", recipe).code == 0
    assert "nothing to do" in llmkd("stage", recipe, "rows_per_shard=1000").out


def test_dry_run_writes_nothing(llmkd, stage_recipe, tmp_path):
    done = llmkd("stage", stage_recipe(), "--dry-run", "rows_per_shard=2")
    assert done.code == 0, done.err
    assert "12 shards, 0 of them finished" in done.out
    assert not (tmp_path / "stage").exists()


@pytest.mark.parametrize("moment", ["before", "within", "after"])
@pytest.mark.parametrize("write", [0, 1, 3, 4, 10, 11])
def test_a_kill_loses_at_most_one_shard(server, stage_recipe, whole, tmp_path, moment, write):
    """Writes: identity, then a shard and its record five times, then the manifest."""
    recipe = stage_recipe()
    killed = server("stage", recipe, fault=(f"kill {moment} write", write))
    assert killed.code == -9
    names = {*files(tmp_path / "stage")} if (tmp_path / "stage").exists() else set()
    finished = len([name for name in names if name.startswith("progress/0") and name.endswith(".json")])
    assert finished >= (write - 1) // 2 or "manifest.json" in names
    again = server("stage", recipe)
    assert again.code == 0, again.err
    assert same_bytes(tmp_path / "stage", whole)


def test_two_ranks_make_the_same_bytes_one_after_the_other(server, stage_recipe, whole, tmp_path):
    recipe = stage_recipe()
    first = server("stage", recipe, env={"RANK": "1", "WORLD_SIZE": "2"})
    assert first.code == 0
    assert {file for file in files(tmp_path / "stage") if "shard" in file} == {
        "shard-00001.parquet",
        "shard-00003.parquet",
    }
    assert server("stage", recipe, env={"RANK": "0", "WORLD_SIZE": "2"}).code == 0
    assert same_bytes(tmp_path / "stage", whole)


def test_a_rank_that_is_lost_is_told_and_its_shards_are_made_by_others(server, llmkd, stage_recipe, whole, tmp_path):
    recipe = stage_recipe()
    lost = server("stage", recipe, env={"RANK": "1", "WORLD_SIZE": "2"}, fault=("kill within write", 3))
    assert lost.code == -9
    other = server("stage", recipe, env={"RANK": "0", "WORLD_SIZE": "2"})
    assert other.code == 0
    assert "others still write" in other.out
    assert "unfinished" in llmkd("stage", stage_recipe("next", data={"path": str(tmp_path / "stage")})).error
    assert server("stage", recipe).code == 0
    assert same_bytes(tmp_path / "stage", whole)


def test_a_full_disk_is_said_and_nothing_is_lost(server, stage_recipe, whole, tmp_path):
    recipe = stage_recipe()
    full = server("stage", recipe, fault=("disk full at write", 5))
    assert full.code == 1
    assert "disk: writing" in full.error
    assert "run again" in full.error
    assert server("stage", recipe).code == 0
    assert same_bytes(tmp_path / "stage", whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stage": {"name": "stages:Shout", "mark": "?"}}, "recipe.stage.mark was None, is '?'"),
        ({"rows_per_shard": 6}, "recipe.rows_per_shard was 5, is 6"),
    ],
)
def test_a_folder_of_another_config_names_the_first_key(llmkd, stage_recipe, whole, change, words):
    assert words in llmkd("stage", stage_recipe("whole", **change)).error


def test_other_rows_are_another_stage(llmkd, stage_recipe, whole, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*STAGE_ROWS[:-1], {"text": "another row"}])
    assert "data.sample" in llmkd("stage", stage_recipe("whole")).error


def test_other_software_is_another_stage(llmkd, stage_recipe, whole, monkeypatch):
    monkeypatch.setattr("llmkd.stages.runner.software", lambda: {"torch": "1.0"})
    assert "versions.llmkd" in llmkd("stage", stage_recipe("whole")).error


def test_a_folder_of_something_else_is_left_alone(llmkd, stage_recipe, tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "thesis.txt").write_text("mine")
    assert "no stage" in llmkd("stage", stage_recipe()).error
    assert files(tmp_path / "stage") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize(("name", "words"), [("Repeats", "twice or out of order"), ("Uneven", "all of one length")])
def test_a_stage_that_breaks_the_rules_is_told(llmkd, stage_recipe, name, words):
    assert words in llmkd("stage", stage_recipe(stage=f"stages:{name}")).error


def test_mistakes_in_a_stage_recipe(llmkd, stage_recipe, whole, tmp_path):
    assert "did you mean 'data'" in llmkd("stage", stage_recipe(dat={})).error
    assert "rows_per_shard" in llmkd("stage", stage_recipe(rows_per_shard=0)).error
    assert "mrk" in llmkd("stage", stage_recipe(stage={"name": "stages:Shout", "mrk": 1})).error
    assert "columns" in llmkd("stage", stage_recipe(data={"path": str(whole), "columns": {"text": "text"}})).error
    taken = write_rows(tmp_path / "taken.jsonl", [{"text": "a b", "example_id": 3}])
    assert "example_id" in llmkd("stage", stage_recipe(data={"path": str(taken)})).error
    shutil.rmtree(whole / "progress", ignore_errors=True)
    assert llmkd("stage").code != 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(server, stage_recipe, tmp_path):
    """Memory of this process alone, pages of memory-mapped files not counted: the same for ten times the rows."""
    peaks = []
    for rows in (2_000, 20_000):
        text = ["distil a large model into a small one " * 50 + str(row) for row in range(rows)]
        pq.write_table(pa.table({"text": text}), tmp_path / f"{rows}.parquet", row_group_size=500)
        shout = stage_recipe(f"shout{rows}", data={"path": str(tmp_path / f"{rows}.parquet")}, rows_per_shard=500)
        half = {"name": "select", "score": {"name": "column", "column": "length"}, "ratio": 0.5}
        select = stage_recipe(
            f"half{rows}", stage=half, data={"path": str(tmp_path / f"shout{rows}")}, rows_per_shard=500
        )
        peaks.append([peak(server("stage", recipe, fault=("watch memory", 0))) for recipe in (shout, select)])
    for small, large in zip(*peaks, strict=True):
        assert large - small < 15 * 2**20, "the rows alone are 38 MB"


def peak(done) -> int:
    assert done.code == 0, done.err
    return max(int(line.split()[1]) for line in done.out.splitlines() if line.startswith("held "))


def test_a_page_about_a_selection(llmkd, stage_recipe, whole, tmp_path):
    select = {"name": "select", "score": {"name": "column", "column": "length"}, "ratio": 0.5}
    recipe = stage_recipe("kept", stage=select, data={"path": str(whole)})
    done = llmkd("stage", recipe, "--report", tmp_path / "pages" / "kept.html")
    assert done.code == 0, done.err
    assert "7 of 15 rows kept" in (tmp_path / "pages" / "kept.html").read_text()
    again = llmkd("stage", recipe, "--report", tmp_path / "again.html")
    assert again.code == 0
    assert (tmp_path / "again.html").read_text() == (tmp_path / "pages" / "kept.html").read_text()
    assert "--report" in llmkd("stage", stage_recipe("whole"), "--report", tmp_path / "x.html").error
