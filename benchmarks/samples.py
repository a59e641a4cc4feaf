"""Ragged instruction data and its batches: every method of a benchmark is given the same ones."""

from __future__ import annotations

import json
import pydoc_data.topics
import random
from pathlib import Path
from typing import Any

from torch import Tensor

from llmkd.data import Collator
from llmkd.data.sampler import EpochSampler

LIMIT = 384  # tokens of a chat
# log-normal tokens a text: those of databricks-dolly-15k's words in a sample of 1000, times 1.3
PROMPT, RESPONSE = (4.22, 0.89), (3.60, 1.30)
Sample = dict[str, list[int]]
Batch = dict[str, Tensor]


def samples(tokenizer: Any, count: int = 800, data: Path | None = None, seed: int = 0) -> list[Sample]:
    """`input_ids` and `labels` of chats of at most LIMIT tokens; only the response is supervised.

    Args:
        data: JSON lines with `prompt` and `response`; without it, English text of Python's own documentation, cut into
            pieces whose lengths are drawn like those of Dolly.
    """
    texts = _drawn(tokenizer, count, seed) if data is None else _read(tokenizer, data, count)
    return [_sample(prompt[: LIMIT - 1], response) for prompt, response in texts]


def _drawn(tokenizer: Any, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    stream = tokenizer("\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    rng = random.Random(seed)

    def piece(shape: tuple[float, float]) -> list[int]:
        length = max(1, min(LIMIT, round(rng.lognormvariate(*shape))))
        start = rng.randrange(max(1, len(stream) - length))
        return stream[start : start + length]

    return [(piece(PROMPT), piece(RESPONSE)) for _ in range(count)]


def _read(tokenizer: Any, data: Path, count: int) -> list[tuple[list[int], list[int]]]:
    rows = [json.loads(line) for line in data.read_text().splitlines()[:count]]
    return [(tokenizer(row["prompt"])["input_ids"], tokenizer(row["response"])["input_ids"]) for row in rows]


def _sample(prompt: list[int], response: list[int]) -> Sample:
    ids = (prompt + response)[:LIMIT]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def batches(rows: list[Sample], size: int, count: int, grouped: bool, pad_token_id: int = 0) -> list[Batch]:
    """`count` padded batches that stand for an epoch: evenly spaced among all of them, sorted by their tokens.

    Args:
        grouped: in llmkd's default order, which puts chats of like length together, or in a plain shuffle.
    """
    order = list(EpochSampler(rows, seed=0, group=size if grouped else 0))
    groups = [[rows[i] for i in order[start : start + size]] for start in range(0, len(order) - size + 1, size)]
    groups.sort(key=lambda group: sum(len(row["input_ids"]) for row in group))
    chosen = [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]
    return [Collator(pad_token_id)(group) for group in chosen]


def shape(given: list[Batch]) -> dict[str, Any]:
    """How many tokens are in the batches, and how much is padding."""
    tokens = sum(int(batch["attention_mask"].sum()) for batch in given)
    positions = sum(batch["input_ids"].numel() for batch in given)
    supervised = sum(len(batch["rows"]) for batch in given)
    return {
        "batches": [list(batch["input_ids"].shape) for batch in given],
        "tokens": tokens,
        "supervised": supervised,
        "padding": round(1 - tokens / positions, 3),
    }
