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
