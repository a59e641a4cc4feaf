"""Stages for tests: quick ones without a model, found by recipes as `stages:Shout`."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Features, Value

from llmkd.stages import Stage


class Shout(Stage):
    """Upper case, with a note of how long the text is; texts of one word are rejected."""

    def __init__(self, mark: str = "!") -> None:
        self.mark = mark

    def features(self, given: Features) -> Features:
        return Features({"text": given["text"], "length": Value("int32")})

    def process(self, columns: dict[str, list]) -> dict[str, list]:
        texts = [text.upper() + self.mark for text in columns["text"]]
        rejected = ["" if " " in text else "one_word" for text in texts]
        lengths = [len(text) for text in texts]
        return {"text": texts, "length": lengths, "rejected": rejected, "example_id": columns["example_id"]}


class Twice(Stage):
    """Two rows of each, which the runner numbers."""

    def features(self, given: Features) -> Features:
        return Features({"text": given["text"]})

    def process(self, columns: dict[str, list]) -> dict[str, list]:
        return {"text": [text for text in columns["text"] for _ in range(2)]}


class Repeats(Shout):
    """Breaks the rule that an id is there once."""

    def process(self, columns: dict[str, list]) -> dict[str, list]:
        return {**super().process(columns), "example_id": [columns["example_id"][0]] * len(columns["text"])}


class Uneven(Shout):
    """Forgets a row of one column."""

    def process(self, columns: dict[str, list]) -> dict[str, list]:
        return {**super().process(columns), "length": [1]}


class Lines(Shout):
    """Writes JSON lines instead of Parquet."""

    suffix = ".jsonl"

    def write(self, file: Path, columns: dict[str, list], features: Features) -> None:
        rows = zip(*(columns[name] for name in features), strict=True)
        file.write_text("".join(json.dumps(dict(zip(features, row, strict=True))) + "\n" for row in rows))
