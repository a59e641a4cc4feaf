"""The row formats: text, prompt + completion, messages. Each turns a batch of rows into samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trl.data_utils import common_prefix_length

from llmkd.data.chat import ChatEncoder, bad_cell, chat_encoder, check_messages


@dataclass(frozen=True)
class Sample:
    """Token ids [T] and which of them are supervised [T]."""

    ids: list[int]
    supervised: list[bool]
    truncated: bool = False


def _encode_text(batch: dict[str, list], where: list[str], tokenizer: Any, max_length: int) -> list[list[Sample]]:
    """Plain text: every token but a chunk's first; consecutive chunks of max_length.

    A list of strings are documents, or parts of such, that an end-of-sequence token joins; a string is one whole document.
    """
    rows = [text if isinstance(text, list) else [text, ""] for text in batch["text"]]
    for pieces, place in zip(rows, where, strict=True):
        for piece in pieces:
            _check_string(piece, f"{place}.text")
    encoded = iter(_ids(tokenizer, [piece for pieces in rows for piece in pieces if piece] or [""]))
    documents = []
    for pieces in rows:
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            ids = _with_eos(ids, tokenizer) if number else ids
            ids = [*ids, *next(encoded)] if piece else ids
        chunks = [ids[start : start + max_length] for start in range(0, max(len(ids), 1), max_length)]
        documents.append([Sample(chunk, [True] * len(chunk)) for chunk in chunks])
    return documents


def _encode_completion(batch: dict[str, list], where: list[str], tokenizer: Any, max_length: int) -> list[list[Sample]]:
    """Prompt and completion strings: the completion and the end-of-sequence token that follows it."""
    if isinstance(batch["prompt"][0], list):
        return _encode_completion_messages(batch, where, tokenizer, max_length)
    for prompt, completion, place in zip(batch["prompt"], batch["completion"], where, strict=True):
        _check_string(prompt, f"{place}.prompt")
        _check_string(completion, f"{place}.completion")
    whole = [prompt + completion for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)]
    samples = []
    for prompt, ids in zip(_ids(tokenizer, batch["prompt"]), _ids(tokenizer, whole), strict=True):
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]  # some tokenizers close every text with it
        start = common_prefix_length(prompt, ids)
        ids = _with_eos(ids, tokenizer)
        samples.append([_cut(ids, [i >= start for i in range(len(ids))], max_length)])
    return samples


def _encode_completion_messages(
    batch: dict[str, list], where: list[str], tokenizer: Any, max_length: int
) -> list[list[Sample]]:
    """Prompt and completion as messages: the assistant's turns of the completion."""
    encoder, samples = chat_encoder(tokenizer), []
    for prompt, completion, place in zip(batch["prompt"], batch["completion"], where, strict=True):
        check_messages(prompt, f"{place}.prompt")
        check_messages(completion, f"{place}.completion")
        samples.append([_chat_sample(encoder, prompt + completion, len(prompt), place, max_length)])
    return samples


def _encode_messages(batch: dict[str, list], where: list[str], tokenizer: Any, max_length: int) -> list[list[Sample]]:
    """Conversations: the assistant's turns."""
    encoder, samples = chat_encoder(tokenizer), []
    for messages, place in zip(batch["messages"], where, strict=True):
        check_messages(messages, f"{place}.messages")
        samples.append([_chat_sample(encoder, messages, 0, place, max_length)])
    return samples


Encode = Callable[[dict[str, list], list[str], Any, int], list[list[Sample]]]
FORMATS: dict[tuple[str, ...], Encode] = {
    ("messages",): _encode_messages,
    ("prompt", "completion"): _encode_completion,
    ("text",): _encode_text,
}


def _chat_sample(encoder: ChatEncoder, messages: list, first: int, where: str, max_length: int) -> Sample:
    return _cut(*(encoder(messages, first, where) if messages else ([], [])), max_length)


def _check_string(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise bad_cell(where, value, "a string")


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids with the tokenizer's own special tokens; a BOS that the text already has is not doubled."""
    bos = tokenizer.bos_token_id
    batch = tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in batch]


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _cut(ids: list[int], supervised: list[bool], max_length: int) -> Sample:
    return Sample(ids[:max_length], supervised[:max_length], truncated=len(ids) > max_length)
