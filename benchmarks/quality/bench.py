"""What every run shares, made once: the quickstart's teacher, student start and text; and one run, measured."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, set_seed

from benchmarks.quality.results import MEASURES
from benchmarks.recorded import RecordedTeacher
from llmkd import build, config
from llmkd.data import prepare
from llmkd.distributed import start_processes
from llmkd.errors import TrainingError
from llmkd.objectives import CrossEntropy, Objective
from llmkd.teachers import TEACHERS, Teacher
from llmkd.trainer import DistillTrainer
from llmkd.weights import reading_once

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
LENGTH, BATCH = 64, 4


def settings(quick: bool = False) -> dict[str, Any]:
    """All that a run depends on beside its entry and seed: the quickstart's model, teacher, data and arguments, made short."""
    steps, held_out = (4, 8) if quick else (24, 40)
    recipe = config.load(
        QUICKSTART,
        [
            f"data.max_length={LENGTH}",
            "data.spans=punctuation",
            "data.max_eval_samples=null",
            f"train.max_steps={steps}",
            f"train.per_device_train_batch_size={BATCH}",
            f"train.warmup_steps={max(1, steps // 9)}",
        ],
    )
    del recipe["objective"], recipe["train"]["output_dir"]
    return {**recipe, "train_samples": steps * BATCH, "held_out_samples": held_out}


@dataclass
class Bench:
    """Teacher, student with a copy of its start, and the samples: what all runs share."""

    settings: dict[str, Any]
    student: nn.Module
    start: dict[str, Tensor]
    teacher: RecordedTeacher
    tokenizer: Any
    train: Dataset
    held_out: Dataset

    def run(self, entry: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train from the start as the entry says, and measure; a loss that is not finite is a result, too."""
        started = time.process_time()
        try:
            self._train(entry, seed)
        except TrainingError as error:
            return {"failed": str(error)}
        seconds = round(time.process_time() - started, 1)
        return {**self.measure(), "cpu_seconds": seconds}

    def _train(self, entry: dict[str, Any], seed: int) -> None:
        set_seed(seed)  # before learned parts are made
        self.student.load_state_dict(self.start)
        objective = build.objective(entry["objective"])
        tables = {**build.TABLES, "teacher": {**TEACHERS, "recorded": lambda: self.teacher}}
        teacher = config.build("teacher", entry.get("teacher", "recorded"), tables)
        with tempfile.TemporaryDirectory() as folder:  # where Ctrl-C leaves a checkpoint
            trainer = self._trainer(objective, teacher, seed, folder, entry.get("epochs", 1))
            trainer.train()
        if trainer.interrupt.stopped:
            raise KeyboardInterrupt
        trainer.stop_unless_finite()

    def measure(self) -> dict[str, float]:
        """The student as it is, against the teacher on held-out text; the objective has no part in it."""
        with tempfile.TemporaryDirectory() as folder:
            report = self._trainer(CrossEntropy(), self.teacher, 0, folder).evaluate()
        gc.collect()  # a trainer is a cycle, and holds the optimizer's state
        names = (*MEASURES, "teacher_perplexity")
        return {name: round(report[f"eval_{name}"], 6) for name in names}

    def _trainer(
        self, objective: Objective, teacher: Teacher, seed: int, folder: str, epochs: int = 1
    ) -> DistillTrainer:
        block = {**self.settings["train"], "seed": seed, "save_strategy": "no", "logging_strategy": "no"}
        forced = {**start_processes(block), "report_to": "none", "disable_tqdm": True}
        args = config.training_arguments(block, folder, **forced)
        train = evenly_spaced(self.train, len(self.train) // epochs)
        trainer = DistillTrainer(
            self.student, teacher, objective, args, train, self.held_out, processing_class=self.tokenizer
        )
        trainer.pop_callback(PrinterCallback)
        return trainer


def make(settings: dict[str, Any]) -> Bench:
    """Load and cut the models, prepare the text, let the teacher read it."""
    with reading_once():
        data = prepare(build.data_spec(settings), build.tokenizer(settings))
        parts = build.parts({**settings, "data": {}, "objective": "cross_entropy"})
    train = evenly_spaced(data.train, settings["train_samples"])
    held_out = evenly_spaced(data.eval, settings["held_out_samples"])
    teacher = RecordedTeacher(parts.teacher)  # type: ignore[arg-type]
    start = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    return Bench(settings, parts.model, start, teacher, parts.tokenizer, train, held_out)


def evenly_spaced(samples: Any, count: int) -> Dataset:
    """`count` samples at equal distances, so that every text has its share."""
    return samples.select([i * len(samples) // count for i in range(count)])
