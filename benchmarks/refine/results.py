"""refine.json: what was measured, written whole after each run, so that the same command goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from llmkd.errors import ConfigError
from llmkd.run import first_difference


def read(file: Path) -> dict[str, Any]:
    """The results of the file; without runs if it is not there."""
    return json.loads(file.read_text()) if file.exists() else {"runs": []}


def begin(file: Path, shared: Mapping[str, Any]) -> dict[str, Any]:
    """The results to go on with: those of the file, or none yet.

    Raises:
        ConfigError: the file is of other settings, versions or data, which would not compare.
    """
    if not file.exists():
        return {**shared, "runs": []}
    old = json.loads(file.read_text())
    for key in ("settings", "versions", "data"):
        difference = first_difference(old[key], json.loads(json.dumps(shared[key])), key)
        if difference:
            raise ConfigError(f"{file.name}: {difference}; expected the same for every run. Move the file away first.")
    return old


def has(found: Mapping[str, Any], arm: str, seed: int) -> bool:
    """Whether this run was measured."""
    return any((run["arm"], run["seed"]) == (arm, seed) for run in found["runs"])


def write(file: Path, found: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(file)


def of(found: Mapping[str, Any], arm: str, key: str) -> list[float]:
    """One number of every run of an arm, by seed."""
    runs = sorted((run for run in found["runs"] if run["arm"] == arm), key=lambda run: run["seed"])
    return [run[key] for run in runs]


def arms(found: Mapping[str, Any], among: Mapping[str, Any]) -> Iterator[str]:
    """The arms that have runs, in the order of `among`."""
    return (arm for arm in among if of(found, arm, "seed"))


def show(values: list[float], form: str = "{:.3f}") -> str:
    """Mean ± sample standard deviation."""
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def gap(found: Mapping[str, Any], arm: str, other: str, key: str) -> list[float]:
    """arm - other, seed by seed, over the seeds that both have: what the seed does to both falls out."""
    pairs = [{run["seed"]: run[key] for run in found["runs"] if run["arm"] == name} for name in (arm, other)]
    return [pairs[0][seed] - pairs[1][seed] for seed in sorted({*pairs[0]} & {*pairs[1]})]


def verdict(found: Mapping[str, Any], arm: str, other: str, key: str) -> str:
    """Whether `arm` is lower than `other` on every seed, higher on every seed, or neither."""
    gaps = gap(found, arm, other, key)
    word = (
        "lower on every seed" if max(gaps) < 0 else "higher on every seed" if min(gaps) > 0 else "no clear difference"
    )
    return f"{word} ({show(gaps, '{:+.3f}')})"
