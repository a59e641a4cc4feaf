"""A teacher that was run once: its rows come from stores on the disk, by what each example says."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

import numpy as np

from llmkd.config import known_keys
from llmkd.data.ids import dataset_ids, id_name
from llmkd.errors import ConfigError, DataError
from llmkd.events import TopKRows
from llmkd.heads import HeadRows
from llmkd.store import STORES, Codec
from llmkd.store.shards import StoreFolder
from llmkd.teachers.base import parts_of
from llmkd.types import Batch, Outputs, Signal, supervised_rows
from llmkd.weights import smoking


class CachedTeacher:
    """Shows the stored rows of a batch's documents, in any order, packing, epoch and number of processes; runs no model.

    Args:
        stores: written by one teacher in one way, perhaps of several data sets. The first one that has an example is read.

    Raises:
        ConfigError: the stores do not go together.
    """

    tokenizer: Any
    reads_documents = True

    def __init__(self, stores: list[StoreFolder]) -> None:
        self.stores = stores
        for store in stores[1:]:
            _same(stores[0], store)
        self.note = stores[0].note
        self.kind = _kind(stores[0])
        self.provides, self.temperature = self.kind.provides, self.kind.temperature
        self.vocab_size: int = self.note["vocab_size"]
        self.tokenizer = _Vocabulary(self.note["vocabulary"]) if self.note["vocabulary"] else None
        self._device: Any = "cpu"
        self._head: HeadRows | None = None

    def prepare(self, accelerator: Any) -> None:
        """Rows, and the head if it is stored, go to the accelerator's device."""
        self._device, self._head = accelerator.device, None

    def check_data(self, dataset: Any) -> None:
        """Raise a DataError that names the first document of a tokenised dataset which no store has."""
        for ids in dataset_ids(dataset):
            missing = ids[~np.logical_or.reduce([store.has(ids) for store in self.stores])]
            if len(missing):
                self._missing(missing[0])

    def __call__(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
        """The supervised rows of the batch's documents.

        Raises:
            DataError: a document is not stored, or damaged. ConfigError: the batch does not say what its documents are.
        """
        ids: Any = batch.get("ids")
        if ids is None:
            raise ConfigError(
                "teacher: got a batch without ids, by which stored rows are found; expected them. "
                "Make batches with llmkd.data.DocumentCollator(your collator), as DistillTrainer does."
            )
        rows = self._rows([self._read(int(example)) for example in ids])
        expected = len(supervised_rows(batch))
        if len(rows) != expected:
            raise DataError(
                f"teacher: the batch's {len(ids)} documents have {len(rows)} rows in the store and {expected} in the batch; "
                "expected as many. Do not change labels after batch['ids'] are computed."
            )
        if vocab_size is not None and isinstance(rows, HeadRows):
            rows = HeadRows(rows.hidden, rows.head, scale=rows.scale, softcap=rows.softcap, vocab_size=vocab_size)
        return Outputs(rows=rows)

    def _read(self, example: int) -> Any:
        """One document's rows, as its kind decodes them."""
        wanted = np.array([example])
        store = next((store for store in self.stores if store.has(wanted)[0]), None)
        if store is None:
            self._missing(example)
        shard, place = store.find(example)
        width = self.note["width"] if self.kind.keeps_head else self.vocab_size
        data = shard.read(place)
        try:
            return self.kind.decode(data, int(shard.rows[place]), width)
        except (ValueError, IndexError) as error:
            shard.damaged(error)

    def _rows(self, parts: list[Any]) -> HeadRows | TopKRows:
        if self.kind.keeps_head and self._head is None:
            self._head = self.stores[0].head(self._device)
        return self.kind.join(parts, self._device, self._head, self.vocab_size)

    def _missing(self, example: int) -> NoReturn:
        where = ", ".join(str(store.folder) for store in self.stores)
        data = self.note["data"].get("path", "its data")
        raise DataError(
            f"teacher: example {id_name(example)} is not in {where}, which holds {sum(len(s.ids) for s in self.stores):,} of "
            f"'{data}' at max_length {self.note['max_length']}; expected every example, evaluation's too. Write a store of "
            "these data, with their tokenizer, chat template and max_length, or name it in teacher.path beside this one."
        )


class _Vocabulary:
    """As much of a tokenizer as comparing vocabularies takes."""

    def __init__(self, tokens: dict[str, int]) -> None:
        self._tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return self._tokens


def cached(*, path: str | list[str], revision: str | None = None) -> Any:
    """p = the rows that `llmkd stage recipes/store/*.yaml` wrote: top-k and a tail, samples, or hidden states and a head.

    Args:
        path: the stage's folder, or several of one teacher, such as one for training and one for evaluation data.
        revision: of the teacher, if it must be this one: a Hub commit, as the folder's manifest has it.

    Reference: Anshumann et al. 2025 (Sparse Logit Sampling), arXiv 2503.16870.
    """
    if smoking():
        from llmkd.teachers.local import local

        return local(path="llama")
    teacher = CachedTeacher([StoreFolder(folder) for folder in ([path] if isinstance(path, str) else path)])
    if revision not in (None, teacher.note["teacher"]):
        raise ConfigError(
            f"teacher.revision: got {revision}, but {teacher.stores[0].folder} holds rows of {teacher.note['teacher']}; "
            "expected the same teacher. Write the store anew, or remove revision."
        )
    return teacher


def check_spec(teacher: Any, spec: Any) -> None:
    """Raise a ConfigError if a store was written of the data that `spec` (a DataSpec) names, but in another way."""
    for store in (store for part in parts_of(teacher) for store in getattr(part, "stores", ())):
        asked = {"max_length": spec.max_length}
        if spec.path == store.note["data"]["path"]:
            asked |= {key: getattr(spec, key) for key in ("name", "split", "revision", "columns")}
        for key, value in asked.items():
            default = type(spec).model_fields[key].get_default()
            stored = store.note["max_length"] if key == "max_length" else store.note["data"].get(key, default)
            if value != stored:
                raise ConfigError(
                    f"data.{key}: got {value!r}, but {store.folder} was written with {stored!r}; expected the same. "
                    f"Set data.{key}, or write the store anew."
                )


def _kind(store: StoreFolder) -> Codec:
    """The codec that wrote a store, which has just its settings: a default that has changed since would read them wrongly."""
    settings = dict(store.note["kind"])
    name = settings.pop("name", None)
    known = known_keys(STORES[name]) if name in STORES else []
    if sorted(known) != sorted(settings):
        raise DataError(
            f"teacher.path: {store.folder} was written as {name} with {', '.join(sorted(settings))}; expected "
            f"{f'{name} with ' + ', '.join(sorted(known)) if known else ' or '.join(STORES)}. Write the store anew."
        )
    return STORES[name](**settings)


def _same(one: StoreFolder, other: StoreFolder) -> None:
    """Raise a ConfigError unless two stores may serve one teacher."""
    for key in ("teacher", "kind", "vocab_size", "max_length", "vocabulary"):
        if one.note[key] != other.note[key]:
            shown = "other values" if key == "vocabulary" else f"{one.note[key]!r} and {other.note[key]!r}"
            raise ConfigError(
                f"teacher.path: {one.folder} and {other.folder} have {shown} of {key}; expected the same in all stores. "
                "Write one of them anew."
            )
