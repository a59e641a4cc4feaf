"""A cached teacher shows the rows of the live one, however the examples are arranged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shelf import MAX_LENGTH, TEXTS, opened, samples, save_texts, stage_of, write

from llmkd import DistillTrainer, TokenDistill
from llmkd.data import Collator, DocumentCollator
from llmkd.data.ids import dataset_ids, document_ids, id_name
from llmkd.divergences import DIVERGENCES
from llmkd.errors import ConfigError, DataError
from llmkd.objectives import DKD, NKD, OFA, CrossEntropy, Mix, SinKD
from llmkd.rows import DenseRows, HeadRows
from llmkd.teachers import check_needs, local
from llmkd.types import Outputs, Signal, row_labels

ALL_OF_IT = {"name": "topk", "k": 264, "bits": 32}
KINDS = {"hidden": "hidden", "topk": ALL_OF_IT}


@pytest.fixture(scope="module", params=KINDS)
def exact(request, teacher, corpus, tmp_path_factory):
    """A store that loses nothing."""
    folder = tmp_path_factory.mktemp(request.param) / "store"
    return opened(write(stage_of(teacher, corpus, folder, KINDS[request.param])))


def batches(data, size: int, seed: int, packing: bool = False, side="right"):
    """The data shuffled, in batches."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    collate = DocumentCollator(Collator(0, packing=packing, padding_side=side))
    return [collate([data[i] for i in order[start : start + size]]) for start in range(0, len(order), size)]


def log_probs(rows) -> torch.Tensor:
    """[n, V], whatever the rows are."""
    if isinstance(rows, DenseRows | HeadRows):
        return rows.logits(slice(None)).log_softmax(-1)
    return torch.full((len(rows), rows.vocab_size), torch.nan).scatter(1, rows.ids, rows.log_probs)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_those_of_the_live_teacher_in_any_order(exact, teacher, corpus, packing, side):
    live, data = local(path=str(teacher)), samples(corpus, packing=packing)
    for seed in range(3):
        for batch in batches(data, 3, seed, packing, side):
            shown, truth = (source(batch, {Signal.LOGITS}, 259).rows for source in (exact, live))
            torch.testing.assert_close(log_probs(shown), log_probs(truth), rtol=1e-4, atol=1e-5)


def test_hidden_states_are_the_live_ones_to_the_bit(teacher, corpus, tmp_path):
    """Batch by batch as the store was written: what a matrix product rounds depends on its shape."""
    store = opened(write(stage_of(teacher, corpus, tmp_path / "store", "hidden", batch_size=1)))
    live = local(path=str(teacher))
    for batch in batches(samples(corpus), 1, 0):
        shown, truth = (source(batch, {Signal.LOGITS}, 259).rows for source in (store, live))
        assert torch.equal(shown.hidden, truth.hidden)
        assert torch.equal(shown.logits(slice(None)), truth.logits(slice(None)))


OBJECTIVES = {
    **{name: (lambda name=name: TokenDistill(name)) for name in DIVERGENCES},
    "dkd": lambda: DKD(),
    "nkd": lambda: NKD(),
    "ofa": lambda: OFA(),
    "sinkd": lambda: SinKD(temperature=1.0, top_k=264),
    "policy": lambda: TokenDistill("reverse_kl", policy="reciprocal_rank"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_live_loss_and_gradient(exact, teacher, corpus, name):
    batch = batches(samples(corpus), 4, 1)[0]
    results = []
    for source in (local(path=str(teacher)), exact):
        torch.manual_seed(0)
        goal = OBJECTIVES[name]()
        check_needs(goal, source)
        z_s = torch.randn(len(row_labels(batch)), 259, generator=torch.Generator().manual_seed(3)).requires_grad_()
        loss = goal(Outputs(rows=DenseRows(z_s)), source(batch, goal.needs, 259), batch)["total"]
        results.append((loss.detach(), torch.autograd.grad(loss, z_s)[0]))
    (live, live_grad), (shown, shown_grad) = results
    torch.testing.assert_close(shown, live, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shown_grad, live_grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_hidden_states_serve_any_temperature_and_top_k_its_own(exact, temperature):
    if exact.temperature is None or exact.temperature == temperature:
        check_needs(TokenDistill(temperature=temperature), exact)
    else:
        with pytest.raises(ConfigError, match=r"temperature 3, but its rows are stored at 1\."):
            check_needs(TokenDistill(temperature=temperature), exact)


def test_what_a_store_cannot_show_is_said_at_once(exact, teacher, corpus, tmp_path):
    class Feature(CrossEntropy):
        needs = frozenset({Signal.HIDDEN_STATES})

    with pytest.raises(ConfigError, match="needs hidden_states from the teacher, which provides logits"):
        check_needs(Feature(), exact)
    drawn = opened(write(stage_of(teacher, corpus, tmp_path / "store", "sampled")))
    check_needs(Mix([TokenDistill(), CrossEntropy()]), drawn)
    for goal in (TokenDistill("reverse_kl"), TokenDistill(policy="confidence_gate"), Mix([TokenDistill(), DKD()])):
        with pytest.raises(ConfigError, match="needs logits from the teacher, which provides samples"):
            check_needs(goal, drawn)


@pytest.mark.parametrize("store", ["hidden", {"name": "topk", "k": 8, "mass": 0.9}, {"name": "sampled", "draws": 5}])
def test_a_batch_without_supervised_documents_has_no_rows(teacher, corpus, tmp_path, store):
    cached = opened(write(stage_of(teacher, corpus, tmp_path / "store", store)))
    batch = DocumentCollator(Collator(0))([{"input_ids": [4, 5, 6], "labels": [-100, -100, -100]}])
    assert batch["ids"].tolist() == []
    assert len(cached(batch, {Signal.LOGITS}, 259).rows) == 0


# What an example is called


def test_an_id_is_of_the_content_alone():
    one = {"input_ids": [4, 5, 6], "labels": [-100, 5, 6], "length": 3}
    packed = {"input_ids": [9, 9, 4, 5, 6], "labels": [-100, 9, -100, 5, 6], "seq_lengths": [2, 3]}
    unsupervised = {"input_ids": [4, 5, 6], "labels": [-100, -100, -100]}
    (name,) = document_ids([one])
    assert document_ids([packed])[1] == name
    assert document_ids([unsupervised, one]).tolist() == [name]
    others = [{"input_ids": [4, 5, 7], "labels": [-100, 5, 6]}, {"input_ids": [4, 5, 6], "labels": [-100, -100, 6]},
              {"input_ids": [4, 5], "labels": [-100, 5]}]  # fmt: skip
    assert len({name, *document_ids(others)}) == 4
    assert document_ids([one]).dtype == np.int64
    assert document_ids([one]).tolist() == [-7107669087558844882], "stores on disks have it"


def test_packing_keeps_the_names(corpus):
    apart, together = (np.concatenate(list(dataset_ids(samples(corpus, packing=p)))) for p in (False, True))
    assert sorted(apart) == sorted(together)
    assert len(apart) > len(TEXTS)


# Guards


def test_an_example_that_is_not_stored_is_named(exact, tmp_path):
    data = samples(save_texts(tmp_path / "other.jsonl", [*TEXTS[:2], "Nobody has seen this."]))
    name = id_name(document_ids([data[len(data) - 1]])[0])
    with pytest.raises(DataError, match=f"example {name} is not in .*max_length {MAX_LENGTH}.*Write a store of these"):
        exact.check_data(data)
    with pytest.raises(DataError, match=name):
        exact(DocumentCollator(Collator(0))([data[len(data) - 1]]), {Signal.LOGITS})


def test_the_trainer_checks_both_datasets_before_it_trains(exact, make_model, corpus, tmp_path, tokenizer):
    good, bad = samples(corpus), samples(save_texts(tmp_path / "other.jsonl", ["Nobody has seen this."]))
    parts = {"model": make_model(), "teacher": exact, "objective": TokenDistill(), "processing_class": tokenizer}
    for train, evaluation in ((bad, good), (good, bad), (good, {"a": good, "b": bad})):
        with pytest.raises(DataError, match="is not in"):
            DistillTrainer(**parts, train_dataset=train, eval_dataset=evaluation)


def test_another_tokenizer_is_an_error(exact, make_model):
    from llmkd.students.tiny import byte_tokenizer

    with pytest.raises(ConfigError, match="tokenizers differ: id 259"):
        DistillTrainer(make_model(), exact, TokenDistill(), processing_class=byte_tokenizer(("new",)))


def test_a_batch_without_ids_and_one_whose_labels_were_changed(exact, corpus):
    batch = batches(samples(corpus), 2, 0)[0]
    with pytest.raises(ConfigError, match=r"without ids.*llmkd\.data\.DocumentCollator"):
        exact({name: value for name, value in batch.items() if name != "ids"}, {Signal.LOGITS})
    fewer = {**batch, "rows": batch["rows"][1:]}
    with pytest.raises(DataError, match="rows in the store and"):
        exact(fewer, {Signal.LOGITS})
