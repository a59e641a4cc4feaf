"""Tiny random classifiers, and examples with and without a label."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

CLASSES = 3
LABELS = [0, 2, 1, 1, -100, 0, 2, 1, 0]
LENGTHS = [9, 5, 12, 3, 7, 10, 6, 4, 8]


def classifier(family: str = "bert", seed: int = 0, size: int = 32, **changes):
    """A tiny random classifier in fp32 and eval mode, that is not indifferent between its classes."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 264, "hidden_size": size, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_labels": CLASSES,
        "pad_token_id": 0,
    }
    if family == "distilbert":
        sizes = {"vocab_size": 264, "dim": size, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "num_labels": CLASSES}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **{**sizes, **changes}))
    for name, parameter in model.named_parameters():
        if name in ("classifier.weight", "score.weight", "bert.pooler.dense.weight"):
            parameter.data.mul_(20)
    return model.float().eval()


def examples(seed: int = 0, **extra) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "label": label, **extra} for row, label in zip(ids, LABELS, strict=True)]


def data(seed: int = 0) -> Dataset:
    return Dataset.from_list(examples(seed))


def own_logits(model, seed: int = 0) -> Tensor:
    """The model's logits of each labelled example, alone and unpadded."""
    alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in examples(seed) if row["label"] >= 0]
    return torch.stack(alone)


def targets() -> Tensor:
    return torch.tensor([label for label in LABELS if label >= 0])
