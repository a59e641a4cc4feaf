"""lm-eval through its Python entry: every model on every task, one at a time, each result written as soon as it stands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from llmkd.errors import ConfigError, need, unknown_name
from llmkd.evaluation import intervals, results, suite
from llmkd.evaluation.models import Target
from llmkd.evaluation.suite import Sampling, fingerprint
from llmkd.weights import Source, load_tokenizer

CPU_BATCH = 8  # memory that runs out cannot be caught there, so nothing finds the largest batch
SLOW = ("bleu", "chrf", "ter")  # corpus statistics: a thousand resamples would take longer than the task


@dataclass(frozen=True)
class Settings:
    """How models are evaluated; `chat` None means a template where the tokenizer has one."""

    data: Path | None = None
    limit: int | None = None
    backend: str = "hf"
    batch_size: str = "auto"
    seed: int = 1234
    chat: bool | None = None
    sampling: Sampling = field(default_factory=Sampling)


def evaluate(
    folder: Path, targets: Sequence[Target], names: Sequence[str], settings: Settings, announce: Callable[[str], None]
) -> dict[str, Any]:
    """Run tasks on models; what the folder's evaluation.json has already is not run again.

    Returns:
        The document of `results`.

    Raises:
        ConfigError: an unknown task or backend, a chat template that is not there, more tokens than a model has room for.
        DataError: a task whose data are missing; nothing has run by then.
    """
    check_backend(settings.backend)
    chats = {target.label: _chat(target, settings.chat) for target in targets}
    leaves = {leaf: changes for members in suite.expand(names).values() for leaf, changes in members.items()}
    tasks = {name: suite.load(name, changes, settings.data, settings.sampling) for name, changes in leaves.items()}
    suite.check_sampling(tasks, settings.sampling)
    shared = {
        name: suite.describe(name, task, settings.limit, settings.seed, settings.data) for name, task in tasks.items()
    }
    for target in targets:
        model = fingerprint(target.fingerprint, settings.backend, chats[target.label])
        document = results.read(folder)
        missing = [name for name in tasks if not results.done(document, shared[name], name, target.label, model)]
        for name in tasks:
            if name not in missing:
                announce(f"{target.label}, {name}: stands already")
        if missing:
            with _loaded(target, settings, chats[target.label]) as (lm, about):
                for name in missing:
                    announce(f"{target.label}, {name}: {shared[name]['n']} examples")
                    measured, run = _measure(lm, name, tasks[name], settings, about["chat_template"])
                    results.add(folder, name, shared[name], target.label, about, measured, {**run, "model": model})
    return results.read(folder)


def check_backend(name: str) -> None:
    """Raise a ConfigError if lm-eval has no such backend, or its package is missing."""
    need("lm_eval", suite.INSTALL)
    from lm_eval.models import MODEL_MAPPING

    if name not in MODEL_MAPPING:
        raise unknown_name("backend", name, MODEL_MAPPING)
    if name.startswith("vllm"):
        need("vllm", "pip install vllm")


def _chat(target: Target, wanted: bool | None) -> bool | None:
    """Whether to use the chat template; None: as the tokenizer of a model that is still to be made will say."""
    if wanted is False or target.source is None:
        return wanted
    has = bool(load_tokenizer(target.source).chat_template)
    if wanted and not has:
        raise ConfigError(_no_template(target))
    return has


def _no_template(target: Target) -> str:
    return (
        f"--chat-template: the tokenizer of '{target.label}' ({target.path}) has none; expected a chat model. Leave the "
        "option out: prompts are then plain where there is no template."
    )


@contextmanager
def _loaded(target: Target, settings: Settings, chat: bool | None) -> Any:
    """lm-eval's model and its line of the document."""
    import torch
    from lm_eval.api.registry import get_model

    batch, device = settings.batch_size, None
    if settings.backend.startswith("hf"):
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        batch = str(CPU_BATCH) if batch == "auto" and device.type == "cpu" else batch
    with target.folder() as path:
        if chat is None or (chat and target.source is None):
            has = bool(load_tokenizer(Source(path)).chat_template)
            if chat and not has:
                raise ConfigError(_no_template(target))
            chat = has
        revision = target.source.revision if target.source else None
        arguments = {"pretrained": path, "dtype": "auto", **({"revision": revision} if revision else {})}
        lm = get_model(settings.backend).create_from_arg_obj(
            arguments, {"batch_size": batch, "device": device and device.type}
        )
        yield lm, _about(target, lm, settings.backend, chat)


def _about(target: Target, lm: Any, backend: str, chat: bool) -> dict[str, Any]:
    model = getattr(lm, "model", None)
    known = hasattr(model, "parameters")
    return {
        "path": target.path,
        "revision": target.source.revision if target.source else None,
        "parameters": sum(p.numel() for p in model.parameters()) if known else None,  # type: ignore[union-attr]
        "backend": backend,
        "dtype": str(model.dtype).removeprefix("torch.") if known else None,  # type: ignore[union-attr]
        "chat_template": chat,
    }


def _measure(lm: Any, name: str, task: Any, settings: Settings, chat: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """One model on one task: its metrics, and how they were made."""
    from lm_eval.evaluator import evaluate as run_tasks

    _check_room(lm, name, task)
    started = time.perf_counter()
    set_seed(settings.seed)
    task.set_fewshot_seed(settings.seed)
    with _quiet():
        found: Any = run_tasks(
            lm=lm, task_dict={"tasks": {name: task}}, limit=settings.limit, bootstrap_iters=0,
            apply_chat_template=chat, fewshot_as_multiturn=chat,
        )  # fmt: skip
    samples = found["samples"][name]
    run = {
        "prompts": fingerprint([sample["prompt_hash"] for sample in samples]),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return metrics_of(task, samples, found["results"][name]), run


def metrics_of(task: Any, samples: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Every metric of a task with its spread, from lm-eval's own values and what it logged of each example."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    out = {}
    for metric, statistic in task.aggregation().items():
        for kind in filters:
            items = [sample[metric] for sample in samples if sample["filter"] == kind and metric in sample]
            value = values.get(f"{metric},{kind}")
            if not items or not isinstance(value, int | float):
                continue
            label = metric if len(filters) == 1 else f"{metric},{kind}"
            is_mean = getattr(statistic, "__name__", "") == "mean"
            found = intervals.bare(value) if metric in SLOW else intervals.of_items(statistic, items, is_mean)
            out[label] = {**found, "value": intervals.bare(value)["value"]}
    return out


def _check_room(lm: Any, name: str, task: Any) -> None:
    """Raise a ConfigError unless a model's context has room for what a task lets it say."""
    if task.get_config("output_type") != "generate_until":
        return
    wanted, room = task.get_config("generation_kwargs").get("max_gen_toks", 0), getattr(lm, "max_length", None)
    if room is not None and wanted >= room:
        raise ConfigError(
            f"task {name}: got up to {wanted} new tokens for a model of {room}; expected room for the prompt as well. "
            f"Set --max-tokens {room // 2}."
        )


@contextmanager
def _quiet() -> Any:
    """lm-eval's own messages, errors excepted, are for those who call it."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
