"""Time and memory of a function, the same way for everybody: warm-up, repeats, the best time, the extra peak memory."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Measured:
    """seconds: the best of the repeats; extra_mib: peak memory above what was held before the call."""

    seconds: float
    extra_mib: float


def measure(run: Callable[[], object], repeats: int = 3) -> Measured:
    """Call `run` once to warm up, once for its memory, and `repeats` times for its time."""
    run()
    extra = _extra_memory(run)
    best = float("inf")
    for _ in range(repeats):
        gc.collect()
        started = time.perf_counter()
        run()
        _wait()
        best = min(best, time.perf_counter() - started)
    return Measured(round(best, 4), round(extra, 1))


def interleave(runs: dict[str, Callable[[], object]], repeats: int = 3) -> dict[str, Measured]:
    """Measure several functions turn by turn, so that a slow moment of the machine hits all of them alike."""
    memory = {}
    for name, run in runs.items():
        run()
        memory[name] = _extra_memory(run)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            started = time.perf_counter()
            run()
            _wait()
            best[name] = min(best[name], time.perf_counter() - started)
    return {name: Measured(round(best[name], 4), round(memory[name], 1)) for name in runs}


def _extra_memory(run: Callable[[], object]) -> float:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is resident now
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """KiB of a field of this process's status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) if found else 0


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
