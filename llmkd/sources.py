"""What a run was made from: the models behind its teacher, the commits that Hub names stood for when they were read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from llmkd.data.manifest import read_manifest
from llmkd.errors import DataError

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def revisions(config: Mapping[str, Any]) -> dict[str, str]:
    """`model`, `teacher` and `data` -> commit hash, of those that came from the Hub."""
    found = {part: commit_of(config.get(part), "model") for part in ("model", "teacher")}
    found["data"] = commit_of(config["data"], "dataset")
    return {part: commit for part, commit in found.items() if commit is not None}


def teachers_behind(spec: Any) -> list[dict[str, Any]]:
    """The models, as specs with a path, that a recipe's teacher speaks for: a store's writer, each one of several.

    A student that teaches itself has none. A store that cannot be read stands for itself.
    """
    options = {"path": spec} if isinstance(spec, str) else dict(spec or {})
    path, name = options.get("path"), options.get("name", "local")
    if name == "cached":
        found = [_writer(Path(folder).expanduser()) for folder in ([path] if isinstance(path, str) else path or [])]
    elif name == "partition":
        found = teachers_behind(options["teacher"])
    elif "teachers" in options:
        members = options["teachers"]
        members = members.values() if isinstance(members, Mapping) else members
        found = [model for member in members for model in teachers_behind(member)]
    else:
        found = [options] if path is not None else []
    return [model for number, model in enumerate(found) if model not in found[:number]]


def _writer(store: Path) -> dict[str, Any]:
    """The model that a store's rows are of, at the commit that it was read at."""
    try:
        identity = read_manifest(store).identity
        teacher, commit = identity["recipe"]["stage"]["teacher"], identity["models"]["teacher"]
    except (DataError, KeyError):
        return {"path": str(store)}
    options = {"path": teacher} if isinstance(teacher, str) else dict(teacher)
    return {**options, "revision": commit} if COMMIT.fullmatch(str(commit)) else options


def commit_of(spec: Any, kind: str) -> str | None:
    """The commit that a part's `path` and `revision` stand for, from the Hub's cache; None if it is not from there."""
    options = {"path": spec} if isinstance(spec, str) else dict(spec or {})
    path, revision = options.get("path"), options.get("revision") or constants.DEFAULT_REVISION
    if not is_hub_name(path):
        return None
    if COMMIT.fullmatch(revision):
        return revision
    file = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=str(path), repo_type=kind), "refs", revision)
    found = file.read_text().strip() if file.is_file() else ""
    return found if COMMIT.fullmatch(found) else None


def is_hub_name(path: Any) -> bool:
    """Whether a path of a recipe is a name on the Hub: neither a file, a folder, a package's file nor a Python object."""
    return isinstance(path, str) and bool(HUB_NAME.fullmatch(path)) and not Path(path).exists()
