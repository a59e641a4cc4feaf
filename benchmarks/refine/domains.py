"""DDK against uniform and size-proportional sampling: the same student, loss, tokens and order seeds; other domain weights."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, set_seed

from benchmarks.refine import corpus
from benchmarks.refine.arms import SAMPLINGS
from benchmarks.refine.recorded import RecordedTeacher
from llmkd import build, config
from llmkd.data.domains import COLUMN
from llmkd.distributed import start_processes
from llmkd.mixing import FILE, mix_domains
from llmkd.objectives import Objective
from llmkd.reweighting import Reweighting
from llmkd.trainer import DistillTrainer
from llmkd.weights import reading_once

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
ARMS = SAMPLINGS
OBJECTIVE = [{"name": "cross_entropy", "weight": 1.0}, {"name": "token", "divergence": "forward_kl", "weight": 0.2}]
WARM_OBJECTIVE = [
    {"name": "token", "divergence": "forward_kl", "weight": 1.0},
    {"name": "cross_entropy", "weight": 0.1},
]


def settings(quick: bool) -> dict[str, Any]:
    """All that a run depends on beside its arm and seed. Counts of windows are a domain's, or all domains' together."""
    recipe = config.load(QUICKSTART)
    sizes = {
        "warm_steps": 80,
        "steps": 36,
        "interval": 6,
        "windows": 160,
        "validation_windows": 3,
        "test_windows": 8,
    }
    small = {"warm_steps": 4, "steps": 4, "interval": 2, "windows": 96, "validation_windows": 1, "test_windows": 1}
    return {
        "model": recipe["model"],
        "teacher": recipe["teacher"],
        "length": 64,
        "batch": 4,
        "learning_rate": 1e-3,
        **(small if quick else sizes),
    }


@dataclass
class Bench:
    """What all runs share: the models, the student's start, the windows of text."""

    settings: dict[str, Any]
    student: nn.Module
    start: dict[str, torch.Tensor]
    teacher: RecordedTeacher
    tokenizer: Any
    train: Dataset
    validation: Dataset
    test: Dataset

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train from the start with an arm's domain weights, and measure on the test windows of every domain."""
        started = time.process_time()
        reweighting = config.build("reweighting", {**ARMS[arm], "interval": self.settings["interval"]}, build.TABLES)
        looks = self.fit(self.train, OBJECTIVE, reweighting, seed, self.settings["steps"])
        measured = self.measure()
        return {**measured, "looks": looks, "cpu_seconds": round(time.process_time() - started, 1)}

    def shared(self) -> dict[str, Any]:
        """The start of every run: its distance to the teacher, and the windows of each domain."""
        counts = Counter(self.train[COLUMN])
        names = self.train.features[COLUMN].names
        return {"start": self.measure(), "windows": {name: counts[i] for i, name in enumerate(names)}}

    def summary(self, run: dict[str, Any]) -> str:
        """One line about a run."""
        return f"KL to the teacher: mean of domains {run['mean_kl']:.3f}, worst {run['worst_kl']:.3f}"

    def fit(self, train: Dataset, objective: Any, reweighting: Reweighting, seed: int, steps: int) -> list[Any]:
        """Train the student from where `start` is; returns the looks at the validation sets."""
        set_seed(seed)
        self.student.load_state_dict(self.start)
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer(train, self.validation, build.objective(objective), seed, steps, folder)
            mix_domains(trainer, reweighting, folder)
            trainer.train()
            if trainer.interrupt.stopped:
                raise KeyboardInterrupt
            trainer.stop_unless_finite()
            return json.loads((Path(folder) / FILE).read_text())["looks"]

    def measure(self) -> dict[str, Any]:
        """KL to the teacher and perplexity of each domain's test windows, and the mean and the worst KL."""
        kl, perplexity = {}, {}
        for number, name in enumerate(self.test.features[COLUMN].names):
            rows = self.test.filter(lambda domain, wanted=number: domain == wanted, input_columns=COLUMN)
            with tempfile.TemporaryDirectory() as folder:
                trainer = self._trainer(self.train, rows, build.objective("cross_entropy"), 0, 1, folder)
                report = trainer.evaluate()
            kl[name], perplexity[name] = report["eval_kl"], report["eval_perplexity"]
        gc.collect()  # a trainer is a cycle, and holds the optimizer's state
        return {"kl": kl, "perplexity": perplexity, "mean_kl": sum(kl.values()) / len(kl), "worst_kl": max(kl.values())}

    def _trainer(
        self, train: Dataset, held_out: Dataset, objective: Objective, seed: int, steps: int, folder: str
    ) -> DistillTrainer:
        block = {
            "max_steps": steps,
            "seed": seed,
            "per_device_train_batch_size": self.settings["batch"],
            "per_device_eval_batch_size": 8,
            "learning_rate": self.settings["learning_rate"],
            "warmup_steps": max(1, steps // 10),
            "adam_beta2": 0.95,
            "bf16": True,
            "train_sampling_strategy": "random",
            "save_strategy": "no",
            "logging_strategy": "no",
        }
        forced = {**start_processes(block), "report_to": "none", "disable_tqdm": True}
        args = config.training_arguments(block, folder, **forced)
        trainer = DistillTrainer(
            self.student, self.teacher, objective, args, train, held_out, processing_class=self.tokenizer
        )
        trainer.pop_callback(PrinterCallback)
        return trainer


def make(settings: dict[str, Any], parts: dict[str, corpus.Texts], work: Path) -> Bench:
    """Load and cut the models, cut the text into windows, and bring the student near its teacher: once, kept in `work`."""
    with reading_once():
        built = build.parts(
            {"model": settings["model"], "teacher": settings["teacher"], "data": {"path": "-"}, "objective": OBJECTIVE}
        )
    tokenizer, length = built.tokenizer, settings["length"]
    sizes = corpus.shares(parts["train"])
    counts = {name: max(settings["batch"], round(settings["windows"] * share)) for name, share in sizes.items()}

    def windows(part: str, count: int) -> Dataset:
        return corpus.chunks(parts[part], dict.fromkeys(sizes, count), length, tokenizer)

    train = corpus.chunks(parts["train"], counts, length, tokenizer)
    validation, test = windows("validation", settings["validation_windows"]), windows("test", settings["test_windows"])
    start = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    bench = Bench(settings, built.model, start, RecordedTeacher(built.teacher), tokenizer, train, validation, test)
    _warm(bench, corpus.chunks(parts["reference"], counts, length, tokenizer), work / "start.safetensors")
    return bench


def _warm(bench: Bench, windows: Dataset, file: Path) -> None:
    """Distil the cut student on other text, sampled by size, until its perplexities are near the teacher's."""
    if not file.exists():
        proportional = config.build("reweighting", {**ARMS["proportional"], "interval": 10**6}, build.TABLES)
        bench.fit(windows, WARM_OBJECTIVE, proportional, 0, bench.settings["warm_steps"])
        state = {name: tensor.contiguous().clone() for name, tensor in bench.student.state_dict().items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)
    bench.start = load_file(file)
