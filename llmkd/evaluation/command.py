"""`llmkd evaluate`: what the options mean, and which way a model is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd import build
from llmkd import config as recipes
from llmkd.errors import ConfigError
from llmkd.evaluation import glue, harness, results, suite, table
from llmkd.evaluation.models import Target, find
from llmkd.evaluation.suite import Sampling


@dataclass(frozen=True)
class Options:
    """The command line's arguments, in its order."""

    targets: list[str]
    tasks: str
    baseline: str | None
    data: Path | None
    limit: int | None
    backend: str
    batch_size: str
    max_tokens: int | None
    repeats: int | None
    seed: int
    chat_template: bool | None


def run(options: Options, announce: Callable[[str], None]) -> None:
    """Evaluate and print the table."""
    _check(options)
    baselines = None if options.baseline is None else _split(options.baseline)
    found = [
        find(target, baselines) for target in options.targets
    ]  # all that can be wrong with names, before anything runs
    parts = []
    for folder, targets in found:
        config = classifier_config(folder)
        way = _language_model if config is None else _classifier
        parts.append(way(folder, targets, config, options, announce))
    table.show(parts)


def _language_model(
    folder: Path, targets: list[Target], config: Any, options: Options, announce: Callable[[str], None]
) -> table.Part:
    names = _split(options.tasks)
    sampling = Sampling(options.max_tokens, options.repeats)
    settings = harness.Settings(
        options.data, options.limit, options.backend, options.batch_size, options.seed, options.chat_template, sampling
    )
    document = harness.evaluate(folder, targets, names, settings, announce)
    groups = {name: list(leaves) for name, leaves in suite.expand(names).items()}
    return folder / results.FILE, document, groups


def _classifier(
    folder: Path, targets: list[Target], config: Any, options: Options, announce: Callable[[str], None]
) -> table.Part:
    for option, value in (("--max-tokens", options.max_tokens), ("--repeats", options.repeats),
                          ("--chat-template", options.chat_template)):  # fmt: skip
        if value is not None:
            raise ConfigError(f"{option}: got {value} for '{folder}', a classifier, which has no prompt. Remove it.")
    own, _ = glue.task_of(config, None, None)
    if options.tasks and _split(options.tasks) != [own]:
        raise ConfigError(
            f"--tasks: got '{options.tasks}' for '{folder}', a classifier of {own}; expected {own}. Leave it out."
        )
    document, name = glue.evaluate(folder, targets, config, options.data, options.limit, announce)
    return folder / results.FILE, document, {name: [name]}


def classifier_config(folder: Path) -> Any:
    """The recipe of a classifier's run; None for a language model."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    config = recipes.load(file)
    return None if build.data_spec(config).is_text else config


def _check(options: Options) -> None:
    if options.data is not None and not options.data.is_dir():
        raise ConfigError(f"--data: got '{options.data}', which is no folder; expected one of datasets. Name a folder.")
    if options.batch_size != "auto" and not (options.batch_size.isdecimal() and int(options.batch_size) > 0):
        raise ConfigError(f"--batch-size: got '{options.batch_size}'; expected auto or a number above 0. Set auto.")


def _split(text: str) -> list[str]:
    """The names between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
