"""Checkpoints that are whole or absent: plain Hugging Face folders, the objective's state beside them, a last mark."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.distributed as dist
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from llmkd.adapters import unwrap
from llmkd.disk import need_space, saving
from llmkd.errors import ConfigError
from llmkd.meters import Meter
from llmkd.teachers.base import SelfTeacher, Teacher
from llmkd.zero3 import gathered, size

if TYPE_CHECKING:
    from llmkd.distiller import Distiller

    Base = Trainer
else:
    Base = object

MARK = "complete"
OBJECTIVE_FILE = "objective.safetensors"
STEP_STATE_FILE = "objective_steps.json"
TEACHER_FILE = "teacher.safetensors"
UNLOGGED_FILE = "unlogged.json"


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run that were written to the end, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / MARK).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


class Checkpoints(Base):
    """The part of DistillTrainer that writes and reads them; of teachers, only what one has copied from the student."""

    distiller: Distiller
    teacher: Teacher | None
    _train_meter: Meter
    _last_log: float

    def last_checkpoint(self) -> str | None:
        """The newest complete checkpoint of this run, or None."""
        found = complete_checkpoints(str(self.args.output_dir))
        return str(found[-1]) if found else None

    def save_student(self, folder: str, merge: bool = False) -> None:
        """Write the student as a plain Hugging Face model with tokenizer and generation config; call it on all ranks.

        Args:
            folder: where to. merge: fold a PEFT adapter into its base model first (the trainer's student stays merged).

        Raises:
            TrainingError: the disk is full.
        """
        student = self.distiller.student
        if merge and isinstance(student, PeftModel):
            with gathered(student.parameters(), write=True):
                self.distiller.student = student.merge_and_unload()  # type: ignore[operator]
        with saving(folder):
            self.save_model(folder, _internal_call=True)
        if self.args.should_save:
            Path(folder, OBJECTIVE_FILE).unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, mark as complete, and only then drop older checkpoints: a kill at any moment leaves one to resume from."""
        self.stop_unless_finite()  # type: ignore[attr-defined]
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            need_space(folder, self._checkpoint_bytes())
            (folder / MARK).unlink(missing_ok=True)
        unlogged = self._unlogged()
        try:
            with saving(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if self.args.should_save:
            (folder / STEP_STATE_FILE).write_text(json.dumps(self.distiller.objective.step_state()))
            if isinstance(self.teacher, SelfTeacher):
                with saving(folder):
                    safetensors.torch.save_file(self.teacher.state_dict(), folder / TEACHER_FILE)
            (folder / UNLOGGED_FILE).write_text(json.dumps(unlogged))
            _mark(folder)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _unlogged(self) -> dict[str, float]:
        """What was summed since the last log, over all ranks, and the seconds; it stays to be logged."""
        sums = self._train_meter.totals()
        self._put_back(sums)
        return {**sums, "seconds": time.perf_counter() - self._last_log}

    def _put_back(self, sums: Mapping[str, float]) -> None:
        here = float(self.args.process_index == 0)  # each sum once, and its name on every rank
        device = self.args.device
        self._train_meter.add(
            {name: torch.tensor(value * here, dtype=torch.float64, device=device) for name, value in sums.items()}
        )

    def _checkpoint_bytes(self) -> int:
        """Weights, two moments for each trained one unless only the model is saved, and a self teacher's copies."""
        parameters = list(self.distiller.parameters())
        moments = 0 if self.args.save_only_model else 8 * sum(size(p) for p in parameters if p.requires_grad)
        copies = self.teacher.state_dict().values() if isinstance(self.teacher, SelfTeacher) else ()
        return sum(size(p) * p.element_size() for p in (*parameters, *copies)) + moments

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Only the student goes into the model's files; the objective's parameters get a file of their own."""
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        os.makedirs(folder, exist_ok=True)
        state = self.distiller.state_dict() if state_dict is None else state_dict
        tied = unwrap(self.distiller.student).all_tied_weights_keys  # sharded state comes with a copy of the head
        student = {name.removeprefix("student."): t for name, t in state.items() if name.startswith("student.")}
        student = {name: tensor for name, tensor in student.items() if name not in tied}
        self.distiller.student.save_pretrained(folder, state_dict=student)  # type: ignore[operator]
        ours = ((name.removeprefix("objective."), t) for name, t in state.items() if name.startswith("objective."))
        own = {name: tensor.contiguous() for name, tensor in ours}
        if own:
            safetensors.torch.save_file(own, os.path.join(folder, OBJECTIVE_FILE))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the student and the objective back into the modules that are being trained."""
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        student = self.distiller.student
        if isinstance(student, PeftModel):
            set_peft_model_state_dict(student, load_peft_weights(resume_from_checkpoint, device="cpu"))
        else:
            loaded = type(student).from_pretrained(resume_from_checkpoint, dtype=student.dtype)  # type: ignore[attr-defined]
            student.load_state_dict(loaded.state_dict())
        own = os.path.join(resume_from_checkpoint, OBJECTIVE_FILE)
        if os.path.isfile(own):
            self.distiller.objective.load_state_dict(safetensors.torch.load_file(own))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """With them, under every framework, what the objective moves at each step and a self teacher has copied."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.distiller.objective.load_step_state(json.loads(Path(checkpoint, STEP_STATE_FILE).read_text()))
            if isinstance(self.teacher, SelfTeacher):
                self.teacher.load_state_dict(_copies(Path(checkpoint, TEACHER_FILE)))
            unlogged = json.loads(Path(checkpoint, UNLOGGED_FILE).read_text())
            self._last_log -= unlogged.pop("seconds")
            self._put_back(unlogged)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _copies(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(
            f"checkpoint: got {file.parent} without {file.name}; expected what the teacher copied from the student. "
            "Resume from a checkpoint of a run with this teacher."
        )
    return safetensors.torch.load_file(file)


def _mark(folder: Path) -> None:
    """Create the mark after everything else is on the disk."""
    with open(folder / MARK, "w") as file:
        file.write("every file of this checkpoint was written\n")
        file.flush()
        os.fsync(file.fileno())
