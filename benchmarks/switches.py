"""The switches that make a step smaller or faster: what each costs and saves, and that it changes no loss."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import trainers
from benchmarks.measure import interleave
from benchmarks.record import finish, header
from benchmarks.samples import Batch, shape

PLAIN = "plain"
SWITCHES: dict[str, tuple[dict[str, Any], float]] = {  # options, and how far the loss may be off
    PLAIN: ({}, 0.0),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, 1e-5),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, 1e-5),
    "unfused AdamW": ({"optim": "adamw_torch"}, 1e-5),
    "bf16": ({"bf16": True}, 0.02),
    "torch_compile": ({"torch_compile": True}, 1e-4),
}


def switches(setting: trainers.Setting, given: list[Batch], repeats: int, against: Path | None) -> None:
    """Measure llmkd with each switch on the same batches, halved where two are accumulated; writes switches.json.

    Raises:
        RuntimeError: a switch changed the loss of the first epoch by more than it may.
    """
    losses: dict[str, float] = {}
    runs = {name: partial(_train, setting, given, options) for name, (options, _) in SWITCHES.items()}
    started = {name: run() for name, run in runs.items()}
    measured = interleave(started, repeats, losses.__setitem__)
    for name, (_, tolerance) in SWITCHES.items():
        if abs(losses[name] / losses[PLAIN] - 1) > tolerance:
            raise RuntimeError(f"{name}: the loss is {losses[name]}, without it {losses[PLAIN]}; expected the same")
    plain = measured[PLAIN]
    cases = [
        {
            "case": name,
            **asdict(found),
            "loss_of_first_epoch": round(losses[name], 6),
            "memory_over_plain": round(found.extra_mib / plain.extra_mib, 3),
            "ratios": {} if name == PLAIN else {"plain_over_this": round(plain.seconds / found.seconds, 3)},
        }
        for name, found in measured.items()
    ]
    for case in cases:
        print(
            f"{case['case']}: {case['seconds']:.2f} s, {case['extra_mib']:.0f} MiB, loss {case['loss_of_first_epoch']}"
        )
    finish("switches", {**header(repeats), **shape(given), "cases": cases}, against)


def _train(setting: trainers.Setting, given: list[Batch], options: dict[str, Any]) -> Any:
    """An epoch's training with some options."""
    torch.manual_seed(0)
    parts = options.get("gradient_accumulation_steps", 1)
    own = replace(setting, options={**setting.options, **options, "max_steps": len(given)})
    return trainers.llmkd(own, given if parts == 1 else [half for batch in given for half in _halves(batch)])


def _halves(batch: Batch) -> list[Batch]:
    """A batch as two of half its rows, padded as it is."""
    size, width = batch["input_ids"].shape
    cut = size // 2
    parts = []
    for start, stop in ((0, cut), (cut, size)):
        mine = (batch["rows"] >= start * width) & (batch["rows"] < stop * width)
        part = {name: value[start:stop] for name, value in batch.items() if name != "rows" and len(value) == size}
        parts.append({**part, "rows": batch["rows"][mine] - start * width})
    return parts
