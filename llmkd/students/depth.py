"""A student that keeps some of a model's layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from llmkd.errors import ConfigError
from llmkd.students.pretrained import pretrained
from llmkd.zero3 import gathered, whole_models


def depth(
    *,
    layers: int | list[int],
    path: str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    num_labels: int | None = None,
    teacher_model: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """theta_s = the kept layers of theta, everything else copied: same width, vocabulary and tokenizer, fewer layers.

    Args:
        layers: which layers to keep (indices, in order), or how many: evenly spaced with both ends kept.
        path, gguf_file, revision: the model to cut, see `weights.locate`; without a path, the teacher.
        dtype: of the student's master weights. num_labels: see `pretrained`; it needs a path.

    Raises:
        ConfigError: indices out of range or not increasing, more layers than there are, or no model to cut.

    Reference: Sanh et al. 2019 (DistilBERT), arXiv 1910.01108.
    """
    if path is None and num_labels is not None:
        raise ConfigError(
            "model.num_labels: got a value for a cut teacher, which has a head; expected none. Add model.path."
        )
    given = {"gguf_file": gguf_file, "revision": revision, "num_labels": num_labels}
    base = teacher_model if path is None else pretrained(path=path, **given)
    if base is None:
        raise ConfigError("model: depth needs a model to cut; give model.path, or a local teacher to cut.")
    kept = kept_layers(layers, base.config.get_text_config().num_hidden_layers)
    return keep_layers(base, kept).to(getattr(torch, dtype))


def kept_layers(layers: int | list[int], total: int) -> list[int]:
    """The indices to keep; a number n means n evenly spaced ones, first and last included."""
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ConfigError(f"model.layers: got {layers}; expected 1 to {total}, the layers of the model to cut.")
        return [round(i * (total - 1) / max(1, layers - 1)) for i in range(layers)]
    if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= total:
        raise ConfigError(f"model.layers: got {layers}; expected increasing indices from 0 to {total - 1}.")
    return layers


def cut_config(config: Any, kept: list[int]) -> Any:
    """The config with len(kept) layers; per-layer lists such as `layer_types` are cut alike."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(text, name, [value[index] for index in kept])
    text.num_hidden_layers = len(kept)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def keep_layers(base: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A new model with copies of the kept layers and of everything that is not a layer."""
    total = base.config.get_text_config().num_hidden_layers
    prefix = _layer_prefix(base, total)
    with whole_models():
        student = type(base)._from_config(cut_config(base.config, kept), dtype=base.dtype)
    place = {f"{prefix}.{old}.": f"{prefix}.{new}." for new, old in enumerate(kept)}
    with gathered(base.parameters()):
        student.load_state_dict(_renamed(base.state_dict(), prefix, place))
    student.tie_weights()
    if base.can_generate():
        student.generation_config = copy.deepcopy(base.generation_config)
    return student


def _renamed(state: dict[str, Any], prefix: str, place: dict[str, str]) -> dict[str, Any]:
    """Entries outside the layers as they are, those of kept layers at their new place, others left out."""
    out = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}.")}
    for old, new in place.items():
        out |= {new + name.removeprefix(old): tensor for name, tensor in state.items() if name.startswith(old)}
    return out


def _layer_prefix(model: PreTrainedModel, total: int) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name
    raise ConfigError(f"model: found no list of {total} layers in {type(model).__name__}; depth cannot cut it.")
