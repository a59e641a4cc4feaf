"""A student that starts from nothing but a config."""

from __future__ import annotations

from typing import Any

from transformers.modeling_utils import PreTrainedModel

from llmkd.weights import locate, new_model


def scratch(
    *,
    path: str,
    config: dict[str, Any] | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """theta_s ~ the architecture's own initialisation: the family, vocabulary and tokenizer of `path`, of any size.

    Args:
        path, revision: the model whose config and tokenizer to take; its weights are not read.
        config: fields of that config to change, such as {hidden_size: 512, num_hidden_layers: 8}.
        dtype: of the master weights.
        trust_remote_code: run code that the model's repository carries.

    Raises:
        ConfigError: the config has no such field, or the sizes do not fit each other.

    Reference: Gu et al. 2025 (MiniPLM), arXiv 2410.17215, pre-trains its students so.
    """
    return new_model(locate(path, revision=revision), dict(config or {}), dtype, trust_remote_code)
