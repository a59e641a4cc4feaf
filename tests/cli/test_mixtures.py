"""Recipes with domains: from named files to domains.json, on through a kill, and what a recipe can get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from place import WORDS, write_rows

DDK = {"name": "ddk", "interval": 3}
FIXED = {"name": "fixed", "weights": {"few": 1.0, "mnay": 1.0}}
STEPS = {"train.num_train_epochs": None, "train.max_steps": 8, "train.save_steps": 2}


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    """A domain of few words and one of many."""
    few = [{"text": " ".join(WORDS[:2] * (i % 4 + 1))} for i in range(24)]
    many = [{"text": " ".join(WORDS[(3 * i + j) % 8] for j in range(i % 5 + 3))} for i in range(12)]
    return {"few": str(write_rows(tmp_path / "few.jsonl", few)), "many": str(write_rows(tmp_path / "many.jsonl", many))}


def outcome(run: Path) -> tuple:
    metrics = json.loads((run / "metrics.json").read_text())
    return (
        (run / "student" / "model.safetensors").read_bytes(),
        (run / "domains.json").read_bytes(),
        metrics["after"]["kl"],
    )


def test_a_killed_run_goes_on_to_the_same_bits(server, recipe, paths, tmp_path):
    changes = {"data.path": paths, "reweighting": DDK, **STEPS}
    file = recipe({**changes, "train.output_dir": str(tmp_path / "whole")}, name="whole.yaml")
    ended = server("train", file)
    assert ended.code == 0, ended.err
    assert {"domains.json", "domains.svg"} <= {file.name for file in (tmp_path / "whole").iterdir()}
    looks = json.loads((tmp_path / "whole" / "domains.json").read_text())["looks"]
    assert [look["step"] for look in looks] == [0, 3, 6, 8]
    file = recipe(changes)
    assert server("train", file, fault=("kill in step", 5)).code == -9
    assert not (tmp_path / "run" / "domains.svg").exists()
    assert server("train", file, "--resume").code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reweighting": DDK}, ["the data name no domains", "data.path", "data.domain_column"]),
        ({"data.path": "PATHS"}, ["domains, which nothing samples", "reweighting: fixed"]),
        (
            {"data.path": "PATHS", "reweighting": DDK, "data.held_out_every": None},
            ["validation", "data.held_out_every"],
        ),
        ({"data.path": "PATHS", "reweighting": "dkd"}, ["dkd", "did you mean 'ddk'?"]),
        ({"data.path": "PATHS", "reweighting": {**DDK, "alhpa": 1}}, ["alhpa", "did you mean 'alpha'?"]),
        ({"data.path": "PATHS", "reweighting": {**DDK, "alpha": 2.0}}, ["alpha", "2.0", "0 to 1"]),
        ({"data.path": "PATHS", "reweighting": DDK, "train.max_steps": -1}, ["train.max_steps", "without end"]),
        ({"data.path": "PATHS", "reweighting": FIXED}, ["mnay", "did you mean 'many'?"]),
        ({"data.path": {"few": "./nowhere.jsonl"}, "reweighting": DDK}, ["domain 'few'", "nowhere.jsonl"]),
    ],
)
@pytest.mark.parametrize("words_", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_recipe_that_cannot_be_is_said_before_weights_are_loaded(
    llmkd, recipe, paths, changes, words, words_, models
):
    changes = {key: paths if value == "PATHS" else value for key, value in changes.items()}
    hollow = {"model": str(models / "hollow"), "teacher": str(models / "hollow")}
    error = llmkd("train", recipe({**STEPS, **hollow, **changes}), *words_).error
    for word in words:
        assert word in error, error
