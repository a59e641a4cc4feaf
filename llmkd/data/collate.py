"""Samples to one batch of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value, concatenate_datasets
from torch import Tensor
from transformers import DataCollatorWithPadding

from llmkd.errors import ConfigError
from llmkd.types import supervised_rows

IGNORE = -100


@dataclass
class Collator:
    """Pads examples to one length: `input_ids`, `labels`, `position_ids`, `attention_mask`, all int64 [B, T].

    `rows` [N] are the flat positions that predict a supervised token: known here, on the host, the training step needs
    no sync to find them. `spans` [P], if the examples have them, are the first of each two rows, by their place in `rows`,
    that predict adjacent tokens of one span.

    Padding is told by length, never by id, so that a true EOS counts where pad = EOS. Position ids count a row's real
    tokens from 0, whichever side is padded, and are 0 at padding.

    Packed examples have `seq_lengths`. Their position ids restart at each document and there is no attention mask:
    transformers then keeps documents apart for any batch size with sdpa and eager attention, if the model runs
    without a cache (`use_cache=False`); flash attention does so for a batch of one row only.

    Raises: ConfigError for an unknown padding side, or packed examples without `packing`.
    """

    pad_token_id: int
    packing: bool = False
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in ("right", "left"):
            raise ConfigError(f"padding_side: got '{self.padding_side}'; expected 'right' or 'left'. Use one of these.")

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch; T is the longest example, rounded up to `pad_to_multiple_of`."""
        if "seq_lengths" in examples[0] and not self.packing:
            raise ConfigError("Collator: got packed examples; expected packing=True for these. Set packing=True.")
        ids = [example["input_ids"] for example in examples]
        batch = {
            "input_ids": self._pad(ids, self.pad_token_id),
            "labels": self._pad([example["labels"] for example in examples], IGNORE),
        }
        batch["rows"] = supervised_rows(batch)
        if "spans" in examples[0]:
            spans = self._pad([example["spans"] for example in examples], 0)
            batch["spans"] = paired_rows(spans, batch["rows"])
        if self.packing:
            lengths = [example.get("seq_lengths", [len(example["input_ids"])]) for example in examples]
            positions = [[i for length in row for i in range(length)] for row in lengths]
            return batch | {"position_ids": self._pad(positions, 0)}
        mask = self._pad([[1] * len(row) for row in ids], 0)
        return batch | {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1) * mask}

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        width = max(len(row) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        out = torch.full((len(rows), width), value, dtype=torch.int64)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if self.padding_side == "left" else slice(0, len(row))
            out[i, place] = torch.as_tensor(row, dtype=torch.int64)
        return out


@dataclass
class ExampleCollator:
    """Pads examples as transformers' DataCollatorWithPadding does: the tokenizer's inputs [B, T], `labels` [B], `rows` [N].

    `rows` are the examples with a label that is not -100. Columns that are no input of the tokenizer are left out.
    """

    tokenizer: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch."""
        names = {*self.tokenizer.model_input_names, "label", "labels"}
        kept = [{name: value for name, value in example.items() if name in names} for example in examples]
        batch = dict(DataCollatorWithPadding(self.tokenizer)(kept))
        return batch | {"rows": supervised_rows(batch)}


def collator(unit: Literal["token", "example"], tokenizer: Any) -> Collator | ExampleCollator:
    """The default collator of models with one row a token, or an example."""
    if unit == "token":
        pad_id = getattr(tokenizer, "pad_token_id", None)
        return Collator(0 if pad_id is None else pad_id)
    if tokenizer is None:
        raise ConfigError("processing_class: got None; expected the tokenizer, to pad examples with. Pass it.")
    return ExampleCollator(tokenizer)


def paired_rows(spans: Tensor, rows: Tensor) -> Tensor:
    """Which rows [P] of `rows` [N] predict, with the row after them, two adjacent tokens of one span; `spans` [B, T]."""
    number = spans.flatten()[rows + 1]
    together = (rows[1:] == rows[:-1] + 1) & (number[1:] == number[:-1]) & (number[1:] > 0)
    return together.nonzero().squeeze(-1)


def pad_with_unsupervised(dataset: Any, multiple: int) -> Any:
    """Append copies of the first sample with all labels -100, until the length is a multiple of `multiple`.

    Every rank then has equally many evaluation batches, and no supervised token counts twice. Takes a Dataset, or
    anything with a length and rows by number.
    """
    missing = -len(dataset) % multiple
    if missing == 0 or len(dataset) == 0:
        return dataset
    name = "labels" if "labels" in dataset[0] else "label"
    label = dataset[0][name]
    filler = {**dataset[0], name: IGNORE if np.ndim(label) == 0 else [IGNORE] * len(label)}
    if not isinstance(dataset, Dataset):
        return [*(dataset[i] for i in range(len(dataset))), *([filler] * missing)]
    if isinstance(dataset.features[name], ClassLabel):
        dataset = dataset.cast_column(name, Value("int64"))  # -100 is no class
    return concatenate_datasets([dataset, Dataset.from_list([filler] * missing, features=dataset.features)])
