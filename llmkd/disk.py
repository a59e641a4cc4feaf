"""Saving to a disk that may be full: say so in one line, and leave no half-written file behind unannounced."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkd.errors import TrainingError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PHRASES = ("no space left", "os error 28", "file too large", "os error 27", "failed writing file", "unexpected pos")
AGAIN = "run again with --resume: earlier checkpoints are whole"


def need_space(folder: str | Path, size: int) -> None:
    """Raise a TrainingError unless `size` bytes are free where `folder` will lie."""
    place = Path(folder)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise TrainingError(
            f"disk: {free / 1e9:.2f} GB free for {folder}, which needs {size / 1e9:.2f} GB. "
            "Free some space, or set train.output_dir, train.save_total_limit or train.save_only_model."
        )


@contextmanager
def saving(folder: str | Path, again: str = AGAIN) -> Iterator[None]:
    """Turn what torch, safetensors or the system say about a full disk into one TrainingError, with how to go on."""
    try:
        yield
    except Exception as error:
        text = str(error).lower()
        if getattr(error, "errno", None) in FULL or any(phrase in text for phrase in PHRASES):
            raise TrainingError(
                f"disk: writing {folder} failed ({str(error).strip().splitlines()[0]}). Free some space there, then {again}."
            ) from error
        raise
