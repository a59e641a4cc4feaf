"""A place with a tiny teacher, a tiny student, texts and recipes, and two ways to run the command line there."""

from __future__ import annotations

import copy
import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from driver import Result, Server

from llmkd.students.tiny import byte_tokenizer, tiny_config, tiny_model

WORDS = ("cat", "dog", "sat", "on", "the", "mat", "ran", "off")


def make_models(folder: Path) -> None:
    """A teacher that is sure of itself, and a student with dropout, so that random states matter."""
    tokenizer = byte_tokenizer()
    for name, seed, sharper, changes in (("teacher", 0, 40.0, {}), ("student", 1, 1.0, {"attention_dropout": 0.1})):
        torch.manual_seed(seed)
        model = tiny_model(tiny_config(**changes))
        model.get_output_embeddings().weight.data *= sharper
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


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


def recipe_of(models: Path) -> dict[str, Any]:
    """Three short epochs with length grouping (the default), accumulation and dropout."""
    return {
        "model": str(models / "student"),
        "teacher": str(models / "teacher"),
        "objective": [
            {"name": "token", "divergence": "forward_kl", "weight": 1.0},
            {"name": "cross_entropy", "weight": 0.1},
        ],
        "data": {"path": str(models / "rows.jsonl"), "max_length": 48, "held_out_every": 8},
        "train": {
            "num_train_epochs": 3,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "save_steps": 5,
            "logging_steps": 3,
            "report_to": "none",
        },
    }


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
