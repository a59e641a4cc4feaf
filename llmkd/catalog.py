"""The tables, read from source: what `llmkd list` prints and README's method table is made of.

Tables are literals, so that their entries' docstrings can be read without importing torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

KINDS = ("divergence", "objective", "policy", "schedule", "reweighting", "teacher", "model", "stage", "score", "store")
METHODS = ("divergence", "objective", "policy", "schedule", "reweighting", "stage", "score", "store")
ENDS = r"\.?(?=\n\w+:|\n\n|\Z)"  # the next field, an empty line or the end
PAPER = re.compile(r"^Reference: (.+?)" + ENDS, re.MULTILINE | re.DOTALL)
FIDELITY = re.compile(r"^Fidelity: (.+?)" + ENDS, re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One line of a table: its kind and name, the formula, the paper, how it was checked, its knobs and defaults."""

    kind: str
    name: str
    formula: str
    paper: str
    fidelity: str
    knobs: str


@dataclass(frozen=True)
class Definition:
    """What a name stands for: a class, a function or an assignment, and the module that it is in."""

    module: str
    node: ast.stmt


def entries(kind: str | None = None) -> list[Entry]:
    """Every entry of every table, or of one."""
    return list(_entries(kind))


def _entries(kind: str | None) -> Iterator[Entry]:
    tables = dict(_items(_find("llmkd.build", "TABLES")))
    for table in KINDS if kind is None else (kind,):
        for name, target in _items(tables[table]):
            text = ast.get_docstring(target.node) or ""  # type: ignore[arg-type]
            formula = " ".join(text.split("\n\n")[0].split())
            yield Entry(table, name, formula, _field(PAPER, text), _field(FIDELITY, text), _knobs(target))


@cache
def _source(module: str) -> ast.Module:
    place = Path(__file__).parent.joinpath(*module.split(".")[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _find(module: str, name: str) -> Definition:
    """The definition of a name of one of llmkd's modules, through its imports."""
    for node in _source(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Definition(module, node)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return Definition(module, node)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmkd"):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _find(str(node.module), alias.name)
    raise LookupError(f"{module}: got no definition of '{name}'; expected one at the top level. Write it there.")


def _items(table: Definition) -> Iterator[tuple[str, Definition]]:
    """The entries of a table: `{"name": NAME}`, a literal."""
    value = table.node.value  # type: ignore[attr-defined]
    for key, entry in zip(value.keys, value.values, strict=True):
        yield ast.literal_eval(key), _find(table.module, entry.id)


def _field(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return " ".join(found.group(1).split()) if found else ""


def _knobs(target: Definition) -> str:
    """Every parameter with a default that is not None, and the default."""
    if _is_dataclass(target.node):
        module, given = target.module, _fields(target.node)
    else:
        made = _maker(target)
        module, given = (made.module, _arguments(made.node)) if made else ("", [])
    shown = ((name, _default(module, default)) for name, default in given if default is not None)
    return ", ".join(f"{name}={default}" for name, default in shown if default != "None")


def _is_dataclass(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)


def _fields(node: Any) -> list[tuple[str, ast.expr | None]]:
    return [(one.target.id, one.value) for one in node.body if isinstance(one, ast.AnnAssign)]  # type: ignore[union-attr]


def _arguments(node: Any) -> list[tuple[str, ast.expr | None]]:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(plain[len(plain) - len(arguments.defaults) :], arguments.defaults, strict=True)]
    pairs += [*zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [(one.arg, default) for one, default in pairs]


def _maker(target: Definition) -> Definition | None:
    """The function that takes the knobs: itself, or a class's `__init__`, perhaps inherited."""
    if isinstance(target.node, ast.FunctionDef):
        return target
    assert isinstance(target.node, ast.ClassDef)
    own = (node for node in target.node.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    found = next(own, None)
    if found is not None:
        return Definition(target.module, found)
    for base in target.node.bases:
        try:
            return _maker(_find(target.module, ast.unparse(base)))
        except LookupError:  # a class of another package
            continue
    return None


def _default(module: str, value: ast.expr) -> str:
    """The default as Python shows it; a function or class by its name."""
    if isinstance(value, ast.Name):
        node = _find(module, value.id).node
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            return node.name
        value = node.value  # type: ignore[attr-defined]
    return repr(ast.literal_eval(value))


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
