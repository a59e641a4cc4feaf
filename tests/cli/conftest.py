"""A place with a tiny teacher, a tiny student, texts and recipes, and two ways to run the command line there."""

from __future__ import annotations

import copy
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from driver import Result, Server
from place import STAGE_ROWS, WORDS, make_models, recipe_of, write_rows


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """The folder of `teacher/`, `student/`, `rows.jsonl`, and `hollow/`: a model whose weights cannot be read."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 14))) for _ in range(56)]
    write_rows(folder / "rows.jsonl", [{"text": text} for text in texts])
    hollow = folder / "hollow"
    hollow.mkdir()
    for file in (folder / "student").iterdir():
        (hollow / file.name).write_bytes(b"garbage" if file.suffix == ".safetensors" else file.read_bytes())
    return folder


@pytest.fixture
def recipe(models, tmp_path) -> Callable[..., Path]:
    """Factory: writes a recipe file; `recipe({"data.max_length": 8})` changes keys, None removes one."""

    def write(changes: dict[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        config = copy.deepcopy(recipe_of(models))
        config["train"]["output_dir"] = str(tmp_path / "run")
        for path, value in (changes or {}).items():
            *parents, last = path.split(".")
            node = config
            for parent in parents:
                node = node[parent]
            node[last] = value
            if value is None:
                del node[last]
        file = tmp_path / name
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        return file

    return write


@pytest.fixture
def llmkd(monkeypatch, capsys, tmp_path) -> Callable[..., Result]:
    """Runs `llmkd ...` in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read once, when it is imported
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*argv: Any) -> Result:
        from llmkd.cli import main

        monkeypatch.setattr(sys, "argv", ["llmkd", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Result(ended.value.code or 0, out, err)  # type: ignore[arg-type]

    return call


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Server:
    """Runs `llmkd ...` in a process of its own, which a fault may kill."""
    return Server(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="session")
def trained(server, models, tmp_path_factory) -> Path:
    """The folder of a finished run with evaluations on the way; copy it before you change it."""
    return _trained(server, models, tmp_path_factory.mktemp("trained"), eval_strategy="steps", eval_steps=5)


@pytest.fixture(scope="session")
def adapted(server, models, tmp_path_factory) -> Path:
    """The folder of a finished run whose student is an adapter."""
    return _trained(server, models, tmp_path_factory.mktemp("adapted"), {"r": 4, "target_modules": "all-linear"})


def _trained(server: Server, models: Path, place: Path, peft: dict[str, Any] | None = None, **train: Any) -> Path:
    config = copy.deepcopy(recipe_of(models)) | ({} if peft is None else {"peft": peft})
    config["train"] |= {"output_dir": str(place / "run"), "num_train_epochs": 1, **train}
    (place / "recipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    done = server("train", place / "recipe.yaml")
    assert done.code == 0, done.err
    return place / "run"


@pytest.fixture
def stage_recipe(tmp_path):
    """Factory: a recipe of stages:Shout over 23 rows; keywords replace keys."""
    rows = write_rows(tmp_path / "rows.jsonl", STAGE_ROWS)

    def write(name: str = "stage", **changes) -> Path:
        config = {
            "stage": {"name": "stages:Shout"},
            "data": {"path": str(rows)},
            "output_dir": str(tmp_path / name),
            "rows_per_shard": 5,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**config, **changes}))
        return file

    return write


@pytest.fixture
def whole(llmkd, stage_recipe, tmp_path) -> Path:
    """The folder of an undisturbed run on one process."""
    done = llmkd("stage", stage_recipe("whole"))
    assert done.code == 0, done.err
    return tmp_path / "whole"
