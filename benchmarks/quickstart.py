"""The two commands of README, run as a user runs them: wall time, peak memory, the student before and after."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from llmkd.table import show

RESULTS = Path(__file__).parent / "results"
RECIPES = {"distilled": "recipes/quickstart.yaml", "control": "recipes/quickstart_ce.yaml"}


def quickstart() -> None:
    """Run the quickstart and its control; writes quickstart.json and the picture of the table."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            result[name] = _run(recipe, Path(folder) / name)
    distilled = result["distilled"]
    shared = {key: distilled.pop(key) for key in ("versions", "device", "commit")}
    result["control"] = {k: v for k, v in result["control"].items() if k not in shared}
    (RESULTS / "quickstart.json").write_text(json.dumps({**shared, **result}, indent=2) + "\n")
    console = Console(record=True, width=86, file=open(os.devnull, "w"))  # noqa: SIM115
    show({**distilled, **shared}, Path("runs/quickstart"), console)
    picture = console.export_svg(title="llmkd train recipes/quickstart.yaml")
    without_remote_fonts = re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    (RESULTS / "quickstart.svg").write_text(without_remote_fonts)


def _run(recipe: str, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "llmkd", "train", recipe, f"train.output_dir={folder}"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{recipe} failed with status {os.waitstatus_to_exitcode(status)}")
    metrics = json.loads((folder / "metrics.json").read_text())
    wall = {"wall_seconds": round(time.perf_counter() - started, 1), "peak_memory_mb": round(usage.ru_maxrss / 1024, 1)}
    return {**metrics, "process": wall}
