"""MiniPLM's selection against a random one: the same corpus, student, start and training tokens; other halves of it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset

from benchmarks.refine import corpus
from benchmarks.refine.arms import SELECTIONS
from llmkd import config
from llmkd.run import train as run_recipe
from llmkd.stages.runner import prepare, run
from llmkd.students.tiny import byte_tokenizer, tiny_config, tiny_model

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
ARMS = SELECTIONS
REFERENCES = {"large": [0, 1, 11, 23, 28, 29], "small": [0, 1, 29]}  # layers of the teacher that each keeps
KEPT = 0.5


def settings(quick: bool) -> dict[str, Any]:
    """All that a run depends on beside its arm and seed; sizes of text in characters."""
    sizes = {"corpus": 240_000, "reference_text": 80_000, "test": 48_000, "reference_steps": 60, "steps": 140}
    small = {"corpus": 12_000, "reference_text": 12_000, "test": 12_000, "reference_steps": 2, "steps": 4}
    student = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
               "num_key_value_heads": 4, "head_dim": 32, "initializer_range": 0.02}  # fmt: skip
    return {
        "teacher": config.load(QUICKSTART)["teacher"],
        "references": REFERENCES,
        "kept": KEPT,
        "chunk": 128,
        "student": student,
        "student_length": 256,
        "student_batch": 8,
        "student_learning_rate": 2e-3,
        **(small if quick else sizes),
    }


@dataclass
class Bench:
    """The scored corpus, in the folder `work`; what is finished there is not made again."""

    settings: dict[str, Any]
    work: Path

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Select, train a student of bytes from scratch on the selection, and measure it on the test text."""
        started = time.process_time()
        selected = self._select(arm, seed)
        folder = self.work / f"student-{arm.replace(', ', '-')}-{seed}"
        metrics = run_recipe(self._recipe(selected, self._start(seed), folder, seed), folder, True, lambda text: None)
        return {
            "bits_per_byte": metrics["after"]["bits_per_byte"],
            "training_tokens": metrics["train"]["steps"]
            * self.settings["student_batch"]
            * self.settings["student_length"],
            "kept_characters": sum(len(piece) for row in _table(selected)["text"] for piece in row),
            "kept_of_domain": Counter(_table(selected)["domain"]),
            "cpu_seconds": round(time.process_time() - started, 1),
        }

    def summary(self, run: dict[str, Any]) -> str:
        """One line about a run."""
        return f"{run['bits_per_byte']:.4f} bits per byte"

    def shared(self) -> dict[str, float]:
        """How alike the two references score: rank correlation, and the share of the selection that both would keep."""
        teacher = _column(self.work / "teacher", "teacher_nll_mean")
        scores = [_column(self.work / f"scores-{name}", "reference_nll_mean") - teacher for name in REFERENCES]
        count = int(KEPT * len(teacher))
        kept = [{*np.argsort(-values, kind="stable")[:count].tolist()} for values in scores]
        ranks = [np.argsort(np.argsort(values)) for values in scores]
        overlap = len(kept[0] & kept[1]) / count
        return {
            "chunks": len(teacher),
            "spearman": round(float(np.corrcoef(*ranks)[0, 1]), 4),
            "same_selection": round(overlap, 4),
            "negative_scores": round(float((scores[0] < 0).mean()), 4),
        }

    def _select(self, arm: str, seed: int) -> Path:
        """The stage of an arm; only random ones differ by seed."""
        stage = {"name": "select", **ARMS[arm], "ratio": KEPT}
        folder = self.work / f"selected-{arm.replace(', ', '-')}"
        if stage["score"] == "random":
            stage["score"] = {"name": "random", "seed": seed}
            folder = folder.with_name(f"{folder.name}-{seed}")
        _stage(stage, self.work / "scores-large", folder, join={"path": str(self.work / "teacher")})
        return folder

    def _start(self, seed: int) -> Path:
        """The student before training: of one seed the same for every arm."""
        folder = self.work / f"start-{seed}"
        if not (folder / "tokenizer.json").exists():
            torch.manual_seed(seed)
            length = {"max_position_embeddings": self.settings["student_length"]}
            tiny_model(tiny_config("llama", **self.settings["student"], **length)).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return folder

    def _recipe(self, data: Path, start: Path, folder: Path, seed: int) -> dict[str, Any]:
        return {
            "model": str(start),
            "objective": "cross_entropy",
            "data": {
                "path": str(data),
                "max_length": self.settings["student_length"],
                "packing": True,
                "eval": {"path": str(self.work / "test.jsonl")},
            },
            "train": {
                **_arguments(
                    self.settings["steps"], self.settings["student_batch"], self.settings["student_learning_rate"]
                ),
                "train_sampling_strategy": "random",
                "output_dir": str(folder),
                "seed": seed,
            },
        }


def make(settings: dict[str, Any], parts: dict[str, corpus.Texts], work: Path) -> Bench:
    """Write the texts, train the two references on D_ref, score the corpus under both and under the teacher."""
    sizes = {"corpus": "train", "reference_text": "reference", "test": "test"}
    for name, part in sizes.items():
        _write(work / f"{name.removesuffix('_text')}.jsonl", parts[part], settings[name])
    texts = work / "corpus.jsonl"
    common = {"name": "score", "max_length": settings["chunk"], "domain": "domain", "batch_tokens": 1024}
    _stage({**common, "teacher": settings["teacher"]}, texts, work / "teacher")
    for name, layers in settings["references"].items():
        folder = work / f"reference-{name}"
        recipe = {
            "model": {"name": "depth", "layers": layers},
            "teacher": settings["teacher"],
            "objective": "cross_entropy",
            "data": {"path": str(work / "reference.jsonl"), "max_length": 64},
            "train": {**_arguments(settings["reference_steps"], 4, 1e-3), "bf16": True, "output_dir": str(folder)},
        }
        run_recipe(recipe, folder, True, lambda text: None)
        model = {"path": str(folder / "student"), "dtype": "bfloat16"}
        _stage({**common, "reference": model}, texts, work / f"scores-{name}")
    return Bench(settings, work)


def _arguments(steps: int, batch: int, rate: float) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 10),
        "adam_beta2": 0.95,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _write(file: Path, texts: corpus.Texts, characters: int) -> None:
    """The first documents of each domain, as much of each as its share of the text, cut to the character."""
    rows = []
    for name, share in corpus.shares(texts).items():
        left = round(characters * share)
        for text in texts[name]:
            if left > 0:
                rows.append({"text": text[:left], "domain": name})
                left -= len(text)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _stage(stage: Mapping[str, Any], data: Path, folder: Path, **more: Any) -> None:
    recipe = {
        "stage": dict(stage),
        "data": {"path": str(data)},
        "output_dir": str(folder),
        "rows_per_shard": 64,
        **more,
    }
    run(prepare(recipe), lambda text: None)


def _table(folder: Path) -> Dataset:
    files = sorted(str(file) for file in folder.glob("*.parquet"))
    found: Any = load_dataset("parquet", data_files=files, split="train")
    return found


def _column(folder: Path, name: str) -> np.ndarray:
    return np.asarray(_table(folder)[name])
