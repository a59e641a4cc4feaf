"""Rows to samples: token ids with aligned labels, cut to length, counted, split, and packed if asked."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import pack_dataset

from llmkd.data.collate import IGNORE
from llmkd.data.encode import FORMATS, Sample
from llmkd.data.load import ROW_COLUMNS, DataSpec, load_rows
from llmkd.data.spans import mark
from llmkd.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)

REASONS = ("too_short", "no_supervised_token")
_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "supervised": Value("int32"),
        "truncated": Value("bool"),
        "row": Value("int64"),
        "rejected": Value("string"),
    }
)
_SPANS = {"spans": List(Value("int32"))}


@dataclass(frozen=True)
class Prepared:
    """Tokenised samples: columns `input_ids`, `labels`, `length`, `spans` (numbers of the tokens' spans) if asked for, and
    `seq_lengths` (documents' lengths) if packed.

    `report` counts: rows, samples, tokens, supervised_tokens, truncated, each reason of REASONS, and packed_sequences
    if packed; for the evaluation set the same with the prefix `eval_`.
    """

    train: Dataset
    eval: Dataset | None
    report: dict[str, int]


def prepare(
    spec: DataSpec,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    rows: Dataset | None = None,
    eval_rows: Dataset | None = None,
) -> Prepared:
    """Tokenise the rows of `spec` (or `rows`, `eval_rows`, if given) into samples of at most `max_length` tokens.

    Labels are aligned with the ids (not shifted), -100 where not supervised and at position 0. Rows whose `label` column is
    named become a classifier's examples: see `examples`.
    Raises: DataError on bad rows, or if nothing is supervised.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if "label" in spec.columns:
        from llmkd.data.examples import prepare_examples

        return prepare_examples(spec, tokenizer, rows)
    rows = load_rows(spec) if rows is None else rows.select(range(min(len(rows), spec.max_samples or len(rows))))
    samples = _tokenize(rows, spec.columns, tokenizer, spec)
    row = _numpy(samples, "row")
    held_out = row % spec.held_out_every == 0 if spec.held_out_every else np.zeros(len(row), dtype=bool)
    train, report = _finish(samples, ~held_out, spec, "data", None)
    evaluation, counts = None, {}
    if spec.eval is not None:
        eval_rows = load_rows(spec.eval) if eval_rows is None else eval_rows
        samples = _tokenize(eval_rows, spec.eval.columns, tokenizer, spec, "data.eval")
        held_out = np.ones(len(samples), dtype=bool)
    if spec.eval is not None or spec.held_out_every:
        evaluation, counts = _finish(samples, held_out, spec, "data.eval", spec.max_eval_samples)
    return Prepared(train, evaluation, report | {f"eval_{key}": count for key, count in counts.items()})


def samples_of(rows: dict[str, list], tokenizer: Any, max_length: int, first: int = 0) -> dict[str, list]:
    """Rows from number `first` on as `prepare` makes samples of them, not yet dropped or packed.

    Returns:
        `input_ids`, `labels`, `length`, `supervised`, `truncated`, `row`, and `rejected`: one of REASONS, or "".
    """
    used = format_of(list(rows), {}, "data")
    index = list(range(first, first + len(rows[used[0]])))
    theirs, options = list(used), {"tokenizer": tokenizer, "max_length": max_length, "spans": None, "name": "data"}
    return _encode_batch(rows, index, used=used, theirs=theirs, **options)


def _tokenize(rows: Dataset, columns: dict[str, str], tokenizer: Any, spec: DataSpec, name: str = "data") -> Dataset:
    """Map rows to samples with the columns of _FEATURES; what cannot be learned from is marked, not yet dropped."""
    if len(rows) == 0:
        raise DataError(f"{name}: got no rows; expected at least one. Point {name}.path at data.")
    used = format_of(rows.column_names, columns, name)
    theirs = [columns.get(ours, ours) for ours in used]
    rows = rows.with_format(None).select_columns(theirs)
    return rows.map(
        partial(
            _encode_batch,
            used=used,
            theirs=theirs,
            tokenizer=tokenizer,
            max_length=spec.max_length,
            spans=spec.spans,
            name=name,
        ),
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=theirs,
        features=Features({**_FEATURES, **_SPANS}) if spec.spans else _FEATURES,
        desc=f"tokenising {name}",
    )


def format_of(names: list[str], columns: dict[str, str], name: str) -> tuple[str, ...]:
    """Tell the format from the column names; where `columns` maps some, only formats that use them count."""
    have = ", ".join(names)
    for ours, theirs in columns.items():
        if theirs not in names:
            hint = did_you_mean(theirs, names)
            raise DataError(f"{name}.columns: got {ours}: '{theirs}'; the columns are: {have}{hint or '. Name one.'}")
    found = [
        used
        for used in FORMATS
        if all(columns.get(ours, ours) in names for ours in used) and (not columns or {*used} & {*columns})
    ]
    if len(found) > 1:
        seen = " and ".join(" + ".join(used) for used in found)
        pick = found[0][0]
        raise DataError(
            f"{name}: got rows with {seen}; expected one format. Choose, e.g. {name}.columns={{{pick}: {pick}}}."
        )
    if not found:
        wanted = "text, or prompt and completion, or messages"
        raise DataError(
            f"{name}: got columns {have}, with {name}.columns {columns or 'empty'}; expected {wanted}. "
            f"Map them, e.g. {name}.columns={{{ROW_COLUMNS[0]}: {names[0]}}}."
        )
    return found[0]


def _encode_batch(
    batch: dict[str, list],
    index: list[int],
    *,
    used: tuple[str, ...],
    theirs: list[str],
    tokenizer: Any,
    max_length: int,
    spans: str | None,
    name: str,
) -> dict[str, list]:
    ours = {column: batch[their] for column, their in zip(used, theirs, strict=True)}
    encoded = FORMATS[used](ours, [f"{name} row {i}" for i in index], tokenizer, max_length)
    out: dict[str, list] = {column: [] for column in _FEATURES}
    for row, samples in zip(index, encoded, strict=True):
        for sample in samples:
            _append(out, row, sample)
    if spans:
        out["spans"] = [mark(ids, tokenizer, spans) for ids in out["input_ids"]]
    return out


def _append(out: dict[str, list], row: int, sample: Sample) -> None:
    labels = [token if said else IGNORE for token, said in zip(sample.ids, sample.supervised, strict=True)]
    labels[:1] = [IGNORE] * len(labels[:1])
    supervised = sum(label != IGNORE for label in labels)
    reason = "too_short" if len(labels) < 2 else "" if supervised else "no_supervised_token"
    values = (sample.ids, labels, len(labels), supervised, sample.truncated, row, reason)
    for column, value in zip(_FEATURES, values, strict=True):
        out[column].append(value)


def _finish(
    samples: Dataset, chosen: np.ndarray, spec: DataSpec, name: str, limit: int | None
) -> tuple[Dataset, dict[str, int]]:
    """Keep the chosen samples that teach something, at most `limit`; count; pack."""
    rejected = _numpy(samples, "rejected")
    reasons = Counter(rejected[chosen & (rejected != "")].tolist())
    kept = np.flatnonzero(chosen & (rejected == ""))[:limit]
    counts = {reason: reasons[reason] for reason in REASONS}
    why = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    if len(kept) == 0:
        raise DataError(
            f"{name}: got {int(chosen.sum())} samples, none with a supervised token ({why}); expected at least one. "
            f"Check the rows and max_length ({spec.max_length})."
        )
    if reasons:
        logger.warning("%s: dropped %d of %d samples: %s", name, reasons.total(), int(chosen.sum()), why)
    report = {
        "rows": len(np.unique(_numpy(samples, "row")[chosen])),
        "samples": len(kept),
        "tokens": int(_numpy(samples, "length")[kept].sum()),
        "supervised_tokens": int(_numpy(samples, "supervised")[kept].sum()),
        "truncated": int(_numpy(samples, "truncated")[kept].sum()),
    } | counts
    columns = ["input_ids", "labels", *(_SPANS if spec.spans else ())]
    dataset = samples.select_columns([*columns, "length"])
    dataset = dataset if len(kept) == len(dataset) else dataset.select(kept)
    if spec.packing:
        dataset = _pack(dataset.select_columns(columns), spec.max_length)
        report["packed_sequences"] = len(dataset)
    return dataset, report


def _pack(dataset: Dataset, max_length: int) -> Dataset:
    """Pack best-fit decreasing, documents whole; `seq_lengths` [documents] tells them apart."""
    packed = pack_dataset(dataset, max_length, strategy="bfd")
    return packed.map(_total_length, batched=True, input_columns="seq_lengths", desc="measuring")


def _total_length(seq_lengths: list[list[int]]) -> dict[str, list[int]]:
    return {"length": [sum(lengths) for lengths in seq_lengths]}


def _numpy(samples: Dataset, column: str) -> np.ndarray:
    return samples.data.column(column).to_numpy()
