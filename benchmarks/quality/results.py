"""quality.json: settings and one record a run, written whole after each, so that running again goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.quality.entries import ENTRIES
from llmkd.errors import ConfigError
from llmkd.run import first_difference

MEASURES = ("kl", "top1_agreement", "perplexity")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over the seeds; `std` is None for one seed."""

    mean: float
    std: float | None

    def show(self, form: str) -> str:
        """As `mean ± std`, both in this format."""
        return form.format(self.mean) + ("" if self.std is None else f" ± {form.format(self.std)}")


def begin(file: Path, shared: Mapping[str, Any]) -> dict[str, Any]:
    """The results to go on with: those of the file, or none yet.

    Raises:
        ConfigError: the file was measured under other settings or versions, which would not compare.
    """
    if not file.exists():
        return {**shared, "runs": []}
    old = json.loads(file.read_text())
    for key in ("settings", "versions"):
        difference = first_difference(old[key], json.loads(json.dumps(shared[key])), key)
        if difference:
            raise ConfigError(f"{file.name}: {difference}; expected the same for every run. Move the file away first.")
    return old


def has(results: Mapping[str, Any], name: str, seed: int) -> bool:
    """Whether this entry, as it is now, was measured with this seed."""
    return any(run["seed"] == seed for run in runs_of(results, name))


def add(file: Path, results: dict[str, Any], run: dict[str, Any]) -> None:
    """Put a run in place of an earlier one of its entry and seed, and write the file, whole or not at all."""
    others = [old for old in results["runs"] if (old["entry"], old["seed"]) != (run["entry"], run["seed"])]
    results["runs"] = [*others, run]
    write(file, results)


def write(file: Path, results: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(file)


def read(file: Path) -> dict[str, Any]:
    """The results of the file; without runs if it is not there."""
    return json.loads(file.read_text()) if file.exists() else {"runs": []}


def runs_of(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The runs of an entry as the table has it now; runs of what it was before do not count."""
    return [run for run in results["runs"] if run["entry"] == name and run["recipe"] == ENTRIES.get(name)]


def spreads(results: Mapping[str, Any]) -> dict[str, dict[str, Spread]]:
    """entry -> measure -> Spread, of every entry whose runs all came to an end, the closest to the teacher first."""
    found = {}
    for name in ENTRIES:
        runs = runs_of(results, name)
        if runs and not any("failed" in run for run in runs):
            found[name] = {measure: spread([run[measure] for run in runs]) for measure in MEASURES}
    return dict(sorted(found.items(), key=lambda item: item[1]["kl"].mean))


def spread(values: list[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(mean(values), stdev(values) if len(values) > 1 else None)
