"""Documents to chunks of tokens that end where a document or a sentence ends, as MiniPLM cuts its corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkd.errors import ConfigError

ENDS = ".!?"
ENDS_ALONE = "\u3002\uff01\uff1f"  # Chinese and Japanese: a sentence may follow without a space
CLOSERS = "\"')]}\u201d\u2019"
LOOK = 16  # characters around a cut that tell whether it is a sentence's end


@dataclass(frozen=True)
class Chunk:
    """Token ids, and the text that they came from: pieces of documents between which there is an end-of-text token.

    A last piece "" says that the chunk ends with one: joining the pieces with it gives back the chunk.
    """

    ids: list[int]
    text: list[str]


@dataclass
class _Buffer:
    """Tokens that are in no chunk yet: their ids, their document, and where in it they begin (None: its end)."""

    ids: list[int] = field(default_factory=list)
    places: list[tuple[int, int | None]] = field(default_factory=list)


def cut_documents(
    texts: Sequence[str], domains: Sequence[Any] | None, tokenizer: Any, max_length: int
) -> Iterator[tuple[Chunk, Any]]:
    """Cut documents into chunks of at most `max_length` tokens.

    A document's tokens and an end-of-text token go to the buffer of its domain. A full buffer is cut after the last
    document, line or sentence that ends in it, or where it is full if none does; what is left begins the next chunk.

    Args:
        texts: documents. domains: what each belongs to, or None for one domain.

    Yields:
        (chunk, domain), each document's text in order and nothing of it lost.
    """
    buffers: dict[Any, _Buffer] = {}
    for number, (ids, starts) in enumerate(tokens_of(texts, tokenizer)):
        domain = domains[number] if domains is not None else None
        buffer = buffers.setdefault(domain, _Buffer())
        buffer.ids += [*ids, tokenizer.eos_token_id]
        buffer.places += [*((number, start) for start in starts), (number, None)]
        while len(buffer.ids) > max_length:
            yield _take(buffer, texts, _last_end(buffer, texts, max_length)), domain
    for domain, buffer in buffers.items():
        if buffer.ids:
            yield _take(buffer, texts, len(buffer.ids)), domain


def tokens_of(texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Each text's token ids, without special tokens, and the characters at which they begin; the first begins at 0."""
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer: got {type(tokenizer).__name__}, eos {tokenizer.eos_token}; expected a fast one with an end-of-text "
            "token, to cut documents with. Set stage.pack=false."
        )
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(list(texts), padding=False, truncation=False, **options)
    starts = ([0, *(start for start, _ in offsets[1:])] for offsets in encoded["offset_mapping"])
    return [(ids, begin[: len(ids)]) for ids, begin in zip(encoded["input_ids"], starts, strict=True)]


def _last_end(buffer: _Buffer, texts: Sequence[str], max_length: int) -> int:
    """How many tokens to take: up to the last end of a document, line or sentence, else all that fit."""
    for count in range(max_length, 1, -1):
        number, start = buffer.places[count - 1]
        after, place = buffer.places[count]
        if start is None or (after == number and place is not None and _is_end(texts[number], place)):
            return count
    return max_length


def _is_end(text: str, place: int) -> bool:
    """Whether a line or a sentence ends before the character at `place`."""
    before = text[max(0, place - LOOK) : place]
    left = before.rstrip(" ")
    spaced = len(left) < len(before) or text[place : place + 1].isspace()
    words = left.rstrip(CLOSERS)
    return left.endswith("\n") or words.endswith(tuple(ENDS_ALONE)) or (spaced and words.endswith(tuple(ENDS)))


def _take(buffer: _Buffer, texts: Sequence[str], count: int) -> Chunk:
    """The buffer's first tokens as a chunk; they leave the buffer."""
    pieces, begin = [], buffer.places[0]
    for number, start in buffer.places[:count]:
        if begin is None:
            begin = (number, start)
        if start is None:
            pieces.append(texts[number][slice(begin[1] if begin[1] is not None else len(texts[number]), None)])
            begin = None
    if begin is None:
        pieces.append("")
    else:
        pieces.append(texts[begin[0]][begin[1] : buffer.places[count][1]])
    chunk = Chunk(buffer.ids[:count], pieces)
    del buffer.ids[:count], buffer.places[:count]
    return chunk
