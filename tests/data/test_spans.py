"""Phrases of a text and the tokens in them."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmkd import build
from llmkd.data import Collator, DataSpec, prepare
from llmkd.data.spans import _spacy_model, mark, punctuation
from llmkd.errors import ConfigError, DataError

TEXT = "The quick brown fox jumped over the lazy dog, didn't it?\nWell-known facts"


def said(text: str, numbers: list[int], tokens: list[str] | None = None) -> list[str]:
    """The text of each span of a byte-level tokenizer."""
    parts: dict[int, str] = {}
    for token, number in zip(tokens or text, numbers, strict=True):
        if number:
            parts[number] = parts.get(number, "") + token
    return list(parts.values())


def test_runs_of_words_between_punctuation_and_function_words():
    assert [TEXT[start:end] for start, end in punctuation(TEXT)] == [
        "quick brown fox jumped", "lazy dog", "didn't", "Well-known facts"
    ]  # fmt: skip
    assert punctuation("") == punctuation("... the of") == []


def test_every_byte_of_a_phrase_is_marked(tokenizer):
    numbers = mark(tokenizer(TEXT)["input_ids"], tokenizer, "punctuation")
    assert said(TEXT, numbers) == ["quickbrownfoxjumped", "lazydog", "didn't", "Well-knownfacts"]  # a blank is no word


def test_a_token_with_a_blank_before_it_lies_in_the_phrase():
    words = ["the", "Ġred", "Ġhouse", "Ġof", "Ġcards", "."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=".")
    assert mark([0, 1, 2, 3, 4, 5], tokenizer, "punctuation") == [0, 1, 1, 0, 2, 0]


def test_text_that_is_read_otherwise_than_written_has_no_spans_there(tokenizer):
    ids = tokenizer("red caf\u00e9 blue")["input_ids"]
    broken = ids[:7] + ids[8:]  # half of the é is gone
    numbers = mark(broken, tokenizer, "punctuation")
    assert len(numbers) == len(broken)
    assert numbers[:3] == [1, 1, 1]
    assert numbers[7] == 0
    assert all(numbers[-4:])


def test_special_tokens_are_in_no_phrase(tokenizer):
    ids = tokenizer("<|im_start|>user says<|im_end|>")["input_ids"]
    numbers = mark(ids, tokenizer, "punctuation")
    assert numbers[0] == numbers[-1] == 0
    assert sum(number > 0 for number in numbers) == len("usersays")


def test_a_slow_tokenizer_is_refused(tokenizer):
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(DataError, match="fast"):
        mark([1, 2], slow, "punctuation")


@pytest.mark.parametrize("name", ["spacy", "nltk"])
def test_a_missing_package_is_an_error_that_says_what_to_install(tokenizer, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    _spacy_model.cache_clear()
    with pytest.raises(ConfigError, match=r"llmkd\[spans\]"):
        mark(tokenizer("a red house")["input_ids"], tokenizer, name)


def test_noun_chunks_of_spacy(tokenizer, monkeypatch):
    chunk = SimpleNamespace(start_char=2, end_char=11)
    model = lambda text: SimpleNamespace(noun_chunks=[chunk])  # noqa: E731
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: model))
    _spacy_model.cache_clear()
    text = "a red house stands"
    assert said(text, mark(tokenizer(text)["input_ids"], tokenizer, "spacy")) == ["redhouse"]

    def absent(name: str) -> None:
        raise OSError("no such model")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=absent))
    _spacy_model.cache_clear()
    with pytest.raises(ConfigError, match="spacy download"):
        mark([40], tokenizer, "spacy")


def test_phrases_of_nltk(tokenizer, monkeypatch):
    text = "It stands on a red hill."
    tags = ["PRP", "VBZ", "IN", "DT", "JJ", "NN", "."]

    class Phrase:
        def __init__(self, leaves: list) -> None:
            self.leaves = lambda: leaves

    def parse(tagged: list) -> list:
        assert [tag for _, tag in tagged] == tags
        return [tagged[0], Phrase(tagged[1:2]), Phrase(tagged[2:6]), tagged[6]]

    fake = SimpleNamespace(
        pos_tag=lambda words: list(zip(words, tags, strict=True)),
        RegexpParser=lambda grammar: SimpleNamespace(parse=parse),
    )
    monkeypatch.setitem(sys.modules, "nltk", fake)
    assert said(text, mark(tokenizer(text)["input_ids"], tokenizer, "nltk")) == ["stands", "onaredhill"]

    def untaught(words: list[str]) -> None:
        raise LookupError("no tagger")

    fake.pos_tag = untaught
    with pytest.raises(ConfigError, match=r"nltk\.downloader"):
        mark([40], tokenizer, "nltk")


# In the data


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        {"text": "a red house of cards. blue sky"},
        {"prompt": "say it: ", "completion": "a red house of cards"},
        {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "a red house of cards"}]},
    ],
    ids=lambda row: "-".join(row),
)
def test_spans_come_with_the_batch(tokenizer, row, packing):
    spec = DataSpec(path="x:y", max_length=128, spans="punctuation", packing=packing)
    data = prepare(spec, tokenizer, Dataset.from_list([row, row]))
    batch = Collator(0, packing=packing)(list(data.train))
    first = batch["spans"]
    labels = batch["labels"].flatten()[batch["rows"] + 1]
    pairs = {tokenizer.decode(labels[i : i + 2]) for i in first.tolist()}
    assert {"re", "ed", "ho", "us", "se", "ca", "rd"} <= pairs
    assert "of" not in pairs
    assert not any(" " in pair for pair in pairs)
    assert len(first) % 2 == 0, "as many in either of the two equal rows"
    assert set(data.train.column_names) >= {"spans", "length"}
    plain = prepare(spec.model_copy(update={"spans": None}), tokenizer, Dataset.from_list([row]))
    assert "spans" not in plain.train.column_names
    assert "spans" not in Collator(0, packing=packing)(list(plain.train))


def test_data_and_objective_must_both_know_of_spans():
    config = {"objective": "span", "data": {"path": "x:y"}, "model": "m"}
    with pytest.raises(ConfigError, match=r"data\.spans: got nothing"):
        build.parts(config)
    config = {"objective": "cross_entropy", "data": {"path": "x:y", "spans": "nltk"}, "model": "m"}
    with pytest.raises(ConfigError, match="no objective reads"):
        build.parts(config)
