"""Chunks end where documents, lines and sentences do, hold at most what fits, and lose no character."""

from __future__ import annotations

import pytest

from llmkd.data.encode import FORMATS
from llmkd.errors import ConfigError
from llmkd.stages.chunks import cut_documents

DOCUMENTS = [
    "A cat sat. It ran off! Where to? Nobody knows.",
    "One line\nand another line\nand so on",
    "",
    "nospacesandnoendatallinthisonewordwhichislongerthanachunk",
    'He said "stop." Then he went (quickly.) home. No. 3.5 stays whole',
    "猫坐下。狗跑了\uff01",
]


def chunks(texts, tokenizer, max_length, domains=None):
    return [chunk for chunk, _ in cut_documents(texts, domains, tokenizer, max_length)]


@pytest.mark.parametrize("max_length", [2, 5, 16, 20, 31, 64, 1000])
def test_nothing_is_lost_and_everything_fits(tokenizer, max_length):
    found = chunks(DOCUMENTS, tokenizer, max_length)
    assert all(1 <= len(chunk.ids) <= max_length for chunk in found)
    eos = tokenizer.eos_token_id
    tokens = [token for text in DOCUMENTS for token in [*tokenizer(text)["input_ids"], eos]]
    assert [token for chunk in found for token in chunk.ids] == tokens
    joined = "".join("|".join(chunk.text) for chunk in found)
    assert joined == "".join(text + "|" for text in DOCUMENTS)


@pytest.mark.parametrize("max_length", [16, 31, 64, 1000])
def test_the_text_of_a_chunk_gives_its_tokens_again(tokenizer, max_length):
    ascii_only = [text for text in DOCUMENTS if text and text.isascii()]
    for chunk in chunks(ascii_only, tokenizer, max_length):
        (samples,) = FORMATS[("text",)]({"text": [chunk.text]}, ["row"], tokenizer, 10_000)
        assert samples[0].ids == chunk.ids


def test_cuts_come_after_the_last_sentence_line_or_document_that_ends(tokenizer):
    assert [chunk.text for chunk in chunks([DOCUMENTS[0]], tokenizer, 20)] == [
        ["A cat sat. "], ["It ran off! "], ["Where to? "], ["Nobody knows.", ""],
    ]  # fmt: skip
    assert [chunk.text for chunk in chunks([DOCUMENTS[1]], tokenizer, 20)] == [
        ["One line\n"], ["and another line\n"], ["and so on", ""],
    ]  # fmt: skip
    assert [chunk.text for chunk in chunks(["ab", "cdefgh ijklm"], tokenizer, 8)] == [
        ["ab", ""],
        ["cdefgh i"],
        ["jklm", ""],
    ]


def test_a_point_inside_a_number_ends_no_sentence_and_quotes_may_follow_one(tokenizer):
    first = chunks(['He has "it." 3.5 is more than a lot'], tokenizer, 18)[0]
    assert first.text == ['He has "it." ']


def test_a_document_longer_than_the_context_is_cut_where_it_must_be(tokenizer):
    found = chunks([DOCUMENTS[3]], tokenizer, 20)
    assert [len(chunk.ids) for chunk in found] == [20, 20, 18]
    assert "".join("".join(chunk.text) for chunk in found) == DOCUMENTS[3]


def test_short_documents_share_a_chunk_of_their_domain(tokenizer):
    texts, domains = ["a.", "b.", "c.", "d."], ["x", "y", "x", "y"]
    found = list(cut_documents(texts, domains, tokenizer, 100))
    assert [(chunk.text, domain) for chunk, domain in found] == [(["a.", "c.", ""], "x"), (["b.", "d.", ""], "y")]


def test_a_tokenizer_that_cannot_tell_offsets_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"stage\.pack=false"):
        chunks(["a"], tokenizer, 8)


def test_no_document_is_no_chunk(tokenizer):
    assert chunks([], tokenizer, 8) == []
