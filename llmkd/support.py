"""One event space for student and teacher: log-probabilities over V tokens, or over K tokens and one tail event."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmkd.types import Rows


def wide(x: Tensor) -> Tensor:
    """Widen half precision to float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(z / T) in at least float32, [n, V] -> [n, V] nats."""
    z = wide(logits)
    return torch.log_softmax(z if temperature == 1.0 else z / temperature, dim=-1)


def pair(student_logits: Tensor, teacher: Rows, rows: slice, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both models over the same events.

    Args:
        student_logits: [n, V], of the rows `rows`.
        teacher: any rows; dense ones give V events, top-k ones K events and a tail (none when K = V).
        rows: which of the teacher's rows.
        temperature: divides both models' logits.

    Returns:
        (log_t, log_s), both [n, events], in nats.

    Raises:
        ValueError: the widths differ, or top-k rows were recorded at another temperature.
    """
    return teacher.align(rows, log_softmax(student_logits, temperature), temperature)


def coarsen(log_p: Tensor, ids: Tensor) -> Tensor:
    """Keep the events `ids` [n, K] of `log_p` [n, V] and sum all others into one tail: [n, K + 1], or [n, V] if K = V.

    An id of -1 is no event: it gets log 0.
    """
    named, ids = ids >= 0, name_all(ids)
    kept = log_p.gather(-1, ids).masked_fill(~named, float("-inf"))
    if ids.shape[-1] == log_p.shape[-1]:
        return kept
    tail = log_p.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([kept, tail], dim=-1)


def name_all(ids: Tensor) -> Tensor:
    """Ids [n, K] with another of their row in place of -1; a row has at least one event."""
    return torch.where(ids >= 0, ids, ids.amax(-1, keepdim=True))


def log_tail(log_p: Tensor) -> Tensor:
    """log(1 - sum exp(log_p)) over the last dimension, [n, K] -> [n, 1]; the mass that K events leave, at least eps."""
    mass = log_p.double().exp().sum(-1, keepdim=True)
    return (1.0 - mass).clamp_min(torch.finfo(torch.float32).tiny).log().to(log_p.dtype)
