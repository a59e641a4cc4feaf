"""What a result depends on: package versions, device, commit; what a device is slow at."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import resource
import subprocess
import sys
from functools import cache

logger = logging.getLogger(__name__)
PACKAGES = ("llmkd", "torch", "transformers", "accelerate", "peft", "datasets", "trl", "deepspeed", "lm_eval", "math-verify",
            "scikit-learn", "evaluate")  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions of what llmkd stands on, and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """The accelerator's name, or the CPU's number of cores that this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} cores ({platform.machine()})"


def commit() -> str | None:
    """The commit of the working directory's repository, or None."""
    try:
        out = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None if out.returncode == 0 else None


def peak_memory_mb() -> float:
    """The most memory this process has held so far, MiB: of the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


@cache
def warn_of_slow_bfloat16() -> None:
    """Say once that bfloat16 is slow, where there is no accelerator and the CPU has no units for it; call it where it is used.

    A GEMM takes 6 to 8 times as long as in float32 on such a CPU.
    """
    import torch

    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 has none
    units = cpu.get("architecture") != "x86_64" or cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    if not (units or torch.accelerator.is_available()):
        logger.warning(
            "bfloat16: this CPU has no units for it (AMX, AVX512-BF16), so it is several times slower than float32. "
            "Set train.bf16=false, and models as {path: ..., dtype: float32}."
        )
