"""Index arithmetic of plans: keyed permutations, and passes without repeats.

The cost of every function is linear in the number of requested indices and does not depend on the size of the pool.
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
"""Number of positions per block of a permutation, so that the work arrays stay in the processor's cache."""


def exactly(number: float) -> Fraction:
    """Return a number as the exact fraction of its decimal form, so that products do not suffer from binary rounding.

    Example:
        >>> from dataflex import exactly
        >>> 0.07 * 100, exactly(0.07) * 100
        (7.000000000000001, Fraction(7, 1))
    """
    return Fraction(repr(float(number)))


class KeyedPermutation:
    """A pseudo-random permutation of ``range(size)``, evaluated at any position without storing the permutation.

    Large sizes use a generalised Feistel network over the mixed-radix digits ``(x // b, x % b)`` with ``a * b >=
    size``, followed by cycle walking for the few values outside the range (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002). The network has four rounds of a 32-bit finalizer hash. Sizes up to 2**62 are possible, and
    the memory is limited to one chunk. Small sizes (one chunk) use a stored Fisher-Yates shuffle, which reaches every
    permutation.

    Args:
        size: number of elements, >= 0.
        key: the key of the permutation. Equal keys and sizes give equal permutations.

    Example:
        >>> import numpy as np
        >>> from dataflex import KeyedPermutation, key_of
        >>> permutation = KeyedPermutation(5, key_of(42, "my_order"))
        >>> order = permutation(np.arange(5))
        >>> sorted(order.tolist())
        [0, 1, 2, 3, 4]
        >>> bool(permutation(np.array([3]))[0] == order[3])
        True
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
        """Return the outputs of the Feistel network, in ``[0, a * b)``, so possibly outside ``[0, size)``."""
        # Both digits are below 2**31, so each digit and the sum of two digits fit into 32 bits.
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
    """Set ``target`` to ``(target + hash(source, key)) mod modulus``. The last two arguments are work arrays."""
    np.bitwise_xor(source, key, out=hashed)
    hashed *= np.uint32(0x85EBCA6B)
    hashed ^= hashed >> np.uint32(15)
    hashed *= np.uint32(0xC2B2AE35)
    hashed ^= hashed >> np.uint32(13)
    np.multiply(hashed, np.uint64(modulus), out=scaled)
    scaled >>= np.uint64(32)
    target += scaled.astype(np.uint32)
    # If the sum is below the modulus, the unsigned difference wraps around to a value larger than the sum.
    np.subtract(target, np.uint32(modulus), out=hashed)
    np.minimum(target, hashed, out=target)


@dataclass(frozen=True)
class Walk:
    """A rule that orders the passes instead of a random permutation.

    Attributes:
        maker: identifies the rule.
        arrange: takes the number of a pass and some elements, and returns the positions of these elements in the order
            in which they are drawn.
        repeats: whether the order of one pass also holds for the next passes.
    """

    maker: str
    arrange: Callable[[int, IndexArray], IndexArray]
    repeats: bool


@dataclass(frozen=True)
class PassOrder:
    """The order of one pass that a walk has decided.

    Attributes:
        number: the number of the pass.
        elements: all elements in the order in which they are drawn, shape (size,).
        begin: how many elements were drawn before the decision. The other elements are in the order of the walk.
        maker: the ``maker`` of the walk.
    """

    number: int
    elements: IndexArray
    begin: int
    maker: str


class PassSampler:
    """Draws ``range(size)`` in passes: every element once, in a new order for each pass, before any element repeats.

    The whole state is :attr:`drawn` and :attr:`decided`.

    Args:
        size: number of elements, >= 1.
        seed: the seed of the run.
        name: the name of the sampled set. It is part of the key of every pass's order.
        shuffle: False keeps the natural order in every pass.
    """

    def __init__(self, size: int, *, seed: int, name: str, shuffle: bool = True) -> None:
        self.size, self.seed, self.name, self.shuffle = size, seed, name, shuffle
        self.drawn = 0
        self.decided: PassOrder | None = None
        """The order of the running pass, if a walk has decided it."""

    def draw(self, count: int, walk: Walk | None = None) -> IndexArray:
        """Return the next ``count`` elements (int64) and advance.

        Args:
            count: number of elements.
            walk: orders the remaining elements of each pass. If None, a pass that a walk has ordered keeps its order,
                and other passes have a random order.
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
        """Order a pass except for its first ``offset`` elements, unless this walk has already ordered the pass."""
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
