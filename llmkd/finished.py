"""A finished run, read from its folder: recipe, metrics, evaluation, history."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd import config as recipes
from llmkd.errors import ConfigError


@dataclass(frozen=True)
class Run:
    """What a run left: the resolved recipe, metrics.json, evaluation.json ({} if there is none), the trainer's log entries
    and the token view (each empty if it was not written)."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    evaluation: dict[str, Any]
    history: list[dict[str, Any]]
    tokens: list[list[dict[str, Any]]]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def student(self) -> Path:
        """The folder of the student."""
        return self.folder / "student"

    @property
    def is_adapter(self) -> bool:
        """Whether the student is an adapter, without its base model."""
        return (self.student / "adapter_config.json").is_file()


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ConfigError: it is none, the run has not finished, or a file cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"run: got '{folder}', which has no config.yaml; expected a run folder, such as runs/quickstart."
        )
    metrics = read_metrics(folder)
    if metrics.get("after") is None or not (folder / "student").is_dir():
        raise ConfigError(
            f"run: '{folder}' has not finished; expected metrics.json and student/. "
            f"Go on with: llmkd train {folder / 'config.yaml'} --resume train.output_dir={folder}"
        )
    evaluation, history, tokens = (read_json(folder / f"{name}.json") for name in ("evaluation", "history", "tokens"))
    return Run(folder, recipes.load(folder / "config.yaml"), metrics, evaluation or {}, history or [], tokens or [])


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a run, or {}."""
    return read_json(folder / "metrics.json") or {}


def read_json(file: Path) -> Any:
    """What a JSON file holds, or None if there is none.

    Raises:
        ConfigError: it is not JSON.
    """
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{file}: got broken JSON ({error}); expected the file of a run. Restore or delete it."
        ) from error
