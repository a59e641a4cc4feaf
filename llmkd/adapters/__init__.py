"""Adapters: how a model of one kind is read, checked and measured. `adapter_of(model)` chooses by the model's class."""

from __future__ import annotations

from torch import nn

from llmkd.adapters.base import Adapter, check_takes, freeze, unwrap
from llmkd.adapters.causal_lm import CAUSAL_LM
from llmkd.adapters.classifier import CLASSIFIER
from llmkd.adapters.regressor import REGRESSOR
from llmkd.errors import ConfigError


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a Hugging Face model or its PEFT wrapper.

    Raises:
        ConfigError: neither a causal LM nor a sequence classifier.
    """
    base = unwrap(model)
    if any(kind.__name__.endswith("ForSequenceClassification") for kind in type(base).__mro__):
        return REGRESSOR if base.config.num_labels == 1 else CLASSIFIER
    if getattr(base, "get_output_embeddings", lambda: None)() is not None:
        return CAUSAL_LM
    raise ConfigError(
        f"model: got {type(base).__name__}; expected a causal LM or a model for sequence classification. Load it with "
        "AutoModelForCausalLM or AutoModelForSequenceClassification."
    )


__all__ = ["CAUSAL_LM", "CLASSIFIER", "REGRESSOR", "Adapter", "adapter_of", "check_takes", "freeze", "unwrap"]
