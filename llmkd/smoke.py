"""`--smoke`: two steps of any recipe on tiny random models."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkd import build
from llmkd.data.load import DataSpec, has_domains
from llmkd.run import train
from llmkd.weights import stand_in

SMOKE_TEXT = "Distillation lets a small model learn what a large one knows. " * 4


def smoke(config: Mapping[str, Any], announce: Any = print) -> dict[str, Any]:
    """Two steps of the recipe, epochs where data are made up, on tiny random models of its families, without a network."""
    small = copy.deepcopy(dict(config))
    small["train"] = {**small["train"], "max_steps": 2, "per_device_train_batch_size": 8, "bf16": False, "fp16": False,
                      "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 2, "logging_steps": 1,
                      "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
                      "report_to": "none", "push_to_hub": False, "torch_compile": False}  # fmt: skip
    for part in ("model", "teacher"):
        if isinstance(small.get(part), Mapping):
            small[part] = {key: value for key, value in small[part].items() if key not in ("attn_implementation",)}
    if isinstance(small.get("reweighting"), Mapping):
        plain = {key: value for key, value in small["reweighting"].items() if not isinstance(value, Mapping)}
        small["reweighting"] = {**plain, "interval": 1}
    with tempfile.TemporaryDirectory() as folder:
        small["data"] = _small_data(build.data_spec(config), Path(folder), _domains(config))
        with stand_in("smoke", _layers(config["model"]), _labels(config)):
            return train(small, Path(folder) / "run", announce=announce)


def _layers(model: Any) -> int:
    """Layers that tiny models need, so that those a recipe keeps exist."""
    layers = model.get("layers") if isinstance(model, Mapping) else None
    return max(layers) + 1 if isinstance(layers, list) and layers else layers if isinstance(layers, int) else 2


def _labels(config: Mapping[str, Any]) -> int | None:
    """Classes of tiny models: those of the recipe, 2 where its data have labels and nobody says how many."""
    if build.data_spec(config).is_text:
        return None
    model = config["model"]
    return (model.get("num_labels") if isinstance(model, Mapping) else None) or 2


def _domains(config: Mapping[str, Any]) -> list[str]:
    """The recipe's domains, made-up ones where only its data know them."""
    path, teacher = config["data"]["path"], config.get("teacher")
    members = teacher.get("teachers") if isinstance(teacher, Mapping) else None
    return next((list(names) for names in (path, members) if isinstance(names, Mapping)), ["one", "two"])


def _small_data(spec: DataSpec, folder: Path, domains: list[str]) -> dict[str, Any]:
    """A few short rows of the recipe's own data where it lies here, made-up ones where it is on the Hub."""
    kept = {"max_length": min(spec.max_length, 64), "packing": spec.packing, "spans": spec.spans}
    if has_domains(spec):
        return {"path": {name: _write(folder / f"{name}.jsonl", spec) for name in domains}, **kept,
                "held_out_every": 4, "max_eval_samples": 4}  # fmt: skip
    if ":" in str(spec.path) or Path(str(spec.path)).exists():
        local = spec.model_dump(include={"path", "split", "columns"}, exclude_defaults=True)
        return {**local, **kept, "max_samples": 8, "held_out_every": 4, "max_eval_samples": 4}
    columns = {} if spec.is_text else {"columns": {name: name for name in spec.columns}}
    return {"path": _write(folder / "rows.jsonl", spec), **kept, **columns, "held_out_every": 4, "max_eval_samples": 4}


def _write(file: Path, spec: DataSpec) -> str:
    file.write_text("".join(json.dumps(_made_up(spec, row)) + "\n" for row in range(8)))
    return str(file)


def _made_up(spec: DataSpec, row: int) -> dict[str, Any]:
    if not spec.is_text:
        return {**dict.fromkeys(spec.columns, SMOKE_TEXT), "label": row % 2}
    if "messages" in spec.columns:
        return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": SMOKE_TEXT}]}
    if "prompt" in spec.columns:
        return {"prompt": "Why distil? ", "completion": SMOKE_TEXT}
    return {"text": SMOKE_TEXT}
