"""Rows with labels: pairs, lengths, labels of either kind, what is dropped, what is refused; folders laid out as on the Hub."""

from __future__ import annotations

import gzip
import json

import pytest

from llmkd.data import DataSpec, EvalSpec, load_rows, prepare
from llmkd.data.examples import check_labels
from llmkd.errors import DataError

ROWS = [
    {"premise": "a cat sat", "hypothesis": "a cat", "gold": 1},
    {"premise": "a dog", "hypothesis": "no dog at all", "gold": 0},
    {"premise": "on a mat", "hypothesis": "off", "gold": -1},
    {"premise": "ran", "hypothesis": "sat", "gold": 0},
]
PAIR = {"text": "premise", "text_pair": "hypothesis", "label": "gold"}


def write(file, rows=ROWS):
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return str(file)


@pytest.fixture
def spec(tmp_path):
    return lambda rows=ROWS, **changes: DataSpec(
        path=write(tmp_path / "rows.jsonl", rows), **{"columns": PAIR, **changes}
    )


def test_pairs_are_the_tokenizers_own(spec, tokenizer):
    prepared = prepare(spec(), tokenizer)
    kept = [row for row in ROWS if row["gold"] >= 0]
    assert list(prepared.train["labels"]) == [1, 0, 0]
    for row, example in zip(kept, prepared.train, strict=True):
        alone = tokenizer(row["premise"], row["hypothesis"])
        assert {name: example[name] for name in alone} == dict(alone)
        assert example["length"] == len(alone["input_ids"])
    assert prepared.report == {"rows": 4, "samples": 3, "tokens": sum(prepared.train["length"]), "no_label": 1}
    assert prepared.eval is None


def test_one_text_and_a_length_limit(spec, tokenizer):
    train = prepare(spec(columns={"text": "premise", "label": "gold"}, max_length=5), tokenizer).train
    assert list(train["input_ids"]) == [tokenizer(row["premise"])["input_ids"][:5] for row in ROWS if row["gold"] >= 0]


def test_values_stay_values(spec, tokenizer):
    rows = [{"premise": "a", "hypothesis": "b", "gold": value} for value in (0.5, -2.0, 3.0, None)]
    prepared = prepare(spec(rows), tokenizer)
    assert list(prepared.train["labels"]) == [0.5, -2.0, 3.0]
    assert prepared.report["no_label"] == 1


def test_held_out_rows_and_a_place_of_their_own(spec, tokenizer, tmp_path):
    held = prepare(spec(held_out_every=2), tokenizer)
    assert (len(held.train), len(held.eval)) == (2, 1)
    own = EvalSpec(path=write(tmp_path / "eval.jsonl", ROWS[:2]), columns=PAIR)
    apart = prepare(spec(eval=own, max_eval_samples=1), tokenizer)
    assert (len(apart.train), len(apart.eval), apart.report["eval_rows"]) == (3, 1, 2)


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (ROWS, {"columns": {**PAIR, "label": "golf"}}, r"got label: 'golf'; the columns are: .*did you mean 'gold'"),
        (ROWS, {"columns": {**PAIR, "prompt": "premise"}}, "got prompt beside a label"),
        (ROWS, {"packing": True}, "data.packing: got True for rows with labels"),
        (ROWS, {"spans": "punctuation"}, "data.spans: got punctuation for rows with labels"),
        (ROWS[2:3], {}, "got 1 rows, none with a label"),
        ([{**ROWS[0], "gold": "yes"}], {}, r"row 0.gold: got 'yes' \(str\); expected a class number or a value"),
        ([{**ROWS[0], "premise": None}, ROWS[1]], {}, r"row 0.premise: got None \(NoneType\); expected a string"),
    ],
)
def test_bad_rows(spec, tokenizer, rows, changes, said):
    with pytest.raises(DataError, match=said):
        prepare(spec(rows, **changes), tokenizer)


def test_evaluation_rows_need_a_label_too(spec, tokenizer, tmp_path):
    own = EvalSpec(path=write(tmp_path / "eval.jsonl"), columns={"text": "premise"})
    with pytest.raises(DataError, match=r"data.eval.columns: got no label"):
        prepare(spec(eval=own), tokenizer)


def test_labels_are_classes_of_the_model(spec, tokenizer):
    train = prepare(spec(), tokenizer).train
    check_labels(train, 2)
    check_labels(train, 1)
    with pytest.raises(DataError, match=r"got the label 2; expected a class from 0 to 1.*model.num_labels"):
        check_labels(prepare(spec([{**ROWS[0], "gold": 2}]), tokenizer).train, 2)
    with pytest.raises(DataError, match=r"got the label 1.0; expected a class from 0 to 1, as an integer"):
        check_labels(prepare(spec([{**ROWS[0], "gold": 1.0}]), tokenizer).train, 2)


def test_a_folder_laid_out_as_on_the_hub(tmp_path):
    write(tmp_path / "glue" / "mnli" / "train.jsonl.gz", ROWS)
    write(tmp_path / "glue" / "mnli" / "validation_matched-00000-of-00001.jsonl", ROWS[:2])
    write(tmp_path / "glue" / "mnli" / "validation_mismatched.jsonl", ROWS[:1])

    def count(**changes) -> int:
        return len(load_rows(DataSpec(path=str(tmp_path / "glue"), name="mnli", **changes)))

    assert (count(), count(split="validation_matched"), count(split="validation_mismatched")) == (4, 2, 1)
    with pytest.raises(
        DataError, match=r"data.split: got 'validation'.*has train, validation_matched, validation_mismatched"
    ):
        count(split="validation")
    with pytest.raises(DataError, match=r"data.name: got 'rte'"):
        load_rows(DataSpec(path=str(tmp_path / "glue"), name="rte"))


def test_other_folders_are_read_whole(tmp_path):
    write(tmp_path / "rows" / "train.jsonl")
    write(tmp_path / "rows" / "more.jsonl")
    assert len(load_rows(DataSpec(path=str(tmp_path / "rows")))) == 8
