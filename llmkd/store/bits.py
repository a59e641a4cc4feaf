"""Integers in few bits, with numpy: packed codes of one width, and rising numbers as Elias and Fano wrote them."""

from __future__ import annotations

import numpy as np

WIDEST = 24  # bits of a code: below it a float32 holds every value exactly


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits take."""
    return -(-count * width // 8)


def pack(codes: np.ndarray, width: int) -> bytes:
    """Codes [n] in [0, 2^width), the lowest bit first, without gaps."""
    bits = (codes.astype(np.uint32)[:, None] >> np.arange(width, dtype=np.uint32)) & 1
    return np.packbits(bits.astype(np.uint8).ravel(), bitorder="little").tobytes()


def unpack(data: np.ndarray, count: int, width: int) -> np.ndarray:
    """What `pack` took, int64 [count], of the first `packed_bytes` of `data` (uint8)."""
    if width == 0:
        return np.zeros(count, dtype=np.int64)
    bits = np.unpackbits(data[: packed_bytes(count, width)], count=count * width, bitorder="little")
    powers = (2.0 ** np.arange(width)).astype(np.float32)
    return (bits.reshape(count, width).astype(np.float32) @ powers).astype(np.int64)


def low_width(count: int, universe: int) -> int:
    """Bits of each number that Elias-Fano stores as they are: floor(log2(universe / count))."""
    return min(WIDEST, max(0, (universe // max(1, count)).bit_length() - 1))


def rising_bytes(count: int, universe: int) -> int:
    """Bytes of `pack_rising`: at most count (2 + log2(universe / count)) bits, and two bytes of rounding."""
    width = low_width(count, universe)
    return packed_bytes(count, width) + packed_bytes(count + (universe >> width) + 1, 1)


def pack_rising(numbers: np.ndarray, universe: int) -> bytes:
    """Rising numbers [n] in [0, universe): their low bits packed, their high bits in unary.

    Reference: Elias 1974, JACM 21(2); Fano 1971: within 0.6 bits a number of the least that any code of such sets needs.
    """
    count = len(numbers)
    width = low_width(count, universe)
    low, high = numbers & ((1 << width) - 1), numbers >> width
    unary = np.zeros(count + (universe >> width) + 1, dtype=np.uint8)
    unary[high + np.arange(count)] = 1
    return pack(low, width) + np.packbits(unary, bitorder="little").tobytes()


def unpack_rising(data: np.ndarray, count: int, universe: int) -> np.ndarray:
    """What `pack_rising` took, int64 [count], of the first `rising_bytes` of `data`.

    Raises:
        ValueError: the bytes are not those of so many numbers.
    """
    width = low_width(count, universe)
    split = packed_bytes(count, width)
    unary = np.unpackbits(data[split : rising_bytes(count, universe)], bitorder="little")
    places = np.flatnonzero(unary)
    if len(places) != count:
        raise ValueError(f"{len(places)} numbers; expected {count}")
    return (places - np.arange(count) << width) | unpack(data, count, width)
