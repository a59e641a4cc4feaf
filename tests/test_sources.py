"""Which commits a run's names on the Hub stood for, and how far a run had come at each entry of its history."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkd.meters import passed
from llmkd.sources import is_hub_name, revisions

A, B = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The Hub's cache, with a model of two revisions and a data set."""
    refs = {"models--org--large": {"main": A, "v1": B}, "datasets--org--texts": {"main": B}}
    for name, found in refs.items():
        for revision, commit in found.items():
            file = tmp_path / name / "refs" / revision
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(commit)
    (tmp_path / "secret").write_text("nobody's business")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_names_on_the_hub_have_commits(cache):
    recipe = {"model": "org/large", "teacher": {"path": "org/large", "revision": "v1"}, "data": {"path": "org/texts"}}
    assert revisions(recipe) == {"model": A, "teacher": B, "data": B}


def test_a_pinned_commit_is_itself(cache):
    assert revisions({"model": {"path": "org/other", "revision": B}, "data": {"path": "x.jsonl"}}) == {"model": B}


def test_what_is_not_from_the_hub_has_none(cache, tmp_path):
    recipe = {"model": {"name": "depth", "layers": 2}, "teacher": str(tmp_path), "data": {"path": ["a.txt", "b.txt"]}}
    assert revisions(recipe) == {}
    assert (
        revisions({"model": "pkg://some/model.gguf", "teacher": None, "data": {"path": "pydoc_data.topics:topics"}})
        == {}
    )


def test_a_revision_reads_no_other_file(cache):
    assert revisions({"model": {"path": "org/large", "revision": "../../secret"}, "data": {"path": "y.txt"}}) == {}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", True),
        ("gpt2", True),
        ("./folder", False),
        ("/abs/x", False),
        ("a/b/c", False),
        ("a:b", False),
        (None, False),
    ],
)
def test_names(path, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(path) is expected


def test_progress_adds_to_the_last_entry():
    assert passed([], 0.0, 1.0) == {"tokens_seen": 0, "seconds": 1.0}
    history = [{"loss": 1.0, **passed([], 10.0, 1.0)}, {"note": 1.0}]
    assert passed(history, 5.0, 0.25) == {"tokens_seen": 15, "seconds": 1.25}
