"""Random signs and numbers as a hash of (key, row, word): the same on every device, without state between calls.

A key stands for an endless matrix of random signs. A row of the matrix has two 32-bit row keys, which are hashed from
the key and the row's index. Word w of a row, 32 signs, is hashed from the row keys and w. So the cost of any piece of
the matrix depends only on the piece's size. The hash is integer arithmetic modulo 2^32, which the kernel in ``fused``
repeats.

The hash is the finalizer ``triple32`` (Wellons 2018): every bit of its result depends on every bit of its argument.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
FACTORS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)
SHIFTS = (17, 11, 15, 14)
ROTATION_PLACE = MASK
"""Index of the word of a row that gives the row's random number; words of signs have smaller indices."""
_SIGNED = tuple(factor - (1 << 32) if factor >> 31 else factor for factor in FACTORS)
"""The factors modulo 2^32 as signed integers: a product with 32 bits then fits into a signed 64-bit integer."""
_CHUNK_WORDS = 1 << 15
"""Number of words hashed together on a CPU, so that they stay in the cache."""


def key_words(key: int) -> tuple[int, int, int, int]:
    """Return a 128-bit key as four 32-bit words."""
    first, second, third, fourth = ((key >> shift) & MASK for shift in (0, 32, 64, 96))
    return first, second, third, fourth


def random_signs(key: int, first: int, count: int, length: int, device: torch.device) -> Tensor:
    """Return rows ``first`` to ``first + count`` of a key's matrix of signs, cut at ``length``: int8, (count, length).

    Args:
        key: 128 bits; other keys have other signs.
        first: index of the first row, below 2^63.
        count: number of rows.
        length: number of signs of a row, below 2^37.
        device: device of the signs.
    """
    words = -(-length // 32)
    out = torch.empty(count, length, dtype=torch.int8, device=device)
    step = max(1, _CHUNK_WORDS // words) if device.type == "cpu" else count
    places = torch.arange(words, device=device)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        left, right = _row_keys(key, first + begin, end - begin, device)
        bits = _words(places, left.unsqueeze(1), right.unsqueeze(1))
        # The first four of the eight bytes of an int64 are the word, as bytes are little-endian. Each byte selects
        # eight signs from a table.
        octets = bits.view(torch.uint8).view(end - begin, words, 8)[..., :4].flatten()
        signs = _octets(device).index_select(0, octets.int()).view(torch.int8)
        out[begin:end] = signs.view(end - begin, 32 * words)[:, :length]
    return out


def random_numbers(key: int, first: int, count: int, below: int, device: torch.device) -> Tensor:
    """Return a random number from 0 to ``below - 1`` for each row, ``first`` to ``first + count``: int64, (count,)."""
    left, right = _row_keys(key, first, count, device)
    place = torch.full((count,), ROTATION_PLACE, device=device)
    return (_words(place, left, right) * below) >> 32  # scales 32 random bits to the range without a division


class SignTables:
    """Cache of signs on the CPU, where reading signs costs less than computing them.

    Args:
        limit: most bytes of the cached signs.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self._tables: dict[tuple[int, int, int], Tensor] = {}
        """The cached signs, by key, row length and number of rows."""
        self.bytes = 0
        """Bytes of the cached signs."""

    def rows(self, key: int, first: int, count: int, length: int, total: int) -> Tensor:
        """Return the rows of :func:`random_signs` on the CPU; all ``total`` rows are cached if the limit allows."""
        name = (key, length, total)
        if name not in self._tables:
            if self.bytes + total * length > self.limit:
                return random_signs(key, first, count, length, torch.device("cpu"))
            self._tables[name] = random_signs(key, 0, total, length, torch.device("cpu"))
            self.bytes += total * length
        return self._tables[name][first : first + count]


def _row_keys(key: int, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the two row keys of each of ``count`` rows."""
    rows = torch.arange(first, first + count, device=device)
    low, high = rows & MASK, rows >> 32
    one, two, three, four = key_words(key)
    return _mixed(_mixed(low ^ one) ^ high ^ two), _mixed(_mixed(low ^ three) ^ high ^ four)


def _words(places: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the words of rows at some indices, broadcast, as 32 bits in int64.

    The first row key is added before the first step of the hash, the second is combined after it. With both keys before
    it, rows whose first keys are close to each other would have the same words at shifted indices.
    """
    return _finished(_stepped((places + left) & MASK).bitwise_xor_(right))


def _mixed(values: Tensor) -> Tensor:
    """Return the hash of 32-bit values."""
    return _finished(_stepped(values))


def _stepped(values: Tensor) -> Tensor:
    """Return the first step of the hash."""
    values = values ^ (values >> SHIFTS[0])
    return values.mul_(_SIGNED[0]).bitwise_and_(MASK)


def _finished(values: Tensor) -> Tensor:
    """Apply the other steps of the hash in place."""
    values.bitwise_xor_(values >> SHIFTS[1]).mul_(_SIGNED[1]).bitwise_and_(MASK)
    values.bitwise_xor_(values >> SHIFTS[2]).mul_(_SIGNED[2]).bitwise_and_(MASK)
    return values.bitwise_xor_(values >> SHIFTS[3])


@cache
def _octets(device: torch.device) -> Tensor:
    """Return the eight signs of each byte, lowest bit first, as one int64 per byte: (256,)."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return (2 * bits - 1).to(torch.int8).view(torch.int64).flatten().to(device)
