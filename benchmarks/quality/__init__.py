"""Every loss against the same teacher, student start, tokens, seeds and budget: how close each brings the student."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.quality import results
from benchmarks.quality.bench import Bench, make, settings
from benchmarks.quality.entries import ENTRIES
from benchmarks.quality.picture import draw
from llmkd.errors import need, unknown_name
from llmkd.versions import commit, device, versions

RESULTS = Path(__file__).parent.parent / "results"
EXAMPLES = """
**Examples**

    python -m benchmarks quality                       # everything; interrupted, the same command goes on

    python -m benchmarks quality --quick               # a few steps, one seed; writes quality_quick.json

    python -m benchmarks quality --only forward_kl,jsd --seeds 5
"""


def quality(
    quick: Annotated[bool, typer.Option("--quick", help="A few steps and one seed, in minutes.")] = False,
    only: Annotated[str, typer.Option(help="Entries to run, with commas between; all if left out.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 1 to this number.")] = 3,
) -> None:
    """Train with every loss of the tables and without a teacher; writes quality.json and quality.svg."""
    need("matplotlib", "pip install 'llmkd[report]'")
    names = [name.strip() for name in only.split(",")] if only else list(ENTRIES)
    for name in names:
        if name not in ENTRIES:
            raise unknown_name("entry", name, ENTRIES)
    _quiet()
    file = RESULTS / ("quality_quick.json" if quick else "quality.json")
    shared = {"versions": versions(), "device": device(), "settings": settings(quick)}
    found = results.begin(file, shared)
    jobs = [(name, seed) for seed in range(1, 2 if quick else seeds + 1) for name in names]
    jobs = [job for job in jobs if not results.has(found, *job)]
    if jobs:
        bench = make(shared["settings"])
        found["start"] = found.get("start") or bench.measure()
        _run(bench, jobs, file, found)
    draw(found, file.with_suffix(".svg"))


def _run(bench: Bench, jobs: list[tuple[str, int]], file: Path, found: dict[str, Any]) -> None:
    """Run the jobs one by one; what is finished is written, and Ctrl-C loses the one at hand."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=24 * 3600) as progress:
        task = progress.add_task("quality", total=len(jobs))
        progress.advance(task, 0)  # the time left is counted from here
        for name, seed in jobs:
            progress.update(task, description=f"{name}, seed {seed}")
            try:
                run = bench.run(ENTRIES[name], seed)
            except KeyboardInterrupt:
                progress.console.print("interrupted; the same command goes on where this one stopped")
                raise typer.Exit(130) from None
            run = {"entry": name, "seed": seed, "recipe": ENTRIES[name], **run, "commit": commit()}
            results.add(file, found, run)
            said = run.get("failed") or f"KL {run['kl']:.3f}, agreement {run['top1_agreement']:.1%}"
            progress.console.print(f"{name}, seed {seed}: {said}", highlight=False)
            progress.advance(task)


def _quiet() -> None:
    """One progress bar; warnings of llmkd itself stay."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|datasets")
    logging.getLogger("llmkd").setLevel(logging.WARNING)
