"""Refined data: MiniPLM's selection against a random one, DDK's domain weights against fixed ones, at equal tokens."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import datasets
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.refine import corpus, results
from benchmarks.refine.picture import draw
from llmkd.errors import need
from llmkd.plots import INSTALL
from llmkd.run import Stopped
from llmkd.versions import commit, device, versions

RESULTS = Path(__file__).parent.parent / "results"
EXAMPLES = """
**Examples**

    python -m benchmarks refine --data FOLDER              # everything; interrupted, the same command goes on

    python -m benchmarks refine --data FOLDER --quick      # a few steps, one seed; writes refine_quick.json
"""


def refine(
    data: Annotated[Path, typer.Option(help="Folder of *.jsonl or *.jsonl.gz files with `text` and `domain`.")],
    quick: Annotated[bool, typer.Option("--quick", help="A few steps and one seed, in minutes.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 1 to this number.")] = 3,
    work: Annotated[Path, typer.Option(help="Where models, scores and students are kept.")] = Path("runs/refine"),
) -> None:
    """Compare DDK and MiniPLM with their controls on text of several domains; writes refine.json and refine.svg."""
    from benchmarks.refine import domains, selection  # they import all of training, which no other command waits for

    need("matplotlib", INSTALL)
    _quiet()
    experiments: dict[str, Any] = {"ddk": domains, "miniplm": selection}
    parts, digest = corpus.read(data)
    kind = "refine_quick" if quick else "refine"
    file = RESULTS / f"{kind}.json"
    settings = {name: experiment.settings(quick) for name, experiment in experiments.items()}
    text = {"sha256": digest, "domains": {name: len(texts) for name, texts in parts["train"].items()}}
    found = results.begin(file, {"versions": versions(), "device": device(), "settings": settings, "data": text})
    todo = {
        name: [(arm, seed) for seed in range(1, 2 if quick else seeds + 1) for arm in experiment.ARMS]
        for name, experiment in experiments.items()
    }
    todo = {name: [job for job in jobs if not results.has(found, *job)] for name, jobs in todo.items()}
    asked = json.dumps([found["settings"], found["versions"], digest], sort_keys=True)
    place = (
        work / f"{kind}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    )  # nothing of other settings is gone on with
    try:
        _run(todo, found, file, lambda name: experiments[name].make(settings[name], parts, place / name))
    except (KeyboardInterrupt, Stopped):
        Console(stderr=True).print("interrupted; the same command goes on where this one stopped")
        raise typer.Exit(130) from None
    draw(found, file.with_suffix(".svg"))


def _run(todo: dict[str, list[tuple[str, int]]], found: dict[str, Any], file: Path, make: Callable[[str], Any]) -> None:
    """Run what is left, one by one; each is written when it is finished."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=24 * 3600) as progress:
        task = progress.add_task("refine", total=sum(map(len, todo.values())))
        for name, jobs in todo.items():
            if not jobs:
                continue
            progress.update(task, description=f"{name}: what all runs share")
            bench = make(name)
            if name not in found:
                found[name] = bench.shared()
                results.write(file, found)
            for arm, seed in jobs:
                progress.update(task, description=f"{arm}, seed {seed}")
                run = {"arm": arm, "seed": seed, "commit": commit(), **bench.run(arm, seed)}
                found["runs"].append(run)
                results.write(file, found)
                progress.console.print(f"{arm}, seed {seed}: {bench.summary(run)}", highlight=False)
                progress.advance(task)


def _quiet() -> None:
    """One progress bar; warnings of llmkd itself stay."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|datasets")
    logging.getLogger("llmkd").setLevel(logging.WARNING)
