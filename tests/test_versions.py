"""What a device is slow at is said once, where it is used."""

from __future__ import annotations

import logging

import pytest
import torch
from test_trainer import arguments

from llmkd import CrossEntropy, DistillTrainer
from llmkd.versions import warn_of_slow_bfloat16
from llmkd.weights import load_model, locate

BARE = {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False}


@pytest.fixture
def on(monkeypatch, caplog):
    """Be on another CPU; returns what was said since."""

    def be(**capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**BARE, **capabilities})
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        warn_of_slow_bfloat16.cache_clear()
        return lambda: [record.message for record in caplog.records if record.message.startswith("bfloat16")]

    yield be
    warn_of_slow_bfloat16.cache_clear()


def test_a_model_in_bfloat16_on_a_cpu_without_units_for_it(on, make_model, tmp_path, caplog):
    make_model().bfloat16().save_pretrained(tmp_path)
    said = on()
    with caplog.at_level(logging.WARNING):
        load_model(locate(str(tmp_path)), "float32")
        assert said() == []
        for _ in range(2):
            load_model(locate(str(tmp_path)))
    assert len(said()) == 1
    assert "Set train.bf16=false, and models as {path: ..., dtype: float32}" in said()[0]


@pytest.mark.parametrize("capabilities", [{"amx_bf16": True}, {"avx512_bf16": True}, {"architecture": "aarch64"}])
def test_other_cpus_are_not_warned_of(on, capabilities):
    said = on(**capabilities)
    warn_of_slow_bfloat16()
    assert said() == []


def test_training_in_bfloat16(on, make_model, tokenizer, tmp_path):
    said = on()
    for bf16 in (False, True):
        assert len(said()) == 0
        DistillTrainer(make_model(), None, CrossEntropy(), arguments(tmp_path, bf16=bf16), processing_class=tokenizer)
    assert len(said()) == 1
