"""Stored hidden states: with the head, which is kept once, they are the teacher's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llmkd.errors import unknown_name
from llmkd.events import TopKRows
from llmkd.heads import HeadRows
from llmkd.store.base import Codec
from llmkd.types import Signal

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of an fp8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float8": FP8}


class Hidden(Codec):
    """z = head(h): the final hidden states h of the supervised rows; any divergence at any temperature reads them.

    `dtype: auto` is the teacher's own: the rows are exactly those of the live teacher. A narrower one is off by at most
    2^-8 |h_i| (bfloat16), 2^-11 |h_i| (float16, above 6e-5), or 2^-4 |h_i| + 2^-10 max |h| / 448 (float8 e4m3, scaled by
    each row's largest).

    Args:
        dtype: auto, float32, bfloat16, float16 or float8.

    Reference: KDFlow 2026, arXiv 2603.01875, which sends them between processes.
    Fidelity: derived (it is the live teacher's own last step).
    """

    provides = frozenset({Signal.LOGITS})
    keeps_head = True

    def __init__(self, dtype: Literal["auto", "float32", "bfloat16", "float16", "float8"] = "auto") -> None:
        if dtype not in ("auto", *DTYPES):
            raise unknown_name("store hidden.dtype", dtype, ["auto", *DTYPES])
        self.dtype = dtype

    def encode(self, rows: HeadRows, labels: Tensor, seed: int) -> bytes:
        """One example's rows: a letter for their dtype, and their numbers."""
        name = str(rows.hidden.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        hidden, scales = rows.hidden.detach(), b""
        if name == "float8":
            scale = hidden.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
            scales = _bytes(scale)
            hidden = (hidden.float() / scale).clamp(-LARGEST, LARGEST)
        return bytes([list(DTYPES).index(name)]) + scales + _bytes(hidden.to(DTYPES[name]))

    def decode(self, data: np.ndarray, rows: int, width: int) -> Tensor:
        """One example's hidden states, [n, H]."""
        name = list(DTYPES)[int(data[0])]
        at = 1 + (4 * rows if name == "float8" else 0)
        dtype = DTYPES[name]
        if len(data) != at + rows * width * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes for {rows} rows of {width} {name}")
        hidden = torch.from_numpy(data[at:].copy()).view(dtype).view(rows, width)
        if name != "float8":
            return hidden
        return hidden.float() * torch.from_numpy(data[1:at].copy()).view(torch.float32).unsqueeze(-1)

    def join(self, parts: Sequence[Tensor], device: Any, head: HeadRows | None, vocab_size: int) -> HeadRows | TopKRows:
        """Rows of several examples, with the head."""
        assert head is not None
        return head.using([torch.cat(list(parts)).to(device), *head.tensors()[1:]]) if parts else head


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
