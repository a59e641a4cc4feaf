"""One command line in a process of its own, forked from a server that has imported everything; with faults on demand."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOAD = [
    "llmkd.run",
    "llmkd.table",
    "llmkd.stages.command",
    "peft.tuners.lora",
    "transformers.models.llama.modeling_llama",
]
SMALL_FILE = 60_000  # bytes: less than a tiny model


@dataclass(frozen=True)
class Result:
    """How a command ended: exit status (negative: the signal), what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line, which must be the last thing said."""
        lines = [line for line in self.err.replace("\r", "\n").splitlines() if line.strip()]
        found = [line for line in lines if line.startswith("error: ")]
        assert len(found) == 1, self.err
        assert lines[-1] == found[0], self.err
        assert "Traceback" not in self.err
        assert self.code not in (0, None)
        return found[0]


class Server:
    """Starts commands as real processes that share one import of transformers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def __call__(
        self, *argv: Any, fault: tuple[str, int] | None = None, env: dict[str, str] | None = None, timeout: float = 120
    ) -> Result:
        self.count += 1
        out, err = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        words = [str(word) for word in argv]
        process = self.context.Process(
            target=_main, args=(words, str(self.folder), str(out), str(err), fault, env or {})
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{words} took more than {timeout} s: {err.read_text()}")
        return Result(process.exitcode, out.read_text(), err.read_text())


def _main(
    words: list[str], folder: str, out: str, err: str, fault: tuple[str, int] | None, env: dict[str, str]
) -> None:
    os.chdir(folder)
    os.environ.update(env)
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = ["llmkd", *words]
    import torch

    from llmkd.cli import main

    torch.set_num_threads(1)
    if fault is not None:
        FAULTS[fault[0]](fault[1])
    main()


def _around(
    owner: Any, name: str, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> None:
    """Call something before or after a method or function, with its arguments."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        result = original(*args, **kwargs)
        if after is not None:
            after(*args)
        return result

    setattr(owner, name, wrapped)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_step(step: int, number: int, times: int = 1) -> None:
    """Send a signal in the first micro-batches of a step."""
    from llmkd.trainer import DistillTrainer

    left = [number] * times

    def act(trainer: Any, *_: Any) -> None:
        if trainer.state.global_step == step and left:
            os.kill(os.getpid(), left.pop())

    _around(DistillTrainer, "compute_loss", before=act)


def _kill_after_checkpoint(step: int) -> None:
    from llmkd import checkpoints

    _around(checkpoints, "_mark", after=lambda folder: _die() if folder.name == f"checkpoint-{step}" else None)


def _kill_in_checkpoint(step: int) -> None:
    """The weights are there, half of them; optimizer, state and mark are not."""
    from llmkd.trainer import DistillTrainer

    def act(trainer: Any, folder: str | None = None, *_: Any) -> None:
        if trainer.state.global_step == step:
            file = Path(folder or trainer.args.output_dir) / "model.safetensors"
            os.truncate(file, file.stat().st_size // 2)
            _die()

    _around(DistillTrainer, "_save", after=act)


def _kill_in_export(_: int) -> None:
    from llmkd.trainer import DistillTrainer

    _around(DistillTrainer, "save_student", after=lambda *_: _die())


def _disk_full(step: int) -> None:
    """From the checkpoint of that step on, no file can grow beyond SMALL_FILE."""
    from llmkd.trainer import DistillTrainer

    def act(trainer: Any, *_: Any) -> None:
        if trainer.state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))

    _around(DistillTrainer, "_save_checkpoint", before=act)


def _at_write(number: int, before: bool, after: bool) -> None:
    """Die at the n-th file that a stage writes: before it is begun, half-written under its passing name, or whole."""
    from llmkd.stages import files, runner

    original, left = files.put, [number]

    def put(target: Path, partial: Path, write: Callable[[Path], None]) -> None:
        left[0] -= 1
        now = left[0] == -1

        def half(file: Path) -> None:
            write(file)
            if now and not after:
                os.truncate(file, file.stat().st_size // 2)
                _die()

        if now and before:
            _die()
        original(target, partial, half)
        if now:
            _die()

    files.put = runner.put = put


def _stage_disk_full(number: int) -> None:
    """From the n-th file on, no file can grow beyond a kilobyte, which is less than a shard."""
    from llmkd.stages import files, runner

    original, left = files.put, [number]

    def put(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        original(*args)

    files.put = runner.put = put


def _watch_memory(_: int) -> None:
    """Print the most memory that a stage has had for itself when it has read rows or is about to write some.

    What allocators keep for later is given back first: how much that is depends on who was faster.
    """
    import psutil
    import pyarrow

    from llmkd.stages import files, runner, source

    process, trim, original = psutil.Process(), ctypes.CDLL(None).malloc_trim, files.put

    def look(*_: Any) -> None:
        pyarrow.default_memory_pool().release_unused()
        trim(0)
        seen = process.memory_info()
        print(f"held {seen.rss - seen.shared}", flush=True)

    def put(*args: Any) -> None:
        look()
        original(*args)

    files.put = runner.put = put
    for rows in (source.LoadedRows, source.StageRows):
        _around(rows, "read", after=look)


FAULTS: dict[str, Callable[[int], None]] = {
    "kill in step": lambda step: _in_step(step, signal.SIGKILL),
    "interrupt": lambda step: _in_step(step, signal.SIGINT),
    "interrupt twice": lambda step: _in_step(step, signal.SIGINT, times=2),
    "terminate": lambda step: _in_step(step, signal.SIGTERM),
    "kill after checkpoint": _kill_after_checkpoint,
    "kill in checkpoint": _kill_in_checkpoint,
    "kill in export": _kill_in_export,
    "disk full": _disk_full,
    "kill before write": lambda number: _at_write(number, before=True, after=False),
    "kill within write": lambda number: _at_write(number, before=False, after=False),
    "kill after write": lambda number: _at_write(number, before=False, after=True),
    "disk full at write": _stage_disk_full,
    "watch memory": _watch_memory,
}
