"""Index arithmetic of plans: keyed permutations, and passes without repeats.

Everything here is linear in the number of indices asked for, never in the size of the pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from dataflex.data.rng import key_of

IndexArray = NDArray[np.int64]

_ROUNDS = 4
_CHUNK = 1 << 16
"""Positions permuted at a time, so that the work arrays stay in the processor's cache."""


def exactly(number: float) -> Fraction:
    """Return the number as it is written in decimals: of ``0.07 * 100`` the product is then 7, not a little more."""
    return Fraction(repr(float(number)))


class KeyedPermutation:
    """A pseudo-random permutation of ``range(size)``, evaluated at any position without storing it.

    Large sizes: a generalised Feistel network over the mixed-radix digits ``(x // b, x % b)`` with ``a * b >= size``,
    followed by cycle walking for the few values that fall outside (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002). Four rounds of a 32-bit finalizer hash. Sizes up to 2**62; the memory is that of one chunk.
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
        # Both digits are below 2**31, so a digit fits 32 bits and a sum of two of them does too.
        left, right = np.empty(values.size, dtype=np.uint32), np.empty(values.size, dtype=np.uint32)
        quotient = values // self._b
        left[:] = quotient
        right[:] = values - quotient * self._b
        hashed, scaled = np.empty_like(left), np.empty(values.size, dtype=np.uint64)
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                _add_modulo(left, right, key, self._a, hashed, scaled)
            else:
                _add_modulo(right, left, key, self._b, hashed, scaled)
        return left.astype(np.int64) * self._b + right


def _add_modulo(
    target: NDArray[np.uint32],
    source: NDArray[np.uint32],
    key: np.uint32,
    modulus: int,
    hashed: NDArray[np.uint32],
    scaled: NDArray[np.uint64],
) -> None:
    """Set ``target`` to ``(target + hash(source, key)) mod modulus``; the last two arguments are work space."""
    np.bitwise_xor(source, key, out=hashed)
    hashed *= np.uint32(0x85EBCA6B)
    hashed ^= hashed >> np.uint32(15)
    hashed *= np.uint32(0xC2B2AE35)
    hashed ^= hashed >> np.uint32(13)
    np.multiply(hashed, np.uint64(modulus), out=scaled)
    scaled >>= np.uint64(32)
    target += scaled.astype(np.uint32)
    # Below the modulus the difference wraps around to something larger than the sum.
    np.subtract(target, np.uint32(modulus), out=hashed)
    np.minimum(target, hashed, out=target)


@dataclass(frozen=True)
class Walk:
    """How passes are put in order by something else than chance.

    Attributes:
        maker: tells one way of doing so from another.
        arrange: returns the positions of some elements, given with the number of their pass, in the order in which
            they are to be drawn.
        repeats: whether the order of one pass is that of the next ones too.
    """

    maker: str
    arrange: Callable[[int, IndexArray], IndexArray]
    repeats: bool


@dataclass(frozen=True)
class PassOrder:
    """The order of one pass that a walk has decided.

    Attributes:
        number: the pass.
        elements: all elements in the order in which they are drawn, shape (size,).
        begin: how many of them had been drawn before it was decided; the others are in the walk's order.
        maker: of the walk.
    """

    number: int
    elements: IndexArray
    begin: int
    maker: str


class PassSampler:
    """Draws ``range(size)`` in passes: every element once, in a fresh order, before any element comes again.

    Its whole state is :attr:`drawn`, the number of elements drawn so far, and :attr:`decided`.

    Args:
        size: number of elements, >= 1.
        seed: the run's seed.
        name: what is sampled, part of the key of every pass's order.
        shuffle: False keeps the natural order in every pass.
    """

    def __init__(self, size: int, *, seed: int, name: str, shuffle: bool = True) -> None:
        self.size, self.seed, self.name, self.shuffle = size, seed, name, shuffle
        self.drawn = 0
        self.decided: PassOrder | None = None
        """The order of the running pass, if a walk has decided it."""

    def draw(self, count: int, walk: Walk | None = None) -> IndexArray:
        """Return the next ``count`` elements (int64) and move on.

        Args:
            count: of the elements.
            walk: puts the elements of each pass in order that are still to be drawn; None: a pass that was put in order
                goes on in it, others have an order by chance.
        """
        parts = []
        while count > 0:
            number, offset = divmod(self.drawn, self.size)
            take = min(count, self.size - offset)
            if walk is not None:
                self._decide(number, offset, walk)
            elif self.decided is not None and self.decided.number < number:
                self.decided = None
            parts.append(self._elements(number, np.arange(offset, offset + take, dtype=np.int64)))
            self.drawn += take
            count -= take
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def _decide(self, number: int, offset: int, walk: Walk) -> None:
        """Put a pass in order, but for its first ``offset`` elements, unless this walk has done so."""
        decided = self.decided
        if decided is not None and decided.maker == walk.maker:
            if decided.number == number:
                return
            if walk.repeats and decided.begin == offset == 0:
                self.decided = replace(decided, number=number)
                return
        before = self._elements(number, np.arange(offset, dtype=np.int64))
        is_left = np.ones(self.size, dtype=bool)
        is_left[before] = False
        left = np.flatnonzero(is_left)
        elements = np.concatenate([before, left[walk.arrange(number, left)]])
        self.decided = PassOrder(number, elements, offset, walk.maker)

    def _elements(self, number: int, positions: IndexArray) -> IndexArray:
        """Return the elements at positions of a pass."""
        if self.decided is not None and self.decided.number == number:
            return self.decided.elements[positions]
        return self._order(number)(positions) if self.shuffle else positions

    def _order(self, number: int) -> KeyedPermutation:
        return KeyedPermutation(self.size, key_of(self.seed, "pass", self.name, number))
