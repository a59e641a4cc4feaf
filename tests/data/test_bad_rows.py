"""Rows that cannot be learned from, and templates that cannot tell who speaks: one line says what to change."""

from __future__ import annotations

import pytest
from datasets import Dataset

from llmkd.data import DataSpec, prepare
from llmkd.errors import DataError

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def fails(tokenizer, rows: dict[str, list], *parts: str, **spec) -> None:
    with pytest.raises(DataError) as caught:
        prepare(DataSpec(path="unused", **spec), tokenizer, Dataset.from_dict(rows))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_template_that_is_not_prefix_preserving(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    fails(tokenizer, {"messages": [HELLO]}, "row 0", "prefix-preserving", "generation")


def test_a_template_that_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no\nsystem role') }}"
    fails(tokenizer, {"messages": [HELLO]}, "row 0", "no system role")


def test_a_tokenizer_without_a_template(tokenizer):
    tokenizer.chat_template = None
    fails(tokenizer, {"messages": [HELLO]}, "without a chat template")


def test_nothing_to_learn_from(tokenizer):
    fails(tokenizer, {"messages": [HELLO[:1]]}, "none with a supervised token", "no_supervised_token 1")
    fails(tokenizer, {"text": ["", ""]}, "too_short 2")
    fails(tokenizer, {"text": ["abc"]}, "none with a supervised token", held_out_every=2)
    fails(tokenizer, {"text": []}, "no rows")


def test_missing_columns(tokenizer):
    fails(tokenizer, {"body": ["a"], "id": [1]}, "got columns body, id", "text", "messages")
    fails(tokenizer, {"prompt": ["a"]}, "got columns prompt")
    rows = {"instruction": ["a"], "response": ["b"]}
    fails(tokenizer, rows, "instruction, response", "did you mean 'instruction'?", columns={"prompt": "instrution"})
    fails(tokenizer, rows, "{'prompt': 'instruction'}", columns={"prompt": "instruction"})


def test_two_formats_need_a_choice(tokenizer):
    rows = {"text": ["a"], "messages": [HELLO]}
    fails(tokenizer, rows, "messages and text", "data.columns={messages: messages}")
    assert (
        prepare(DataSpec(path="unused", columns={"text": "text"}), tokenizer, Dataset.from_dict(rows)).report["tokens"]
        == 2
    )


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ({"text": ["a", None]}, "data row 1.text: got None (NoneType); expected a string"),
        ({"text": [1, 2]}, "data row 0.text: got 1 (int)"),
        ({"prompt": ["a"], "completion": [["b"]]}, "data row 0.completion: got ['b'] (list)"),
        ({"prompt": [HELLO], "completion": ["b"]}, "data row 0.completion: got 'b' (str); expected a list of messages"),
        ({"messages": ["hi"]}, "data row 0.messages: got 'hi' (str)"),
        ({"messages": [["hi"]]}, "data row 0.messages[0]: got 'hi'"),
        ({"messages": [[{"from": "user", "value": "hi"}]]}, "expected a message {role: str, content: str}"),
        ({"messages": [[{"role": "user", "content": 3}]]}, "data row 0.messages[0].content: got 3 (int)"),
    ],
)
def test_cells_of_the_wrong_type(tokenizer, rows, part):
    fails(tokenizer, rows, part)
