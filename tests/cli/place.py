"""What the commands of these tests work on: tiny models, texts, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llmkd.students.tiny import byte_tokenizer, tiny_config, tiny_model

WORDS = ("cat", "dog", "sat", "on", "the", "mat", "ran", "off")
STAGE_ROWS = [{"text": f"row {number}" if number % 3 else "lonely"} for number in range(23)]


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


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path inside."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
