"""A code of one byte for the loss of a token.

Losses are coded in blocks of 128. A block has a step s, and a loss l becomes the whole number q that is nearest to
sqrt(l) / s, from 0 to 255. It is read as (q s)^2. So small losses have small errors:

    |read - l| <= s sqrt(l) + s^2 / 4 <= sqrt(l m) / 253 + m / 256000,    m: the largest loss of the block

The step is sqrt(m) / 255, rounded up to the upper 16 bits of a float32, which raises it by at most 1/128. Float32 and
these 16 bits have the same range, so every finite loss has a code. A byte and 16 bits for 128 losses are 1.016 bytes a
loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BLOCK = 128
"""Number of losses with one step."""
_LEVELS = 255
_LARGEST_ROOT = np.float32(np.sqrt(float(np.finfo(np.float32).max)) * (1 - 2**-24))
"""Largest float32 whose square is finite."""


def encode(losses: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Return the code of each loss, (n,), and the step of each block, (ceil(n / BLOCK),).

    Args:
        losses: finite and at least 0, (n,). All blocks are full but the last one.
    """
    blocks = -(-losses.size // BLOCK)
    padded = np.zeros(blocks * BLOCK, dtype=np.float64)
    padded[: losses.size] = np.sqrt(losses, dtype=np.float64)
    roots = padded.reshape(blocks, BLOCK)
    steps = _rounded_up(roots.max(axis=1, initial=0.0) / _LEVELS)
    wide = _wide(steps)[:, None]
    codes = np.rint(np.divide(roots, wide, out=np.zeros_like(roots), where=wide > 0)).astype(np.uint8)
    return codes.reshape(-1)[: losses.size], steps


def decode(codes: NDArray[np.uint8], steps: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return losses, (n,), from the code of each and the step of the block of each, both (n,)."""
    roots = np.minimum(codes * _wide(steps), _LARGEST_ROOT)
    return roots * roots


def error_bound(losses: NDArray[np.float32], largest: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the largest error of each loss, (n,), from the loss and the largest loss of its block, both (n,)."""
    wide, most = losses.astype(np.float64), largest.astype(np.float64)
    return np.sqrt(wide * most) / 253 + most / 256000


def _rounded_up(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Return the upper 16 bits of float32 numbers, rounded up."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> 16).astype(np.uint16)


def _wide(steps: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return steps as float32 numbers."""
    return (steps.astype(np.uint32) << 16).view(np.float32)


@dataclass
class Errors:
    """Measured errors of losses that were coded and read again: read minus original.

    Attributes:
        tokens: number of losses.
        total: sum of the errors.
        squares: sum of their squares.
        largest: the largest absolute error.
    """

    tokens: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, losses: NDArray[np.float32], read: NDArray[np.float32]) -> None:
        """Count further losses, (n,), and what is read for them, (n,)."""
        if losses.size:
            errors = read.astype(np.float64) - losses
            self.tokens += losses.size
            self.total += float(errors.sum())
            self.squares += float(errors @ errors)
            self.largest = max(self.largest, float(np.abs(errors).max()))

    def plus(self, other: Errors) -> Errors:
        """Return the errors of both."""
        return Errors(
            self.tokens + other.tokens,
            self.total + other.total,
            self.squares + other.squares,
            max(self.largest, other.largest),
        )

    @property
    def mean(self) -> float:
        """The mean error; 0 without a loss."""
        return self.total / max(1, self.tokens)

    @property
    def rms(self) -> float:
        """The root of the mean squared error; 0 without a loss."""
        return float(np.sqrt(self.squares / max(1, self.tokens)))


@dataclass
class Encoder:
    """Codes losses that come in pieces of any length, and measures the errors."""

    errors: Errors = field(default_factory=Errors)
    _rest: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    """Losses that do not fill a block yet."""

    def add(self, losses: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        """Return the codes and the steps of the blocks that further losses fill."""
        joined = np.concatenate([self._rest, losses])
        full = joined.size // BLOCK * BLOCK
        self._rest = joined[full:]
        return self._coded(joined[:full])

    def end(self) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        """Return the codes and the step of the last block, which is not full; both are empty if it has no loss."""
        rest, self._rest = self._rest, np.empty(0, np.float32)
        return self._coded(rest)

    def _coded(self, losses: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        codes, steps = encode(losses)
        self.errors.add(losses, decode(codes, np.repeat(steps, BLOCK)[: losses.size]))
        return codes, steps
