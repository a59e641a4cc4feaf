"""Classifiers and regressors on their own held-out examples: GLUE as encoders with a head are compared on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from llmkd import build
from llmkd.adapters import adapter_of
from llmkd.data import prepare
from llmkd.data.collate import ExampleCollator
from llmkd.data.load import DataSpec, load_rows
from llmkd.errors import ConfigError
from llmkd.evaluation import intervals, metrics, results, suite
from llmkd.evaluation.models import Target
from llmkd.evaluation.suite import fingerprint
from llmkd.types import Kind

BATCH = 32
MISMATCHED = "validation_mismatched"  # MNLI's second evaluation set
Part = tuple[str, DataSpec]  # what is added to a metric's name, and where its examples are


def evaluate(
    folder: Path,
    targets: Sequence[Target],
    config: Mapping[str, Any],
    data: Path | None,
    limit: int | None,
    announce: Callable[[str], None],
) -> tuple[dict[str, Any], str]:
    """Score the models of a classifier's run on its evaluation examples.

    Returns:
        The document of `results`, and the task's name in it: the dataset's configuration, such as cola.

    Raises:
        ConfigError: a run without evaluation data. DataError: data that are missing.
    """
    name, parts = task_of(config, data, limit)
    shared: dict[str, Any] = {}
    script = metrics.script_of(name)
    for target in targets:
        document = results.read(folder)
        model, tokenizer = None, None
        if not shared:
            model, tokenizer = target.make()
            shared = describe(name, parts, config, limit, data, tokenizer, adapter_of(model).rows is Kind.VALUE)
        if results.done(document, shared, name, target.label, target.fingerprint):
            announce(f"{target.label}, {name}: stands already")
            continue
        model, tokenizer = (model, tokenizer) if model is not None else target.make()
        announce(f"{target.label}, {name}: {shared['n']} examples")
        started, measured = time.perf_counter(), {}
        for suffix, spec in parts:
            pairs = predict(model, tokenizer, examples_of(spec, tokenizer))
            measured |= {f"{metric}{suffix}": number for metric, number in score(name, pairs, script, model).items()}
        run = {
            "prompts": None, "seconds": round(time.perf_counter() - started, 1), "model": target.fingerprint,
            "scored_by": metrics.scored_by(script),
        }  # fmt: skip
        results.add(folder, name, shared, target.label, _about(target, model), measured, run)
    return results.read(folder), name


def task_of(config: Mapping[str, Any], data: Path | None, limit: int | None) -> tuple[str, list[Part]]:
    """The name of a run's task, and its evaluation sets as specs of their own."""
    spec = build.data_spec(config)
    if spec.eval is None and spec.held_out_every is None:
        raise ConfigError("the run has no evaluation data; expected data.eval or data.held_out_every in its recipe.")
    name = spec.name or Path(str(spec.path)).name.split(".")[0]
    if spec.eval is None:
        return name, [("", spec.model_copy(update={"max_eval_samples": limit}))]
    update = {**spec.eval.model_dump(), "max_samples": limit, "max_eval_samples": None, "eval": None}
    if data is not None:
        wanted = {
            "dataset_path": str(spec.eval.path),
            "dataset_name": spec.eval.name,
            "validation_split": spec.eval.split,
        }
        found = suite.local(data, name, wanted)
        update |= {"path": found["dataset_path"], "name": found.get("dataset_name", spec.eval.name)}
    whole = spec.model_copy(update=update)
    if spec.eval.split == "validation_matched":
        return name, [("", whole), ("_mm", whole.model_copy(update={"split": MISMATCHED}))]
    return name, [("", whole)]


def examples_of(spec: DataSpec, tokenizer: Any) -> Dataset:
    """The examples of an evaluation set."""
    prepared = prepare(spec, tokenizer)
    return prepared.train if prepared.eval is None else prepared.eval


@torch.no_grad()
def predict(model: Any, tokenizer: Any, examples: Dataset) -> list[metrics.Pair]:
    """(label, prediction) of each example: the most likely class, or the value."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    adapter, collate, found = adapter_of(model), ExampleCollator(tokenizer), []
    model = model.to(device).eval()
    for start in range(0, len(examples), BATCH):
        batch = collate([examples[row] for row in range(start, min(start + BATCH, len(examples)))])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = adapter.read(model, batch, ()).rows.values.float()  # type: ignore[union-attr]
        answers = logits.squeeze(-1) if adapter.rows is Kind.VALUE else logits.argmax(-1)
        found += zip(batch["labels"].tolist(), answers.tolist(), strict=True)
    return found


def score(name: str, pairs: Sequence[metrics.Pair], script: Any, model: Any) -> dict[str, Any]:
    """A task's metrics with their spread."""
    wanted = metrics.names_of(name, adapter_of(model).rows is Kind.VALUE)
    values = metrics.compute(wanted, pairs, script)
    out = {}
    for metric in wanted:
        if metric == "accuracy":
            found = intervals.shares([float(known == said) for known, said in pairs])
        else:
            found = intervals.bootstrap(metrics.formula(metric), pairs)
        out[metric] = {**found, "value": intervals.bare(values[metric])["value"]}
    return out


def describe(
    name: str, parts: Sequence[Part], config: Mapping[str, Any], limit: int | None, data: Path | None, tokenizer: Any,
    values: bool,
) -> dict[str, Any]:  # fmt: skip
    """What every model's results on the task share: see `results`."""
    wanted = [f"{metric}{suffix}" for suffix, _ in parts for metric in metrics.names_of(name, values)]
    rows = [load_rows(spec) for _, spec in parts]
    columns = list(parts[0][1].columns.values())
    first = parts[0][1]
    return {
        "source": "llmkd",
        "version": 1.0,
        "hash": fingerprint(wanted, first.max_length, [part.select_columns(columns).to_dict() for part in rows]),
        "dataset": {**_declared(config), "split": first.split, "local": data is not None},
        "n": sum(len(examples_of(spec, tokenizer)) for _, spec in parts),
        "limit": limit,
        "repeats": 1,
        "seed": config["train"].get("seed", 42),
        "num_fewshot": 0,
        "generation": None,
        "higher_is_better": dict.fromkeys(wanted, True),
        "main": wanted,
    }  # fmt: skip


def _declared(config: Mapping[str, Any]) -> dict[str, Any]:
    source = config["data"].get("eval") or config["data"]
    return {"path": source["path"], "name": source.get("name")}


def _about(target: Target, model: Any) -> dict[str, Any]:
    return {
        "path": target.path,
        "revision": target.source.revision if target.source else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "backend": "transformers",
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat_template": None,
    }
