"""Pictures of a run, as SVG files: lines over optimizer steps. Needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkd.errors import need

INSTALL = "pip install 'llmkd[report]'"
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> x, y


def plot_domains(source: Path) -> Path:
    """Draw domains.json of a run beside it, as domains.svg: r, and the student's perplexity over the teacher's.

    Raises: ConfigError if matplotlib is not installed.
    """
    content = json.loads(source.read_text())
    looks, teacher = content["looks"], content["teacher_perplexity"]
    moved = [look for look in looks if look["r"] is not None]
    steps = [look["step"] for look in looks]
    r = {name: ([look["step"] for look in moved], [look["r"][name] for look in moved]) for name in content["rows"]}
    behind = {
        name: (steps, [look["perplexity"][name] / teacher.get(name, 1.0) for look in looks]) for name in content["rows"]
    }
    against = "perplexity, student / teacher" if teacher else "perplexity of the student"
    target = source.with_suffix(".svg")
    draw(target, {"r, probability of being sampled": r, against: behind}, "optimizer step")
    return target


def draw(file: Path, panels: Mapping[str, Lines], x_label: str) -> None:
    """One panel a title, side by side, with one legend; the same numbers give the same file."""
    matplotlib: Any = need("matplotlib", INSTALL)
    figure_module: Any = need("matplotlib.figure", INSTALL)
    colours = matplotlib.colormaps["tab20"].colors
    with matplotlib.rc_context({"svg.hashsalt": "llmkd", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = figure_module.Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, lines) in zip(axes, panels.items(), strict=True):
            for i, (name, (x, y)) in enumerate(lines.items()):
                axis.plot(x, y, marker=".", label=name, color=colours[i % len(colours)])
            axis.set(title=title, xlabel=x_label)
            axis.grid(alpha=0.3)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})
