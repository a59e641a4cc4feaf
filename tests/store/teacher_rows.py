"""Rows of a random teacher for the tests of what is stored."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from llmkd.heads import DenseRows, HeadRows
from llmkd.store import Codec

WIDTH = 16


def head_rows(rows: int, vocab_size: int, seed: int = 0, sharp: float = 1.5) -> HeadRows:
    """HeadRows [rows, vocab_size] in float32."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, vocab_size)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = sharp * torch.randn(rows, WIDTH, generator=generator)
    rows_ = HeadRows(hidden, head)
    return rows_.using([t.detach() for t in rows_.tensors()])


def labels_of(rows: int, vocab_size: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (rows,), generator=torch.Generator().manual_seed(seed))


def log_p_of(rows: HeadRows | DenseRows, temperature: float = 1.0) -> Tensor:
    return torch.log_softmax(rows.logits(slice(None)) / temperature, -1)


def stored(kind: Codec, rows: HeadRows, labels: Tensor, seed: int = 0):
    """The rows after they went through bytes."""
    data = kind.encode(rows, labels, seed)
    width = WIDTH if kind.keeps_head else rows.vocab_size
    part = kind.decode(np.frombuffer(data, dtype=np.uint8), len(rows), width)
    return kind.join([part], "cpu", rows, rows.vocab_size)
