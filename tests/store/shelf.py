"""A tiny teacher on the disk, a corpus, and stores of its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from llmkd.data import DataSpec, prepare
from llmkd.stages.runner import Job, run
from llmkd.stages.runner import prepare as prepare_stage
from llmkd.students.tiny import byte_tokenizer, tiny_config, tiny_model
from llmkd.teachers import CachedTeacher, cached

MAX_LENGTH = 24
TEXTS = [f"{word} rows are kept once, number {i}." + " And more." * (i % 4) for i, word in enumerate("abcdefghij")]


def save_teacher(folder: Path, **changes: Any) -> Path:
    """A tiny random model and its tokenizer."""
    import torch

    torch.manual_seed(7)
    tiny_model(tiny_config("llama", initializer_range=0.3, **changes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_texts(file: Path, texts: list[str] | None = None) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts or TEXTS))
    return file


def stage_of(teacher: Path, data: Path, folder: Path, store: Any, **changes: Any) -> dict[str, Any]:
    """A stage recipe, resolved."""
    stage = {"name": "cache_teacher", "teacher": str(teacher), "store": store, "max_length": MAX_LENGTH, **changes}
    return {"stage": stage, "data": {"path": str(data)}, "output_dir": str(folder), "rows_per_shard": 4}


def write(recipe: dict[str, Any]) -> Path:
    job: Job = prepare_stage(recipe)
    assert run(job, lambda text: None) is not None
    return job.folder


def samples(data: Path, **changes: Any) -> Dataset:
    """The corpus as training sees it."""
    return prepare(DataSpec(path=str(data), **{"max_length": MAX_LENGTH, **changes}), byte_tokenizer()).train


def opened(folder: Path, **options: Any) -> CachedTeacher:
    return cached(path=str(folder), **options)
