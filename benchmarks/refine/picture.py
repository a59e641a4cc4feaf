"""refine.svg: each domain's KL under the three samplings, DDK's weights over time, and the students of each selection."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.refine import results
from benchmarks.refine.arms import SAMPLINGS, SELECTIONS
from llmkd.errors import need
from llmkd.plots import INSTALL


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Draw what has numbers. Text becomes outlines: no font is fetched."""
    need("matplotlib", INSTALL)
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    kl, weights, bytes_ = figure.subplots(1, 3, width_ratios=[2, 1.4, 1])
    _kl(found, kl)
    _weights(found, weights, matplotlib.colormaps["tab20"].colors)
    _bytes(found, bytes_)
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "refine"}):
        figure.savefig(file, metadata={"Date": None, "Creator": None})


def _runs(found: Mapping[str, Any], arm: str) -> list[dict[str, Any]]:
    return [run for run in found["runs"] if run["arm"] == arm]


def _kl(found: Mapping[str, Any], axis: Any) -> None:
    """A group of points a domain: one point an arm, the mean of its seeds, and its range."""
    arms = list(results.arms(found, SAMPLINGS))
    for place, arm in enumerate(arms):
        runs = _runs(found, arm)
        for number, name in enumerate(runs[0]["kl"]):
            values, x = [run["kl"][name] for run in runs], number + 0.22 * (place - 1)
            axis.vlines(x, min(values), max(values), color=f"C{place}", linewidth=1)
            axis.plot(x, mean(values), "o", color=f"C{place}", markersize=5, label=arm if number == 0 else None)
    if arms:
        names = list(_runs(found, arms[0])[0]["kl"])
        axis.set_xticks(range(len(names)), names, rotation=60)
        axis.legend(fontsize="small")
    axis.set_title("KL to the teacher on held-out text, nats per token")
    axis.grid(axis="y", alpha=0.3)


def _weights(found: Mapping[str, Any], axis: Any, colours: Any) -> None:
    """r of each domain over the steps, the mean over the seeds."""
    runs = _runs(found, "ddk")
    if runs:
        looks = [[look for look in run["looks"] if look["r"]] for run in runs]
        steps = [look["step"] for look in looks[0]]
        for number, name in enumerate(looks[0][0]["r"]):
            r = [mean(one[i]["r"][name] for one in looks) for i in range(len(steps))]
            axis.plot(steps, r, marker=".", color=colours[number], label=name)
        axis.legend(fontsize="x-small", ncols=2)
    axis.set_title("DDK's r over the optimizer steps")
    axis.grid(alpha=0.3)


def _bytes(found: Mapping[str, Any], axis: Any) -> None:
    """Held-out bits per byte: a point a student."""
    arms = list(results.arms(found, SELECTIONS))
    for place, arm in enumerate(arms):
        values = results.of(found, arm, "bits_per_byte")
        axis.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.7)
    axis.set_xticks(range(len(arms)), [arm.replace(", ", ",\n") for arm in arms], rotation=30)
    axis.margins(x=0.3)
    axis.set_title("MiniPLM: held-out bits per byte")
    axis.grid(axis="y", alpha=0.3)
