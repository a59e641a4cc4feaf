"""`--dry-run` and `--smoke`: check a recipe to the end without its weights, or run two steps of it on tiny ones."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmkd import build
from llmkd import config as recipes
from llmkd.adapters.causal_lm import check_packing, vocabulary
from llmkd.data import prepare
from llmkd.data.load import DataSpec
from llmkd.distributed import start_processes
from llmkd.errors import ConfigError
from llmkd.trainer import check_needs
from llmkd.vocabulary import common_columns
from llmkd.weights import reading_once, stand_in
from llmkd.zero3 import whole_models

CHECKED_ROWS = 64
GIB = 2**30
SMOKE_TEXT = "Distillation lets a small model learn what a large one knows. " * 4


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
    for model in (student, getattr(parts.teacher, "model", None)) if spec.packing else ():
        if model is not None:
            check_packing(model, max(args.train_batch_size, args.eval_batch_size))
    rows = min(spec.max_samples or CHECKED_ROWS, CHECKED_ROWS)
    prepare(spec.model_copy(update={"max_samples": rows}), parts.tokenizer)
    return estimate(student, getattr(parts.teacher, "model", None), args.per_device_train_batch_size * spec.max_length)


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
    size, tokenizer = (parts.teacher.vocab_size, parts.teacher.tokenizer) if parts.teacher else (None, None)
    common_columns(vocabulary(student), size, parts.tokenizer, tokenizer)
    return parts, student


def _call_once(goal: Any) -> None:
    """A divergence that is a function checks its knobs when it is called: call it on two rows of two tokens."""
    rows = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    for part in goal.parts:
        fn = getattr(part, "fn", None)
        if fn is None or isinstance(fn, torch.nn.Module):
            continue
        try:
            fn(rows, rows)
        except ConfigError:
            raise
        except Exception:  # the user's own function, which may want more tokens than two
            continue


def _with_adapter(parts: build.Parts) -> Any:
    if parts.peft_config is None:
        return parts.model
    from peft import get_peft_model

    try:
        return get_peft_model(parts.model, parts.peft_config)
    except ValueError as error:
        raise ConfigError(f"peft: {' '.join(str(error).split())}") from error


def estimate(student: Any, teacher: Any, tokens: int) -> dict[str, float]:
    """Memory of one unsharded device, GiB: exact for weights, gradients and AdamW, a rule of thumb for activations.

    Activations: 34 bytes a token, layer and hidden unit (Korthikanti et al. 2022, arXiv 2205.05198, without attention
    scores), halved for the teacher's forward pass over one layer at a time.
    """
    text = student.config.get_text_config()
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    parts = {
        "student weights": sum(p.numel() * p.element_size() for p in student.parameters()),
        "gradients": trained,
        "AdamW moments": 2 * trained,
        "loss work space": 256 * 2**20,
        "activations": 34 * tokens * text.hidden_size * text.num_hidden_layers,
        "teacher weights": sum(p.numel() * p.element_size() for p in teacher.parameters())
        if teacher is not None
        else 0,
    }
    sizes = {name: size / GIB for name, size in parts.items()}
    return {**sizes, "total": sum(sizes.values())}


def smoke(config: Mapping[str, Any], announce: Any = print) -> dict[str, Any]:
    """Two steps of the recipe on tiny random models of the same families, in seconds, without a network."""
    from llmkd.run import train

    small = copy.deepcopy(dict(config))
    small["train"] = {**small["train"], "max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "fp16": False,
                      "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 2, "logging_steps": 1,
                      "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
                      "report_to": "none", "push_to_hub": False}  # fmt: skip
    for part in ("model", "teacher"):
        if isinstance(small.get(part), Mapping):
            small[part] = {key: value for key, value in small[part].items() if key not in ("attn_implementation",)}
    with tempfile.TemporaryDirectory() as folder:
        small["data"] = _small_data(build.data_spec(config), Path(folder))
        with stand_in("smoke", _layers(config["model"])):
            return train(small, Path(folder) / "run", announce=announce)


def _layers(model: Any) -> int:
    """Layers that tiny models need, so that those a recipe keeps exist."""
    layers = model.get("layers") if isinstance(model, Mapping) else None
    return max(layers) + 1 if isinstance(layers, list) and layers else layers if isinstance(layers, int) else 2


def _small_data(spec: DataSpec, folder: Path) -> dict[str, Any]:
    """A few short rows of the recipe's own data where it lies here, made-up ones where it is on the Hub."""
    import json

    kept = {"max_length": min(spec.max_length, 64), "packing": spec.packing}
    if ":" in str(spec.path) or Path(str(spec.path)).exists():
        local = spec.model_dump(include={"path", "split", "columns"}, exclude_defaults=True)
        return {**local, **kept, "max_samples": 8, "held_out_every": 4, "max_eval_samples": 4}
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(_made_up(spec)) + "\n" for _ in range(8)))
    return {"path": str(rows), **kept, "held_out_every": 4, "max_eval_samples": 4}


def _made_up(spec: DataSpec) -> dict[str, Any]:
    if "messages" in spec.columns:
        return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": SMOKE_TEXT}]}
    if "prompt" in spec.columns:
        return {"prompt": "Why distil? ", "completion": SMOKE_TEXT}
    return {"text": SMOKE_TEXT}
