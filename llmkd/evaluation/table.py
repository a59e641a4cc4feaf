"""What `llmkd evaluate` prints: tasks down, models across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(
    document: Mapping[str, Any], groups: Mapping[str, Sequence[str]], file: Path, console: Console | None = None
) -> None:
    """Print the table of some tasks of a document, and where the document lies.

    Args:
        groups: a name -> its tasks; where they are several, their average gets a line.
    """
    console = console or Console()
    labels = list(document["models"])
    names = list(dict.fromkeys(name for members in groups.values() for name in members))
    between = " " if console.width >= 40 + 24 * len(labels) else "\n"
    table = Table(title=f"{file.parent.name}: evaluation")
    for column in ("task", "metric", "n", *labels):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, metric, cells in rows(document, names, labels, between):
        table.add_row(name, metric, str(document["tasks"][name]["n"]), *cells)
    table.add_section()
    for group, members in groups.items():
        if len(members) > 1:
            scores = averages(document, members, labels)
            table.add_row(group, "average", "", *("-" if score is None else f"{score:.3f}" for score in scores))
    console.print(table)
    console.print("brackets: 95 % intervals", highlight=False)
    plain = [label for label, model in document["models"].items() if model.get("chat_template") is False]
    if plain:
        console.print(f"without a chat template: {', '.join(plain)}", highlight=False)
    console.print(f"results: {file}", highlight=False, soft_wrap=True)


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


def cell(number: Mapping[str, Any] | None, between: str = " ") -> str:
    """A value with its interval."""
    if number is None or number["value"] is None:
        return "-"
    interval = number["interval"]
    return f"{number['value']:.3f}" + (f"{between}\\[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


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
