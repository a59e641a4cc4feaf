"""Reading a text classifier: one row an example, its own logits, the same losses, and what cannot be read."""

from __future__ import annotations

import pytest
import torch
from classes import CLASSES, LABELS, classifier, examples, own_logits, targets
from oracles import dense_rows, instance
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

from llmkd import LocalTeacher
from llmkd.adapters import CAUSAL_LM, CLASSIFIER, adapter_of
from llmkd.adapters.classifier import check, check_packing, columns, read
from llmkd.data.collate import Collator, ExampleCollator, collator
from llmkd.divergences import DIVERGENCES, reads_label
from llmkd.errors import ConfigError
from llmkd.objectives import OBJECTIVES, CrossEntropy, TokenDistill
from llmkd.rows import TopKRows
from llmkd.students.tiny import byte_tokenizer
from llmkd.types import Kind, Outputs, Signal, row_labels, supervised_rows


@pytest.fixture
def batch(tokenizer):
    return ExampleCollator(tokenizer)(examples(sentence="text", idx=4))


# Which adapter


def test_the_models_class_chooses(make_model, tokenizer):
    for model in (classifier(), classifier("llama"), classifier("distilbert")):
        assert adapter_of(model) is CLASSIFIER
    assert adapter_of(make_model()) is CAUSAL_LM
    wrapped = get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert adapter_of(wrapped) is CLASSIFIER
    assert adapter_of(get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))) is CAUSAL_LM


def test_a_model_of_another_kind_is_an_error():
    with pytest.raises(ConfigError, match=r"model: got BertModel; expected .*AutoModelForSequenceClassification"):
        adapter_of(AutoModel.from_config(classifier().config))


# Reading


def test_the_collator_keeps_what_the_model_takes(batch):
    assert set(batch) == {"input_ids", "attention_mask", "labels", "rows"}
    assert batch["labels"].tolist() == LABELS
    assert batch["rows"].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    plain = {name: value for name, value in batch.items() if name != "rows"}
    assert supervised_rows(plain).tolist() == batch["rows"].tolist()
    assert row_labels(plain).tolist() == row_labels(batch).tolist() == targets().tolist()


def test_the_collator_follows_the_unit(tokenizer):
    assert collator("token", tokenizer) == Collator(tokenizer.pad_token_id)
    assert collator("token", None) == Collator(0)
    assert isinstance(collator("example", tokenizer), ExampleCollator)
    with pytest.raises(ConfigError, match="processing_class: got None"):
        collator("example", None)


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "qwen2", "gpt2"])
def test_rows_are_the_models_own_logits_of_the_labelled_examples(family, batch):
    model = classifier(family)
    check(model)
    kinds = {"token_type_ids": torch.zeros_like(batch["input_ids"])} if family == "distilbert" else {}
    rows = read(model, batch | kinds, ()).rows
    torch.testing.assert_close(rows.logits(slice(None)), own_logits(model), rtol=1e-4, atol=1e-5)
    assert rows.vocab_size == CLASSIFIER.width(model) == CLASSES


def test_token_types_reach_a_model_that_has_them(batch):
    model, kinds = classifier(), torch.ones_like(batch["input_ids"])
    first, second = (read(model, batch | extra, ()).rows.values for extra in ({}, {"token_type_ids": kinds}))
    assert not torch.allclose(first, second)


def test_signals_come_only_when_they_are_asked_for(batch):
    model = classifier(attn_implementation="eager")
    plain, full = read(model, batch, {Signal.LOGITS}), read(model, batch, {Signal.HIDDEN_STATES, Signal.ATTENTIONS})
    assert (plain.hidden_states, plain.attentions) == (None, None)
    assert (len(full.hidden_states), len(full.attentions)) == (3, 2)


def test_a_batch_without_a_label_has_no_rows(batch):
    rows = read(classifier(), {"input_ids": batch["input_ids"], "labels": torch.full((9,), -100)}, ()).rows
    assert len(rows) == 0


# What cannot be read


@pytest.mark.parametrize(
    "changes",
    [{"problem_type": "regression"}, {"problem_type": "multi_label_classification"}],
)
def test_several_values_and_several_labels_are_refused(changes):
    model = classifier(**changes)
    with pytest.raises(ConfigError, match=r"model: got num_labels=3 and problem_type=.*several values"):
        check(model)
    with pytest.raises(ConfigError):
        LocalTeacher(model)


def test_a_decoder_needs_to_know_its_pad_token():
    with pytest.raises(ConfigError, match=r"'llama': config.pad_token_id is None.*tokenizer.pad_token_id"):
        check(classifier("llama", pad_token_id=None))
    check(classifier(pad_token_id=None))


def test_other_classes_are_refused(make_model):
    with pytest.raises(ConfigError, match=r"classes: the student has 3, the teacher 4; .*num_labels=4"):
        columns(classifier(), LocalTeacher(classifier(num_labels=4)), None)
    with pytest.raises(ConfigError, match=r"classes: the student has 3, the teacher 264"):
        columns(classifier(), LocalTeacher(make_model()), None)


def test_the_same_names_in_another_order_are_refused(tokenizer):
    names = [{"id2label": dict(enumerate(order))} for order in (("no", "maybe", "yes"), ("Yes", "maybe", "no"))]
    ours, theirs = (classifier(**given) for given in names)
    with pytest.raises(ConfigError, match=r"classes: the student's are .*; expected the same order"):
        columns(ours, LocalTeacher(theirs), tokenizer)
    assert columns(ours, LocalTeacher(classifier(**names[0])), tokenizer) is None
    assert columns(ours, LocalTeacher(classifier()), tokenizer) is None, "names that nobody gave"
    assert columns(ours, None, tokenizer) is None


def test_other_tokenizers_are_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"tokenizers differ: id 259"):
        columns(classifier(), LocalTeacher(classifier(), byte_tokenizer(extra_tokens=("new",))), tokenizer)


def test_packing_is_refused():
    with pytest.raises(ConfigError, match="packing"):
        check_packing(classifier(), 1)


# The loss


@pytest.mark.parametrize(("name", "temperature"), [*((name, 1.0) for name in sorted(DIVERGENCES)), ("forward_kl", 2.0)])
def test_gradients_are_those_of_the_dense_forward(name, temperature, batch):
    student, teacher = classifier().double(), classifier(seed=9, size=48).double()
    fn = instance(DIVERGENCES, name)
    shown = LocalTeacher(teacher)(batch, {Signal.LOGITS})
    loss = TokenDistill(fn, temperature)(read(student, batch, ()), shown, batch)["total"]
    label = (row_labels(batch),) if reads_label(fn) else ()
    dense = dense_rows(fn, own_logits(student), own_logits(teacher), *label, temperature=temperature).sum()
    assert_same(loss, dense, student)


def test_cross_entropy_is_torchs(batch):
    student = classifier().double()
    loss = CrossEntropy()(read(student, batch, ()), None, batch)["total"]
    assert_same(loss, nn.functional.cross_entropy(own_logits(student), targets(), reduction="sum"), student)


def assert_same(loss: Tensor, expected: Tensor, student: nn.Module) -> None:
    torch.testing.assert_close(loss, expected)
    pairs = [torch.autograd.grad(x, list(student.parameters()), allow_unused=True) for x in (loss, expected)]
    for found, wanted in zip(*pairs, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


# Neighbouring tokens of a phrase are nothing that classes have
OF_ROWS = sorted(
    name for name, entry in OBJECTIVES.items() if "spans" not in entry.reads and Kind.DISTRIBUTION in entry.takes
)


@pytest.mark.parametrize("name", OF_ROWS)
def test_every_objective_takes_classes(name, batch):
    objective = OBJECTIVES[name](**{"uskd": {"weak_head": nn.Linear(32, CLASSES)}}.get(name, {}))
    student, teacher = classifier(), LocalTeacher(classifier(seed=9))
    needs = objective.needs | objective.student_needs
    loss = objective(read(student, batch, needs), teacher(batch, {Signal.LOGITS, *objective.needs}), batch)
    loss["total"].backward()
    assert loss["total"].isfinite()
    trained = student.bert.encoder if Signal.HIDDEN_STATES in objective.needs else student.classifier
    assert sum(p.grad.abs().sum() for p in trained.parameters() if p.grad is not None) > 0


def test_a_teacher_of_a_few_classes(batch):
    student, teacher = classifier(), LocalTeacher(classifier(seed=9))
    shown = teacher(batch, {Signal.LOGITS}).rows.logits(slice(None)).log_softmax(-1)
    kept, ids = shown.topk(1)  # with two, the tail would be the third class itself
    found = {}
    for name, rows in (("top", TopKRows(ids, kept, CLASSES)), ("all", TopKRows(*shown.sort()[::-1], CLASSES))):
        found[name] = TokenDistill()(read(student, batch, ()), Outputs(rows=rows), batch)["total"]
    whole = TokenDistill()(read(student, batch, ()), teacher(batch, {Signal.LOGITS}), batch)["total"]
    torch.testing.assert_close(found["all"], whole)
    assert 0 < found["top"] < whole
