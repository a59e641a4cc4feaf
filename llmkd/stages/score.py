"""`score`: what models make of each chunk or row of a corpus."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import compress
from typing import Any, Literal

import numpy as np
from datasets import Features, List, Value

from llmkd import config as recipes
from llmkd.data.collate import IGNORE
from llmkd.data.encode import FORMATS
from llmkd.data.load import SourceSpec
from llmkd.data.manifest import EXAMPLE_ID
from llmkd.errors import ConfigError, DataError
from llmkd.stages.base import REJECTED, Stage
from llmkd.stages.batches import Example
from llmkd.stages.chunks import cut_documents
from llmkd.stages.measures import measure
from llmkd.stages.models import Models
from llmkd.stages.source import Source, blocks, open_source
from llmkd.teachers import LocalTeacher
from llmkd.weights import standing_in

ANY_LENGTH = 2**31


class Score(Stage):
    """nll_M(x) = -sum_i log p_M(y_i | y_<i) of each example x under teacher and reference: the sum, and the mean a token.

    Columns: `tokens` (scored ones), `teacher_nll_sum`, `teacher_nll_mean`, `reference_nll_sum`, `reference_nll_mean`, and
    those of the measures. The first token of a text is not scored, nor is one that follows an end-of-text token. Numbers do
    not depend on the padding (up to rounding); to the same bits they are the same on the same hardware and threads.

    Args:
        teacher, reference: a path, or the keys of a local teacher; at least one, and both of one tokenizer.
        max_length: tokens of an example at most; longer documents are cut, longer rows are rejected as `too_long`.
        pack: put documents together into chunks that end where a document or a sentence does, as MiniPLM does, and at the
            shard's end; False: score each row as it is, its completion or its assistant's turns only where it has them.
        domain: a column; documents of different domains do not share a chunk, and it is kept.
        exclude: a `data:` block; documents that are in it, to the letter, are rejected as `in_reference`: D_ref. What is
            no text is rejected as `not_text`.
        measures: `el2n` (the reference's |p - onehot|_2) and `disagreement` (KL(teacher || reference)), means a token.
        batch_tokens: tokens of a batch, padding included; examples of like length share one.

    Raises:
        ConfigError: no model, two tokenizers, a measure without its model, a short context. DataError: columns.

    Reference: Gu et al. 2025 (MiniPLM), arXiv 2410.17215; EL2N: Paul et al. 2021, arXiv 2107.07075.
    Fidelity: checked against the official code of MiniPLM (by reading: chunks, mask, mean a token; no numbers)
    """

    def __init__(
        self,
        *,
        teacher: str | dict | None = None,
        reference: str | dict | None = None,
        max_length: int = 1024,
        pack: bool = True,
        domain: str | None = None,
        exclude: dict | None = None,
        measures: list[Literal["el2n", "disagreement"]] | None = None,
        batch_tokens: int = 16384,
    ) -> None:
        if max_length < 2 or batch_tokens < 1:
            raise ConfigError(
                f"stage: got max_length {max_length}, batch_tokens {batch_tokens}; expected 2 and 1 or more."
            )
        if domain is not None and not pack:
            raise ConfigError(f"stage.domain: got '{domain}' without pack; rows keep their columns. Remove domain.")
        self.models = Models({"teacher": teacher, "reference": reference}, max_length)
        self.max_length, self.pack, self.domain, self.batch_tokens = max_length, pack, domain, batch_tokens
        self.measures = list(measures or ())
        wants = {"el2n": {"reference"}, "disagreement": {"teacher", "reference"}}
        for name in self.measures:
            if missing := wants[name] - {*self.models.parts}:
                raise ConfigError(f"stage.measures: got {name}; expected a {missing.pop()} for it. Name one.")
        spec = None if exclude is None else recipes.check(SourceSpec, exclude, "stage.exclude")
        self._reference_rows = open_source(spec) if spec is not None and not standing_in() else None
        self._excluded = np.empty(0, dtype=np.uint64)
        self._loaded: dict[str, LocalTeacher] = {}
        self._format: tuple[str, ...] = ("text",)

    def identity(self) -> dict[str, Any]:
        """Models, tokenizer, and what is excluded."""
        excluded = {} if self._reference_rows is None else {"exclude": self._reference_rows.revision}
        return {**self.models.identity(), **excluded}

    def columns(self) -> list[str]:
        """The names of the numbers that it gives."""
        sums = [f"{part}_nll_{kind}" for part in self.models.parts for kind in ("sum", "mean")]
        return [*sums, *("reference_el2n" if measure == "el2n" else measure for measure in self.measures)]

    def features(self, given: Features) -> Features:
        """The rows' own columns (chunks: their texts and domain), `tokens`, and the numbers."""
        self._format = ("text",) if self.pack else format_of(given)
        for column in (*self._format, *([self.domain] if self.domain else [])):
            if column not in given:
                raise DataError(f"data: got columns {', '.join(given)}; expected '{column}'. Map it with data.columns.")
        if self.pack and given["text"] not in (Value("string"), Value("large_string")):
            raise DataError(
                f"data: got text of type {given['text']}; expected strings. Set stage.pack=false for chunks."
            )
        kept = {"text": List(Value("string")), **({self.domain: given[self.domain]} if self.domain else {})}
        kept = kept if self.pack else {name: kind for name, kind in given.items() if name != EXAMPLE_ID}
        numbers = {"tokens": Value("int32"), **{name: Value("float64") for name in self.columns()}}
        if both := {*kept} & {*numbers}:
            raise DataError(f"data: got columns {', '.join(sorted(both))}, which score makes. Rename or drop them.")
        return Features({**kept, **numbers})

    def begin(self, source: Source) -> None:
        """Load the models; note the documents to leave out, eight bytes each."""
        if self._reference_rows is not None:
            keys = [self._keys(block) for block in blocks(self._reference_rows, self._format, 1024)]
            self._excluded = np.unique(np.concatenate(keys))
        self._loaded = self.models.load()

    def process(self, columns: dict[str, list]) -> dict[str, list]:
        """Cut (or encode) the documents that may be scored, and score them."""
        free = ~np.isin(self._keys(columns), self._excluded)
        kept, examples, reasons = (self._chunks if self.pack else self._rows)(columns, free)
        scored = [number for number, reason in enumerate(reasons) if not reason]
        chosen = [examples[number] for number in scored]
        options = {"columns": self.models.columns, "batch_tokens": self.batch_tokens}
        numbers = measure(self._loaded, chosen, self.measures, **options) if chosen else {}
        out: dict[str, list] = {name: [0.0] * len(reasons) for name in self.columns()}
        out["tokens"] = [example.scored for example in examples]
        for place, number in enumerate(scored):
            for name in self.columns():
                out[name][number] = numbers[name][place]
            if not all(math.isfinite(out[name][number]) for name in self.columns()):
                reasons[number] = "not_finite"
        return {**kept, **out, REJECTED: reasons}

    def _chunks(self, columns: dict[str, list], free: np.ndarray) -> tuple[dict[str, list], list[Example], list[str]]:
        """Chunks of the free documents; the others come first, each a rejected row without tokens."""
        usable = [is_free and isinstance(text, str) for text, is_free in zip(columns["text"], free, strict=True)]
        texts = list(compress(columns["text"], usable))
        domains = columns[self.domain] if self.domain else None
        theirs = None if domains is None else list(compress(domains, usable))
        reasons = [
            "not_text" if is_free else "in_reference" for is_free, use in zip(free, usable, strict=True) if not use
        ]
        rejected = len(reasons)
        examples, pieces, names = [Example([], [])] * rejected, [[]] * rejected, [None] * rejected
        for chunk, domain in cut_documents(texts, theirs, self.models.tokenizer, self.max_length):
            example = _example(chunk.ids, [True] * len(chunk.ids), self.models.tokenizer)
            reasons.append("" if example.scored else "too_short")
            examples.append(example)
            pieces.append(chunk.text)
            names.append(domain)
        return {"text": pieces, **({self.domain: names} if self.domain else {})}, examples, reasons

    def _rows(self, columns: dict[str, list], free: np.ndarray) -> tuple[dict[str, list], list[Example], list[str]]:
        """The rows as they are, each one example."""
        where = [f"{EXAMPLE_ID} {number}" for number in columns[EXAMPLE_ID]]
        batch = {name: columns[name] for name in self._format}
        tokenizer = self.models.tokenizer
        samples = [sample for (sample,) in FORMATS[self._format](batch, where, tokenizer, ANY_LENGTH)]
        examples = [_example(sample.ids, sample.supervised, tokenizer) for sample in samples]
        reasons = []
        for example, is_free in zip(examples, free, strict=True):
            too_long = len(example.ids) > self.max_length
            why = "too_long" if too_long else "" if example.scored else "no_supervised_token"
            reasons.append(why if is_free else "in_reference")
        return dict(columns), examples, reasons

    def _keys(self, columns: dict[str, list]) -> np.ndarray:
        """A 64-bit digest of each row's own text."""
        rows = zip(*(columns[name] for name in self._format), strict=True)
        digests = (hashlib.blake2b(json.dumps(row).encode(), digest_size=8).digest() for row in rows)
        return np.frombuffer(b"".join(digests), dtype=np.uint64)


def format_of(given: Features) -> tuple[str, ...]:
    """The row format that the columns tell.

    Raises:
        DataError: none, or more than one.
    """
    found = [used for used in FORMATS if {*used} <= {*given}]
    if len(found) != 1:
        wanted = "text, or prompt and completion, or messages"
        raise DataError(f"data: got columns {', '.join(given)}; expected {wanted}, one of them. Map or drop columns.")
    return found[0]


def _example(ids: list[int], supervised: list[bool], tokenizer: Any) -> Example:
    """Labels of the supervised tokens, without the first and without those that follow an end-of-text token."""
    eos = tokenizer.eos_token_id
    before = [None, *ids[:-1]]
    labels = [
        token if said and number and last != eos else IGNORE
        for number, (token, said, last) in enumerate(zip(ids, supervised, before, strict=False))
    ]
    return Example(ids, labels)
