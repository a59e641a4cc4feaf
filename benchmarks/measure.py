"""Time and memory of functions, the same way for everybody: warm-up, then turn by turn, the best time, the extra peak."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Measured:
    """seconds: the best of `times`; extra_mib: peak memory above what was held before the call."""

    seconds: float
    extra_mib: float
    times: tuple[float, ...]


def interleave(
    runs: dict[str, Callable[[], Any]], repeats: int = 3, seen: Callable[[str, Any], None] | None = None
) -> dict[str, Measured]:
    """Call each function once to warm up, once for its memory, and `repeats` times, turn by turn, for its time.

    A slow moment of the machine then hits all of them alike. `seen` is given each one's first result.
    """
    memory: dict[str, float] = {}
    for name, run in runs.items():
        first = run()
        if seen is not None:
            seen(name, first)
        del first
        memory[name] = extra_memory(run)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: Measured(min(taken), round(memory[name], 1), tuple(taken)) for name, taken in times.items()}


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    gc.collect()
    started = time.perf_counter()
    run()
    _wait()
    return round(time.perf_counter() - started, 4)


def extra_memory(run: Callable[[], Any]) -> float:
    """Peak memory of one call above what was held before it, MiB: of the GPU where there is one, else resident."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # Linux: what was freed before must not hide what is allocated now
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
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
