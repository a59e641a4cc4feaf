"""README's words on refine.json: two tables, and what they show, also where a method does not win."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import mean
from typing import Any

from benchmarks.refine.arms import SAMPLINGS, SELECTIONS
from benchmarks.refine.results import arms, of, show, verdict


def section(found: Mapping[str, Any]) -> str:
    """Tables, picture and findings; a line that says so while nothing was measured."""
    if not found["runs"]:
        return "Nothing is measured yet: run `python -m benchmarks refine --data FOLDER`."
    parts = []
    if list(arms(found, SAMPLINGS)):
        parts += [_domains(found), _domain_findings(found)]
    if list(arms(found, SELECTIONS)):
        parts += [_selections(found), _selection_findings(found)]
    picture = "![Domains' KL, DDK's weights, students of each selection](benchmarks/results/refine.svg)"
    return "\n\n".join([*parts, picture, _setup(found)])


def _domains(found: Mapping[str, Any]) -> str:
    lines = ["| sampling of domains | mean KL of domains, nats | worst domain's KL |", "|---|--:|--:|"]
    for arm in arms(found, SAMPLINGS):
        lines.append(f"| `{arm}` | {show(of(found, arm, 'mean_kl'))} | {show(of(found, arm, 'worst_kl'))} |")
    start = found["ddk"]["start"]
    return "\n".join([*lines, f"| start | {start['mean_kl']:.3f} | {start['worst_kl']:.3f} |"])


def _domain_findings(found: Mapping[str, Any]) -> str:
    settings, windows = found["settings"]["ddk"], found["ddk"]["windows"]
    said = [
        f"DDK against `{other}` at equal tokens: mean KL {verdict(found, 'ddk', other, 'mean_kl')}, worst domain "
        f"{verdict(found, 'ddk', other, 'worst_kl')}."
        for other in arms(found, SAMPLINGS)
        if other != "ddk" and of(found, "ddk", "seed")
    ]
    worst = Counter(max(run["kl"], key=run["kl"].get) for run in found["runs"] if "kl" in run).most_common(1)
    return " ".join(
        [
            *said,
            f"The domain that is farthest from the teacher is mostly {worst[0][0]}." if worst else "",
            f"{len(windows)} domains with {min(windows.values())} to {max(windows.values())} windows of {settings['length']} "
            f"tokens; {settings['steps']} steps of {settings['batch']} windows, r moved every {settings['interval']}; the "
            f"student keeps {len(settings['model']['layers'])} of the teacher's layers, and the loss is the quickstart's, "
            "under which KL falls, for all of them. (The paper's is cross-entropy + 0.2 KL.)",
        ]
    )


def _selections(found: Mapping[str, Any]) -> str:
    lines = ["| half of the corpus | held-out bits per byte | characters kept |", "|---|--:|--:|"]
    for arm in arms(found, SELECTIONS):
        kept = mean(of(found, arm, "kept_characters"))
        lines.append(f"| `{arm}` | {show(of(found, arm, 'bits_per_byte'), '{:.4f}')} | {kept:,.0f} |")
    return "\n".join(lines)


def _selection_findings(found: Mapping[str, Any]) -> str:
    settings, shared = found["settings"]["miniplm"], found["miniplm"]
    layers = {name: len(kept) for name, kept in settings["references"].items()}
    said = [
        f"`{arm}` against `random` at equal training tokens: {verdict(found, arm, 'random', 'bits_per_byte')}."
        for arm in arms(found, SELECTIONS)
        if arm != "random" and of(found, "random", "seed")
    ]
    return " ".join(
        [
            *said,
            f"References of {layers['large']} and {layers['small']} of the teacher's layers, trained on D_ref, agree on the "
            f"order of the {shared['chunks']:,} chunks by a rank correlation of {shared['spearman']:.3f} and would keep "
            f"{shared['same_selection']:.1%} of the same chunks; {shared['negative_scores']:.1%} of the scores are negative.",
            f"Students are Llamas of {settings['student']['num_hidden_layers']} layers and "
            f"{settings['student']['hidden_size']} units that read bytes, from scratch, {settings['steps']} steps of "
            f"{settings['student_batch']} x {settings['student_length']}; a half of {settings['corpus']:,} characters is "
            "kept. `balanced` selects within each domain.",
        ]
    )


def _setup(found: Mapping[str, Any]) -> str:
    seeds = len({run["seed"] for run in found["runs"]})
    return (
        f"Mean ± sample standard deviation over {seeds} seeds; a verdict compares seed by seed. Text of "
        f"{', '.join(found['data']['domains'])}, dealt out by document; on {found['device']}. These are minutes of training, "
        "where the papers have days: they show what the methods do, not what they reach. Every number is in "
        "[refine.json](benchmarks/results/refine.json) and comes again from `python -m benchmarks refine --data FOLDER`."
    )
