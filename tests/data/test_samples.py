"""Rows to samples: exact ids and labels of every format, cuts, counts, hold-outs and packing."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from llmkd.data import Collator, DataSpec, Prepared, prepare

EOS, START, END, NO = 0, 1, 2, -100
HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def run(tokenizer, rows: list[dict] | dict[str, list], **spec) -> Prepared:
    dataset = Dataset.from_dict(rows) if isinstance(rows, dict) else Dataset.from_list(rows)
    return prepare(DataSpec(path="unused", **spec), tokenizer, dataset)


@pytest.fixture
def of(tokenizer):
    """Byte ids of an ASCII text, with \n and space as the byte tokenizer spells them."""
    return lambda text: tokenizer.convert_tokens_to_ids([{"\n": "Ċ", " ": "Ġ"}.get(char, char) for char in text])


# Plain text


def test_text_supervises_all_but_the_first_token_and_keeps_the_real_eos(tokenizer, of):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    made = run(tokenizer, {"text": ["abc", "d"]})
    assert made.train[0] == {"input_ids": [*of("abc"), EOS], "labels": [NO, *of("bc"), EOS], "length": 4}
    batch = Collator(tokenizer.pad_token_id)([made.train[i] for i in range(2)])
    assert batch["labels"].tolist() == [[NO, *of("bc"), EOS], [NO, EOS, NO, NO]]
    assert batch["attention_mask"].sum(-1).tolist() == [4, 2]
    assert made.report == {
        "rows": 2, "samples": 2, "tokens": 6, "supervised_tokens": 4, "truncated": 0, "too_short": 0,
        "no_supervised_token": 0,
    }  # fmt: skip


def test_long_text_is_cut_into_consecutive_chunks(tokenizer, of):
    made = run(tokenizer, {"text": ["abcdefg", "abcdefgh"]}, max_length=4)
    assert made.train["input_ids"][:] == [of("abcd"), [*of("efg"), EOS], of("abcd"), of("efgh")]
    assert made.train["labels"][1] == [NO, *of("fg"), EOS]
    assert (made.report["rows"], made.report["samples"], made.report["too_short"]) == (
        2,
        4,
        1,
    )  # a lone EOS is left over
    assert made.report["truncated"] == 0


def test_eos_is_not_doubled_and_not_invented(tokenizer, of):
    made = run(tokenizer, {"text": ["ab<|endoftext|>"]})
    assert made.train["input_ids"][:] == [[*of("ab"), EOS]]
    tokenizer.eos_token = None
    assert run(tokenizer, {"text": ["ab", ""]}).train["input_ids"][:] == [of("ab")]


@pytest.fixture
def bos_tokenizer(tokenizer):
    """Opens every text with <|im_start|> and closes it with <|endoftext|>, as some tokenizers do."""
    tokenizer.bos_token = "<|im_start|>"
    special = [("<|im_start|>", START), ("<|endoftext|>", EOS)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", pair="$A $B", special_tokens=special
    )
    return tokenizer


def test_special_tokens_of_the_tokenizer_are_not_doubled(bos_tokenizer, of):
    made = run(bos_tokenizer, {"text": ["ab", "<|im_start|>ab"]})
    assert made.train["input_ids"][:] == [[START, *of("ab"), EOS]] * 2
    made = run(bos_tokenizer, {"prompt": ["ab"], "completion": ["c"]})
    assert made.train[0]["input_ids"] == [START, *of("abc"), EOS]
    assert made.train[0]["labels"] == [NO, NO, NO, *of("c"), EOS]
    made = run(bos_tokenizer, {"messages": [HELLO]})
    assert made.train[0]["input_ids"].count(EOS) == 0  # the template is the whole truth


# Prompt and completion


def test_completion_and_its_eos_are_supervised(tokenizer, of):
    made = run(tokenizer, {"prompt": ["ab", ""], "completion": ["cd", "ef"]})
    assert made.train[0]["input_ids"] == [*of("abcd"), EOS]
    assert made.train[0]["labels"] == [NO, NO, *of("cd"), EOS]
    assert made.train[1]["labels"] == [NO, *of("f"), EOS]


def test_long_completions_are_cut_at_the_end_and_counted(tokenizer, of):
    made = run(tokenizer, {"prompt": ["ab", "ab", "abcdef"], "completion": ["cdefg", "c", "g"]}, max_length=4)
    assert made.train["input_ids"][:] == [of("abcd"), [*of("abc"), EOS]]
    assert made.train["labels"][:] == [[NO, NO, *of("cd")], [NO, NO, *of("c"), EOS]]
    report = made.report
    assert (report["rows"], report["samples"], report["truncated"], report["no_supervised_token"]) == (3, 2, 1, 1)


def test_columns_map_ours_to_theirs(tokenizer, of):
    rows = {"instruction": ["a"], "text": ["b"], "id": [1]}
    made = run(tokenizer, rows, columns={"prompt": "instruction", "completion": "text"})
    assert made.train[0] == {"input_ids": [*of("ab"), EOS], "labels": [NO, *of("b"), EOS], "length": 3}
    swapped = run(
        tokenizer,
        {"prompt": ["b"], "completion": ["a"]},
        columns={"prompt": "completion", "completion": "prompt"},
    )
    assert swapped.train[0]["input_ids"] == [*of("ab"), EOS]


# Messages

HEADER = len("[user.hi].[assistant.")  # one id a letter, [ and ] for the two special tokens
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")


def chat_ids(of) -> list[int]:
    return [START, *of("user\nhi"), END, *of("\n"), START, *of("assistant\nyo"), END, *of("\n")]


def test_assistant_turns_are_found_from_prefixes(tokenizer, of):
    turns = [*HELLO, {"role": "user", "content": "é"}, {"role": "assistant", "content": "k"}]
    made = run(tokenizer, {"messages": [HELLO, turns]})
    assert made.train[0]["input_ids"] == chat_ids(of)
    assert made.train[0]["labels"] == [NO] * HEADER + [*of("yo"), END, *of("\n")]
    labels = made.train[1]["labels"]
    assert [label for label in labels if label != NO] == [*of("yo"), END, *of("\n"), *of("k"), END, *of("\n")]
    assert labels[HEADER : HEADER + 4] == [*of("yo"), END, *of("\n")]


def test_generation_markers_are_used(tokenizer, of):
    tokenizer.chat_template = MARKED
    made = run(tokenizer, {"messages": [HELLO]})
    assert made.train[0]["input_ids"] == chat_ids(of)
    assert made.train[0]["labels"] == [NO] * HEADER + [*of("yo"), END, NO]


def test_markers_that_leave_the_end_of_turn_out_are_not_trusted(tokenizer, of):
    tokenizer.chat_template = MARKED_WITHOUT_END
    assert run(tokenizer, {"messages": [HELLO]}).train[0]["labels"][HEADER:] == [*of("yo"), END, *of("\n")]


def template_of(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def test_a_template_that_trl_knows(tokenizer, of):
    tokenizer.chat_template = template_of("qwen2_5")
    made = run(tokenizer, {"messages": [[{"role": "system", "content": "s"}, *HELLO]]})
    supervised = [label for label in made.train[0]["labels"] if label != NO]
    assert supervised[-4:] == [*of("yo"), END, *of("\n")]
    assert made.train[0]["input_ids"] == [START, *of("system\ns"), END, *of("\n"), *chat_ids(of)]


def test_a_template_that_only_trls_variant_makes_prefix_preserving(tokenizer):
    tokenizer.chat_template = template_of("deepseekv3")
    made = run(tokenizer, {"messages": [HELLO]})
    supervised = [label for label in made.train[0]["labels"] if label != NO]
    assert "yo" in tokenizer.decode(supervised)
    assert "hi" not in tokenizer.decode(supervised)


@pytest.mark.parametrize("template", [None, MARKED])
def test_prompt_and_completion_as_messages(tokenizer, of, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    prompt = [*HELLO, {"role": "user", "content": "k"}]
    made = run(tokenizer, {"prompt": [prompt], "completion": [[{"role": "assistant", "content": "z"}]]})
    tail = [*of("z"), END, *(of("\n") if template is None else [NO])]
    ids = [*chat_ids(of), START, *of("user\nk"), END, *of("\n"), START, *of("assistant\nz"), END, *of("\n")]
    assert made.train[0]["input_ids"] == ids
    assert made.train[0]["labels"] == [NO] * (len(ids) - 3) + tail


def test_rows_without_an_assistant_are_dropped_and_counted(tokenizer, caplog):
    made = run(tokenizer, {"messages": [HELLO, HELLO[:1], []]})
    assert made.report["no_supervised_token"] == made.report["too_short"] == 1
    assert (made.report["rows"], len(made.train)) == (3, 1)
    assert "dropped 2 of 3" in caplog.text


def test_messages_are_cut_at_the_end(tokenizer, of):
    made = run(tokenizer, {"messages": [HELLO]}, max_length=HEADER + 1)
    assert made.train[0]["labels"] == [NO] * HEADER + of("y")
    assert made.report["truncated"] == 1


# Evaluation data


def test_held_out_rows(tokenizer, of):
    made = run(tokenizer, {"text": list("abcdefg")}, held_out_every=3, max_eval_samples=2, max_samples=6)
    assert [ids[0] for ids in made.train["input_ids"]] == of("bcef")
    assert made.eval is not None
    assert [ids[0] for ids in made.eval["input_ids"]] == of("ad")
    assert (made.report["rows"], made.report["eval_rows"], made.report["eval_samples"]) == (4, 2, 2)


def test_held_out_documents_keep_their_chunks_together(tokenizer, of):
    made = run(tokenizer, {"text": ["abcdef", "xyz"]}, held_out_every=2, max_length=3, max_eval_samples=1)
    assert made.eval is not None
    assert made.eval["input_ids"][:] == [of("abc")]
    assert made.train["input_ids"][:] == [of("xyz")]


def test_separate_evaluation_data(tokenizer):
    block = {"path": "pydoc_data.topics:topics", "max_samples": 2}
    made = run(tokenizer, {"text": ["ab"]}, eval=block, max_eval_samples=3, max_length=16)
    assert made.eval is not None
    assert (len(made.train), len(made.eval), made.report["eval_samples"]) == (1, 3, 3)
    assert made.report["eval_supervised_tokens"] == 45


# Packing


@pytest.mark.parametrize("held_out_every", [None, 4])
def test_packing_keeps_documents_whole_and_apart(tokenizer, of, held_out_every):
    texts = ["abc", "d", "efghi", "j", "kl"]
    made = run(tokenizer, {"text": texts}, packing=True, max_length=8, held_out_every=held_out_every)
    assert all(length <= 8 for length in made.train["length"])
    documents = []
    for row in made.train:
        assert row["length"] == len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"])
        start = 0
        for length in row["seq_lengths"]:
            assert row["labels"][start] == NO
            assert row["labels"][start + 1 : start + length] == row["input_ids"][start + 1 : start + length]
            documents.append(row["input_ids"][start : start + length])
            start += length
    kept = [text for i, text in enumerate(texts) if not held_out_every or i % held_out_every]
    assert sorted(documents) == sorted([*of(text), EOS] for text in kept)
    assert made.report["samples"] == len(kept)
    assert made.report["packed_sequences"] == len(made.train) < len(kept)
    assert (made.eval is not None) == bool(held_out_every)


def test_the_same_rows_give_the_same_samples(tokenizer):
    rows = {"text": [chr(97 + i % 26) * (i % 13) for i in range(600)]}
    one, two = (run(tokenizer, rows, packing=True, max_length=16) for _ in range(2))
    assert one.train[:] == two.train[:]
    assert one.report == two.report
