"""A student from a config alone: other sizes, new weights, the tokenizer and the vocabulary of the model it is named after."""

from __future__ import annotations

import pytest
import torch
from transformers import set_seed

from llmkd.errors import ConfigError
from llmkd.students import scratch
from llmkd.students.tiny import tiny_config, tiny_model
from llmkd.weights import stand_in


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def path(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(tiny_config(request.param)).save_pretrained(folder)
    return str(folder)


def test_sizes_change_and_the_vocabulary_stays(path):
    model = scratch(path=path, config={"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2})
    assert model.config.hidden_size == 16
    assert len(model.get_decoder().layers) == 3
    assert model.config.vocab_size == 264
    assert model.dtype == torch.float32
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_weights_are_new_and_follow_the_seed(path):
    models = []
    for seed in (0, 0, 1):
        set_seed(seed)
        models.append(scratch(path=path).get_output_embeddings().weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_a_plan_has_no_weights(path):
    with stand_in("plan"):
        assert scratch(path=path, config={"num_hidden_layers": 3}).get_output_embeddings().weight.is_meta


def test_a_field_that_the_config_has_not(path):
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        scratch(path=path, config={"hiden_size": 16})
