"""Data of several named domains: prepared one by one, sampled with given probabilities, each domain without end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_pt_utils import get_length_grouped_indices

from llmkd.data.ids import DOMAIN
from llmkd.data.load import DataSpec, SourceSpec, has_domains, load_rows
from llmkd.data.samples import Prepared
from llmkd.data.samples import prepare as prepare_one
from llmkd.errors import DataError, did_you_mean

Sources = dict[str, tuple[SourceSpec, Dataset]]


def prepare(
    spec: DataSpec, processing_class: PreTrainedTokenizerBase | ProcessorMixin, rows: Dataset | None = None
) -> Prepared:
    """`samples.prepare` of `spec` (or `rows`, if given); of named domains each on its own, with the column `domain` added.

    `held_out_every`, `max_samples` and `max_eval_samples` then count within each domain, and a packed sequence holds one
    domain's documents. The report counts over all domains.

    Raises: DataError, naming the domain, for one without rows, without validation rows, or with bad rows.
    """
    if not has_domains(spec):
        return prepare_one(spec, processing_class, rows)
    train, held_out = _sources(spec, "data", rows), _held_out(spec)
    if len(train) < 2:
        raise DataError(f"data: got one domain, {', '.join(train)}; expected at least two. Name more, or none.")
    _same_names(train, held_out, spec)
    parts = {}
    for name, (source, own_rows) in train.items():
        own = spec.model_copy(update={"columns": source.columns, "max_samples": source.max_samples})
        evaluation = held_out.get(name)
        if evaluation is not None:
            own = own.model_copy(update={"eval": spec.eval.model_copy(update={"columns": evaluation[0].columns})})  # type: ignore[union-attr]
        try:
            parts[name] = prepare_one(own, processing_class, own_rows, evaluation[1] if evaluation else None)
        except DataError as error:
            raise DataError(f"domain '{name}': {error}") from error
    return _joined(parts)


def _held_out(spec: DataSpec) -> Sources:
    if spec.eval is None:
        return {}
    column = spec.eval.domain_column or spec.domain_column
    if not has_domains(spec.eval) and column is None:
        raise DataError(
            "data.eval: got no domains; expected those of data. Give its path as a mapping, or set eval.domain_column."
        )
    return _sources(spec.eval.model_copy(update={"domain_column": column}), "data.eval")


def _same_names(train: Sources, held_out: Sources, spec: DataSpec) -> None:
    if spec.eval is None:
        return
    for name in held_out:
        if name not in train:
            hint = did_you_mean(name, train) or ". Remove it, or add it to data"
            raise DataError(f"data.eval: got domain '{name}'; expected one of {', '.join(train)}{hint}.")
    for name in train:
        if name not in held_out:
            raise DataError(f"data.eval: got no rows of domain '{name}'; expected some of every domain. Add them.")


def _sources(spec: SourceSpec, where: str, rows: Dataset | None = None) -> Sources:
    """Every domain's rows, and the source whose columns they have: named paths, or the values of a column."""
    if isinstance(spec.path, dict):
        if rows is not None:
            raise DataError(f"{where}: got rows and a path for each domain; expected one of them. Set domain_column.")
        found: Sources = {}
        for name, value in spec.path.items():
            own = value.model_dump(exclude_unset=True) if isinstance(value, SourceSpec) else {"path": value}
            source = spec.model_copy(update=own)
            try:
                found[name] = (source, load_rows(source))
            except DataError as error:
                raise DataError(f"{where}: domain '{name}': {error}") from error
        return found
    rows = load_rows(spec.model_copy(update={"max_samples": None})) if rows is None else rows
    column = str(spec.domain_column)
    rows = rows.flatten() if "." in column else rows
    if column not in rows.column_names:
        hint = did_you_mean(column, rows.column_names) or ". Name one of them."
        raise DataError(
            f"{where}.domain_column: got '{column}'; expected one of the columns {', '.join(rows.column_names)}{hint}"
        )
    values = rows[column]
    for number, value in enumerate(values):
        if value is None or str(value) == "":
            raise DataError(
                f"{where} row {number}.{column}: got {value!r}; expected the name of a domain. Fix the row."
            )
    names, index = np.unique(np.array([str(value) for value in values]), return_inverse=True)
    return {str(name): (spec, rows.select(np.flatnonzero(index == i))) for i, name in enumerate(names)}


def _joined(parts: dict[str, Prepared]) -> Prepared:
    label = ClassLabel(names=list(parts))

    def join(datasets: Sequence[Dataset]) -> Dataset:
        marked = [data.add_column(DOMAIN, [i] * len(data), feature=label) for i, data in enumerate(datasets)]
        return concatenate_datasets(marked)

    report: dict[str, int] = {"domains": len(parts)}
    for part in parts.values():
        for key, count in part.report.items():
            report[key] = report.get(key, 0) + count
    held_out = [part.eval for part in parts.values() if part.eval is not None]
    return Prepared(join([part.train for part in parts.values()]), join(held_out) if held_out else None, report)


class DomainSampler(Sampler[int]):
    """Rows of one interval: each row's domain is drawn with the given probabilities, its next row from that domain's pass.

    A domain's pass is a shuffle of all its rows; when it is through, the next begins. All is a function of the seed, the
    interval, the weights and how many rows of each domain were drawn before: the same on every rank, and after a resume.
    With a group size, an interval's rows are reordered so that batches of that many rows hold rows of like length.

    Args:
        domains: [rows] the number of each row's domain, 0 to n_domains - 1.
        n_domains: how many there are; each needs a row.
        size: rows an interval.
        seed: with the interval and the passes, what the shuffles depend on.
        lengths: [rows] tokens a row; group: rows of one optimizer step over all ranks, or 0 for no grouping.
    """

    def __init__(self, domains: Any, n_domains: int, size: int, seed: int, lengths: Any = None, group: int = 0) -> None:
        self.domains = np.asarray(domains)
        self.members = [np.flatnonzero(self.domains == number) for number in range(n_domains)]
        self.size, self.seed, self.lengths, self.group = size, seed, lengths, group
        self.begin(0, [len(rows) for rows in self.members], [0] * n_domains)

    def begin(self, interval: int, weights: Sequence[float], drawn: Sequence[int]) -> None:
        """Plan an interval: its probabilities, and the rows of each domain that were drawn before it."""
        self.plan = self._plan(interval, np.asarray(weights, dtype=np.float64), drawn)

    def counts(self, rows: int | None = None) -> list[int]:
        """Rows of each domain among the first `rows` of the interval, or in all of it."""
        return np.bincount(self.domains[self.plan[:rows]], minlength=len(self.members)).tolist()

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(self.plan.tolist())

    def _plan(self, interval: int, weights: np.ndarray, drawn: Sequence[int]) -> np.ndarray:
        edges = np.cumsum(weights)
        picks = np.random.default_rng([self.seed, interval]).random(self.size)
        chosen = np.searchsorted(edges / edges[-1], picks, side="right")
        plan = np.empty(self.size, dtype=np.int64)
        for number, done in enumerate(drawn):
            places = np.flatnonzero(chosen == number)
            plan[places] = self._next_rows(number, done, len(places))
        if not self.group:
            return plan
        generator = torch.Generator().manual_seed(self.seed * 100_003 + interval)
        lengths = np.asarray(self.lengths)[plan].tolist()
        return plan[get_length_grouped_indices(lengths, self.group, generator=generator)]

    def _next_rows(self, number: int, done: int, count: int) -> np.ndarray:
        """`count` rows of a domain after its first `done`, over as many passes as that takes."""
        rows = self.members[number]
        first, last = done // len(rows), (done + count) // len(rows)
        passes = [np.random.default_rng([self.seed, number, n, 1]).permutation(rows) for n in range(first, last + 1)]
        start = done - first * len(rows)
        return np.concatenate(passes)[start : start + count]
