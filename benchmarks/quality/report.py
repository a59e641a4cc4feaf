"""README's words on quality.json: the table, and what it shows about forward KL and the control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.quality.entries import CONTROL, ENTRIES, LEFT_OUT, REFERENCE
from benchmarks.quality.results import MEASURES, Spread, runs_of, spreads

HEADINGS = ("KL to teacher, nats", "top-1 agreement", "perplexity")
FORMS = ("{:.3f}", "{:.1%}", "{:.1f}")
Losses = dict[str, dict[str, Spread]]


def section(results: Mapping[str, Any]) -> str:
    """Table, picture and what they show; a line that says so while nothing was measured."""
    losses = spreads(results)
    if not losses:
        return "Nothing is measured yet: run `python -m benchmarks quality`."
    parts = [table(results, losses), "![Held-out KL of every loss](benchmarks/results/quality.svg)", setup(results)]
    return "\n\n".join([*parts, *findings(losses)])


def table(results: Mapping[str, Any], losses: Losses) -> str:
    """A line a loss, the closest to the teacher first; then those whose loss was not finite, and the start."""
    lines = [f"| loss | {' | '.join(HEADINGS)} |", "|---|" + "--:|" * len(HEADINGS)]
    for name, values in losses.items():
        cells = (values[measure].show(form) for measure, form in zip(MEASURES, FORMS, strict=True))
        lines.append(f"| {_label(name)} | {' | '.join(cells)} |")
    lines += [f"| {_label(name)} | not finite |{' |' * (len(HEADINGS) - 1)}" for name in failed(results)]
    start = (form.format(results["start"][measure]) for measure, form in zip(MEASURES, FORMS, strict=True))
    return "\n".join([*lines, f"| start | {' | '.join(start)} |"])


def setup(results: Mapping[str, Any]) -> str:
    """What was the same for all, and what the spread is of."""
    settings, train = results["settings"], results["settings"]["train"]
    counts = sorted({len(runs_of(results, name)) for name in spreads(results)})
    seeds = " to ".join(str(count) for count in sorted({counts[0], counts[-1]}))
    return (
        f"The quickstart's teacher (perplexity {results['start']['teacher_perplexity']:.1f}) and student start; "
        f"{train['max_steps']} steps of {train['per_device_train_batch_size']} x {settings['data']['max_length']} tokens at "
        f"learning rate {train['learning_rate']:g}, the same {settings['train_samples']} chunks for every loss, read once "
        f"(`ps_kd`: half of them, twice); {settings['held_out_samples']} held-out chunks; "
        f"mean ± sample standard deviation over {seeds} seeds, each another order of the samples and other "
        "initial values of what a loss learns. Losses have the defaults of their lines above, none was tuned here: this is a "
        f"short run at one learning rate, chosen for forward KL, on {results['device']}, and the yardstick is forward KL "
        "itself, which favours losses like it. Compositions "
        "are in `benchmarks/quality/entries.py`, numbers in [quality.json](benchmarks/results/quality.json); "
        "`python -m benchmarks quality` makes them again."
    )


def findings(losses: Losses) -> list[str]:
    """Who beats, equals or trails forward KL and the control, by the larger of the two spreads."""
    said = []
    if REFERENCE in losses:
        better, same, worse = against(losses, REFERENCE)
        said.append(
            f"Against plain `{REFERENCE}` ({losses[REFERENCE]['kl'].show('{:.3f}')} nats), by more than the larger of the two "
            f"spreads: closer to the teacher {_names(better)}; farther {_names(worse)}; no difference {_names(same)}."
        )
    if CONTROL in losses:
        better, same, worse = against(losses, CONTROL)
        said.append(
            f"Against the control without a teacher ({losses[CONTROL]['kl'].show('{:.3f}')} nats), {len(better)} of "
            f"{len(losses) - 1} losses end closer to the teacher by that measure; those that do not: {_names(same + worse)}."
        )
    return said


def against(losses: Losses, name: str) -> tuple[list[str], list[str], list[str]]:
    """(better, same, worse) than `name` in KL: means that differ by more than the larger of the two spreads, or not."""
    base = losses[name]["kl"]
    sides: tuple[list[str], list[str], list[str]] = ([], [], [])
    for other, values in losses.items():
        gap, noise = values["kl"].mean - base.mean, max(values["kl"].std or 0.0, base.std or 0.0)
        if other != name:
            sides[1 if abs(gap) <= noise else 0 if gap < 0 else 2].append(other)
    return sides


def failed(results: Mapping[str, Any]) -> list[str]:
    """Entries of which a run's loss was not finite."""
    return [name for name in ENTRIES if any("failed" in run for run in runs_of(results, name))]


def cell(results: Mapping[str, Any], losses: Losses, name: str) -> str:
    """A method's held-out KL for the method table, or why there is none."""
    if name in losses:
        return losses[name]["kl"].show("{:.3f}")
    return "not finite" if name in failed(results) else LEFT_OUT.get(name, "")


def _label(name: str) -> str:
    return f"`{name}`, the control: no teacher" if name == CONTROL else f"`{name}`"


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
