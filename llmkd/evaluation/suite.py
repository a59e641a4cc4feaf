"""Names of tasks, groups and tags to lm-eval's task objects, on Hub data or local folders."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmkd.errors import ConfigError, DataError, did_you_mean, need

INSTALL = "pip install 'llmkd[evaluate]'"
OWN = Path(__file__).parent / "tasks"
SETTINGS = ("description", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "fewshot_delimiter",
            "num_fewshot", "output_type", "process_docs", "process_results", "filter_list", "metric_list",
            "generation_kwargs", "repeats", "gen_prefix")  # fmt: skip
DATA_FILES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".arrow")


@dataclass(frozen=True)
class Sampling:
    """What a command may change of tasks that generate; None leaves it to the task."""

    max_tokens: int | None = None
    repeats: int | None = None


@cache
def manager() -> Any:
    """lm-eval's index of tasks, ours included."""
    need("lm_eval", INSTALL)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_path=str(OWN))
    found.task_index["glue"].tags.add("stsb")  # a tag in our file would replace lm-eval's
    return found


def expand(names: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Each name, a task, group or tag -> its leaf tasks -> what a group changes in them.

    Raises:
        ConfigError: a name that is no task, group or tag, or none at all.
    """
    index = manager().task_index
    for name in names:
        if name not in index:
            raise ConfigError(
                f"--tasks: got '{name}'; expected a task, group or tag of lm-eval, such as glue, aime24 or gsm8k"
                f"{did_you_mean(name, index) or '. `lm-eval ls tasks` prints them all.'}"
            )
    if not names:
        raise ConfigError("--tasks: got nothing; expected names, separated by commas. Set --tasks glue,aime24.")
    return {name: _leaves(name, {}, index) for name in names}


def _leaves(member: Any, changes: dict[str, Any], index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks under a member of a group: a name, or a mapping that changes a task or is a group of its own."""
    name = member if isinstance(member, str) else member.get("task", member.get("group"))
    if isinstance(member, dict):
        changes = {**changes, **{key: value for key, value in member.items() if key not in ("task", "group")}}
    if isinstance(name, list):  # a group that is written inside another one
        return {leaf: found for inner in name for leaf, found in _leaves(inner, changes, index).items()}
    entry = index.get(name)
    if entry is None:
        raise ConfigError(
            f"--tasks: '{name}' stands in a group and is no task by itself; name the group's other tasks."
        )
    kind = entry.kind.name
    if kind == "TAG":
        return {leaf: found for inner in sorted(entry.tags) for leaf, found in _leaves(inner, changes, index).items()}
    if kind == "GROUP":
        return {leaf: found for inner in entry.cfg["task"] for leaf, found in _leaves(inner, changes, index).items()}
    return {name: changes}


def load(name: str, changes: Mapping[str, Any], data: Path | None, sampling: Sampling) -> Any:
    """One lm-eval task with its data.

    Args:
        changes: settings of the group. data: a folder of datasets laid out as on the Hub, or None for the Hub itself.

    Raises:
        DataError: the data are not in `data`, or cannot be read. ConfigError: sampling of a task that does not sample.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    config = {**load_yaml(manager().task_index[name].yaml_path), **changes, "task": name}
    config |= _sampled(config, sampling)
    if data is not None:
        config |= local(data, name, config)
        if not config.get("num_fewshot"):
            config |= {"training_split": None, "fewshot_split": None}  # it need not be there
    try:
        task = manager().load([config])["tasks"][name]
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        if not len(task.eval_docs):
            raise ValueError("no examples")
        return task
    except Exception as error:
        place = f"in '{data}'" if data is not None else f"from '{config.get('dataset_path')}'"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"task {name}: its data cannot be loaded {place} ({reason}); expected the dataset and split that the task "
            "names. Check the network, or give --data DIR."
        ) from error


def _sampled(config: Mapping[str, Any], sampling: Sampling) -> dict[str, Any]:
    """The settings of a generating task that the command changes."""
    if config.get("output_type") != "generate_until":
        return {}
    changed: dict[str, Any] = {}
    if sampling.max_tokens is not None:
        changed["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": sampling.max_tokens}
    if sampling.repeats is not None and config["generation_kwargs"].get("do_sample"):
        changed["repeats"] = sampling.repeats
    return changed


def check_sampling(tasks: Mapping[str, Any], sampling: Sampling) -> None:
    """Raise a ConfigError if --max-tokens or --repeats changes none of the tasks."""
    generates = [task for task in tasks.values() if task.get_config("output_type") == "generate_until"]
    sampled = [task for task in generates if task.get_config("generation_kwargs").get("do_sample")]
    for option, value, users, kind in (
        ("--max-tokens", sampling.max_tokens, generates, "generates"),
        ("--repeats", sampling.repeats, sampled, "samples its answers"),
    ):
        if value is not None and not users:
            raise ConfigError(
                f"{option}: got {value}, but no task of {', '.join(tasks)} {kind}; expected one. Remove it."
            )


def local(root: Path, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Where a task's dataset lies under `root`, as settings of the task.

    A dataset `owner/name` is looked for in ROOT/owner/name, ROOT/name and, if ROOT is a copy of that dataset itself, in
    ROOT; its configuration `cola` in the folder cola inside, else in the configurations of its README.md.

    Raises:
        DataError: it is in none of them, or the task has no dataset that could be replaced.
    """
    path = config.get("dataset_path")
    if not path:
        raise DataError(
            f"task {name}: it makes its data itself; expected a dataset to take from --data. Leave --data out."
        )
    part = config.get("dataset_name")
    places = [root / path.strip("/"), root / path.split("/")[-1], root]
    for place in places:
        if part and _has_data(place / part):
            return {"dataset_path": str(place / part), "dataset_name": None}
        if (place / "README.md").is_file() and part and _has_data(place, deep=True):
            return {"dataset_path": str(place)}
        if not part and _has_data(place, deep=place is not root):
            return {"dataset_path": str(place), "dataset_name": None}
    inside = f"{part}/" if part else ""
    raise DataError(
        f"task {name}: its data are not in '{root}'; expected {places[0]}/{inside} or {places[1]}/{inside} with files "
        f"such as {config.get('validation_split') or config.get('test_split') or 'train'}.parquet or .jsonl. "
        f"Copy the dataset '{path}' there."
    )


def _has_data(folder: Path, deep: bool = False) -> bool:
    """Whether a folder has data files: in itself, or in `data/`, or (deep) anywhere."""
    if not folder.is_dir():
        return False
    files = folder.rglob("*") if deep else [*folder.glob("*"), *folder.glob("data/*")]
    return any(file.name.endswith(DATA_FILES) and file.is_file() for file in files)


def describe(name: str, task: Any, limit: int | None, seed: int, data: Path | None) -> dict[str, Any]:
    """What every model's results on a task share: see `results`."""
    entry, config = manager().task_index[name], task.dump_config()
    docs = [doc for _, doc in task.doc_iterator(rank=0, limit=limit, world_size=1)]
    metrics = [item["metric"] for item in config["metric_list"]]
    return {
        "source": "llmkd" if Path(entry.yaml_path).is_relative_to(OWN) else "lm-eval",
        "version": (config.get("metadata") or {}).get("version"),
        "hash": fingerprint(
            {key: config.get(key) for key in SETTINGS}, docs, [task.doc_to_target(doc) for doc in docs]
        ),
        "dataset": {
            "path": load_setting(entry, "dataset_path"),
            "name": load_setting(entry, "dataset_name"),
            "split": task.get_config("test_split") or task.get_config("validation_split"),
            "local": data is not None,
        },
        "n": len(docs),
        "limit": limit,
        "repeats": config.get("repeats", 1),
        "seed": seed,
        "num_fewshot": config.get("num_fewshot") or 0,
        "generation": config.get("generation_kwargs"),
        "higher_is_better": dict(task.higher_is_better()),
        "main": metrics[:1],
    }


def load_setting(entry: Any, key: str) -> Any:
    """A setting of a task as its file has it."""
    return (entry.cfg or {}).get(key)


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of the parts as JSON."""
    text = json.dumps(parts, sort_keys=True, default=_as_text, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_text(value: Any) -> str:
    """A function by its source, which is the same in every process, as its address is not."""
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return getattr(value, "__qualname__", type(value).__name__)
