"""Heads of one family that differ in padding rows are cut to the tokenizer; other tokenizers are an error."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from llmkd import DistillTrainer, LocalTeacher, Mix, TokenDistill
from llmkd.data.collate import Collator
from llmkd.divergences import DIVERGENCES
from llmkd.errors import ConfigError
from llmkd.objectives import CrossEntropy
from llmkd.students.tiny import byte_tokenizer
from llmkd.vocabulary import common_columns

TOKENS = 259
EXAMPLES = [
    {"input_ids": [5, 9, 8, 7, 30], "labels": [-100, -100, 8, 7, 30]},
    {"input_ids": [4, 258, 0], "labels": [-100, 258, 0]},
]


def trainer_of(student, teacher, tokenizer, folder) -> DistillTrainer:
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    objective = Mix([TokenDistill("forward_kl"), CrossEntropy()], [1.0, 0.5])
    return DistillTrainer(student, teacher, objective, args, train_dataset=EXAMPLES, processing_class=tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [(264, 272), (272, 264), (259, 272), (272, 259), (272, 272)])
def test_both_heads_are_cut_to_the_tokenizer(make_model, tokenizer, tmp_path, ours, theirs, tied):
    student = make_model(vocab_size=ours, tie_word_embeddings=tied)
    teacher = make_model("qwen2", seed=5, vocab_size=theirs)
    for model in (student, teacher):
        with torch.no_grad():  # padding that would take all the probability, were it read
            model.lm_head.weight[TOKENS:] = 50 * model.lm_head.weight[5]
    trainer = trainer_of(student, LocalTeacher(teacher, byte_tokenizer()), tokenizer, tmp_path)
    batch = Collator(0)(EXAMPLES)
    loss = trainer.compute_loss(trainer.distiller, batch, num_items_in_batch=torch.tensor(5))
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()

    mask = batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    z_s, z_t = (model(**inputs).logits[:, :-1][mask][:, :TOKENS] for model in (student, teacher))
    log_s, log_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    labels = batch["labels"][:, 1:][mask]
    expected = DIVERGENCES["forward_kl"](log_t.detach(), log_s).sum() - 0.5 * log_s[range(5), labels].sum()
    torch.testing.assert_close(loss, expected / 5)
    (expected / 5).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    padding = found["model.embed_tokens.weight" if tied else "lm_head.weight"][TOKENS:]
    assert padding.count_nonzero() == 0
    assert len(padding) == ours - TOKENS


@pytest.mark.parametrize(
    ("student", "teacher", "columns"),
    [
        (259, 259, None),
        (264, 264, 259),
        (264, 272, 259),
        (272, 264, 259),
        (259, 264, 259),
        (264, 259, 259),
        (264, None, 259),
        (259, None, None),
    ],
)
def test_columns_are_the_tokenizers_or_all(tokenizer, student, teacher, columns):
    assert common_columns(student, teacher, tokenizer, byte_tokenizer()) == columns
    assert common_columns(student, teacher, tokenizer, None) == columns


def test_without_a_tokenizer_only_equal_heads_can_be_compared():
    assert common_columns(264, 264, None, None) is None
    assert common_columns(264, None, None, None) is None
    with pytest.raises(ConfigError, match=r"student has 264 columns, the teacher 272.*Pass processing_class"):
        common_columns(264, 272, None, None)


def test_another_tokenizer_names_the_first_id_that_differs(tokenizer):
    other = byte_tokenizer(("extra",))
    with pytest.raises(ConfigError, match=r"id 259 is None for the student and 'extra' for the teacher.*Use a"):
        common_columns(264, 264, tokenizer, other)


def test_the_same_tokens_in_another_order_are_another_tokenizer():
    ours, theirs = byte_tokenizer(("one", "two")), byte_tokenizer(("two", "one"))
    with pytest.raises(ConfigError, match="id 259 is 'one' for the student and 'two' for the teacher"):
        common_columns(264, 264, ours, theirs)


def test_a_trainer_refuses_another_tokenizer_before_it_trains(make_model, tokenizer, tmp_path):
    teacher = LocalTeacher(make_model(), byte_tokenizer(("extra",)))
    with pytest.raises(ConfigError, match="tokenizers differ: id 259"):
        trainer_of(make_model(), teacher, tokenizer, tmp_path)


def test_a_head_narrower_than_the_tokenizer_cannot_be_compared_with_a_wider_one(tokenizer):
    for student, teacher in ((250, 264), (264, 250)):
        with pytest.raises(ConfigError, match=r"the tokenizer has 259 tokens, but the heads have"):
            common_columns(student, teacher, tokenizer, None)


def test_tokens_that_neither_model_has_cut_nothing(tokenizer):
    assert common_columns(250, 250, tokenizer, None) is None
    assert common_columns(250, None, tokenizer, None) is None
