"""The model card of a run: README.md with the results in `model-index`, written from what the run left and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llmkd import config as recipes
from llmkd import table
from llmkd.evaluation.table import lines as evaluated_lines
from llmkd.finished import Run, read_json
from llmkd.hub.licence import Inherited, inherited
from llmkd.hub.methods import Used, bibtex, used
from llmkd.sources import is_hub_name, teachers_behind

TEMPLATE = Path(__file__).with_name("card.md.jinja")
FILE = "README.md"
SHOWN = ("objective", "divergence", "policy", "schedule")


def write_card(run: Run, file: Path, adapter: bool) -> list[str]:
    """Write the card of a run's student, an adapter or a whole model.

    Returns:
        What the user should look at before publishing.
    """
    licence = inherited(run.config)
    file.write_text(str(card(run, licence, adapter)))
    return licence.warnings


def card(run: Run, licence: Inherited, adapter: bool = False) -> ModelCard:
    """The card; all its numbers are those of metrics.json and evaluation.json."""
    parts = used(run.config)
    evaluated = run.evaluation.get("tasks") or {}
    return ModelCard.from_template(
        _data(run, licence, parts, adapter),
        template_path=str(TEMPLATE),
        name=run.name,
        summary=_summary(run, adapter),
        warnings=licence.warnings,
        models=_rows(_models(run, licence)),
        total=_total(parts),
        objective=_rows(_part(part) for part in parts if part.kind in SHOWN),
        sources=_rows(_sources(run)),
        counts=_rows(_counts(run.metrics["train"]["data"])),
        manifests=_manifests(run.config["data"]),
        training=_rows(_training(run.metrics)),
        results=_rows(table.lines(run.metrics)),
        evaluation=_rows(evaluated_lines(run.evaluation)) if evaluated else [],
        recipe=recipes.dump(run.config).rstrip(),
        citations=bibtex(parts),
    )


def _data(run: Run, licence: Inherited, parts: list[Used], adapter: bool) -> ModelCardData:
    given = (run.config.get("model"), *teachers_behind(run.config.get("teacher")))
    bases = dict.fromkeys(path for spec in given if is_hub_name(path := _path(spec)))
    data_path = run.config["data"]["path"]
    architectures = (read_json(run.student / "config.json") or {}).get("architectures") or [""]
    classifies = architectures[0].endswith("ForSequenceClassification")
    names = [part.name for part in parts if part.kind in ("objective", "divergence") and part.entry is not None]
    return ModelCardData(
        model_name=run.name,
        base_model=list(bases) or None,
        datasets=[data_path] if is_hub_name(data_path) else None,
        license=licence.licence,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if classifies else "text-generation",
        tags=["llmkd", "knowledge-distillation", *names],
        eval_results=[*_held_out(run, classifies), *_tasks(run.evaluation)] or None,
    )


def _held_out(run: Run, classifies: bool) -> Iterable[EvalResult]:
    data = run.config["data"]
    source = data.get("eval") or data
    for name, label in table.QUALITY.items():
        if run.metrics["after"].get(name) is not None:
            yield EvalResult(
                task_type="text-classification" if classifies else "text-generation",
                dataset_type=_dataset(source["path"]),
                dataset_name=f"{_dataset(source['path'])}, held out",
                dataset_config=source.get("name"),
                dataset_split=source.get("split", "train"),
                dataset_revision=source.get("revision") or run.metrics.get("revisions", {}).get("data"),
                metric_type=name,
                metric_name=label,
                metric_value=run.metrics["after"][name],
            )


def _tasks(evaluation: Mapping[str, Any]) -> Iterable[EvalResult]:
    """The student's metrics of every task, each with the task's version and hash."""
    for name, task in (evaluation.get("tasks") or {}).items():
        settings = {key: task.get(key) for key in ("hash", "n", "repeats", "seed", "num_fewshot", "limit")}
        for metric, found in task["models"].get("student", {}).items():
            spread = {key: found.get(key) for key in ("stderr", "interval")}
            given = {
                "task": name,
                "task_version": task.get("version"),
                "source": task.get("source"),
                **settings,
                **spread,
            }
            yield EvalResult(
                task_type="text-generation",
                dataset_type=_dataset(task["dataset"]["path"]),
                dataset_name=name,
                dataset_config=task["dataset"].get("name"),
                dataset_split=task["dataset"].get("split"),
                metric_type=metric,
                metric_name=f"{metric} ({name}, version {task.get('version')})",
                metric_value=found["value"],
                metric_args={key: value for key, value in given.items() if value is not None},
            )


def _path(spec: Any) -> Any:
    return spec if isinstance(spec, str) else (spec or {}).get("path")


def _dataset(path: Any) -> str:
    """A data set's name on the Hub; that of its last part for files and objects of this machine."""
    first = path if isinstance(path, str) else path[0]
    return first if is_hub_name(first) else first.rstrip("/").rsplit("/", 1)[-1]


def _summary(run: Run, adapter: bool) -> str:
    teachers = " and ".join(_named(spec["path"]) for spec in teachers_behind(run.config.get("teacher")))
    alone = "distilled from itself" if run.config.get("teacher") else "trained without a teacher"
    what = "A LoRA adapter" if adapter else "A model"
    how = f"distilled from {teachers}" if teachers else alone
    return f"{what} {how} with llmkd."


def _named(path: Any) -> str:
    return f"[{path}](https://huggingface.co/{path})" if is_hub_name(path) else f"`{path}`"


def _models(run: Run, licence: Inherited) -> Iterable[tuple]:
    sizes = {"teacher": run.metrics["teacher"].get("parameters")}
    revisions = run.metrics.get("revisions", {})
    teacher = run.config.get("teacher")
    behind = teachers_behind(teacher) or ([] if teacher is None else [teacher])
    given = [*(("teacher", "teacher", spec) for spec in behind), ("model", "student's start", run.config["model"])]
    for part, label, spec in given:
        options = {"path": spec} if isinstance(spec, str) else spec
        path = options.get("path")
        how = {key: value for key, value in options.items() if key not in ("path", "revision")}
        what = " ".join(filter(None, (_named(path) if path else "the teacher's weights,", _inline(how))))
        named = filter(None, (options.get("revision"), revisions.get(part)))
        inherits = licence.sources.get(str(path or _path(next(iter(behind), None))))
        yield label, what, " = ".join(dict.fromkeys(named)), sizes.get(part), inherits
    yield "student", "this model", "", run.metrics["parameters"], licence.licence


def _total(parts: list[Used]) -> str:
    terms = [part for part in parts if part.kind == "objective"]
    total = " + ".join(f"{_weight(part.weight)} x `{part.name}`" for part in terms)
    return f"loss = ({total}) / number of supervised items, p = teacher, q = student; logarithms are natural."


def _weight(weight: Any) -> str:
    return f"`{weight['name']}`" if isinstance(weight, Mapping) else f"{weight:g}"


def _part(part: Used) -> tuple:
    formula, paper, checked = ("code of its author's own", "", "")
    if part.entry is not None:
        formula, paper, checked = part.entry.formula, part.entry.paper, part.entry.fidelity
    weight = "" if part.weight is None else _weight(part.weight)
    return f"{part.kind} `{part.name}`", weight, formula, _inline(part.options), paper, checked


def _inline(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={json.dumps(value, ensure_ascii=False)}`" for key, value in options.items())


def _sources(run: Run) -> Iterable[tuple]:
    data = run.config["data"]
    for source in (data, *filter(None, [data.get("eval")])):
        found = run.metrics.get("revisions", {}).get("data") if source is data else None
        path = source["path"] if isinstance(source["path"], str) else ", ".join(source["path"])
        named = f"[{path}](https://huggingface.co/datasets/{path})" if is_hub_name(path) else f"`{path}`"
        revision = source.get("revision") or found or "not pinned"
        yield named, source.get("name"), source.get("split", "train"), revision, _inline(source.get("columns", {}))


def _counts(report: Mapping[str, int]) -> Iterable[tuple]:
    for name in (name for name in report if not name.startswith("eval_")):
        yield name.replace("_", " "), f"{report[name]:,}", _count(report.get(f"eval_{name}"))


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _manifests(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The manifests of stages, where the data are what stages made."""
    paths = [data["path"]] if isinstance(data["path"], str) else data["path"]
    files = [Path(path) / "manifest.json" for path in paths]
    return [(str(file), json.dumps(read_json(file), indent=1)) for file in files if file.is_file()]


def _training(metrics: Mapping[str, Any]) -> Iterable[tuple]:
    train = metrics["train"]
    yield "steps", f"{train['steps']:,}"
    yield "tokens trained on", _count(train.get("tokens"))
    yield "wall time", f"{train['seconds']:,.0f} s"
    yield "tokens a second", "" if train["tokens_per_second"] is None else f"{train['tokens_per_second']:,.0f}"
    yield "hardware", f"{metrics['device']}, {metrics.get('processes', 1)} process(es)"
    yield "peak memory", f"{train['peak_memory_mb']:,.0f} MB"
    yield "seed", str(metrics["seed"])
    yield "versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())


def _rows(lines: Iterable[tuple]) -> list[list[str]]:
    """Cells of a Markdown table."""
    return [[_cell(value) for value in line] for line in lines]


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
    return " ".join(text.split()).replace("|", "\\|")
