"""README's words on speed: the loss head, whole steps and the switches, from head.json, step.json and switches.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Result = dict[str, Any]
PEERS = {"gemms": "its four products alone", "dense": "dense torch", "trl": "TRL", "liger": "Liger"}
STEPS = {
    "llmkd": "llmkd",
    "gkd": "TRL GKD (`lmbda=0`)",
    "sft": "TRL SFT: no teacher",
    "limit": "limit: backbones and head products alone",
}


def section(folder: Path) -> str:
    """All that was measured, each table with its device; a sentence where nothing was."""
    made = {"head": head_table, "step": step_table, "switches": switch_table}
    parts = [write(json.loads((folder / f"{name}.json").read_text())) for name, write in made.items()
             if (folder / f"{name}.json").is_file()]  # fmt: skip
    parts += [_curves(folder)] if (folder / "scaling.json").is_file() else []
    return "\n\n".join(parts) or "Nothing is measured yet: `python -m benchmarks head`, `step`."


def head_table(result: Result) -> str:
    """Times over llmkd's, case by case, and extra memory."""
    lines = [f"| loss head: N x V, Hs, Ht | {' | '.join(PEERS.values())} | llmkd, MiB | {PEERS['trl']}, MiB |",
             f"|---|{'--:|' * (len(PEERS) + 2)}"]  # fmt: skip
    for case in result["cases"]:
        rows, vocab, student, teacher = case["rows_vocab_hs_ht"]
        if case["shape"] == "small":
            continue
        times = [_times(case["ratios"].get(f"{peer}_over_llmkd")) for peer in PEERS]
        memory = [f"{case['methods'][name]['extra_mib']:,.0f}" for name in ("llmkd", "trl")]
        name = f"{case['loss']}, {case['dtype']}: {rows} x {vocab}, {student}, {teacher}"
        lines.append(f"| {' | '.join([name, *times, *memory])} |")
    lines += ["", f"How many times llmkd's time the others take, forward and backward, {_place(result)}; memory is the peak "
              "beyond what was held before, gradients included. Above 1 llmkd is faster; its products alone are the floor of "
              "every exact method. [head.json](benchmarks/results/head.json), `python -m benchmarks head`."]  # fmt: skip
    return "\n".join(lines)


def step_table(result: Result) -> str:
    """Time and memory of whole steps."""
    lines = ["| whole step | batches | tokens/s | time over llmkd's | extra memory, MiB |", "|---|---|--:|--:|--:|"]
    for case in result["cases"]:
        for name, label in STEPS.items():
            if name not in case.get("methods", {}):
                continue
            found, over = case["methods"][name], case["ratios"].get(f"{name}_over_llmkd", 1.0)
            lines.append(f"| {label} | {case['case']}, {case['padding']:.0%} padding | {found['tokens_per_second']:,.0f} | "
                         f"{over:.2f}x | {found['extra_mib']:,.0f} |")  # fmt: skip
    own = next(case["ratios"] for case in result["cases"] if "methods" not in case)
    lines += ["", f"SmolLM2-135M-Instruct into 10 of its layers, {result['dtype']}, batches of {result['size']} ragged chats, "
              f"{_place(result)}. Each with its default batches, llmkd trains on {own['tokens_per_second_over_gkd']:.2f}x the "
              f"tokens a second of TRL's GKD, and {own['tokens_per_second_over_sft']:.2f}x those of its SFT trainer, which has "
              "no teacher. [step.json](benchmarks/results/step.json), `python -m benchmarks step`."]  # fmt: skip
    return "\n".join(lines)


def switch_table(result: Result) -> str:
    """What each switch costs and saves."""
    lines = ["| switch | speed | extra memory | mean loss of an epoch |", "|---|--:|--:|--:|"]
    for case in result["cases"]:
        speed, memory = case["ratios"].get("plain_over_this", 1.0), case["memory_over_plain"]
        lines.append(f"| {case['case']} | {speed:.2f}x | {memory:.2f}x | {case['loss_of_first_epoch']:.5f} |")
    lines += ["", f"The same batches and models, {_place(result)}. [switches.json](benchmarks/results/switches.json), "
              "`python -m benchmarks step --switches`."]  # fmt: skip
    return "\n".join(lines)


def _curves(folder: Path) -> str:
    names = json.loads((folder / "scaling.json").read_text())["cases"]
    axes = dict.fromkeys(case["axis"] for case in names)
    return "\n".join(
        f"![Time and memory of a step against {axis}](benchmarks/results/scaling-{axis}.svg)" for axis in axes
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _place(result: Result) -> str:
    return f"best of {result['repeats']} in one process on {result['device']}"
