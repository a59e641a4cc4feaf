"""Stored rows of a few draws: an unbiased estimate of the teacher's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkd.errors import ConfigError
from llmkd.events import TopKRows
from llmkd.heads import HeadRows
from llmkd.store.base import Codec, log_probs, padded
from llmkd.store.bits import pack, pack_rising, packed_bytes, rising_bytes, unpack, unpack_rising
from llmkd.store.draws import comb, offsets
from llmkd.types import Signal

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Events a row [n], and of all rows end to end their rising ids and the logs of their weights."""


class Sampled(Codec):
    """t_v = (draws of v / n) p_v / r_v, n draws from r = p^power / sum p^power: E[t] = p, as ids, counts and weights.

    What is linear in p keeps its expected gradient: the forward KL (its value grows by the entropy that t lacks, which the
    student cannot change). With power 1 all p_v / r_v are 1, nothing but ids and counts is stored and t sums to 1; below 1
    rare tokens are drawn more often, and weigh less. Nothing else may read such rows: E[f(t)] is not f(p). The n draws are at
    equal steps (`draws.comb`): a token is drawn n r_v times, rounded up or down, which has less noise than n on their own.

    Args:
        draws: n; a row has at most as many tokens.
        power: > 0, of the proposal r.
        temperature: T > 0 that divides the logits; a loss that reads the rows needs the same.
        seed: with an example's content, all that its draws depend on.

    Reference: Anshumann et al. 2025 (Sparse Logit Sampling), arXiv 2503.16870.
    Fidelity: paper only (weights that are not renormalised keep a tempered proposal unbiased; the equal steps are ours).
    """

    provides = frozenset({Signal.SAMPLES})
    temperature: float

    def __init__(self, draws: int = 12, power: float = 1.0, temperature: float = 1.0, seed: int = 0) -> None:
        if not 1 <= draws < 2**16:
            raise ConfigError(f"store sampled.draws: got {draws}; expected 1 to 65535, such as 12.")
        for name, value in {"power": power, "temperature": temperature}.items():
            if value <= 0:
                raise ConfigError(f"store sampled.{name}: got {value}; expected a number above 0, such as 1.0.")
        self.draws, self.power, self.temperature, self.seed = draws, power, temperature, seed

    def encode(self, rows: HeadRows, labels: Tensor, seed: int) -> bytes:
        """One example's rows."""
        offset = offsets(len(rows), seed ^ self.seed)
        parts = [self._draw(log_p, part.start, offset[part]) for part, log_p in log_probs(rows, self.temperature)]
        numbers, times, ratios = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        head = np.array([len(numbers)], dtype="<u4").tobytes()
        weights = ratios.astype("<f4").tobytes() if self.power != 1.0 else b""
        return head + pack_rising(numbers, len(rows) * rows.vocab_size) + pack(times - 1, self._width) + weights

    def _draw(self, log_p: Tensor, start: int, offset: Tensor) -> tuple[np.ndarray, ...]:
        """row * V + id of what is drawn, how often, and log p / r, of rows from number `start`."""
        r = torch.softmax(log_p * self.power, dim=-1, dtype=torch.float64)
        drawn = comb(self.draws * r, offset, self.draws)
        row = torch.arange(len(log_p), device=log_p.device).unsqueeze(-1)
        places, times = (row * log_p.shape[-1] + drawn).unique(return_counts=True)
        ratios = log_p.flatten()[places] - r.flatten()[places].log()
        return (places + start * log_p.shape[-1]).cpu().numpy(), times.cpu().numpy(), ratios.cpu().numpy()

    @property
    def _width(self) -> int:
        return (self.draws - 1).bit_length()

    def decode(self, data: np.ndarray, rows: int, width: int) -> Drawn:
        """One example's draws."""
        count = int(data[:4].view("<u4")[0])
        places = np.cumsum([4, rising_bytes(count, rows * width), packed_bytes(count, self._width)])
        if len(data) != places[2] + 4 * count * (self.power != 1.0):
            raise ValueError(f"{len(data)} bytes for {count} events of {rows} rows")
        row, ids = np.divmod(unpack_rising(data[4:], count, rows * width), width)
        times = unpack(data[places[1] :], count, self._width) + 1
        log_t = np.log(times / self.draws)
        if self.power != 1.0:
            log_t += data[places[2] :].view("<f4")
        return np.bincount(row, minlength=rows), ids, log_t

    def join(self, parts: Sequence[Drawn], device: Any, head: HeadRows | None, vocab_size: int) -> TopKRows:
        """Rows of several examples, the shorter ones filled up."""
        return TopKRows(*padded(parts, vocab_size, device), vocab_size, self.temperature, sampled=True)
