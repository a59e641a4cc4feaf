"""`llmkd evaluate`: what the options mean, and which way a model is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmkd.errors import ConfigError
from llmkd.evaluation import harness, results, suite, table
from llmkd.evaluation.models import find
from llmkd.evaluation.suite import Sampling


@dataclass(frozen=True)
class Options:
    """The command line's arguments, in its order."""

    target: str
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
    names = _split(options.tasks)
    _check(options)
    folder, targets = find(options.target, None if options.baseline is None else _split(options.baseline))
    sampling = Sampling(options.max_tokens, options.repeats)
    settings = harness.Settings(
        options.data, options.limit, options.backend, options.batch_size, options.seed, options.chat_template, sampling
    )
    document = harness.evaluate(folder, targets, names, settings, announce)
    table.show(document, {name: list(leaves) for name, leaves in suite.expand(names).items()}, folder / results.FILE)


def _check(options: Options) -> None:
    if options.data is not None and not options.data.is_dir():
        raise ConfigError(f"--data: got '{options.data}', which is no folder; expected one of datasets. Name a folder.")
    if options.batch_size != "auto" and not (options.batch_size.isdecimal() and int(options.batch_size) > 0):
        raise ConfigError(f"--batch-size: got '{options.batch_size}'; expected auto or a number above 0. Set auto.")


def _split(text: str) -> list[str]:
    """The names between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
