"""Tiny models and a byte-level tokenizer, made on the spot: no test needs a network or a download."""

from __future__ import annotations

import os

import pytest
import torch

from llmkd.students.tiny import byte_tokenizer, tiny_config, tiny_model

if "PYTEST_XDIST_WORKER" in os.environ:  # processes that share the cores, and those that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def make_model():
    """Factory: `make_model("llama", num_hidden_layers=2, **config)` gives a tiny random causal LM in fp32."""

    def make(family: str = "llama", seed: int = 0, **changes):
        torch.manual_seed(seed)
        return tiny_model(tiny_config(family, **changes))

    return make


@pytest.fixture
def split_trainer(make_model, tokenizer, tmp_path):
    """Factory of trainers on the same rows in the same order, in steps of accumulation x micro of them.

    `objective` makes one; with `uneven`, every third row has fewer supervised tokens; `options` are TrainingArguments'.
    """
    from datasets import Dataset
    from transformers import TrainingArguments

    from llmkd import DistillTrainer

    def make(objective, micro: int = 8, accumulation: int = 1, uneven: bool = False, **options) -> DistillTrainer:
        rows = [{"input_ids": list(range(3 + i, 15 + i)), "labels": [-100, *range(4 + i, 15 + i)]} for i in range(16)]
        for row in rows[::3] if uneven else ():
            row["labels"][:8] = [-100] * 8
        args = TrainingArguments(
            output_dir=str(tmp_path / f"{micro}x{accumulation}"),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            logging_steps=1,
            use_cpu=True,
            **options,
        )
        torch.manual_seed(0)
        goal, student, teacher = objective(), make_model(), make_model(seed=1, hidden_size=48)
        data = Dataset.from_list(rows)
        return DistillTrainer(student, teacher, goal, args, data, data.select(range(3)), processing_class=tokenizer)

    return make
