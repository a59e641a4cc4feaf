"""A recipe to its parts: student, teacher, objective, data, arguments. Everything is checked before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from llmkd import config as recipes
from llmkd.data.load import DataSpec, has_domains
from llmkd.divergences import DIVERGENCES
from llmkd.errors import ConfigError
from llmkd.mixing import UNUSABLE, check_arguments
from llmkd.objectives import OBJECTIVES, Mix, Objective
from llmkd.policies import POLICIES
from llmkd.reweighting import REWEIGHTINGS, Reweighting
from llmkd.schedules import SCHEDULES, as_schedule
from llmkd.stages import SCORES, STAGES
from llmkd.store import STORES
from llmkd.students import STUDENTS
from llmkd.teachers import TEACHERS
from llmkd.teachers.cached import check_spec
from llmkd.weights import load_tokenizer, locate

SCHEDULED = ("temperature", "weight")  # keys of an objective that take a number or a schedule
TABLES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "divergence": DIVERGENCES,
    "objective": OBJECTIVES,
    "policy": POLICIES,
    "schedule": SCHEDULES,
    "reweighting": REWEIGHTINGS,
    "teacher": TEACHERS,
    "model": STUDENTS,
    "stage": STAGES,
    "score": SCORES,
    "store": STORES,
}


@dataclass
class Parts:
    """What DistillTrainer and the data need, built."""

    model: Any
    teacher: Any
    objective: Objective
    tokenizer: Any
    peft_config: Any
    reweighting: Reweighting | None


def data_spec(config: Mapping[str, Any]) -> DataSpec:
    """The `data:` block, checked."""
    return recipes.check(DataSpec, config["data"], "data")


def objective(spec: Any) -> Objective:
    """The `objective:` block: a name, a mapping, or a list of mappings with a `weight` each, a number or a schedule."""
    entries = spec if isinstance(spec, list) else [spec]
    parts, weights = [], []
    for entry in entries:
        options = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        for key in SCHEDULED:
            if isinstance(options.get(key), Mapping):
                options[key] = recipes.build("schedule", options[key], TABLES)
        weights.append(as_schedule(options.pop("weight", 1.0), "objective.weight"))
        parts.append(recipes.build("objective", options, TABLES))
    return Mix(parts, weights)


def parts(config: Mapping[str, Any]) -> Parts:
    """Build every part; within `weights.stand_in` this loads no weights."""
    goal = objective(config["objective"])
    _check_spans(goal, config)
    mixture = reweighting(config)
    peft_config = peft(config.get("peft"), "SEQ_CLS" if _has_labels(config) else "CAUSAL_LM")
    model_spec, teacher_spec = _spec(config["model"], "pretrained"), _spec(config.get("teacher"), "local")
    teacher = recipes.build("teacher", teacher_spec, TABLES) if teacher_spec else None
    check_spec(teacher, data_spec(config))
    model = recipes.build("model", model_spec, TABLES, teacher_model=getattr(teacher, "model", None))
    return Parts(model, teacher, goal, tokenizer(config), peft_config, mixture)


def _has_labels(config: Mapping[str, Any]) -> bool:
    return "label" in ((config.get("data") or {}).get("columns") or {})


def _check_spans(goal: Objective, config: Mapping[str, Any]) -> None:
    """Raise a ConfigError if the objective reads spans that the data do not have, or the other way round."""
    given = (config.get("data") or {}).get("spans")
    if "spans" in goal.reads and given is None:
        raise ConfigError("data.spans: got nothing; expected a chunker, as the objective reads spans. Set punctuation.")
    if given is not None and "spans" not in goal.reads:
        raise ConfigError(f"data.spans: got '{given}', which no objective reads. Remove it, or add the objective span.")


def reweighting(config: Mapping[str, Any]) -> Reweighting | None:
    """The `reweighting:` block, or None; ConfigError if it and the domains of `data:` do not go together."""
    spec, data = config.get("reweighting"), data_spec(config)
    if spec is None:
        if has_domains(data):
            raise ConfigError("data: got domains, which nothing samples. Add reweighting: fixed, or name no domains.")
        return None
    if not has_domains(data):
        raise ConfigError(
            "reweighting: the data name no domains; expected some. Give data.path as a mapping, or set data.domain_column."
        )
    if data.eval is None and data.held_out_every is None:
        raise ConfigError(
            "reweighting: the domains have no validation data; expected some of each. Set data.held_out_every or data.eval."
        )
    known = {"max_steps": -1, "train_sampling_strategy": "random", **dict.fromkeys(UNUSABLE), **config["train"]}
    check_arguments(SimpleNamespace(**known))
    mixture: Reweighting = recipes.build("reweighting", spec, TABLES)
    if isinstance(data.path, dict):
        mixture.check(data.path)
    return mixture


def tokenizer(config: Mapping[str, Any]) -> Any:
    """The student's tokenizer; the teacher's where the student is cut from it."""
    for spec in (_spec(config["model"], "pretrained"), _spec(config.get("teacher"), "local")):
        if spec and spec["name"] != "cached" and isinstance(spec.get("path"), str):
            return load_tokenizer(locate(spec["path"], spec.get("gguf_file"), spec.get("revision")))
    raise ConfigError("model: neither model nor teacher has a path; expected one, to take the tokenizer from.")


def part(config: Mapping[str, Any], kind: Literal["model", "teacher"]) -> Any:
    """The spec of `model` or `teacher` with the name of its table's entry, or None."""
    return _spec(config.get(kind), "pretrained" if kind == "model" else "local")


def has_own_code(config: Mapping[str, Any]) -> bool:
    """Whether model or teacher is the user's own code, of which nobody knows what building it costs."""
    specs = (_spec(config["model"], "pretrained"), _spec(config.get("teacher"), "local"))
    return any(":" in str(spec["name"]) for spec in specs if spec)


def peft(block: Mapping[str, Any] | None, task_type: str = "CAUSAL_LM") -> Any:
    """The `peft:` block, verbatim LoraConfig; `merge` is llmkd's and handled at export."""
    if block is None:
        return None
    from peft import LoraConfig

    options = {key: value for key, value in block.items() if key != "merge"}
    return recipes.build("peft", {"name": "lora", "task_type": task_type, **options}, {"peft": {"lora": LoraConfig}})


def _spec(spec: Any, default: str) -> Any:
    """A string is a path; a mapping without a name is the default entry."""
    if spec is None:
        return None
    options = {"path": spec} if isinstance(spec, str) else dict(spec)
    return {"name": default, **options}
