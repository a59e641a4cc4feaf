"""Batches: padding on either side gives a model the same inputs; padding is told by length, never by id."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from llmkd.data import Collator, pad_with_unsupervised
from llmkd.errors import ConfigError

EXAMPLES = [
    {"input_ids": [5, 6, 0], "labels": [-100, 6, 0], "length": 3},
    {"input_ids": [7, 8, 9, 10, 0], "labels": [-100, -100, 9, 10, 0], "length": 5},
]


def test_right_padding():
    batch = Collator(pad_token_id=0)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0, 0], [7, 8, 9, 10, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 6, 0, -100, -100], [-100, -100, 9, 10, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_left_padding():
    batch = Collator(pad_token_id=0, padding_side="left", pad_to_multiple_of=4)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[0] * 5 + [5, 6, 0], [0] * 3 + [7, 8, 9, 10, 0]]
    assert batch["attention_mask"].tolist() == [[0] * 5 + [1] * 3, [0] * 3 + [1] * 5]
    assert batch["position_ids"].tolist() == [[0] * 5 + [0, 1, 2], [0] * 3 + [0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100] * 5 + [-100, 6, 0], [-100] * 3 + [-100, -100, 9, 10, 0]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_side_does_not_change_the_logits(make_model, family):
    model = make_model(family)
    logits = []
    for side in ("right", "left"):
        batch = Collator(pad_token_id=0, padding_side=side, pad_to_multiple_of=8)(EXAMPLES)
        mask = batch["attention_mask"].bool()
        del batch["labels"]
        with torch.no_grad():
            logits.append(model(**batch, use_cache=False).logits[mask])
    torch.testing.assert_close(*logits)


def test_unknown_padding_side():
    with pytest.raises(ConfigError, match="got 'middle'"):
        Collator(pad_token_id=0, padding_side="middle")  # pyright: ignore[reportArgumentType]


def test_packed_examples_need_a_packing_collator():
    with pytest.raises(ConfigError, match="packing=True"):
        Collator(pad_token_id=0)([{**EXAMPLES[0], "seq_lengths": [3]}])


def test_packed_batch_has_restarting_positions_and_no_mask():
    examples = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9], "seq_lengths": [2, 3]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    ]
    batch = Collator(pad_token_id=0, packing=True)(examples)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, 9], [-100, 6, 7, -100, -100]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("rows", [1, 3])
def test_packed_documents_do_not_see_each_other(make_model, attention, family, rows):
    changes = {"sliding_window": 3} if family == "mistral" else {}
    model = make_model(family, attn_implementation=attention, **changes)
    documents = [[11, 12, 13], [21, 22, 23, 24], [31]]
    changed = [[41, 42, 43], *documents[1:]]

    def logits(packed: list[list[int]]) -> torch.Tensor:
        ids = [token for document in packed for token in document]
        first = {"input_ids": ids, "labels": ids, "seq_lengths": [len(document) for document in packed]}
        others = [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "labels": [-100] * 10, "seq_lengths": [4, 6]}] * (
            rows - 1
        )
        batch = Collator(pad_token_id=0, packing=True)([first, *others])
        del batch["labels"]
        with torch.no_grad():
            return model(**batch, use_cache=False).logits[0, : len(ids)]

    before, after = logits(documents), logits(changed)
    assert torch.isfinite(before).all()
    assert not torch.allclose(before[:3], after[:3])
    assert torch.equal(before[3:], after[3:])
    with torch.no_grad():
        alone = model(torch.tensor([documents[1]]), use_cache=False).logits[0]
    torch.testing.assert_close(before[3:7], alone)


def test_pad_with_unsupervised():
    dataset = Dataset.from_list([*EXAMPLES, {"input_ids": [3, 4], "labels": [-100, 4], "length": 2}])
    padded = pad_with_unsupervised(dataset, 4)
    assert len(padded) == 4
    assert padded.features == dataset.features
    assert padded[:3] == dataset[:]
    assert padded[3] == {"input_ids": [5, 6, 0], "labels": [-100] * 3, "length": 3}
    assert pad_with_unsupervised(dataset, 3) is dataset
    assert len(pad_with_unsupervised(dataset, 8)) == 8
