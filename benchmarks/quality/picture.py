"""quality.svg: the held-out KL of every loss with its spread, and the control as a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.entries import CONTROL, REFERENCE
from benchmarks.quality.results import spreads
from llmkd.errors import need


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Draw all entries that have numbers, the closest to the teacher on top. Text becomes outlines: no font is fetched."""
    need("matplotlib", "pip install 'llmkd[report]'")
    import matplotlib
    from matplotlib.figure import Figure

    kl = {name: values["kl"] for name, values in spreads(results).items()}
    figure = Figure(figsize=(8, 0.6 + 0.24 * len(kl)), layout="constrained")
    axes = figure.add_subplot()
    means, errors = [value.mean for value in kl.values()], [value.std or 0.0 for value in kl.values()]
    axes.errorbar(means, range(len(kl)), xerr=errors, fmt="o", markersize=4, capsize=3, color="#1f6feb")
    for name, style in ((CONTROL, "--"), (REFERENCE, ":")):
        if name in kl:
            axes.axvline(kl[name].mean, linestyle=style, color="#57606a", linewidth=1, label=_label(name))
    axes.set_yticks(range(len(kl)), list(kl))
    axes.invert_yaxis()
    axes.set_xlabel("KL to the teacher on held-out text, nats per token (less is closer)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper right", fontsize="small")
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "quality"}):
        figure.savefig(file, metadata={"Date": None, "Creator": None})


def _label(name: str) -> str:
    return "cross_entropy: the control, without a teacher" if name == CONTROL else name
