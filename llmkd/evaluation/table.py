"""What `llmkd evaluate` prints: tasks down, models across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Part = tuple[Path, Mapping[str, Any], Mapping[str, Sequence[str]]]  # a results file, its document, names -> their tasks


def show(parts: Sequence[Part], console: Console | None = None) -> None:
    """Print one table of some tasks of one or several documents, and where these lie.

    A name that stands for several tasks gets a line with their average, and several documents one of all their tasks.
    """
    console = console or Console()
    labels = list(dict.fromkeys(label for _, document, _ in parts for label in document["models"]))
    between = " " if console.width >= 40 + 24 * len(labels) else "\n"
    table = Table(title=f"{parts[0][0].parent.name}: evaluation" if len(parts) == 1 else "evaluation")
    for column in ("task", "metric", "n", *labels):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for file, document, groups in parts:
        prefix = "" if len(parts) == 1 else f"{file.parent.name}: "
        for name, metric, cells in rows(document, _leaves(groups), labels, between):
            table.add_row(f"{prefix}{name}", metric, str(document["tasks"][name]["n"]), *map(escape, cells))
    table.add_section()
    for name, average in all_averages(parts, labels):
        table.add_row(name, "average", "", *("-" if score is None else f"{score:.3f}" for score in average))
    console.print(table)
    console.print("brackets: 95 % intervals", highlight=False)
    templates = [item for _, document, _ in parts for item in document["models"].items()]
    plain = dict.fromkeys(label for label, model in templates if model["chat_template"] is False)
    if plain:
        console.print(f"without a chat template: {', '.join(plain)}", highlight=False)
    for file, _, _ in parts:
        console.print(f"results: {file}", highlight=False, soft_wrap=True)


def _leaves(groups: Mapping[str, Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for members in groups.values() for name in members))


def all_averages(parts: Sequence[Part], labels: Sequence[str]) -> list[tuple[str, list[float | None]]]:
    """The lines of averages: of each name with several tasks, and of all tasks if there are several documents."""
    out = [
        (group, averages(document, members, labels))
        for _, document, groups in parts
        for group, members in groups.items()
        if len(members) > 1
    ]
    if len(parts) > 1:
        scores = [[score(document["tasks"][name], label) for label in labels]
                  for _, document, groups in parts for name in _leaves(groups)]  # fmt: skip
        out.append(("all", [_mean(column) for column in zip(*scores, strict=True)]))
    return out


def rows(
    document: Mapping[str, Any], names: Sequence[str], labels: Sequence[str], between: str = " "
) -> list[tuple[str, str, list[str]]]:
    """(task, metric, a cell a model); n of mean@n is filled in."""
    out = []
    for name in names:
        task = document["tasks"][name]
        metrics = list(dict.fromkeys(metric for model in task["models"].values() for metric in model))
        for metric in metrics:
            cells = [cell(task["models"].get(label, {}).get(metric), between) for label in labels]
            out.append((name, metric.replace("@n", f"@{task['repeats']}"), cells))
    return out


def lines(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """All results of a document as a table: a head, then a line a metric of a task, a column a model."""
    models, tasks = list(document["models"]), document["tasks"]
    return [("task", "version", "metric", *models)] + [
        (f"{name} (n = {tasks[name]['n']:,})", str(tasks[name]["version"]), metric, *cells)
        for name, metric, cells in rows(document, list(tasks), models)
    ]


def cell(number: Mapping[str, Any] | None, between: str = " ") -> str:
    """A value with its interval."""
    if number is None or number["value"] is None:
        return "-"
    interval = number["interval"]
    return f"{number['value']:.3f}" + (f"{between}[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def averages(document: Mapping[str, Any], names: Sequence[str], labels: Sequence[str]) -> list[float | None]:
    """The mean over tasks of each model's score (the mean of a task's main metrics); None where a task is missing."""
    return [_mean([score(document["tasks"][name], label) for name in names]) for label in labels]


def score(task: Mapping[str, Any], label: str) -> float | None:
    """The mean of a model's main metrics on a task, or None."""
    found = task["models"].get(label, {})
    return _mean([found.get(metric, {}).get("value") for metric in task["main"]])


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
