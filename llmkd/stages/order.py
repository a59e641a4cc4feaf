"""Exact ranks in a corpus of any size: the rows up to rank r in the order (score falling, id rising), with little memory.

Scores become 64-bit keys that sort as they do. Four passes over the scores find the key of rank r sixteen bits at a time,
from histograms of 65536 counts; a fifth finds the id at which ties end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np

BITS = 16
SIGN = np.uint64(1 << 63)


@dataclass(frozen=True)
class Block:
    """Some rows: scores [n] float64, all finite; ids [n], rising through all blocks; what group each is in [n]."""

    scores: np.ndarray
    ids: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Cut:
    """The last row of the first r: what is at or before it in the order is among them."""

    score: float
    example_id: int

    def covers(self, scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Which rows are among the first r."""
        return (scores > self.score) | ((scores == self.score) & (ids <= self.example_id))


@dataclass
class _Search:
    """The key of one rank, as far as it is known: its first bits, and the rank among the rows that share them."""

    group: Hashable
    rank: int
    prefix: int = 0


def keys_of(scores: np.ndarray) -> np.ndarray:
    """Unsigned keys [n] that rise as the scores fall; 0.0 and -0.0 are one."""
    bits = (scores + 0.0).view(np.uint64)
    return np.where(bits & SIGN, bits, ~(bits | SIGN))


def _score_of(key: int) -> float:
    """The score of a key."""
    value = np.uint64(key)
    bits = value if value & SIGN else ~value ^ SIGN
    return float(np.array([bits], dtype=np.uint64).view(np.float64)[0])


def counts(blocks: Iterable[Block]) -> dict[Hashable, int]:
    """How many rows each group has, in the order of their first rows."""
    found: dict[Hashable, int] = {}
    for block in blocks:
        for group, count in zip(*np.unique(block.groups, return_counts=True), strict=True):
            found[group.item()] = found.get(group.item(), 0) + int(count)
    return found


def cuts(
    blocks: Callable[[], Iterable[Block]], ranks: dict[tuple[Hashable, int], int]
) -> dict[tuple[Hashable, int], Cut]:
    """The row at each rank.

    Args:
        blocks: called for each pass over all rows.
        ranks: (group, any number) -> rank r in that group, from 1 to the number of its rows.

    Returns:
        The cut of each.
    """
    searches = {name: _Search(name[0], rank) for name, rank in ranks.items()}
    for shift in range(64 - BITS, -1, -BITS):
        _narrow(blocks(), list(searches.values()), shift)
    left = {name: search.rank for name, search in searches.items()}
    found: dict[tuple[Hashable, int], Cut] = {}
    for block in blocks() if searches else ():
        keys = keys_of(block.scores)
        for name, search in searches.items():
            if name not in found:
                ties = np.flatnonzero((keys == np.uint64(search.prefix)) & (block.groups == search.group))
                if len(ties) >= left[name]:
                    found[name] = Cut(_score_of(search.prefix), int(block.ids[ties[left[name] - 1]]))
                left[name] -= len(ties)
    return found


def _narrow(blocks: Iterable[Block], searches: list[_Search], shift: int) -> None:
    """Learn the next bits of each key from a histogram of the rows that share the bits known so far."""
    tallies = np.zeros((len(searches), 1 << BITS), dtype=np.int64)
    for block in blocks if searches else ():
        keys = keys_of(block.scores)
        digits = ((keys >> np.uint64(shift)) & np.uint64((1 << BITS) - 1)).astype(np.int64)
        heads = keys >> np.uint64(shift + BITS) if shift + BITS < 64 else np.zeros_like(keys)
        for tally, search in zip(tallies, searches, strict=True):
            same = (heads == np.uint64(search.prefix)) & (block.groups == search.group)
            tally += np.bincount(digits[same], minlength=1 << BITS)
    for tally, search in zip(tallies, searches, strict=True):
        totals = tally.cumsum()
        digit = int(np.searchsorted(totals, search.rank))
        search.rank -= int(totals[digit - 1]) if digit else 0
        search.prefix = search.prefix << BITS | digit
