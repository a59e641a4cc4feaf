"""One run: a recipe to a run folder with student, checkpoints, resolved config and metrics."""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from llmkd import build, zero3
from llmkd import config as recipes
from llmkd.adapters import adapter_of, unwrap
from llmkd.checkpoints import complete_checkpoints
from llmkd.data import prepare
from llmkd.data.collate import Collator
from llmkd.data.examples import check_labels
from llmkd.distributed import is_main, start_processes
from llmkd.errors import ConfigError
from llmkd.finished import read_metrics
from llmkd.mixing import mix_domains
from llmkd.plan import check
from llmkd.sources import revisions
from llmkd.token_view import token_view
from llmkd.trainer import DistillTrainer
from llmkd.versions import commit, device, peak_memory_mb, versions
from llmkd.weights import reading_once, standing_in

MEASURED = {
    "token": ("kl", "top1_agreement", "perplexity", "bits_per_byte", "peak_memory_mb"),
    "example": ("kl", "top1_agreement", "accuracy", "mse_to_teacher", "mse", "peak_memory_mb"),
}
MAY_CHANGE = {"save_steps", "save_total_limit", "logging_steps", "report_to", "disable_tqdm", "run_name", "output_dir"}


class Stopped(Exception):
    """The run was interrupted after a checkpoint."""


def folder_of(config: Mapping[str, Any], name: str) -> Path:
    """The run folder: `train.output_dir`, or runs/<recipe>."""
    return Path(config["train"].get("output_dir") or Path("runs") / name)


def claim(folder: Path, config: Mapping[str, Any], resume: bool) -> None:
    """Accept a new run folder, or the one of the same recipe; never touch another's silently. Nothing is written.

    Raises:
        ConfigError: it exists and `resume` was not asked for, or it belongs to another config (the key is named).
    """
    file = folder / "config.yaml"
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"train.output_dir: '{folder}' is not empty and no run; expected a new folder. Set another."
            )
        return
    if not resume:
        raise ConfigError(
            f"train.output_dir: '{folder}' has a run already; expected a new folder. "
            "Add --resume to go on with it, or train.output_dir=OTHER for a new one."
        )
    difference = first_difference(recipes.load(file), config)
    if difference:
        raise ConfigError(
            f"--resume: {difference} in '{folder}'; expected the recipe that the run began with. "
            "Use another train.output_dir."
        )


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first key in which two configs differ, with both values; keys that do not change the result may differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            if path == "train" and key in MAY_CHANGE:
                continue
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    return None if old == new else f"{path} was {old!r}, is {new!r}"


def train(config: Mapping[str, Any], folder: Path, resume: bool = False, announce: Any = print) -> dict[str, Any]:
    """Run a checked recipe to the end and write its folder.

    Returns:
        What metrics.json holds: `before`, `after`, `teacher`, `train`, versions and seed.

    Raises:
        Stopped: Ctrl-C or SIGTERM, after a checkpoint. LlmkdError: what the user has to fix.
    """
    forced = {**start_processes(config["train"]), "output_dir": str(folder / "checkpoints")}
    if is_main():
        claim(folder, config, resume)
    done = read_metrics(folder)
    if done.get("after") is not None:
        announce(f"{folder} is finished already; nothing to do.")
        return done
    checkpoints = complete_checkpoints(folder / "checkpoints")
    args = recipes.training_arguments(config["train"], str(folder), **forced)
    spec = build.data_spec(config)
    with reading_once():
        if not standing_in() and not build.has_own_code(config):
            check(config)  # all that can be wrong is said before weights are loaded
        data = prepare(spec, build.tokenizer(config))
        announce(f"data: {_counts(data.report)}")
        set_seed(args.seed)  # before random parts are made: adapters, projectors
        built = build.parts(config)
    if not spec.is_text:
        for name, part in (("data", data.train), ("data.eval", data.eval)):
            if part is not None:
                check_labels(part, adapter_of(built.model).width(built.model), name)
    _begin(folder, config)
    args.eval_on_start = data.eval is not None and not checkpoints
    trainer = DistillTrainer(
        model=built.model,
        teacher=built.teacher,
        objective=built.objective,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=built.tokenizer,
        peft_config=built.peft_config,
        data_collator=Collator(built.tokenizer.pad_token_id, packing=spec.packing) if spec.is_text else None,
    )
    if built.reweighting is not None:
        mix_domains(trainer, built.reweighting, folder)
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    if trainer.interrupt.stopped:
        raise Stopped(str(trainer.last_checkpoint()))
    trainer.stop_unless_finite()
    return _finish(trainer, config, folder, data.report)


def _begin(folder: Path, config: Mapping[str, Any]) -> None:
    """Create the run folder, once nothing is left to check."""
    if is_main() and not (folder / "config.yaml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "config.yaml", recipes.dump(config))


def _finish(trainer: DistillTrainer, config: Mapping[str, Any], folder: Path, report: dict[str, int]) -> dict[str, Any]:
    """Final evaluation, export and metrics; metrics.json comes last, so that its `after` means all is there."""
    train_column = _train_column(trainer, report)
    final = trainer.evaluate() if trainer.eval_dataset is not None else {}
    start = next((entry for entry in trainer.state.log_history if entry.get("step") == 0 and "eval_loss" in entry), {})
    merge = bool((config.get("peft") or {}).get("merge", False))
    trainer.save_student(str(folder / "student"), merge=merge)
    speed = _speed(trainer)
    student = trainer.distiller.student
    metrics = {
        "before": _measured(trainer, start, speed["student"]),
        "after": _measured(trainer, final, speed["student"]),
        "teacher": _teacher_column(trainer, final, speed["teacher"]),
        "train": train_column,
        "revisions": revisions(config),
        "parameters": sum(zero3.size(p) for p in student.parameters()),
        "seed": trainer.args.seed,
        "versions": versions(),
        "device": device(),
        "processes": trainer.args.world_size,
        "commit": commit(),
    }
    tokens = token_view(trainer)
    if trainer.args.should_save:
        _write(folder / "history.json", json.dumps(trainer.state.log_history, indent=1) + "\n")
        if tokens is not None:
            _write(folder / "tokens.json", json.dumps(tokens, ensure_ascii=False) + "\n")
        _write(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _measured(trainer: DistillTrainer, logs: Mapping[str, float], speed: float | None) -> dict[str, float | None]:
    unit = trainer.distiller.adapter.unit
    values = {name: logs.get(f"eval_{name}") for name in MEASURED[unit] if unit == "token" or f"eval_{name}" in logs}
    return {**values, "tokens_per_second": speed}


def _teacher_column(trainer: DistillTrainer, final: Mapping[str, float], speed: float | None) -> dict[str, Any]:
    """What was measured of the teacher, or nothing; of one that is not here, such as a store, neither speed nor size."""
    model = getattr(trainer.teacher, "model", None)
    unit = trainer.distiller.adapter.unit
    named = {"token": ("perplexity", "bits_per_byte"), "example": ("accuracy", "mse")}[unit]
    values = {name: final.get(f"eval_teacher_{name}") for name in named}
    if trainer.teacher is None or (model is None and not any(values.values())):
        return {}
    same = {"kl": 0.0, "top1_agreement": 1.0} if "eval_mse" not in final else {"mse_to_teacher": 0.0}
    size = sum(zero3.size(p) for p in model.parameters()) if model is not None else None
    return {**same, **values, "tokens_per_second": speed, "parameters": size}


def _train_column(trainer: DistillTrainer, report: dict[str, int]) -> dict[str, Any]:
    history = trainer.state.log_history
    logs = [entry for entry in history if "tokens_per_second" in entry]
    speeds = [entry["tokens_per_second"] for entry in logs]
    return {
        "loss": logs[-1]["loss"] if logs else None,
        "steps": trainer.state.global_step,
        "tokens": history[-1]["tokens_seen"],
        "seconds": round(history[-1]["seconds"], 1),
        "tokens_per_second": round(sum(speeds) / len(speeds), 1) if speeds else None,
        "peak_memory_mb": peak_memory_mb(),
        "data": report,
    }


def _speed(trainer: DistillTrainer) -> dict[str, float | None]:
    """Forward tokens/s of student and teacher on the same held-out batch; None where models are sharded."""
    none: dict[str, float | None] = {"student": None, "teacher": None}
    if trainer.eval_dataset is None or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return none
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    models = {"student": trainer.distiller.student, "teacher": getattr(trainer.teacher, "model", None)}
    with trainer.accelerator.autocast():
        return {name: forward_speed(model, batch) if model is not None else None for name, model in models.items()}


@torch.no_grad()
def forward_speed(model: Any, batch: Mapping[str, torch.Tensor], repeats: int = 3) -> float:
    """Tokens a second of the model's own forward pass with all logits, on up to 8 rows; the best of `repeats`."""
    inputs = {name: batch[name][:8] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
    cacheless = {"use_cache": False} if "use_cache" in inspect.signature(unwrap(model).forward).parameters else {}
    model.eval()
    best = float("inf")
    for _ in range(repeats + 1):  # the first is a warm-up that the best of the rest never loses to
        started = time.perf_counter()
        out = model(**inputs, **cacheless).logits
        out.flatten()[0].item()  # wait for the device
        best = min(best, time.perf_counter() - started)
    return round(tokens / best, 1)


def _counts(report: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in report.items() if value)


def _write(file: Path, text: str) -> None:
    """Write a whole file or none."""
    partial = file.with_suffix(file.suffix + f".{os.getpid()}")
    partial.write_text(text)
    partial.replace(file)
