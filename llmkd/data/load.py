"""Where rows come from: Hub datasets, text, JSON and parquet files, and objects of installed Python packages."""

from __future__ import annotations

import glob
import importlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import datasets
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llmkd.data.layout import inner, of_split, suffix_of
from llmkd.data.manifest import check_shard, is_stage, read_manifest
from llmkd.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)

ROW_COLUMNS = ("text", "prompt", "completion", "messages", "text_pair", "label")
_KINDS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_NOT_DATA = {"manifest.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_PYTHON_OBJECT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class SourceSpec(BaseModel):
    """A place that rows come from, and which of its columns are meant."""

    model_config = ConfigDict(extra="forbid")

    path: str | list[str] | dict[str, str | list[str] | SourceSpec] = Field(
        description="Hub id, file(s), folder, glob, or 'package.module:attribute'; a mapping names domains"
    )
    domain_column: str | None = Field(None, description="the column (`a.b` for a nested one) that names a row's domain")
    name: str | None = Field(None, description="Hub config name")
    split: str = "train"
    revision: str | None = Field(None, description="Hub revision; pin it, or the data can change under a recipe")
    columns: dict[str, str] = Field({}, description="our column -> theirs, e.g. {prompt: instruction}")
    max_samples: int | None = Field(None, ge=1, description="rows taken, the first ones")

    @model_validator(mode="after")
    def _one_way_to_name_domains(self) -> SourceSpec:
        if isinstance(self.path, dict):
            if self.domain_column is not None:
                raise ValueError("got both domain_column and a path for each domain; expected one of them. Remove one.")
            if any(isinstance(source, SourceSpec) and has_domains(source) for source in self.path.values()):
                raise ValueError("got domains inside a domain; expected plain sources. Name every domain at the top.")
        return self

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for ours in columns:
            if ours not in ROW_COLUMNS:
                known = ", ".join(ROW_COLUMNS)
                raise ValueError(f"got key '{ours}'; expected one of {known}{did_you_mean(ours, ROW_COLUMNS)}")
        return columns


class EvalSpec(SourceSpec):
    """The `data.eval:` block: held-out rows from a place of their own."""


class DataSpec(SourceSpec):
    """The `data:` block of a recipe. Lengths are in tokens."""

    max_length: int = Field(1024, ge=2, description="tokens a sample")
    packing: bool = Field(False, description="pack documents into sequences of max_length; they stay independent")
    spans: Literal["punctuation", "spacy", "nltk"] | None = Field(
        None, description="mark phrases for the span objective"
    )
    held_out_every: int | None = Field(None, ge=2, description="rows 0, n, 2n, ... are held out for evaluation")
    eval: EvalSpec | None = None
    max_eval_samples: int | None = Field(None, ge=1, description="tokenised evaluation samples kept, the first ones")

    @property
    def is_text(self) -> bool:
        """Whether rows are texts to predict, and not examples with a label."""
        return "label" not in self.columns

    @model_validator(mode="after")
    def _one_evaluation_source(self) -> DataSpec:
        if self.held_out_every is not None and self.eval is not None:
            raise ValueError("got both held_out_every and eval; expected at most one. Remove one of them.")
        if self.max_eval_samples is not None and self.held_out_every is None and self.eval is None:
            raise ValueError("got max_eval_samples without evaluation data. Set held_out_every or eval, or remove it.")
        return self


def has_domains(spec: SourceSpec) -> bool:
    """Whether the rows belong to named domains."""
    return isinstance(spec.path, dict) or spec.domain_column is not None


def load_rows(spec: SourceSpec) -> Dataset:
    """Return the first `max_samples` raw rows of the source, with its own column names.

    Raises: DataError if the source is missing, empty, unreadable or out of reach.
    """
    rows = _open(spec)
    if len(rows) == 0:
        raise _empty(spec.path)
    return rows.select(range(min(len(rows), spec.max_samples or len(rows))))


def _open(spec: SourceSpec) -> Dataset:
    path = spec.path
    if isinstance(path, dict):
        raise DataError(f"data.path: got the domains {', '.join(path)}; expected one source. Load each on its own.")
    if isinstance(path, list):
        if not path:
            raise DataError("data.path: got an empty list; expected at least one file. Name a file.")
        _no_hub_options(spec)
        return _from_files(spec, [file for item in path for file in _files_of(item)])
    if _is_local(path):
        if (folder := inner(path, spec.name)) is not None:
            spec, path = spec.model_copy(update={"path": folder, "name": None}), folder
        _no_hub_options(spec)
        return _from_folder_or_files(spec, path)
    if _PYTHON_OBJECT.fullmatch(path):
        _no_hub_options(spec)
        return _from_python(spec, path)
    return _from_hub(spec, path)


# Files


def _is_local(path: str) -> bool:
    named = path.startswith((".", "/", "~")) or suffix_of(Path(path)) in _KINDS or glob.has_magic(path)
    return named or Path(path).exists()


def _no_hub_options(spec: SourceSpec) -> None:
    for key in ("name", "revision"):
        value = getattr(spec, key)
        if value is not None:
            raise DataError(f"data.{key}: got '{value}' for '{spec.path}', which is not on the Hub. Remove {key}.")


def _from_folder_or_files(spec: SourceSpec, path: str) -> Dataset:
    folder = Path(path).expanduser()
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _read(path, lambda: datasets.load_from_disk(str(folder)))
    if is_stage(folder):
        return _from_files(spec, [check_shard(folder, shard) for shard in read_manifest(folder).shards])
    files = _files_of(path)
    if folder.is_dir() and (chosen := of_split(files, spec.split, path)) is not None:
        files, spec = chosen, spec.model_copy(update={"split": "train"})
    return _from_files(spec, files)


def _files_of(path: str) -> list[Path]:
    """Expand a file, a folder (searched to the bottom) or a glob to a sorted list of files."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [f for f in place.rglob("*") if f.is_file() and suffix_of(f) in _KINDS and f.name not in _NOT_DATA]
        found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(place).parts)]
        others = [f for f in found if f.name != "README.md"]  # a dataset's card, unless all else is text too
        found = found if all(_KINDS[suffix_of(f)] == "text" for f in others) else others
    elif glob.has_magic(path):
        found = [Path(f) for f in glob.glob(str(place), recursive=True) if Path(f).is_file()]
    else:
        raise DataError(
            f"data.path: got '{path}', which does not exist; expected a file, folder, glob or Hub id. Fix it."
        )
    if not found:
        raise DataError(f"data.path: got '{path}', where no file is; expected {', '.join(_KINDS)} files. Fix the path.")
    return sorted(found)


def _from_files(spec: SourceSpec, files: list[Path]) -> Dataset:
    kinds = set()
    for file in files:
        if suffix_of(file) not in _KINDS:
            raise DataError(
                f"data.path: got '{file}'; expected a {', '.join(_KINDS)} file. Convert it to one of these."
            )
        if file.stat().st_size == 0:
            raise _empty(str(file))
        kinds.add(_KINDS[suffix_of(file)])
    if len(kinds) > 1:
        seen = ", ".join(sorted(kinds))
        raise DataError(f"data.path: got {seen} files in '{spec.path}'; expected one kind. Name one, e.g. with a glob.")
    kind = kinds.pop()
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    names = [str(file) for file in files]
    shown = names[0] if len(names) == 1 else f"{names[0]}' and {len(names) - 1} more"
    return _read(shown, lambda: datasets.load_dataset(kind, data_files=names, split=spec.split, **options))


def _read(path: str, load: Callable[[], Any]) -> Dataset:
    try:
        rows = load()
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise _empty(path) from error
        _unreadable(path, error)
    if not isinstance(rows, Dataset):
        raise DataError(
            f"data.path: got '{path}' with {type(rows).__name__}; expected one split. Name a split's folder."
        )
    return rows


def _unreadable(path: str, error: Exception) -> NoReturn:
    if "nknown split" in str(error):
        raise DataError(f"data.split: {_reason(error)} in '{path}'; expected a split that exists. Fix it.") from error
    raise DataError(
        f"data.path: got '{path}', which cannot be read ({_reason(error)}); expected whole UTF-8 text, JSON or "
        "parquet. Repair or replace the file."
    ) from error


def _reason(error: BaseException) -> str:
    """The root cause on one line of at most 200 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(". ")


def _empty(path: Any) -> DataError:
    return DataError(f"data.path: got '{path}', which is empty; expected at least one row. Point it at data.")


# The Hub


def _from_hub(spec: SourceSpec, path: str) -> Dataset:
    if spec.revision is None:
        logger.warning("data.revision is not set: '%s' can change between runs. Pin a commit hash.", path)
    try:
        return datasets.load_dataset(path, spec.name, split=spec.split, revision=spec.revision)
    except Exception as error:
        raise DataError(
            f"data.path: got '{path}' (name {spec.name}, split '{spec.split}', revision {spec.revision}), which cannot "
            f"be loaded ({_reason(error)}); expected a reachable Hub dataset. Check the name, split and access."
        ) from error


# Python objects


def _from_python(spec: SourceSpec, path: str) -> Dataset:
    value = _attribute(path)
    value = value() if callable(value) else value
    if isinstance(value, datasets.DatasetDict):
        if spec.split not in value:
            known = ", ".join(map(str, value))
            raise DataError(f"data.split: got '{spec.split}' for '{path}'; expected one of {known}. Fix it.")
        return value[spec.split]
    if spec.split != "train":
        raise DataError(f"data.split: got '{spec.split}' for '{path}', which has no splits. Remove split.")
    if isinstance(value, Dataset):
        return value
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return Dataset.from_dict({"text": [value[key] for key in sorted(value)]})
    if isinstance(value, list) and all(isinstance(row, str) for row in value):
        return Dataset.from_dict({"text": value})
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return _read(path, lambda: Dataset.from_list(value))
    raise DataError(
        f"data.path: got '{path}', a {type(value).__name__}; expected a dict of texts, a list of texts or of dict "
        "rows, a datasets.Dataset, or a function of no arguments that returns one. Return one of these."
    )


def _attribute(path: str) -> Any:
    module_name, attribute = path.split(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise DataError(
            f"data.path: got '{path}', whose module cannot be imported ({_reason(error)}); expected an installed "
            "package. Install it or fix the name."
        ) from error
    if not hasattr(module, attribute):
        hint = did_you_mean(attribute, vars(module))
        raise DataError(f"data.path: got '{path}'; expected an attribute of '{module_name}'{hint or '. Fix the name.'}")
    return getattr(module, attribute)
