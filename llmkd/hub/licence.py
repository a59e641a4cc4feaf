"""What a student inherits: the licences of its start and of its teacher, and what they say about outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from llmkd.errors import ConfigError
from llmkd.sources import is_hub_name, teachers_behind
from llmkd.weights import locate

PERMISSIVE = frozenset(
    {"apache-2.0", "mit", "isc", "zlib", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "unlicense"}
)
LLAMA_2 = "its outputs must not be used to improve any other large language model"
LLAMA_3 = "a model made with its outputs must carry `Llama` at the beginning of its name and say `Built with Llama`"
RESTRICTED: dict[str, str] = {
    "llama2": LLAMA_2,
    "llama3": LLAMA_2,
    "llama3.1": LLAMA_3,
    "llama3.2": LLAMA_3,
    "llama3.3": LLAMA_3,
    "llama4": LLAMA_3,
    "gemma": "a model trained on its outputs counts as a derivative and stays under the Gemma terms of use",
    "qwen": "a model made with its outputs must say `Built with Qwen` or `Improved using Qwen`",
    "qwen-research": "it and what is made with its outputs are for research, not for commercial use",
    "mnpl": "it and what is made with it are for research and testing, not for production",
    "cc-by-nc-4.0": "it is not for commercial use",
    "cc-by-nc-sa-4.0": "it is not for commercial use, and what is made of it keeps its licence",
    "openrail": "its restrictions of use pass on to what is made with it",
    "bigscience-bloom-rail-1.0": "its restrictions of use pass on to what is made with it",
}


@dataclass(frozen=True)
class Inherited:
    """The student's licence, None if it does not follow from its sources', by their paths, and what to look at before it is
    published."""

    licence: str | None
    sources: dict[str, str | None]
    warnings: list[str]


def inherited(config: Mapping[str, Any]) -> Inherited:
    """The licence of a recipe's student: its sources' if they share one; its start's if all are permissive; else open."""
    starts = [config["model"]] if _path(config["model"]) is not None else []
    given = [
        *(("start", spec) for spec in starts),
        *(("teacher", spec) for spec in teachers_behind(config.get("teacher"))),
    ]
    sources = {str(_path(spec)): licence_of(spec) for _, spec in given}
    warnings = []
    for part, spec in given:
        licence, what = sources[str(_path(spec))], f"the {part} `{_path(spec)}`"
        if licence is None:
            warnings.append(f"The licence of {what} could not be read: look it up before you publish the student.")
        elif licence in RESTRICTED:
            warnings.append(f"The licence of {what}, `{licence}`, restricts the student: {RESTRICTED[licence]}.")
        elif licence not in PERMISSIVE:
            warnings.append(
                f"The licence of {what}, `{licence}`, is not one that llmkd knows: read what it says on outputs."
            )
    known = set(sources.values())
    follows = len(known) == 1 or known <= PERMISSIVE
    return Inherited(next(iter(sources.values()), None) if follows else None, sources, warnings)


def licence_of(spec: Any) -> str | None:
    """The licence that a model's card or its GGUF file names, in lower case; None if there is none to be read."""
    options = {"path": spec} if isinstance(spec, str) else dict(spec)
    try:
        source = locate(options["path"], options.get("gguf_file"), options.get("revision"))
    except ConfigError:
        return None
    if source.gguf_file is not None and Path(source.path, source.gguf_file).is_file():
        return _of_gguf(Path(source.path, source.gguf_file))
    card = Path(source.path, "README.md")
    if not card.is_file() and is_hub_name(source.path):
        card = _downloaded(source.path, source.revision)
    return _of_card(card) if card is not None and card.is_file() else None


def _path(spec: Any) -> str | None:
    return spec if isinstance(spec, str) else (spec or {}).get("path")


def _downloaded(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "README.md", revision=revision))
    except (HfHubHTTPError, OSError):
        return None


def _of_card(file: Path) -> str | None:
    try:
        data = ModelCard(file.read_text(errors="replace"), ignore_metadata_errors=True).data
    except (yaml.YAMLError, ValueError):  # a stranger's file
        return None
    name = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return str(name).lower() if isinstance(name, str) else None


def _of_gguf(file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.license")
    name = str(field.contents()) if field is not None else ""
    return re.sub(r"\s+", "-", name.strip()).lower() or None
