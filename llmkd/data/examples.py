"""Rows to examples of a classifier or regressor: one text or a pair, and its label."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value

from llmkd.data.chat import bad_cell
from llmkd.data.load import DataSpec, load_rows
from llmkd.data.samples import Prepared
from llmkd.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)


def prepare_examples(spec: DataSpec, tokenizer: Any, rows: Dataset | None = None) -> Prepared:
    """Tokenise rows with `text`, `text_pair` if there is one, and `label` into examples of at most `max_length` tokens.

    Columns are the tokenizer's inputs, `labels` and `length`. A label is a class, an integer from 0, or a regression's
    number; rows without one (None, or below 0 as the Hub marks test sets) are dropped and counted as `no_label`.

    Raises:
        DataError: a missing column, a cell of a wrong type, no row with a label, or an option that examples have no use for.
    """
    _refuse(spec)
    rows = load_rows(spec) if rows is None else rows
    train, evaluation = _encode(rows, spec.columns, tokenizer, spec, "data"), None
    if spec.held_out_every:
        numbers = np.arange(len(train)) % spec.held_out_every
        train, evaluation = train.select(np.flatnonzero(numbers)), train.select(np.flatnonzero(numbers == 0))
    if spec.eval is not None:
        evaluation = _encode(load_rows(spec.eval), spec.eval.columns, tokenizer, spec, "data.eval")
    kept, report = _finish(train, "data", None)
    if evaluation is None:
        return Prepared(kept, None, report)
    held_out, counts = _finish(evaluation, "data.eval", spec.max_eval_samples)
    return Prepared(kept, held_out, report | {f"eval_{key}": count for key, count in counts.items()})


def _refuse(spec: DataSpec) -> None:
    for key, value in (("packing", spec.packing), ("spans", spec.spans)):
        if value:
            raise DataError(
                f"data.{key}: got {value} for rows with labels; expected one example a row. Remove data.{key}."
            )


def _encode(rows: Dataset, columns: dict[str, str], tokenizer: Any, spec: DataSpec, name: str) -> Dataset:
    used = [ours for ours in ("text", "text_pair", "label") if ours in columns or ours == "text"]
    theirs = {ours: columns.get(ours, ours) for ours in used}
    for ours, column in theirs.items():
        if column not in rows.column_names:
            hint = did_you_mean(column, rows.column_names)
            have = ", ".join(rows.column_names)
            raise DataError(f"{name}.columns: got {ours}: '{column}'; the columns are: {have}{hint or '. Name one.'}")
    if extra := sorted(set(columns) - set(used)):
        raise DataError(
            f"{name}.columns: got {extra[0]} beside a label; expected text, text_pair and label. Remove it."
        )
    if "label" not in columns:
        raise DataError(
            f"{name}.columns: got no label; expected the column that data.columns names. Add {name}.columns."
        )
    rows = rows.with_format(None).select_columns(list(theirs.values()))
    label = rows.features[theirs["label"]]
    whole = isinstance(label, ClassLabel) or "int" in str(getattr(label, "dtype", ""))
    kinds = {kind: List(Value("int32")) for kind in tokenizer(*[""] * (len(used) - 1))}
    return rows.map(
        partial(_encode_batch, theirs=theirs, tokenizer=tokenizer, max_length=spec.max_length, name=name),
        batched=True, batch_size=1000, with_indices=True, remove_columns=rows.column_names, desc=f"tokenising {name}",
        features=Features({**kinds, "labels": Value("int64" if whole else "float32"), "length": Value("int32")}),
    )  # fmt: skip


def _encode_batch(
    batch: dict[str, list], index: list[int], *, theirs: dict[str, str], tokenizer: Any, max_length: int, name: str
) -> dict[str, list]:
    texts = [batch[column] for ours, column in theirs.items() if ours != "label"]
    for column, cells in zip(theirs.values(), texts, strict=False):
        for row, cell in zip(index, cells, strict=True):
            if not isinstance(cell, str):
                raise bad_cell(f"{name} row {row}.{column}", cell, "a string")
    encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length, verbose=False))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    known = zip(index, batch[theirs["label"]], strict=True)
    labels = [_label(label, f"{name} row {row}.{theirs['label']}") for row, label in known]
    return {**encoded, "labels": labels, "length": lengths}


def _label(value: Any, where: str) -> int | float | None:
    """A class or a value; None where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise bad_cell(where, value, "a class number or a value")
    missing = value is None or math.isnan(value) or (isinstance(value, int) and value < 0)
    return None if missing else value


def _finish(examples: Dataset, name: str, limit: int | None) -> tuple[Dataset, dict[str, int]]:
    """Keep the labelled ones, at most `limit`, and count."""
    labels = examples["labels"]
    kept = [row for row, label in enumerate(labels) if label is not None]
    missing = len(labels) - len(kept)
    if not kept:
        raise DataError(
            f"{name}: got {len(labels)} rows, none with a label; expected at least one. Point {name}.path at labelled data."
        )
    if missing:
        logger.warning("%s: dropped %d of %d rows without a label", name, missing, len(labels))
    kept = kept[:limit]
    examples = examples if len(kept) == len(examples) else examples.select(kept)
    return examples, {
        "rows": len(labels),
        "samples": len(examples),
        "tokens": sum(examples["length"]),
        "no_label": missing,
    }


def check_labels(examples: Dataset, classes: int, name: str = "data") -> None:
    """Check that labels are what a model with so many outputs tells: classes, or with one output values.

    Raises:
        DataError: a label that is no class of the model.
    """
    if classes == 1:
        return
    wrong = next((label for label in examples["labels"] if label not in range(classes)), None)
    if wrong is not None or not isinstance(examples[0]["labels"], int):
        seen = examples[0]["labels"] if wrong is None else wrong
        raise DataError(
            f"{name}: got the label {seen}; expected a class from 0 to {classes - 1}, as an integer. Set model.num_labels "
            "to the number of classes, or to 1 for a regression."
        )
