"""`llmkd report`: the page, from run folders to one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmkd import table
from llmkd.errors import ConfigError
from llmkd.evaluation.table import lines as evaluated_lines
from llmkd.finished import Run, read_run
from llmkd.report.figures import COLOURS, Named, plotly_js, sections

FADES_FROM = 1.0  # nats: the least KL at which a token's colour is full


def write_report(folders: Sequence[Path], file: Path) -> None:
    """Read finished runs and write the page that compares them.

    Raises:
        ConfigError: a folder is no finished run, a run is named twice, or plotly is not installed.
    """
    runs = named([read_run(folder) for folder in folders])
    text = page(runs)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def named(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by their folder's name, by the whole path where names are the same."""
    names = [run.name for run in runs]
    labels = [run.name if names.count(run.name) == 1 else str(run.folder) for run in runs]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError(f"run: got '{twice}' twice; expected different runs. Name it once.")
    return dict(zip(labels, runs, strict=True))


def page(runs: Named) -> str:
    """The page; the same runs give the same text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        title="llmkd: " + ", ".join(runs),
        runs=[_head(label, run, i) for i, (label, run) in enumerate(runs.items())],
        evaluations=[
            (label, evaluated_lines(run.evaluation)) for label, run in runs.items() if run.evaluation.get("tasks")
        ],
        sections=list(sections(runs)),
        views=[(label, *_view(run)) for label, run in runs.items()],
        data=_json({label: {"metrics": run.metrics, "tokens": run.tokens} for label, run in runs.items()}),
        difference=difference(runs),
        labels=list(runs),
        plotly=plotly_js(),
    )


def _head(label: str, run: Run, number: int) -> dict[str, Any]:
    train = run.metrics["train"]
    facts = f"{train['steps']:,} steps, {train['seconds']:,.0f} s, {run.metrics['device']}, seed {run.metrics['seed']}"
    return {
        "label": label,
        "colour": COLOURS[number % len(COLOURS)],
        "facts": facts,
        "lines": table.lines(run.metrics),
    }


def _view(run: Run) -> tuple[float, list[list[tuple[str, float | None, float]]]]:
    """The KL at which colour is full, and the samples' tokens as (text, KL, colour's strength)."""
    known = sorted(token["kl"] for sample in run.tokens for token in sample if "kl" in token)
    full = max(FADES_FROM, known[int(0.95 * len(known))]) if known else FADES_FROM
    samples = [[(_visible(t["text"]), t.get("kl"), min(1.0, t.get("kl", 0.0) / full)) for t in s] for s in run.tokens]
    return full, samples


def _visible(text: str) -> str:
    """A line's end as a sign and an end; a token that would show nothing as its code."""
    shown = text.replace("\n", "\u21b5\n").replace("\t", "\u21e5")
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in shown)


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def difference(runs: Named) -> list[tuple[str, list[str]]]:
    """Keys of the recipes, and of what they ran on, in which the runs differ: (key, a value a run); all if there is one."""
    facts = ("seed", "device", "processes", "commit", "versions")
    flat = []
    for run in runs.values():
        around = {f"({name})": run.metrics.get(name) for name in facts}
        flat.append(dict(_flat({**run.config, **around})))
    keys = dict.fromkeys(key for one in flat for key in one)
    lines = [(key, [one.get(key, "-") for one in flat]) for key in keys]
    return [line for line in lines if len(runs) == 1 or len(set(line[1])) > 1]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Scalars and lists of scalars by their dotted path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for i, item in enumerate(value):
            yield from _flat(item, f"{path}.{i}")
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
