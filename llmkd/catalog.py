"""The tables, read from docstrings: what `llmkd list` prints and README's method table is made of."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

KINDS = ("divergence", "objective", "policy", "schedule", "reweighting", "teacher", "model", "stage", "score")
METHODS = ("divergence", "objective", "policy", "schedule", "reweighting", "stage", "score")
PAPER = re.compile(r"^Reference: (.+?)\.?$", re.MULTILINE)
FIDELITY = re.compile(r"^Fidelity: (.+?)\.?$", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One line of a table: its kind and name, the formula, the paper, how it was checked, its knobs and defaults."""

    kind: str
    name: str
    formula: str
    paper: str
    fidelity: str
    knobs: str


def entries(kind: str | None = None) -> list[Entry]:
    """Every entry of every table, or of one."""
    return list(_entries(kind))


def _entries(kind: str | None) -> Iterator[Entry]:
    from llmkd.build import TABLES

    for table in KINDS if kind is None else (kind,):
        for name, target in TABLES[table].items():
            text = inspect.getdoc(target) or ""
            formula = " ".join(text.split("\n\n")[0].split())
            yield Entry(table, name, formula, _field(PAPER, text), _field(FIDELITY, text), _knobs(target))


def _field(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found.group(1) if found else ""


def _knobs(target: Callable) -> str:
    parameters = inspect.signature(target).parameters.values()
    shown = (p for p in parameters if p.default is not p.empty and p.default is not None)
    return ", ".join(f"{p.name}={getattr(p.default, '__name__', repr(p.default))}" for p in shown)


COLUMNS: dict[str, Callable[[Entry], str]] = {
    "name": lambda entry: f"`{entry.name}`",
    "what it computes": lambda entry: entry.formula,
    "paper": lambda entry: entry.paper,
    "checked": lambda entry: entry.fidelity,
    "defaults": lambda entry: f"`{entry.knobs}`" if entry.knobs else "",
}


def markdown(kinds: tuple[str, ...] = METHODS, columns: Mapping[str, Callable[[Entry], str]] = COLUMNS) -> str:
    """The method table, as Markdown; README's has further columns, of what is not in the package."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for kind in kinds:
        for entry in entries(kind):
            cells = (cell(entry).replace("|", "\\|") for cell in columns.values())
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
