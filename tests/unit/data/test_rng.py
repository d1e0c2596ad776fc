"""Keyed random numbers: the same in every process, different for every name."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

from dataflex.data.rng import derive_rng, key_of

# printf '42\x1fstr:selector\x1fstr:loss\x1fint:3' | sha256sum; the first 16 bytes, little-endian
PINNED = int.from_bytes(bytes.fromhex("e38a2aec0a88a601fa70785e6b0ce651"), "little")

SCRIPT = """
import random
import numpy as np
random.seed(1)
np.random.seed(1)
from dataflex.data.rng import derive_rng
print(derive_rng(42, "selector", "loss", 3).integers(0, 2**62, 5).tolist())
"""


def test_keys_are_the_digest_of_seed_and_names() -> None:
    assert key_of(42, "selector", "loss", 3) == PINNED
    expected = np.random.Generator(np.random.Philox(key=PINNED)).random(4)
    assert np.array_equal(derive_rng(42, "selector", "loss", 3).random(4), expected)


def test_draws_do_not_depend_on_the_process() -> None:
    here = str(derive_rng(42, "selector", "loss", 3).integers(0, 2**62, 5).tolist())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == here


def test_drawing_leaves_the_global_streams_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    derive_rng(1, "x").random(100)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_every_difference_in_the_names_gives_another_key() -> None:
    names = [
        (1,),
        (2,),
        (1, "a"),
        (1, "b"),
        (1, "a", "b"),
        (1, "b", "a"),
        (1, "ab"),
        (1, "a", 0),
        (1, "a", 1),
        (1, "a", "1"),
        (1, 1),
        (1, "1"),
        (11,),
        (1, ""),
        (1, "", ""),
    ]
    assert len({key_of(*each) for each in names}) == len(names)
    assert len({derive_rng(*each).integers(2**62) for each in names}) == len(names)
