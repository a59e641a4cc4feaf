"""A student that exists already."""

from __future__ import annotations

from typing import Any

from transformers.modeling_utils import PreTrainedModel

from llmkd.weights import load_model, locate


def pretrained(
    *,
    path: str,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    num_labels: int | None = None,
) -> PreTrainedModel:
    """A model from the Hub, a folder, a GGUF file or `pkg://package/file.gguf`, as it is.

    Args:
        path, gguf_file, revision: see `weights.locate`.
        dtype: of the master weights; float32 with `train.bf16: true` is mixed precision, bfloat16 halves the memory.
        attn_implementation: transformers' attention backend; None lets it choose.
        trust_remote_code: run code that the model's repository carries.
        num_labels: make it a sequence classifier of that many classes, or with 1 a regressor; the head is new and random
            unless the checkpoint has one of that size.

    Reference: Wolf et al. 2020 (transformers), arXiv 1910.03771.
    """
    extra: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    return load_model(locate(path, gguf_file, revision), dtype, trust_remote_code, num_labels, **extra)
