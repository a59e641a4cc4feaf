"""Step time and memory against sequence length, vocabulary and batch: curves, as JSON and as pictures."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import trainers
from benchmarks.measure import interleave
from benchmarks.record import RESULTS, finish, header
from benchmarks.samples import Batch
from llmkd.data import Collator
from llmkd.students.tiny import byte_tokenizer, tiny_config, tiny_model

BASE = {"length": 512, "vocabulary": 32768, "batch": 1}
CURVES = {
    "length": (128, 256, 512, 1024, 2048, 4096),
    "vocabulary": (4096, 8192, 16384, 32768, 65536, 151936),
    "batch": (1, 2, 4, 8),
}
TOKENS = 2048  # of an epoch, at least: a trainer takes a third of a second to start one
BYTES = 259  # tokens of the byte tokenizer
METHODS = ("limit", "llmkd", "gkd")
LABELS = {"limit": "limit (backbones and head GEMMs)", "llmkd": "llmkd", "gkd": "TRL GKD, lmbda = 0"}
WIDTHS = {"student": (256, 4), "teacher": (384, 6)}  # hidden size, layers


def scaling(repeats: int, against: Path | None) -> None:
    """Measure one batch of every point; writes scaling.json and scaling-<axis>.svg."""
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for axis, values in CURVES.items():
            cases += [_point(axis, value, Path(folder), repeats) for value in values]
    result = {**header(repeats), "base": BASE, "hidden_and_layers": WIDTHS, "cases": cases}
    for axis in CURVES:
        draw(axis, [case for case in cases if case["axis"] == axis], RESULTS / f"scaling-{axis}.svg")
    finish("scaling", result, against)


def _point(axis: str, value: int, folder: Path, repeats: int) -> dict[str, Any]:
    place = {**BASE, axis: value}
    student, teacher = (_model(*WIDTHS[name], place["vocabulary"]) for name in ("student", "teacher"))
    tokenizer = byte_tokenizer(tuple(f"<{i}>" for i in range(place["vocabulary"] - BYTES)))
    setting = trainers.Setting(student, teacher, tokenizer, folder, {})
    steps = max(1, TOKENS // (place["length"] * place["batch"]))
    runs = {method: trainers.METHODS[method](setting, [_batch(**place)] * steps) for method in METHODS}
    measured = interleave(runs, repeats)
    best = {method: one.seconds for method, one in measured.items()}
    print(f"{axis} {value}: " + ", ".join(f"{method} {seconds:.3f} s" for method, seconds in best.items()), flush=True)
    return {
        "case": f"{axis} {value}",
        "axis": axis,
        "value": value,
        "steps": steps,
        "methods": {
            method: {**asdict(one), "seconds_per_step": round(one.seconds / steps, 4)}
            for method, one in measured.items()
        },
        "ratios": {f"{method}_over_llmkd": round(best[method] / best["llmkd"], 3) for method in ("limit", "gkd")},
    }


def _model(hidden: int, layers: int, vocabulary: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "head_dim": 64}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128}
    return tiny_model(tiny_config("llama", vocab_size=vocabulary, max_position_embeddings=4096, **sizes, **heads))


def _batch(length: int, vocabulary: int, batch: int) -> Batch:
    """Random tokens of which the last three quarters are supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, min(vocabulary, 259), (batch, length), generator=generator).tolist()
    prompt = length // 4
    return Collator(0)([{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids])


def draw(axis: str, points: list[dict[str, Any]], file: Path) -> None:
    """Time and memory of every method over one axis, both logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "llmkd", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, plots = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for plot, key, label in zip(
        plots, ("seconds_per_step", "extra_mib"), ("seconds a step", "extra memory, MiB"), strict=True
    ):
        for method in METHODS:
            values = [point["methods"][method][key] for point in points]
            plot.plot([point["value"] for point in points], values, marker="o", label=LABELS[method])
        plot.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        plot.set_xticks([point["value"] for point in points], [f"{point['value']:,}" for point in points], rotation=45)
        plot.minorticks_off()
        plot.grid(alpha=0.3)
    plots[0].legend()
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
