"""Index arithmetic of plans: keyed permutations, passes without repeats, and largest-remainder counts.

Everything here is linear in the number of indices asked for, never in the size of the pool.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dataflex.rng import key_of

IndexArray = NDArray[np.int64]

_ROUNDS = 6
_CHUNK = 1 << 16
"""Positions permuted at a time, so that the work arrays stay in the processor's cache."""


class KeyedPermutation:
    """A pseudo-random permutation of ``range(size)``, evaluated at any position without storing it.

    Large sizes: a generalised Feistel network over the mixed-radix digits ``(x // b, x % b)`` with ``a * b >= size``,
    followed by cycle walking for the few values that fall outside (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002). Six rounds of a 32-bit finalizer hash. Sizes up to 2**62; the memory is that of one chunk.
    Small sizes (one chunk): a stored Fisher-Yates shuffle, which reaches every permutation.

    Args:
        size: number of elements, >= 0.
        key: the permutation's key; equal keys and sizes give equal permutations.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._table = np.random.Generator(np.random.Philox(key=key)).permutation(size) if size <= _CHUNK else None
        self._a = max(1, math.isqrt(max(size - 1, 0)) + 1)
        self._b = max(1, -(-size // self._a))
        words = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint32)
        self._keys = [np.uint32(word) for word in words]

    def __call__(self, positions: IndexArray) -> IndexArray:
        """Return the elements at ``positions`` (each in ``[0, size)``), in the same shape."""
        if self._table is not None:
            return self._table[positions]
        flat = np.ascontiguousarray(positions, dtype=np.int64).ravel()
        out = np.empty_like(flat)
        for begin in range(0, flat.size, _CHUNK):
            block = self._encrypt(flat[begin : begin + _CHUNK])
            outside = np.flatnonzero(block >= self.size)
            while outside.size:
                block[outside] = self._encrypt(block[outside])
                outside = outside[block[outside] >= self.size]
            out[begin : begin + _CHUNK] = block
        return out.reshape(np.shape(positions))

    def _encrypt(self, values: IndexArray) -> IndexArray:
        left, right = np.divmod(values.astype(np.uint64), np.uint64(self._b))
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                left = _add_modulo(left, right, key, self._a)
            else:
                right = _add_modulo(right, left, key, self._b)
        return (left * np.uint64(self._b) + right).astype(np.int64)


def _add_modulo(
    target: NDArray[np.uint64], source: NDArray[np.uint64], key: np.uint32, modulus: int
) -> NDArray[np.uint64]:
    """Return ``(target + hash(source, key)) mod modulus``; both operands are below 2**32."""
    x = source.astype(np.uint32)
    x ^= key
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(13)
    scaled = x.astype(np.uint64)
    scaled *= np.uint64(modulus)
    scaled >>= np.uint64(32)
    scaled += target
    scaled -= np.uint64(modulus) * (scaled >= np.uint64(modulus))
    return scaled


class PassSampler:
    """Draws ``range(size)`` in passes: every element once, in a fresh order, before any element comes again.

    Its whole state is :attr:`drawn`, the number of elements drawn so far.

    Args:
        size: number of elements, >= 1.
        seed: the run's seed.
        name: what is sampled, part of the key of every pass's order.
        shuffle: False keeps the natural order in every pass.
    """

    def __init__(self, size: int, *, seed: int, name: str, shuffle: bool = True) -> None:
        self.size, self.seed, self.name, self.shuffle = size, seed, name, shuffle
        self.drawn = 0

    def draw(self, count: int) -> IndexArray:
        """Return the next ``count`` elements (int64) and move on."""
        parts = []
        while count > 0:
            number, offset = divmod(self.drawn, self.size)
            take = min(count, self.size - offset)
            positions = np.arange(offset, offset + take, dtype=np.int64)
            parts.append(self._order(number)(positions) if self.shuffle else positions)
            self.drawn += take
            count -= take
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _order(self, number: int) -> KeyedPermutation:
        return KeyedPermutation(self.size, key_of(self.seed, "pass", self.name, number))


def apportion(proportions: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Return integer counts that add up to ``total``, by largest remainder; ties go to the lower index.

    Args:
        proportions: non-negative shares with a positive sum, any scale, shape (K,).
        total: what the counts add up to, >= 0.
    """
    shares = np.asarray(proportions, dtype=np.float64)
    quotas = shares / shares.sum() * total
    counts = np.floor(quotas).astype(np.int64)
    remainder = total - int(counts.sum())
    by_fraction = np.argsort(-(quotas - counts), kind="stable")
    counts[by_fraction[:remainder]] += 1
    return counts
