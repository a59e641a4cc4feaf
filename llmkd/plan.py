"""`--dry-run`: check a recipe to the end without its weights, and estimate the memory that it needs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from llmkd import build
from llmkd import config as recipes
from llmkd.adapters import adapter_of, check_takes
from llmkd.data import prepare
from llmkd.distributed import start_processes
from llmkd.errors import ConfigError
from llmkd.teachers import SelfTeacher, check_needs, live_models
from llmkd.weights import reading_once, stand_in
from llmkd.zero3 import whole_models

CHECKED_ROWS = 64
GIB = 2**30


def dry_run(config: Mapping[str, Any]) -> dict[str, float]:
    """Build and check all that a run would, without weights and on the first rows only.

    Returns:
        An estimate of one device's memory in GiB, by what it is for.

    Raises:
        LlmkdError: whatever the run would have stopped at.
    """
    spec = build.data_spec(config)
    with tempfile.TemporaryDirectory() as folder:
        forced = {**start_processes(config["train"]), "output_dir": folder}
        args = recipes.training_arguments(config["train"], folder, **forced)
    with reading_once():
        parts, student = check(config)
    teachers = live_models(parts.teacher)
    for model in (student, *teachers) if spec.packing else ():
        adapter_of(model).check_packing(model, max(args.train_batch_size, args.eval_batch_size))
    rows = min(spec.max_samples or CHECKED_ROWS, CHECKED_ROWS)
    prepare(spec.model_copy(update={"max_samples": rows}), parts.tokenizer)
    copies = parts.teacher.snapshots if isinstance(parts.teacher, SelfTeacher) else 0
    return estimate(student, teachers, args.per_device_train_batch_size * spec.max_length, copies)


def check(config: Mapping[str, Any]) -> tuple[build.Parts, Any]:
    """Build every part without weights and check them against each other.

    Returns:
        The parts, and the student that would be trained: the model, or its PEFT wrapper.

    Raises:
        LlmkdError: an unknown key, a wrong value, a missing file, a signal that the teacher lacks, other tokenizers.
    """
    with whole_models(), stand_in("plan"):
        parts = build.parts(config)
        student = _with_adapter(parts)
    _call_once(parts.objective)
    check_needs(parts.objective, parts.teacher)
    adapter = adapter_of(student)
    check_takes(adapter, parts.objective.takes)
    _check_rows(build.data_spec(config).is_text, adapter.unit)
    adapter.columns(student, parts.teacher, parts.tokenizer)
    return parts, student


def _check_rows(are_text: bool, unit: str) -> None:
    """Raise a ConfigError unless the rows are what such a model learns from."""
    if are_text and unit == "example":
        raise ConfigError(
            "data.columns: got no label for a classifier; expected one, as {text: sentence, label: label}. Name its column."
        )
    if not are_text and unit == "token":
        raise ConfigError(
            "data.columns: got a label for a causal LM; expected a classifier or a regression. Set model.num_labels."
        )


def _call_once(goal: Any) -> None:
    """A divergence that is a function checks its knobs when it is called: call it on two rows of two tokens."""
    rows = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    for part in goal.parts:
        fn = getattr(part, "fn", None)
        if fn is None or isinstance(fn, torch.nn.Module):
            continue
        try:
            fn(rows, rows)
        except (RuntimeError, IndexError):  # the user's own function, which may want more tokens than two
            continue


def _with_adapter(parts: build.Parts) -> Any:
    if parts.peft_config is None:
        return parts.model
    from peft import get_peft_model

    try:
        return get_peft_model(parts.model, parts.peft_config)
    except ValueError as error:
        raise ConfigError(f"peft: {' '.join(str(error).split())}") from error


def estimate(student: Any, teachers: list[Any], tokens: int, copies: int = 0) -> dict[str, float]:
    """Memory of one unsharded device, GiB: exact for weights, gradients and AdamW, a rule of thumb for activations.

    Activations: 34 bytes a token, layer and hidden unit of the student (Korthikanti et al. 2022, arXiv 2205.05198, without
    attention scores); live teachers, which keep no graph, count with their weights alone, a self teacher with its `copies`.
    """
    text = student.config.get_text_config()
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    parts = {
        "student weights": sum(p.numel() * p.element_size() for p in student.parameters()),
        **({"student snapshots": copies * trained} if copies else {}),
        "gradients": trained,
        "AdamW moments": 2 * trained,
        "loss work space": 256 * 2**20,
        "activations": 34 * tokens * text.hidden_size * text.num_hidden_layers,
        "teacher weights": sum(p.numel() * p.element_size() for model in teachers for p in model.parameters()),
    }
    sizes = {name: size / GIB for name, size in parts.items()}
    return {**sizes, "total": sum(sizes.values())}
