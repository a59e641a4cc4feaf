"""The figures of a report: what the runs logged, drawn with plotly; a colour a run, the same in every figure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llmkd import table
from llmkd.errors import need
from llmkd.finished import Run

INSTALL = "pip install 'llmkd[report]'"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
DOMAIN = re.compile(r"domain/(.+)/r")
NO_CURVE = re.compile(r"(step|epoch|tokens_seen|seconds|total_flos|train_.*|eval_.*|domain/.*)")
LOGARITHMIC = {"perplexity"}
FIRST = ("loss", "learning_rate")
Named = Mapping[str, Run]  # label -> run, in the order of the page


def curves(runs: Named) -> dict[str, Any]:
    """A figure a logged quantity, over optimizer steps: the loss, its terms, and what schedules and methods move."""
    logged = dict.fromkeys(key for run in runs.values() for entry in run.history for key in entry)
    names = [name for name in logged if not NO_CURVE.fullmatch(name)]
    names = [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]
    return {name: _lines(runs, "step", name, "optimizer step") for name in names}


def quality(runs: Named) -> dict[str, Any]:
    """Two figures a held-out metric: over tokens trained on, and over wall time."""
    made = {}
    for name, label in table.QUALITY.items():
        for axis, title in (("tokens_seen", "tokens trained on"), ("seconds", "wall time, s")):
            if any(f"eval_{name}" in entry for run in runs.values() for entry in run.history):
                made[f"{label} over {title}"] = _lines(runs, axis, f"eval_{name}", title)
    return made


def domains(runs: Named) -> dict[str, Any]:
    """A figure a run whose data are a mixture: how likely each domain was drawn."""
    made = {}
    for label, run in runs.items():
        names = dict.fromkeys(found[1] for entry in run.history for key in entry if (found := DOMAIN.fullmatch(key)))
        if names:
            figure = _figure("optimizer step")
            for i, name in enumerate(names):
                x, y = _points(run, "step", f"domain/{name}/r")
                figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", line=_line(i))
            made[f"domain weights of {label}"] = figure
    return made


def sizes(runs: Named) -> dict[str, Any]:
    """Parameters against quality, a figure a metric; each run's start and teacher are lines across."""
    made = {}
    for name, label in table.QUALITY.items():
        values = {key: run.metrics["after"].get(name) for key, run in runs.items()}
        if any(value is not None for value in values.values()):
            lines = {who: _across(runs, who, name) for who in ("start", "teacher")}
            made[f"{label} by size"] = _by_size(runs, values, lines)
    for task, metric in _tasks(runs):
        found = {key: _scored(run, task, metric, "student") for key, run in runs.items()}
        lines = {
            who: _unique({k: _scored(r, task, metric, who) for k, r in runs.items()}) for who in ("start", "teacher")
        }
        made[f"{task}, {metric} by size"] = _by_size(runs, found, lines)
    return made


def _tasks(runs: Named) -> list[tuple[str, str]]:
    """Every evaluated task with each of its main metrics."""
    tasks = (item for run in runs.values() for item in run.evaluation.get("tasks", {}).items())
    return list(dict.fromkeys((name, metric) for name, task in tasks for metric in task["main"]))


def _scored(run: Run, task: str, metric: str, model: str) -> float | None:
    models = run.evaluation.get("tasks", {}).get(task, {}).get("models", {})
    return models.get(model, {}).get(metric, {}).get("value")


def _across(runs: Named, who: str, name: str) -> dict[str, float]:
    part = {"start": "before", "teacher": "teacher"}[who]
    return _unique({label: run.metrics[part].get(name) for label, run in runs.items()})


def _unique(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values that there are, each once, by the first run that has it."""
    found: dict[float, str] = {}
    for label, value in values.items():
        if value is not None:
            found.setdefault(value, label)
    return {label: value for value, label in found.items()}


def _by_size(runs: Named, values: Mapping[str, float | None], lines: Mapping[str, Mapping[str, float]]) -> Any:
    figure = _figure("parameters of the student")
    figure.update_xaxes(type="log")
    for i, (label, run) in enumerate(runs.items()):
        if values[label] is not None:
            size = run.metrics["parameters"]
            marker = {"size": 12, "color": COLOURS[i % len(COLOURS)]}
            figure.add_scatter(x=[size], y=[values[label]], name=label, mode="markers", marker=marker)
    for who, dash in (("start", "dot"), ("teacher", "dash")):
        several = len(lines[who]) > 1
        for label, value in lines[who].items():
            text = f"{who} of {label}" if several else who
            figure.add_hline(y=value, line={"dash": dash, "color": "#777", "width": 1}, annotation={"text": text})
    return figure


def _lines(runs: Named, x_name: str, name: str, x_title: str) -> Any:
    figure = _figure(x_title, len(runs) > 1)
    if name.removeprefix("eval_") in LOGARITHMIC:
        figure.update_yaxes(type="log")
    for i, (label, run) in enumerate(runs.items()):
        x, y = _points(run, x_name, name)
        if x:
            figure.add_scatter(x=x, y=y, name=label, mode="lines+markers", line=_line(i), marker={"size": 4})
    return figure


def _points(run: Run, x_name: str, name: str) -> tuple[list[float], list[float]]:
    """What was logged under a name, in order; of several values at one place, the last."""
    found = {entry[x_name]: entry[name] for entry in run.history if name in entry and x_name in entry}
    return list(found), list(found.values())


def _line(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number // len(COLOURS) % len(DASHES)], "width": 2}


def _figure(x_title: str, legend: bool = True) -> Any:
    """An empty figure in the page's style."""
    graphs: Any = need("plotly.graph_objects", INSTALL)
    axis = {"gridcolor": "#e5e5e5", "zerolinecolor": "#ccc", "automargin": True}
    return graphs.Figure(
        layout={
            "template": "none",
            "height": 280,
            "margin": {"l": 50, "r": 12, "t": 8, "b": 44},
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "showlegend": legend,
            "hovermode": "closest",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": {**axis, "title": {"text": x_title}},
            "yaxis": axis,
        }
    )


def as_html(figure: Any, number: int) -> str:
    """A figure as a piece of a page that has plotly.js; the same figure gives the same text."""
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{number}",
        default_height="280px",
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )


def plotly_js() -> str:
    """plotly.js, to be written into the page."""
    offline: Any = need("plotly.offline", INSTALL)
    return offline.get_plotlyjs()


Section = Callable[[Named], dict[str, Any]]
SECTIONS: Sequence[tuple[str, Section]] = (
    ("Loss, divergence and schedules", curves),
    ("Quality over tokens and wall time", quality),
    ("Size and quality", sizes),
    ("Domain weights", domains),
)


def sections(runs: Named) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    """(title, [(figure's title, HTML)]) of each section that has a figure."""
    number = 0
    for title, make in SECTIONS:
        drawn = []
        for name, figure in make(runs).items():
            drawn.append((name, as_html(figure, number)))
            number += 1
        if drawn:
            yield title, drawn
