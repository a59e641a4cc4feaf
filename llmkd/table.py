"""What a finished run prints: student before and after against the teacher, the folder, the next command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROWS = (
    ("KL to teacher (nats/token)", "kl", "{:.3f}"),
    ("top-1 agreement", "top1_agreement", "{:.1%}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("squared distance to teacher", "mse_to_teacher", "{:.4f}"),
    ("mean squared error", "mse", "{:.4f}"),
    ("perplexity", "perplexity", "{:,.1f}"),
    ("bits per byte", "bits_per_byte", "{:.3f}"),
    ("parameters", "parameters", "{:,.0f}"),
    ("forward tokens/s", "tokens_per_second", "{:,.0f}"),
    ("peak memory (MB)", "peak_memory_mb", "{:,.0f}"),
)
COST = {"parameters", "tokens_per_second", "peak_memory_mb"}
QUALITY = {key: label for label, key, _ in ROWS if key not in COST}


def show(metrics: Mapping[str, Any], folder: Path, console: Console | None = None) -> None:
    """Print the table of one run."""
    console = console or Console()
    table = Table(title=f"{folder.name}: held-out text")
    for name in ("", "student before", "student after", "teacher"):
        table.add_column(name, justify="right" if name else "left")
    for line in lines(metrics):
        table.add_row(*line)
    console.print(table)
    train = metrics["train"]
    console.print(
        f"{train['steps']} steps in {train['seconds']:.0f} s ({_cell(train['tokens_per_second'], '{:,.0f}')} tokens/s), "
        f"peak memory {train['peak_memory_mb']:,.0f} MB",
        highlight=False,
    )
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    command = next_command(folder) if "perplexity" in metrics["after"] else f"llmkd evaluate {folder}"
    console.print(f"next:\n  {command}", highlight=False, soft_wrap=True)


def lines(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line a metric: its label, and what the student before and after and the teacher have."""
    sizes = {"parameters": metrics["parameters"]}
    columns = [{**sizes, **metrics["before"]}, {**sizes, **metrics["after"]}, metrics["teacher"]]
    return [
        (label, *(_cell(column.get(key), form) for column in columns))
        for label, key, form in ROWS
        if any(key in column for column in columns)
    ]


def next_command(folder: Path) -> str:
    """Let the student speak, with transformers alone."""
    student = folder / "student"
    return (
        "python -c \"from transformers import pipeline; print(pipeline('text-generation', "
        f"'{student}')('The for statement', max_new_tokens=30)[0]['generated_text'])\""
    )


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
