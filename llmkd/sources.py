"""What a run was made from: the commits that its Hub names stood for when they were read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def revisions(config: Mapping[str, Any]) -> dict[str, str]:
    """`model`, `teacher` and `data` -> commit hash, of those that came from the Hub."""
    found = {part: commit_of(config.get(part), "model") for part in ("model", "teacher")}
    found["data"] = commit_of(config["data"], "dataset")
    return {part: commit for part, commit in found.items() if commit is not None}


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
