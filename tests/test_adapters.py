"""Reading a causal LM: its own logits at the supervised positions, whatever its family, its head and the padding."""

from __future__ import annotations

import pytest
import torch
from oracles import dense_rows
from torch import Tensor

from llmkd.adapters import freeze
from llmkd.adapters.causal_lm import check_head, check_packing, head_settings, read, vocabulary
from llmkd.data.collate import Collator
from llmkd.divergences import DIVERGENCES
from llmkd.errors import ConfigError
from llmkd.objectives import TokenDistill
from llmkd.types import Outputs, row_labels, supervised_rows

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 0.3},
    "gemma3_text": {"final_logit_softcapping": 0.3},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 4.0},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 0.5},
    "falcon_h1": {
        "lm_head_multiplier": 0.2,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_chunk_size": 8,
    },
    "nanochat": {"final_logit_softcapping": 0.3},
    "gpt2": {"tie_word_embeddings": True},
    "opt": {"word_embed_proj_dim": 16},
    "phi": {},
    "gpt_neox": {},
    "mistral": {},
    "mixtral": {},
    "olmo2": {},
    "phi3": {},
    "stablelm": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "starcoder2": {},
    "bloom": {},
    "smollm3": {},
}
NORMS_IN_FP32 = ("gemma2", "gemma3_text", "cohere", "falcon_h1", "granite", "qwen3", "llama", "llama-tied")
DOCUMENTS = [([5, 9, 8, 7, 30, 31], 3), ([40, 41, 42], 1), ([50, 51, 52, 53, 54, 55, 56, 57, 58], 6)]


def family(make_model, name: str, **changes):
    return make_model(name.split("-")[0], **{**FAMILIES.get(name, {}), **changes})


def examples() -> list[dict[str, list[int]]]:
    """Documents of unequal lengths, each with a prompt that is not supervised."""
    return [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in DOCUMENTS]


def own_logits(model) -> Tensor:
    """The model's logits of each document alone, where the next token is supervised; one loop, one shift."""
    rows = []
    for example in examples():
        logits = model(input_ids=torch.tensor([example["input_ids"]]), use_cache=False).logits[0]
        rows += [logits[t - 1] for t, label in enumerate(example["labels"]) if label != -100]
    return torch.stack(rows)


def logits_of(outputs: Outputs) -> Tensor:
    return outputs.rows.logits(slice(None))


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_the_models_own_logits_whatever_the_padding(make_model, name):
    model = family(make_model, name)
    expected = own_logits(model)
    for collate in (Collator(0), Collator(0, pad_to_multiple_of=16), Collator(0, padding_side="left")):
        rows = logits_of(read(model, collate(examples()), ()))
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "qwen3"])
def test_more_left_padding_changes_nothing(make_model, name):
    model = family(make_model, name).double()
    batch = Collator(0, padding_side="left", pad_to_multiple_of=32)(examples())
    torch.testing.assert_close(logits_of(read(model, batch, ())), own_logits(model), rtol=1e-9, atol=1e-9)


def test_rows_follow_from_the_labels_where_the_collator_has_not_counted_them(make_model):
    model, batch = make_model(), Collator(0)(examples())
    plain = {name: value for name, value in batch.items() if name != "rows"}
    assert supervised_rows(plain).tolist() == batch["rows"].tolist()
    torch.testing.assert_close(logits_of(read(model, plain, ())), logits_of(read(model, batch, ())))
    assert row_labels(plain).tolist() == [label for e in examples() for label in e["labels"] if label != -100]


def test_a_batch_without_a_supervised_token_has_no_rows(make_model):
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": torch.full((2, 4), -100)}
    assert len(read(make_model(), batch, ()).rows) == 0


def test_rows_are_cut_to_the_vocabulary(make_model):
    model, batch = make_model(), Collator(0)(examples())
    whole, cut = read(model, batch, ()).rows, read(model, batch, (), vocab_size=259).rows
    assert (whole.vocab_size, cut.vocab_size, vocabulary(model)) == (264, 259, 264)
    torch.testing.assert_close(cut.logits(slice(None)), whole.logits(slice(None))[:, :259])


def test_signals_come_only_when_they_are_asked_for(make_model):
    model, batch = make_model(attn_implementation="eager"), Collator(0)(examples())
    plain = read(model, batch, {"logits"})
    assert plain.hidden_states is None
    assert plain.attentions is None
    full = read(model, batch, {"hidden_states", "attentions"})
    assert [tuple(h.shape) for h in full.hidden_states] == [(3, 9, 32)] * 3
    assert [tuple(a.shape) for a in full.attentions] == [(3, 4, 9, 9)] * 2
    torch.testing.assert_close(logits_of(full), logits_of(plain))


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-tied", "gpt2", "gemma2", "gemma3_text", "cohere", "granite", "falcon_h1", "phi", "opt", "qwen3"],
)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_gradients_are_those_of_the_dense_forward(make_model, name, divergence):
    student, teacher = family(make_model, name).double(), make_model("llama", seed=7).double()
    if name == "phi":
        torch.nn.init.normal_(student.lm_head.bias)
    batch = Collator(0)(examples())
    loss = TokenDistill(divergence)(read(student, batch, ()), read(teacher, batch, ()), batch)
    loss["total"].backward()
    found = {key: p.grad for key, p in student.named_parameters()}
    student.zero_grad()
    dense = dense_rows(DIVERGENCES[divergence], own_logits(student), own_logits(teacher)).sum()
    dense.backward()
    torch.testing.assert_close(loss["total"], dense)
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(
            found[key], parameter.grad, rtol=1e-6, atol=1e-6 if name in NORMS_IN_FP32 else 1e-11, msg=key
        )


def test_gradients_in_fp32_keep_the_precision_of_the_dense_forward(make_model):
    student, teacher = make_model("gemma2", final_logit_softcapping=0.3), make_model("llama", seed=7)
    batch = Collator(0)(examples())
    TokenDistill("forward_kl")(read(student, batch, ()), read(teacher, batch, ()), batch)["total"].backward()
    found = {key: p.grad for key, p in student.named_parameters()}
    student.zero_grad()
    dense_rows(DIVERGENCES["forward_kl"], own_logits(student), own_logits(teacher)).sum().backward()
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_head_passes_the_check(make_model, name):
    model = family(make_model, name).train()
    check_head(model)
    assert model.training, "the check leaves the model as it was"


def test_a_head_that_does_more_is_an_error(make_model):
    model = make_model("cohere")
    model.config.logit_scale = 1.0  # the model took its own from the config when it was built
    with pytest.raises(ConfigError, match="'cohere': logits differ"):
        check_head(model)


def test_a_head_that_is_wrapped_in_more_is_an_error(make_model):
    model = make_model()
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits.roll(1, -1))
    with pytest.raises(ConfigError, match="does more than scale, soft-cap and bias"):
        check_head(model)


def test_a_model_without_weights_cannot_be_checked(make_model):
    with torch.device("meta"):
        check_head(make_model("cohere"))


def test_head_settings_follow_the_kind_of_model(make_model):
    assert head_settings(family(make_model, "granite").config) == (0.125, None)
    assert head_settings(family(make_model, "cohere").config) == (0.25, None)
    assert head_settings(family(make_model, "gemma2").config) == (1.0, 0.3)
    assert head_settings(make_model("gemma3_text").config) == (1.0, None)


def test_frozen_means_no_gradient_and_no_dropout(make_model):
    model = freeze(make_model("gpt2", resid_pdrop=0.5).train())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


PACKABLE = ["llama", "qwen2", "qwen3", "gemma3_text", "cohere", "granite", "gpt2", "phi", "gpt_neox", "mixtral"]


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(make_model, name, attention):
    model = family(make_model, name, attn_implementation=attention)
    check_packing(model, 2)
    one, two, three = examples()
    packed = [
        {key: one[key] + two[key] for key in one} | {"seq_lengths": [6, 3]},
        {**three, "seq_lengths": [9]},
    ]
    rows = logits_of(read(model, Collator(0, packing=True)(packed), ()))
    torch.testing.assert_close(rows, own_logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "mamba", "falcon_h1", "opt", "gpt_oss"])
def test_a_model_that_cannot_keep_documents_apart_is_refused(make_model, name):
    model = family(make_model, name).train()
    with pytest.raises(ConfigError, match=rf"packing.*'{name}'.*Set data.packing=false"):
        check_packing(model, 1)
    assert model.training


def test_flash_attention_keeps_documents_apart_in_one_row_only(make_model):
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    check_packing(model, 1)
    with pytest.raises(ConfigError, match=r"flash_attention_2.*per_device_train_batch_size=1"):
        check_packing(model, 2)


def test_packing_is_checked_without_weights_as_far_as_it_goes(make_model):
    with torch.device("meta"):
        check_packing(make_model(), 2)
        with pytest.raises(ConfigError, match="packing"):
            check_packing(make_model("bloom"), 2)
