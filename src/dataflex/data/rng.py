"""Random numbers as a pure function of (seed, names): nothing in the package draws from global state."""

from __future__ import annotations

import hashlib

import numpy as np


def key_of(seed: int, *names: str | int) -> int:
    """Return a 128-bit key that depends on ``seed`` and every one of ``names``, in order."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def derive_rng(seed: int, *names: str | int) -> np.random.Generator:
    """Return a counter-based generator (Philox) keyed by ``seed`` and ``names``, e.g. a component and a round."""
    return np.random.Generator(np.random.Philox(key=key_of(seed, *names)))
