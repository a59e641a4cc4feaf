"""Several teachers, each for its own domains: an example is read by one of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkd.errors import ConfigError, DataError
from llmkd.mixture import route
from llmkd.teachers.base import Teacher, check_data
from llmkd.teachers.ensemble import Members, built
from llmkd.types import Batch, Outputs, Routes, Signal, supervised_rows

BY_EXAMPLE = ("input_ids", "labels", "attention_mask", "position_ids")


class RoutedTeacher:
    """Shows p_j of the member j that an example's `domain` names; each member runs on its own examples only.

    Under sharding every member runs on every rank, if need be on one example that it shows no row of.

    Args:
        teachers: domain -> teacher; all live or of hidden states, or all of draws or top-k rows at one temperature.

    Raises:
        ConfigError: the members do not go together.
    """

    reads_documents = True

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.domains, self.members = list(teachers), Members(list(teachers.values()))
        if len(self.members.temperatures) > 1:
            raise ConfigError(
                "routed: got whole rows of some teachers and stored events, or other temperatures, of others; expected one "
                "kind of all. Store hidden states, or all alike."
            )
        (self.temperature,) = self.members.temperatures
        self.provides, self.tokenizer = self.members.provides, self.members.tokenizer
        self.vocab_size = self.members.vocab_size
        self._names: list[str] | None = None

    def prepare(self, accelerator: Any) -> None:
        """Prepare each member."""
        self.members.prepare(accelerator)

    def check_data(self, dataset: Any) -> None:
        """See that every domain of a dataset has a teacher, and every example a stored row where its teacher reads one.

        Raises:
            DataError: it has no column `domain`, a domain without a teacher, or an example that is not stored.
        """
        if "domain" not in getattr(dataset, "column_names", ()):
            raise DataError("teacher: routed needs a column 'domain'; the data have none. Set data.domain_column.")
        self._names = getattr(dataset.features["domain"], "names", None)
        numbers = np.array([self._number(value) for value in dataset["domain"]])
        for number, teacher in enumerate(self.members):
            mine = np.flatnonzero(numbers == number)
            if len(mine):
                check_data(teacher, dataset.select(mine))

    def __call__(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
        """Each row of a batch as its example's teacher has it."""
        routes: Any = batch.get("routes")
        if not isinstance(routes, Routes):
            raise ConfigError(
                "teacher: got a batch without routes; expected some. Give the examples a column 'domain', and make batches "
                "with llmkd.data.DocumentCollator(your collator), as DistillTrainer does."
            )
        width = self.vocab_size if vocab_size is None else vocab_size
        by_example = np.array([self._number(value) for value in routes.domains])
        owner = by_example[routes.examples]
        rows: list[Any] = [
            teacher(_part(batch, routes, by_example, owner, number), {Signal.LOGITS}, width).rows
            for number, teacher in enumerate(self.members)
        ]
        return Outputs(rows=route(rows, np.repeat(owner, routes.rows)))  # type: ignore[arg-type]

    def _number(self, value: Any) -> int:
        """The member of a domain."""
        name = self._names[value] if self._names is not None and not isinstance(value, str) else value
        if name not in self.domains:
            raise DataError(
                f"teacher: got the domain {name!r}; expected one of {', '.join(self.domains)}. Name a teacher for it."
            )
        return self.domains.index(name)


def routed(*, teachers: dict[str, str | dict]) -> RoutedTeacher:
    """p = p_j(x), j = the domain of the example x: a teacher for each domain, each live or cached.

    Args:
        teachers: domain -> a spec as `teacher:` takes it; all of one tokenizer.

    Reference: Lopez-Paz et al. 2016 (generalised distillation), arXiv 1511.03643, for teachers of several domains.
    """
    return RoutedTeacher({domain: built(spec) for domain, spec in teachers.items()})


def _part(batch: Batch, routes: Routes, by_example: np.ndarray, owner: np.ndarray, number: int) -> Batch:
    """The examples of one member, at least one, with the rows and ids that are its."""
    mine = np.flatnonzero(by_example == number)
    some = mine if len(mine) else np.zeros(1, dtype=np.int64)
    device, width = batch["input_ids"].device, batch["input_ids"].shape[1]
    chosen = torch.from_numpy(some).to(device)
    part: dict[str, Any] = {key: batch[key].index_select(0, chosen) for key in BY_EXAMPLE if key in batch}
    own = np.repeat(owner == number, routes.rows)
    moved = np.searchsorted(some, routes.examples) - routes.examples  # how many examples further down
    shift = np.repeat(moved, routes.rows)[own] * width
    rows = supervised_rows(batch).index_select(0, _to(np.flatnonzero(own), device))
    ids: Any = batch["ids"]
    return {**part, "rows": rows + _to(shift, device), "ids": ids[owner == number]}


def _to(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int64)).to(device)
