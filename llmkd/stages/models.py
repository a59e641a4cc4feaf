"""The models of a stage: checked when a recipe is, loaded when there is work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from llmkd import config as recipes
from llmkd.adapters import adapter_of
from llmkd.errors import ConfigError
from llmkd.stages.identity import model_revision, tokenizer_digest
from llmkd.teachers import LocalTeacher, local
from llmkd.vocabulary import common_columns
from llmkd.weights import locate, stand_in, standing_in


class Models:
    """Causal LMs of one tokenizer, by the part that each plays.

    Args:
        specs: part -> a path or the keys of `teachers.local`; None for a part that nobody plays.
        max_length: tokens that each of them must be able to read.

    Raises:
        ConfigError: no model, an unknown key or path, no causal LM, a short context, or other tokenizers.
    """

    def __init__(self, specs: Mapping[str, str | dict[str, Any] | None], max_length: int) -> None:
        given = {part: spec for part, spec in specs.items() if spec is not None}
        if not given:
            raise ConfigError(f"stage: got no model; expected {' or '.join(specs)}. Name one.")
        self._specs = {part: {"path": spec} if isinstance(spec, str) else dict(spec) for part, spec in given.items()}
        with nullcontext() if standing_in() else stand_in("plan"):
            planned = {part: self._load(part) for part in given}
        for part, model in planned.items():
            _check(part, model, max_length)
        first, *others = planned.values()
        self.parts, self.tokenizer = tuple(planned), first.tokenizer
        other = others[0] if others else None
        self.columns = common_columns(
            first.vocab_size, other.vocab_size if other else None, first.tokenizer, other.tokenizer if other else None
        )

    def _load(self, part: str) -> LocalTeacher:
        return recipes.build("model", {"name": "local", **self._specs[part]}, {"model": {"local": local}})

    def load(self) -> dict[str, LocalTeacher]:
        """The models with their weights, each on this process's device, by part."""
        device = _device()
        loaded = {part: self._load(part) for part in self.parts}
        for model in loaded.values():
            model.model.to(device)
        return loaded

    def identity(self) -> dict[str, Any]:
        """Revisions of the models, and a digest of the tokenizer."""
        keys = ("path", "gguf_file", "revision")
        places = {part: {key: spec[key] for key in keys if key in spec} for part, spec in self._specs.items()}
        revisions = {part: model_revision(locate(**place)) for part, place in places.items()}
        return {"models": revisions, "tokenizer": tokenizer_digest(self.tokenizer)}


def _check(part: str, teacher: LocalTeacher, max_length: int) -> None:
    if adapter_of(teacher.model).unit != "token":
        raise ConfigError(f"stage.{part}: got a classifier; expected a causal LM. Use another model.")
    config: Any = teacher.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and context < max_length and not standing_in():
        raise ConfigError(
            f"stage.max_length: got {max_length}; expected at most {context}, the context of {part}. Set it so."
        )


def _device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    return torch.device(kind.type if kind else "cpu", int(os.environ.get("LOCAL_RANK", "0")))
