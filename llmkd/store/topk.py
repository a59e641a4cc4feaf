"""Stored rows of the K best tokens and a tail: each row's own K, ids in order, log-probabilities in a few bits, draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

EXACT = 32  # bits of a log-probability that is not coded but stored as a float32


@dataclass(frozen=True)
class Events:
    """The named events of n rows, end to end: `counts` [n] of them a row, their `ids` rising within it and `log_probs`.

    `place` [n] says which of a row's events is its label; `label` [n] and `tail` [n] are the log-probabilities, nats, of the
    label and of all tokens that are not named. `draws` [n] tokens a row were drawn from the tail: `draw_ids`, rising within
    a row, perhaps repeated.
    """

    counts: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    place: np.ndarray
    label: np.ndarray
    tail: np.ndarray
    draws: np.ndarray
    draw_ids: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where each row's events begin, [n]."""
        return np.cumsum(self.counts) - self.counts


def encode(events: Events, vocab_size: int, bits: int) -> bytes:
    """The events of one example as bytes.

    ids: row * V + id as one rising sequence, which also tells where each row ends; draws likewise. log-probabilities: what a
    row has between its lowest and its highest (its label's apart, which is stored exactly) is cut into 2^bits - 1 equal steps.

    Args:
        events: of n rows. vocab_size: V. bits: of a log-probability, 2 to 16, or 32 for all of it.
    """
    rows = len(events.counts)
    row = np.repeat(np.arange(rows, dtype=np.int64), events.counts)
    sizes = np.array([len(events.ids), len(events.draw_ids)], dtype="<u4")
    parts = [sizes, events.label.astype("<f4"), events.tail.astype("<f4")]
    ids = pack_rising(row * vocab_size + events.ids, rows * vocab_size)
    of_draws = np.repeat(np.arange(rows, dtype=np.int64), events.draws)
    draws = pack_rising(of_draws * vocab_size + events.draw_ids, rows * vocab_size)
    place = pack(events.place, _place_width(events.counts))
    if bits == EXACT:
        values = events.log_probs.astype("<f4").tobytes()
    else:
        lo, hi = _ends(events)
        parts += [lo, hi]
        step = step_of(lo, hi, bits)[row]
        codes = np.rint((events.log_probs - lo.astype(np.float64)[row]) / np.where(step > 0, step, 1.0))
        values = pack(np.clip(codes, 0, (1 << bits) - 1), bits)
    return b"".join(part.tobytes() for part in parts) + ids + draws + place + values


def decode(data: np.ndarray, rows: int, vocab_size: int, bits: int) -> Events:
    """What `encode` wrote of `rows` rows: labels and tails exactly, other log-probabilities within a step.

    Rounding puts each within half a step of its row. All of a row but its label are then shifted alike, by at most half a
    step, so that the masses of its events and its tail add up to 1.

    Args:
        data: uint8.

    Raises:
        ValueError: the bytes are not those of so many rows.
    """
    count, drawn = (int(size) for size in data[:8].view("<u4"))
    label, tail = data[8 : 8 + 8 * rows].view("<f4").reshape(2, rows)
    at = 8 + 8 * rows
    ends = data[at : at + 4 * rows].view("<f2").reshape(2, rows) if bits != EXACT else None
    at += 0 if ends is None else 4 * rows
    numbers = unpack_rising(data[at:], count, rows * vocab_size)
    at += rising_bytes(count, rows * vocab_size)
    row, ids = np.divmod(numbers, vocab_size)
    counts = np.bincount(row, minlength=rows)
    of_draws, draw_ids = np.divmod(unpack_rising(data[at:], drawn, rows * vocab_size), vocab_size)
    at += rising_bytes(drawn, rows * vocab_size)
    draws = np.bincount(of_draws, minlength=rows)
    width = _place_width(counts)
    place = unpack(data[at:], rows, width)
    at += packed_bytes(rows, width)
    if len(data) != at + packed_bytes(count, bits):
        raise ValueError(f"{len(data)} bytes; expected {at + packed_bytes(count, bits)}")
    if ends is None:
        exact = np.frombuffer(data[at:].tobytes(), "<f4")
        return Events(counts, ids, exact, place, label, tail, draws, draw_ids)
    step = step_of(ends[0], ends[1], bits)
    log_probs = ends[0].astype(np.float64)[row] + unpack(data[at:], count, bits) * step[row]
    start = np.cumsum(counts) - counts
    log_probs[start + place] = -np.inf
    rest = 1.0 - np.exp(label, dtype=np.float64) - np.exp(tail, dtype=np.float64)
    seen = np.add.reduceat(np.exp(log_probs), start)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.nan_to_num(np.log(rest) - np.log(seen), posinf=0.0, neginf=0.0)
    log_probs += np.clip(shift, -step / 2, step / 2)[row]
    log_probs[start + place] = label
    return Events(counts, ids, log_probs.astype(np.float32), place, label, tail, draws, draw_ids)


def step_of(lo: np.ndarray, hi: np.ndarray, bits: int) -> np.ndarray:
    """(hi - lo) / (2^bits - 1), [n] nats: how far a decoded log-probability may be off."""
    return (hi.astype(np.float64) - lo.astype(np.float64)) / ((1 << bits) - 1)


def _ends(events: Events) -> tuple[np.ndarray, np.ndarray]:
    """Each row's lowest and highest log-probability but the label's, as float16 and rounded outwards; 0 if it has none."""
    start = events.starts
    found = []
    for ufunc, nothing in ((np.minimum, np.inf), (np.maximum, -np.inf)):
        values = events.log_probs.astype(np.float64)
        values[start + events.place] = nothing
        end = ufunc.reduceat(values, start)
        end[events.counts == 1] = 0.0
        near = end.astype("<f2")
        found.append(np.where(ufunc(near, end) == near, near, np.nextafter(near, np.float16(-nothing))))
    return found[0], found[1]


def _place_width(counts: np.ndarray) -> int:
    """Bits of a place in the longest row."""
    return int(counts.max(initial=1) - 1).bit_length()


class TopK(Codec):
    """p on the K best tokens and the label, and one tail event for all others: ids, log p in b bits, label and tail exactly.

    Exact in the ids, the label's and the tail's mass; every other log-probability is off by at most (hi - lo) / (2^bits - 1)
    of its row, hi and lo its highest and lowest (`topk.decode`). All divergences read such rows, on K + 2 events; the
    forward KL also learns within the tail, from tokens v drawn there d p_v times, rounded up or down at random (`draws.comb`):
    without them a student learns nothing of the order of rarer tokens. They take two bytes each, d p_tail a row.

    Args:
        k: tokens a row, at most. bits: of a log-probability: 2 to 16, or 32 for a float32.
        mass: below 1 each row has as many tokens as reach this probability, if k of them do.
        temperature: T > 0 that divides the logits; a loss that reads the rows needs the same.
        draws: d, 0 for none.

    Reference: Hinton et al. 2015, arXiv 1503.02531; ids: Elias 1974, JACM 21(2).
    Fidelity: derived (the codes, their bound and the draws of the tail are ours).
    """

    provides = frozenset({Signal.LOGITS})
    temperature: float

    def __init__(
        self, k: int = 50, bits: int = 5, mass: float = 1.0, temperature: float = 1.0, draws: int = 32
    ) -> None:
        if k < 1:
            raise ConfigError(f"store topk.k: got {k}; expected at least 1, such as 50.")
        if bits != EXACT and not 2 <= bits <= 16:
            raise ConfigError(f"store topk.bits: got {bits}; expected 2 to 16, or 32 for exact values.")
        if not 0.0 < mass <= 1.0:
            raise ConfigError(f"store topk.mass: got {mass}; expected above 0 and at most 1.")
        if temperature <= 0:
            raise ConfigError(f"store topk.temperature: got {temperature}; expected a number above 0, such as 1.0.")
        if draws < 0:
            raise ConfigError(f"store topk.draws: got {draws}; expected 0 or more, such as 32.")
        self.k, self.bits, self.mass, self.temperature, self.draws = k, bits, mass, temperature, draws

    def encode(self, rows: HeadRows, labels: Tensor, seed: int) -> bytes:
        """One example's rows."""
        offset = offsets(len(rows), seed)
        shown = log_probs(rows, self.temperature)
        parts = [self._events(log_p, labels[part], offset[part]) for part, log_p in shown]
        return encode(
            Events(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))), rows.vocab_size, self.bits
        )

    def _events(self, log_p: Tensor, label: Tensor, offset: Tensor) -> tuple[np.ndarray, ...]:
        """The fields of `Events`, of log-probabilities [m, V], labels [m] and where draws begin [m]."""
        vocab_size, label = log_p.shape[-1], label.unsqueeze(-1)
        best, ids = log_p.topk(min(self.k, vocab_size))
        before = best.double().exp().cumsum(-1) - best.double().exp()
        left_out = best.isneginf() if self.mass == 1.0 else best.isneginf() | (before >= self.mass)
        ids = ids.masked_fill(left_out, vocab_size)
        missing = (ids != label).all(-1, keepdim=True)
        ids = torch.cat([ids, torch.where(missing, label, vocab_size)], dim=-1).sort(-1).values
        named = ids < vocab_size
        place = (ids == label).int().argmax(-1)
        some = torch.where(named, ids, label)
        rest = log_p.scatter(-1, some, float("-inf"))
        flat = log_p.gather(-1, some)[named]
        drawn = comb(self.draws * rest.exp(), offset, self.draws)
        found = drawn < vocab_size
        events = named.sum(-1), ids[named], flat, place, log_p.gather(-1, label).squeeze(-1), rest.logsumexp(-1)
        fields = (*events, found.sum(-1), drawn[found])
        return tuple(field.cpu().numpy() for field in fields)

    def decode(self, data: np.ndarray, rows: int, width: int) -> Events:
        """One example's events."""
        return decode(data, rows, width, self.bits)

    def join(self, parts: Sequence[Events], device: Any, head: HeadRows | None, vocab_size: int) -> TopKRows:
        """Rows of several examples, the shorter ones filled up."""
        named = [(part.counts, part.ids, part.log_probs) for part in parts]
        drawn = None
        if self.draws:
            tails = padded([self._weights(part) for part in parts], vocab_size, device)
            drawn = TopKRows(*tails, vocab_size, self.temperature, sampled=True)
        return TopKRows(*padded(named, vocab_size, device), vocab_size, self.temperature, drawn=drawn)

    def _weights(self, part: Events) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens a row, ids, logs of their weights) of what was drawn; each draw weighs 1 / d."""
        row = np.repeat(np.arange(len(part.draws)), part.draws)
        places, times = np.unique(np.stack([row, part.draw_ids]), axis=1, return_counts=True)
        return np.bincount(places[0], minlength=len(part.draws)), places[1], np.log(times / self.draws)
