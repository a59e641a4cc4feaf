"""DDK against uniform and size-proportional sampling: the same student, loss, tokens and order seeds; other domain weights."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, set_seed

from benchmarks.recorded import RecordedTeacher
from benchmarks.refine import corpus
from benchmarks.refine.arms import SAMPLINGS
from llmkd import build, config
from llmkd.data.ids import DOMAIN
from llmkd.distributed import start_processes
from llmkd.mixing import FILE, mix_domains
from llmkd.objectives import Objective
from llmkd.reweighting import Reweighting
from llmkd.trainer import DistillTrainer
from llmkd.weights import reading_once

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
ARMS = SAMPLINGS
OBJECTIVE = [{"name": "token", "divergence": "forward_kl", "weight": 1.0}, {"name": "cross_entropy", "weight": 0.1}]
# As in the paper the student begins near its teacher: r is a softmax of perplexity ratios, and holds nothing but its bounds
# where they are far from 1. These are the layers whose removal, one by one and greedily, moved the teacher least.
REMOVED = (25, 17, 16, 4, 18, 14)


def settings(quick: bool) -> dict[str, Any]:
    """All that a run depends on beside its arm and seed. Counts of windows are a domain's, or all domains' together."""
    sizes = {"steps": 36, "interval": 6, "windows": 240, "validation_windows": 3, "test_windows": 8}
    small = {"steps": 4, "interval": 2, "windows": 96, "validation_windows": 1, "test_windows": 1}
    return {
        "model": {"name": "depth", "layers": [layer for layer in range(30) if layer not in REMOVED]},
        "teacher": config.load(QUICKSTART)["teacher"],
        "objective": OBJECTIVE,
        "length": 64,
        "batch": 4,
        "learning_rate": 3e-4,
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
        looks = self._fit(reweighting, seed)
        measured = self.measure()
        return {**measured, "looks": looks, "cpu_seconds": round(time.process_time() - started, 1)}

    def shared(self) -> dict[str, Any]:
        """The start of every run: its distance to the teacher, and the windows of each domain."""
        counts = Counter(self.train[DOMAIN])
        names = self.train.features[DOMAIN].names
        return {"start": self.measure(), "windows": {name: counts[i] for i, name in enumerate(names)}}

    def summary(self, run: dict[str, Any]) -> str:
        """One line about a run."""
        return f"KL to the teacher: mean of domains {run['mean_kl']:.3f}, worst {run['worst_kl']:.3f}"

    def _fit(self, reweighting: Reweighting, seed: int) -> list[Any]:
        """Train the student from its start; returns the looks at the validation sets."""
        set_seed(seed)
        self.student.load_state_dict(self.start)
        with tempfile.TemporaryDirectory() as folder:
            objective = build.objective(self.settings["objective"])
            trainer = self._trainer(self.validation, objective, seed, folder)
            mix_domains(trainer, reweighting, folder)
            trainer.train()
            if trainer.interrupt.stopped:
                raise KeyboardInterrupt
            trainer.stop_unless_finite()
            return json.loads((Path(folder) / FILE).read_text())["looks"]

    def measure(self) -> dict[str, Any]:
        """KL to the teacher and perplexity of each domain's test windows, and the mean and the worst KL."""
        kl, perplexity = {}, {}
        for number, name in enumerate(self.test.features[DOMAIN].names):
            rows = self.test.filter(lambda domain, wanted=number: domain == wanted, input_columns=DOMAIN)
            with tempfile.TemporaryDirectory() as folder:
                trainer = self._trainer(rows, build.objective("cross_entropy"), 0, folder)
                report = trainer.evaluate()
            kl[name], perplexity[name] = report["eval_kl"], report["eval_perplexity"]
        gc.collect()  # a trainer is a cycle, and holds the optimizer's state
        return {"kl": kl, "perplexity": perplexity, "mean_kl": sum(kl.values()) / len(kl), "worst_kl": max(kl.values())}

    def _trainer(self, held_out: Dataset, objective: Objective, seed: int, folder: str) -> DistillTrainer:
        steps = self.settings["steps"]
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
            self.student, self.teacher, objective, args, self.train, held_out, processing_class=self.tokenizer
        )
        trainer.pop_callback(PrinterCallback)
        return trainer


def make(settings: dict[str, Any], parts: dict[str, corpus.Texts], work: Path) -> Bench:
    """Load and cut the models, and cut the text into windows; nothing is kept in `work`."""
    blocks = {name: settings[name] for name in ("model", "teacher", "objective")}
    with reading_once():
        built = build.parts({**blocks, "data": {"path": "-"}})
    sizes = corpus.shares(parts["train"])
    counts = {name: max(settings["batch"], round(settings["windows"] * share)) for name, share in sizes.items()}

    def windows(part: str, wanted: Mapping[str, int]) -> Dataset:
        return corpus.chunks(parts[part], wanted, settings["length"], built.tokenizer)

    held_out = {
        part: windows(part, dict.fromkeys(sizes, settings[f"{part}_windows"])) for part in ("validation", "test")
    }
    start = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    teacher = RecordedTeacher(built.teacher)
    return Bench(settings, built.model, start, teacher, built.tokenizer, windows("train", counts), **held_out)
