"""Rows from text, JSON, parquet, Python objects and the Hub, and one-line errors for all that is wrong with them."""

from __future__ import annotations

import json
import logging
import pydoc_data.topics
import sys
import types

import datasets
import pytest
from datasets import Dataset, DatasetDict
from pydantic import ValidationError

from llmkd.data import DataSpec, EvalSpec, load_rows
from llmkd.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def module(monkeypatch):
    """A Python module `rows_for_test` that a test fills with attributes."""
    made = types.ModuleType("rows_for_test")
    monkeypatch.setitem(sys.modules, "rows_for_test", made)
    return made


def write(path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def fails(path, *parts: str, **spec) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(DataSpec(path=path, **spec))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_text_files_are_one_document_each_in_order(tmp_path):
    b, a = write(tmp_path / "b.md", "second\n\nstill second"), write(tmp_path / "a.txt", "first\nline two\n")
    assert load_rows(DataSpec(path=[b, a]))["text"][:] == ["second\n\nstill second", "first\nline two\n"]
    assert load_rows(DataSpec(path=str(tmp_path)))["text"][:] == ["first\nline two\n", "second\n\nstill second"]
    assert load_rows(DataSpec(path=str(tmp_path / "*.md")))["text"][:] == ["second\n\nstill second"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_lines_and_json_lists(tmp_path, name):
    rows = [{"instruction": "a", "response": "b"}, {"instruction": "c", "response": "d"}]
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    assert load_rows(DataSpec(path=write(tmp_path / name, text))).to_list() == rows


def test_parquet_folder_with_a_card_and_a_manifest(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "out").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "out" / "shard-00000.parquet")
    write(tmp_path / "out" / "README.md", "# a card")
    write(tmp_path / "out" / "manifest.json", "{}")
    assert load_rows(DataSpec(path=str(tmp_path / "out"))).to_list() == rows


def test_folder_of_save_to_disk(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert load_rows(DataSpec(path=str(tmp_path / "saved"), max_samples=1))["text"][:] == ["a"]


def test_the_standard_librarys_topics():
    rows = load_rows(DataSpec(path="pydoc_data.topics:topics"))
    topics = pydoc_data.topics.topics
    assert rows["text"][:] == [topics[key] for key in sorted(topics)]


@pytest.mark.parametrize(
    "value",
    [
        {"b": "two", "a": "one"},
        ["one", "two"],
        [{"text": "one"}, {"text": "two"}],
        Dataset.from_dict({"text": ["one", "two"]}),
        lambda: ["one", "two"],
        DatasetDict(train=Dataset.from_dict({"text": ["one", "two"]})),
    ],
)
def test_python_objects(module, value):
    module.rows = value
    assert load_rows(DataSpec(path="rows_for_test:rows"))["text"][:] == ["one", "two"]


def test_max_samples_takes_the_first_rows(module):
    module.rows = [str(i) for i in range(5)]
    assert load_rows(DataSpec(path="rows_for_test:rows", max_samples=2))["text"][:] == ["0", "1"]
    assert len(load_rows(DataSpec(path="rows_for_test:rows", max_samples=9))) == 5


def test_missing_places(tmp_path):
    fails(str(tmp_path / "none.jsonl"), "none.jsonl", "does not exist")
    fails(str(tmp_path / "*.jsonl"), "no file")
    fails([str(tmp_path / "none")], "does not exist")
    fails([], "empty list")


def test_empty_files(tmp_path, module):
    fails(write(tmp_path / "empty.txt", ""), "empty.txt", "is empty")
    fails([write(tmp_path / "a.txt", "a"), str(tmp_path / "empty.txt")], "empty.txt", "is empty")
    fails(write(tmp_path / "blank.jsonl", "\n\n"), "blank.jsonl", "is empty")
    fails(write(tmp_path / "empty.json", "[]"), "is empty")
    module.rows = []
    fails("rows_for_test:rows", "is empty")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.jsonl", '{"text": "x"}\n{"text": \n'),
        ("bad.json", '[{"text": "x"}'),
        ("strings.jsonl", '"a"\n"b"\n'),
        ("bad.parquet", "PAR1 not at all"),
        ("latin.txt", b"\xff\xfe\xfa"),
    ],
)
def test_corrupt_files(tmp_path, name, content):
    fails(write(tmp_path / name, content), name, "cannot be read")


def test_wrong_kinds_of_files(tmp_path):
    fails([write(tmp_path / "a.csv", "a,b")], "a.csv", ".jsonl")
    write(tmp_path / "mixed" / "a.txt", "a")
    write(tmp_path / "mixed" / "b.jsonl", '{"text": "b"}')
    fails(str(tmp_path / "mixed"), "json, text", "one kind")


def test_options_that_have_no_effect(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    fails(path, "data.revision", revision="abc")
    fails(path, "data.name", name="main")
    fails(path, "data.split", split="validation")
    fails("pydoc_data.topics:topics", "data.split", split="test")


def test_bad_python_objects(module):
    fails("no_such_module_here:rows", "cannot be imported")
    fails("pydoc_data.topics:topic", "did you mean 'topics'?")
    module.rows = 3
    fails("rows_for_test:rows", "a int")
    module.rows = {"a": 1}
    fails("rows_for_test:rows", "a dict of texts")
    module.rows = DatasetDict(test=Dataset.from_dict({"text": ["a"]}))
    fails("rows_for_test:rows", "data.split", "expected one of test")
    module.rows = [{"text": "a"}, {"text": 1}]
    fails("rows_for_test:rows", "cannot be read")


def test_a_hub_dataset_out_of_reach(monkeypatch, caplog):
    def unreachable(path, name, split, revision):
        raise ConnectionError(f"Couldn't reach\n'{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    fails("someone/something", "someone/something", "Couldn't reach", revision="abc")
    assert not caplog.records
    fails("someone/something")
    assert "data.revision is not set" in caplog.text


def test_a_hub_dataset_offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("someone/something", "someone/something", revision="abc")


def test_a_pinned_hub_dataset_gets_its_arguments(monkeypatch, caplog):
    seen = {}

    def loaded(path, name, split, revision):
        seen.update(path=path, name=name, split=split, revision=revision)
        return Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    with caplog.at_level(logging.WARNING):
        load_rows(EvalSpec(path="o/d", name="main", split="test[:1]", revision="abc"))
    assert seen == {"path": "o/d", "name": "main", "split": "test[:1]", "revision": "abc"}
    assert not caplog.records


@pytest.mark.parametrize(
    ("block", "part"),
    [
        ({"maxlength": 3}, "maxlength"),
        ({"max_length": 1}, "max_length"),
        ({"columns": {"promt": "x"}}, "did you mean 'prompt'?"),
        ({"held_out_every": 2, "eval": {"path": "x"}}, "at most one"),
        ({"held_out_every": 1}, "held_out_every"),
        ({"max_eval_samples": 2}, "without evaluation data"),
    ],
)
def test_bad_recipe_blocks(block, part):
    with pytest.raises(ValidationError, match=part.replace("?", r"\?")):
        DataSpec(**{"path": "x", **block})
