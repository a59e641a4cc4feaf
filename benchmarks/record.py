"""What a benchmark leaves: a JSON under results/, and whether a ratio has fallen since an older one."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
import typer

from llmkd.versions import commit, device, versions

RESULTS = Path(__file__).parent / "results"
FALL = 0.10  # a ratio may move by this much from run to run
Against = typer.Option(help="An older result of this benchmark: exit 1 if a ratio fell by more than 10%.")


def header(repeats: int) -> dict[str, Any]:
    """Versions, device, commit, threads and repeats."""
    found = versions()
    try:
        found["liger-kernel"] = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        found["liger-kernel"] = "not installed"
    threads = torch.get_num_threads()
    return {"versions": found, "device": device(), "commit": commit(), "threads": threads, "repeats": repeats}


def finish(name: str, result: dict[str, Any], against: Path | None) -> None:
    """Write results/<name>.json and compare it with an older file, which may be the one that is overwritten.

    Raises:
        typer.Exit: with 1, if a ratio fell or the two have no ratio in common.
    """
    old = None if against is None else json.loads(against.read_text())
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    if old is None:
        return
    shared, fallen = compare(old, result)
    for line in fallen:
        print(line)
    print(f"{shared} ratios compared with {against}, {len(fallen)} fell by more than {FALL:.0%}")
    if fallen or not shared:
        raise typer.Exit(1)


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[int, list[str]]:
    """(number of ratios that both results have, a line for each that fell); a higher ratio is better, always."""
    before, after = (
        {(case["case"], name): ratio for case in result["cases"] for name, ratio in case.get("ratios", {}).items()}
        for result in (old, new)
    )
    shared = [key for key in after if key in before]
    fallen = [key for key in shared if after[key] < (1 - FALL) * before[key]]
    return len(shared), [
        f"{case}: {name} fell from {before[case, name]} to {after[case, name]}" for case, name in fallen
    ]
