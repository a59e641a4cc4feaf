"""A live teacher is frozen, deterministic, keeps its dtype, and shows the signals that are asked for."""

from __future__ import annotations

import pytest
import torch

from llmkd.data.collate import Collator
from llmkd.divergences import DIVERGENCES
from llmkd.errors import ConfigError
from llmkd.objectives import TokenDistill
from llmkd.teachers import TEACHERS, LocalTeacher, Teacher, local
from llmkd.types import Outputs, Signal


@pytest.fixture
def batch():
    examples = [
        {"input_ids": [5, 9, 8, 7, 30], "labels": [-100, -100, 8, 7, 30]},
        {"input_ids": [4, 3], "labels": [-100, 3]},
    ]
    return Collator(0)(examples)


def logits(outputs: Outputs) -> torch.Tensor:
    return outputs.rows.logits(slice(None))


def own(model, batch) -> torch.Tensor:
    z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return z[:, :-1][batch["labels"][:, 1:] != -100]


def test_it_is_frozen_and_has_no_dropout(make_model, batch):
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    teacher = LocalTeacher(model)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    first, second = teacher(batch, {Signal.LOGITS}), teacher(batch, {Signal.LOGITS})
    assert torch.equal(logits(first), logits(second))
    torch.testing.assert_close(logits(first), own(model, batch))


def test_nothing_it_shows_has_a_graph(make_model, batch):
    outputs = LocalTeacher(make_model(attn_implementation="eager"))(batch, set(Signal))
    assert not logits(outputs).requires_grad
    assert not any(tensor.requires_grad for tensor in (*outputs.hidden_states, *outputs.attentions))


def test_only_what_is_asked_for_is_shown(make_model, batch):
    teacher = LocalTeacher(make_model(attn_implementation="eager"))
    plain = teacher(batch, {Signal.LOGITS})
    assert (plain.hidden_states, plain.attentions) == (None, None)
    assert len(teacher(batch, {Signal.HIDDEN_STATES}).hidden_states) == 3
    assert len(teacher(batch, {Signal.ATTENTIONS}).attentions) == 2
    assert teacher(batch, {Signal.LOGITS}, 259).rows.vocab_size == 259


def test_it_keeps_its_own_dtype_beside_a_student_in_another(make_model, batch):
    model = make_model(seed=3).bfloat16()
    teacher, student = LocalTeacher(model), make_model()
    shown = teacher(batch, {Signal.LOGITS})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert shown.rows.hidden.dtype == torch.bfloat16
    from llmkd.adapters.causal_lm import read

    loss = TokenDistill("forward_kl")(read(student, batch, ()), shown, batch)["total"]
    loss.backward()
    with torch.no_grad():
        log_t, log_s = (own(m, batch).float().log_softmax(-1) for m in (model, student))
    torch.testing.assert_close(loss, DIVERGENCES["forward_kl"](log_t, log_s).sum(), rtol=1e-3, atol=1e-5)
    assert {parameter.grad.dtype for parameter in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_of_the_student_does_not_reach_it(make_model, batch, dtype):
    model = make_model().to(dtype)
    teacher = LocalTeacher(model)
    expected = logits(teacher(batch, {Signal.LOGITS}))
    with torch.autocast("cpu", dtype=torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        shown = teacher(batch, {Signal.LOGITS})
    assert shown.rows.hidden.dtype == dtype
    assert torch.equal(logits(shown), expected)


def test_it_is_a_teacher(make_model, tokenizer):
    teacher = LocalTeacher(make_model(), tokenizer)
    assert isinstance(teacher, Teacher)
    assert teacher.provides == {Signal.LOGITS, Signal.HIDDEN_STATES, Signal.ATTENTIONS}
    assert teacher.vocab_size == 264
    assert teacher.tokenizer is tokenizer
    assert LocalTeacher(make_model()).tokenizer is None


def test_it_is_read_from_a_folder_in_its_checkpoints_dtype(make_model, tokenizer, tmp_path):
    model = make_model("qwen2").half()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = local(path=str(tmp_path))
    assert teacher.model.dtype == torch.float16
    assert teacher.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert TEACHERS["local"](path=str(tmp_path), dtype="float32").model.dtype == torch.float32


def test_a_head_that_llmkd_cannot_read_is_an_error_at_once(make_model):
    model = make_model("cohere")
    model.config.logit_scale = 9.0
    with pytest.raises(ConfigError, match="its head does more"):
        LocalTeacher(model)
