"""Which entries of the tables a recipe uses, with all their options, and the papers to cite for them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmkd import catalog
from llmkd.build import SCHEDULED, TABLES

DEFAULT_NAMES = {"model": "pretrained", "teacher": "local"}
PAPER = re.compile(r"([A-Z][\w'-]*(?: et al\.| and [A-Z][\w'-]*)?) ((?:19|20)\d\d)(?: \(([^)]*)\))?")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Used:
    """One part of a recipe: its kind and name, the options that it runs with, its weight in the objective, and its entry
    in the tables; None for code of the user's own."""

    kind: str
    name: str
    options: dict[str, Any]
    weight: Any
    entry: catalog.Entry | None


def used(config: Mapping[str, Any]) -> list[Used]:
    """Every part that a recipe names or takes by default, outermost first, each once."""
    found: list[Used] = []
    for kind in TABLES:
        block = config.get(kind)
        for spec in block if isinstance(block, list) else [] if block is None else [block]:
            path_is_meant = kind in DEFAULT_NAMES and isinstance(spec, str)
            spec = {"path": spec} if path_is_meant else spec
            found += [part for part in _used(kind, spec) if part not in found]
    return found


def _used(kind: str, spec: Any) -> Iterator[Used]:
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = options.pop("name", DEFAULT_NAMES.get(kind))
    weight = options.pop("weight", 1.0) if kind == "objective" else None
    entry = next((entry for entry in catalog.entries(kind) if entry.name == name), None)
    effective = {**(_defaults(TABLES[kind][name]) if entry else {}), **options}
    yield Used(kind, str(name), effective, weight, entry)
    for key, value in effective.items():
        if key in TABLES and value is not None:
            yield from _used(key, value)
        elif key in SCHEDULED and isinstance(value, Mapping):
            yield from _used("schedule", value)
    if isinstance(weight, Mapping):
        yield from _used("schedule", weight)


def _defaults(target: Callable) -> dict[str, Any]:
    """Options that a recipe may leave out, with the values that they then have; a function by its name."""
    parameters = inspect.signature(target).parameters.values()
    given = (p for p in parameters if p.default is not p.empty and p.default is not None)
    return {p.name: getattr(p.default, "__name__", p.default) for p in given}


def bibtex(parts: list[Used]) -> list[str]:
    """A BibTeX entry a paper that the parts' docstrings name, with no more than they say."""
    found: dict[str, str] = {}
    for part in parts:
        if part.entry is not None and not part.entry.paper.startswith("no paper"):
            for reference in part.entry.paper.split(";"):
                found |= _entry(reference)
    return list(found.values())


def _entry(reference: str) -> dict[str, str]:
    """`Agarwal et al. 2024 (GKD), arXiv 2306.13649, eq. 1` -> an entry by its key; {} where no paper is named."""
    paper, arxiv = PAPER.search(reference), ARXIV.search(reference)
    if paper is None:
        return {}
    who, year, what = paper.groups()
    named = " and " in who or "et al." in who
    authors = who.replace(" et al.", " and others") if named else None
    what = what or (None if named else who)
    number = arxiv.group(1) if arxiv else None
    key = re.sub(r"\W", "", who.split()[0] + year + (what or "").split(" ")[0]).lower()
    fields = {
        "author": authors,
        "title": f"{{{what or f'arXiv:{number}'}}}",
        "year": year,
        "eprint": number,
        "archivePrefix": "arXiv" if number else None,
        "url": f"https://arxiv.org/abs/{number}" if number else None,
        "note": reference.strip(),
    }
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value is not None)
    return {number or key: f"@misc{{{key},\n{lines}\n}}"}
