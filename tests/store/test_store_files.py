"""A store's files: damage is found and named, one shard is made again alone, several stores serve one teacher."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors import safe_open
from shelf import TEXTS, opened, samples, save_teacher, save_texts, stage_of, write

from llmkd import build
from llmkd.data import Collator, DocumentCollator
from llmkd.data.manifest import verify
from llmkd.errors import ConfigError, DataError
from llmkd.sources import teachers_behind
from llmkd.stages.command import smoke_test
from llmkd.stages.runner import prepare as prepare_stage
from llmkd.store.shards import StoreFolder
from llmkd.teachers import TEACHERS, CachedTeacher, cached
from llmkd.types import Signal

FIRST, SHARD = "shard-00000.safetensors", "shard-00001.safetensors"


@pytest.fixture
def recipe(teacher, corpus, tmp_path):
    return stage_of(teacher, corpus, tmp_path / "store", {"name": "topk", "k": 5})


@pytest.fixture
def folder(recipe):
    return write(recipe)


def read_all(folder, corpus) -> None:
    data, store = samples(corpus), opened(folder)
    for i in range(len(data)):
        store(DocumentCollator(Collator(0))([data[i]]), {Signal.LOGITS})


def spoil(file, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("settings", [{"name": "topk", "k": 5}, {"name": "other", "k": 5}])
def test_a_store_of_other_settings_than_todays_is_refused(folder, settings):
    store = StoreFolder(folder)
    store.note["kind"] = settings
    with pytest.raises(
        DataError, match=rf"was written as {settings['name']} with .*expected .*topk.*Write the store anew"
    ):
        CachedTeacher([store])


@pytest.mark.parametrize("at", [9, -1, -40])
def test_a_flipped_bit_is_found_when_its_example_is_read_and_by_verify(folder, corpus, at):
    read_all(folder, corpus)
    verify(folder)
    spoil(folder / FIRST, at)  # examples that several shards have are read from the first
    for check in (lambda: read_all(folder, corpus), lambda: verify(folder)):
        with pytest.raises(DataError, match=rf"{FIRST}: .*Delete that file and run the stage again"):
            check()


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_short_or_missing_shard_is_found_when_the_store_is_opened(folder, how):
    file = folder / SHARD
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        file.unlink()
    with pytest.raises(DataError, match=rf"{SHARD}: .*Delete that file"):
        opened(folder)


@pytest.mark.parametrize("shard", [FIRST, SHARD])
def test_a_deleted_shard_is_made_again_alone(recipe, folder, shard):
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")}
    assert len(before) == 3
    (folder / shard).unlink()
    write(recipe)
    after = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")}
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert {name for name in after if after[name][1] != before[name][1]} == {shard}


@pytest.mark.parametrize("store", ["topk", "sampled", "hidden"])
def test_two_ranks_write_what_one_writes(monkeypatch, teacher, corpus, tmp_path, store):
    one = write(stage_of(teacher, corpus, tmp_path / "one", store))
    job = prepare_stage(stage_of(teacher, corpus, tmp_path / "two", store))
    from llmkd.stages.runner import run

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        run(job, lambda text: None)
    for file in one.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_the_head_is_kept_once_and_only_where_it_is_needed(teacher, corpus, tmp_path):
    names = {}
    for store in ("topk", "hidden"):
        folder = write(stage_of(teacher, corpus, tmp_path / store, store))
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened_file:
                names[store, file.name] = [name for name in opened_file.keys() if "head" in name]  # noqa: SIM118
    assert {key for key, heads in names.items() if heads} == {("hidden", "shard-00000.safetensors")}


def test_repeated_and_unusable_rows_are_counted(teacher, tmp_path):
    data = save_texts(tmp_path / "twice.jsonl", [TEXTS[0], TEXTS[0], "", "x"])
    folder = write(stage_of(teacher, data, tmp_path / "store", "topk"))
    counts = json.loads((folder / "manifest.json").read_text())["shards"][0]
    count = len(samples(save_texts(tmp_path / "once.jsonl", [TEXTS[0], "x"])))
    assert counts["rows"] == count
    assert counts["rejected"] == {"repeated": count - 1, "too_short": 1}


# Several stores, and recipes that do not fit


def test_two_stores_serve_one_teacher(teacher, tmp_path):
    halves = [save_texts(tmp_path / f"{i}.jsonl", TEXTS[i::2]) for i in (0, 1)]
    folders = [write(stage_of(teacher, data, tmp_path / f"store{i}", "hidden")) for i, data in enumerate(halves)]
    both = cached(path=[str(folder) for folder in folders])
    both.check_data(samples(save_texts(tmp_path / "all.jsonl")))
    with pytest.raises(DataError, match=r"store0, which holds"):
        cached(path=str(folders[0])).check_data(samples(halves[1]))


@pytest.mark.parametrize(
    ("changes", "said"), [({"store": "sampled"}, "of kind"), ({"max_length": 20}, "24 and 20 of max_length")]
)
def test_stores_that_do_not_go_together(teacher, corpus, folder, tmp_path, changes, said):
    recipe = stage_of(teacher, corpus, tmp_path / "other", "topk")
    other = write({**recipe, "stage": {**recipe["stage"], **{"store": {"name": "topk", "k": 5}}, **changes}})
    with pytest.raises(ConfigError, match=said):
        cached(path=[str(folder), str(other)])


def test_rows_of_another_teacher_are_refused(corpus, folder, tmp_path):
    other = write(stage_of(save_teacher(tmp_path / "teacher", num_hidden_layers=1), corpus, tmp_path / "other", "topk"))
    revision = json.loads((folder / "manifest.json").read_text())["identity"]["models"]["teacher"]
    assert cached(path=str(folder), revision=revision).provides == {Signal.LOGITS}
    with pytest.raises(ConfigError, match=f"got {revision}, but .*other holds rows of"):
        cached(path=str(other), revision=revision)
    shutil.rmtree(tmp_path / "other" / "progress", ignore_errors=True)


def test_what_is_no_store_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"does not exist; expected a store\. Write it first: llmkd stage"):
        cached(path=str(tmp_path / "nothing"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"]["recipe"]["stage"] = {"name": "select"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="the folder of another stage"):
        cached(path=str(folder))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"max_length": 32}, "data.max_length: got 32, but .* was written with 24"),
        ({"max_length": 24, "columns": {"text": "text"}}, "data.columns: got .* was written with {}"),
    ],
)
def test_a_training_recipe_must_fit_its_store(teacher, corpus, folder, data, said):
    recipe = {"model": str(teacher), "teacher": {"name": "cached", "path": str(folder)}, "objective": "token",
              "data": {"path": str(corpus), **data}, "train": {}}  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        build.parts(recipe)
    build.parts({**recipe, "data": {"path": str(corpus), "max_length": 24}})


def test_the_stage_says_what_is_wrong_before_it_runs(teacher, corpus, tmp_path):
    good = stage_of(teacher, corpus, tmp_path / "store", "topk")
    for changes, said in (
        ({"teacher": {"path": str(teacher), "dtyp": "auto"}}, "did you mean 'dtype'"),
        ({"teacher": {"dtype": "auto"}}, "missing path"),
        ({"max_length": 4096}, "got 4096; expected at most 512, the context of teacher"),
        ({"store": "top"}, "did you mean 'topk'"),
        ({"store": {"name": "topk", "kk": 3}}, "unknown key of store topk"),
        ({"max_length": 1}, "max_length: got 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare_stage({**good, "stage": {**good["stage"], **changes}})


@pytest.mark.parametrize("store", ["topk", {"name": "sampled", "power": 0.5}, {"name": "hidden", "dtype": "float8"}])
def test_smoke(corpus, store):
    stage = {"name": "cache_teacher", "teacher": "llama", "store": store, "max_length": 24}
    assert smoke_test({"stage": stage, "data": {"path": str(corpus)}, "output_dir": "store"}).rows > 0


def test_it_is_in_the_table():
    assert TEACHERS["cached"] is cached


def test_the_model_that_wrote_a_store_is_behind_it(folder, teacher, tmp_path):
    """Cards and licences speak of it, not of the folder; what cannot be read stands for itself."""
    stored, gone = {"name": "cached", "path": [str(folder)]}, {"name": "cached", "path": str(tmp_path / "gone")}
    assert teachers_behind(stored) == [{"path": str(teacher)}]
    assert teachers_behind({"name": "routed", "teachers": {"a": stored, "b": gone, "c": str(teacher)}}) == [
        {"path": str(teacher)},
        {"path": str(tmp_path / "gone")},
    ]
    assert teachers_behind({"name": "ema", "decay": 0.9}) == teachers_behind(None) == []
