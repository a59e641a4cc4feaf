"""Packed integers come back as they were, in as few bytes as promised."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmkd.store.bits import WIDEST, pack, pack_rising, packed_bytes, rising_bytes, unpack, unpack_rising


def bytes_of(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


@pytest.mark.parametrize("width", [0, 1, 3, 5, 8, 13, WIDEST])
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_codes_come_back(width, count):
    codes = np.random.default_rng(width).integers(0, 2**width, count)
    if count:
        codes[0] = 2**width - 1
    data = pack(codes, width)
    assert len(data) == packed_bytes(count, width) == math.ceil(count * width / 8)
    assert unpack(bytes_of(data + b"more"), count, width).tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("count", "universe"), [(0, 10), (1, 1), (1, 10**9), (10, 10), (50, 49152), (700, 1000), (6400, 128 * 151936)]
)
def test_rising_numbers_come_back(count, universe):
    rng = np.random.default_rng(count)
    numbers = np.sort(rng.choice(universe, count, replace=False)) if universe < 10**7 else spread(rng, count, universe)
    data = pack_rising(numbers, universe)
    assert len(data) == rising_bytes(count, universe)
    assert unpack_rising(bytes_of(data + b"more"), count, universe).tolist() == numbers.tolist()


def spread(rng: np.random.Generator, count: int, universe: int) -> np.ndarray:
    return np.unique(rng.integers(0, universe, 2 * count))[:count]


@pytest.mark.parametrize("universe", [49152, 151936])
def test_a_set_takes_little_more_than_any_code_needs(universe):
    for count in (64, 640, 3200, 8192):  # of 64 rows
        size = 64 * universe
        least = (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)
        taken = 8 * rising_bytes(count, size)
        assert least < taken < least + 0.6 * count + 16
        assert taken <= count * (2 + math.log2(size / count)) + 16


def test_other_bytes_are_not_taken_for_numbers():
    data = bytes_of(pack_rising(np.arange(5), 40)).copy()
    data[-1] ^= 0xFF
    with pytest.raises(ValueError, match="expected 5"):
        unpack_rising(data, 5, 40)
