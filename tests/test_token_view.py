"""The token view: KL and the five best tokens of both models, at the place that they were expected for."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from llmkd import CrossEntropy, DistillTrainer, TokenDistill
from llmkd.rows import TopKRows
from llmkd.support import log_softmax
from llmkd.teachers.local import LocalTeacher
from llmkd.token_view import BEST, TOKENS, token_view
from llmkd.types import Outputs, Signal

TEXTS = ("the cat sat", "a dog ran off the mat and on", "é")


def rows(tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids if len(row) > 2]


@pytest.fixture
def make(make_model, tokenizer, tmp_path):
    def build(teacher=None, objective=None, **changes):
        return DistillTrainer(
            make_model(seed=1), teacher, objective or TokenDistill("forward_kl"),
            TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True),
            processing_class=tokenizer, **{"eval_dataset": rows(tokenizer), **changes},
        )  # fmt: skip

    return build


def test_it_says_what_both_models_say(make, make_model, tokenizer):
    teacher = make_model(seed=2)
    trainer = make(teacher)
    view = token_view(trainer)
    assert view is not None
    assert ["".join(token["text"] for token in sample) for sample in view] == list(TEXTS[:2])
    for sample, row in zip(view, rows(tokenizer), strict=True):
        ids = torch.tensor([row["input_ids"]])
        width = trainer.distiller.vocab_size
        with torch.no_grad():
            log_t, log_s = (
                model(ids).logits[0, :, :width].double().log_softmax(-1)
                for model in (teacher, trainer.distiller.student)
            )
        assert [set(token) for token in sample[:2]] == [{"text"}, {"text"}], "not supervised"
        for place, token in enumerate(sample[2:], start=2):
            before = place - 1
            expected = (log_t[before].exp() * (log_t[before] - log_s[before])).sum().item()
            assert token["kl"] == pytest.approx(expected, abs=1e-4)
            for who, log_p in (("teacher", log_t[before]), ("student", log_s[before])):
                best = log_p.topk(BEST)
                assert [chance for _, chance in token[who]] == pytest.approx(best.values.exp().tolist(), abs=1e-4)
                assert token[who][0][0] in (
                    tokenizer.decode(best.indices[0]),
                    tokenizer.convert_ids_to_tokens(best.indices[0].item()),
                )


def test_a_part_of_a_character_is_shown_as_the_tokenizer_writes_it(make, make_model, tokenizer):
    ids = tokenizer("né")["input_ids"]
    view = token_view(make(make_model(seed=2), eval_dataset=[{"input_ids": ids, "labels": [-100, *ids[1:]]}]))
    assert [token["text"] for token in view[0]] == ["n", "Ã", "©"]


def test_a_long_sample_is_cut(make, make_model, tokenizer):
    ids = tokenizer("ab " * 150)["input_ids"]
    view = token_view(make(make_model(seed=2), eval_dataset=[{"input_ids": ids, "labels": [-100, *ids[1:]]}] * 9))
    assert [len(sample) for sample in view] == [TOKENS] * 4
    assert all("kl" in token for token in view[0][1:])


def test_a_teacher_that_shows_its_best_tokens_only(make, make_model, tokenizer):
    class TopK(LocalTeacher):
        def __call__(self, batch, needs, vocab_size=None):
            rows = super().__call__(batch, needs, vocab_size).rows
            best = log_softmax(rows.logits(slice(0, len(rows)))).topk(8)
            return Outputs(rows=TopKRows(best.indices, best.values, rows.vocab_size))

    whole = token_view(make(make_model(seed=2)))
    few = token_view(make(TopK(make_model(seed=2), tokenizer)))
    assert [[t.get("teacher") for t in sample] for sample in few] == [[t.get("teacher") for t in s] for s in whole]
    pairs = [pair for samples in zip(few, whole, strict=True) for pair in zip(*samples, strict=True)]
    assert all(0 <= one["kl"] <= other["kl"] + 1e-4 for one, other in pairs if "kl" in one)


def test_rows_of_fewer_events_show_as_many(make, make_model, tokenizer):
    class Few(LocalTeacher):
        def __call__(self, batch, needs, vocab_size=None):
            rows = super().__call__(batch, needs, vocab_size).rows
            best = log_softmax(rows.logits(slice(0, len(rows)))).topk(8)
            beyond = torch.arange(8) >= 1 + torch.arange(len(rows))[:, None] % 8
            ids, log_p = best.indices.masked_fill(beyond, -1), best.values.masked_fill(beyond, -torch.inf)
            return Outputs(rows=TopKRows(ids, log_p, rows.vocab_size))

    whole = token_view(make(make_model(seed=2)))
    few = token_view(make(Few(make_model(seed=2), tokenizer)))
    shown = [[t["teacher"] for t in sample if "kl" in t] for sample in few]
    assert shown == [
        [t["teacher"][: min(BEST, 1 + i % 8)] for i, t in enumerate(t for t in sample if "kl" in t)] for sample in whole
    ]


@pytest.mark.parametrize("shown", [{"provides": frozenset({Signal.SAMPLES})}, {"temperature": 2.0}])
def test_rows_that_tell_no_chances_have_no_view(make, make_model, tokenizer, shown):
    teacher = LocalTeacher(make_model(seed=2), tokenizer)
    trainer = make(teacher)
    assert token_view(trainer) is not None
    for name, value in shown.items():
        setattr(teacher, name, value)
    assert token_view(trainer) is None


def test_nothing_to_show(make, make_model):
    assert token_view(make(None, CrossEntropy())) is None
    assert token_view(make(make_model(seed=2), eval_dataset=None)) is None
