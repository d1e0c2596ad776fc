"""The code of one byte for a loss: its error keeps the stated bound, for every finite loss."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.probe.loss_code import BLOCK, Encoder, Errors, decode, encode, error_bound

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
RNG = np.random.default_rng(0)
CASES = {
    "losses of a model": RNG.exponential(2.5, 5000) * (RNG.random(5000) < 0.7),
    "heavy tails": RNG.exponential(2.0, 5000) ** 4,
    "every size": 10.0 ** RNG.uniform(-45, 38.5, 20000),
    "one large loss in a block": np.where(np.arange(1000) % BLOCK == 3, 1e6, RNG.random(1000)),
    "zeros": np.zeros(300),
    "one value": np.full(200, 2.3),
    "the largest": np.full(130, LARGEST),
    "the largest and the smallest": np.array([LARGEST, 0.0, SMALLEST, 1.0]),
    "the smallest": np.array([SMALLEST, 0.0, 3 * SMALLEST]),
    "between two codes": (np.arange(255) + 0.5) ** 2,
    "one loss": np.array([7.0]),
    "none": np.array([]),
}


def read(losses: np.ndarray) -> np.ndarray:
    codes, steps = encode(losses)
    assert (codes.dtype, codes.shape, steps.dtype) == (np.uint8, losses.shape, np.uint16)
    assert steps.size == -(-losses.size // BLOCK)
    return decode(codes, np.repeat(steps, BLOCK)[: losses.size])


def largest_of_blocks(losses: np.ndarray) -> np.ndarray:
    firsts = range(0, losses.size, BLOCK)
    return np.concatenate([np.full_like(losses[k : k + BLOCK], losses[k : k + BLOCK].max()) for k in firsts])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("error")
def test_the_error_keeps_its_bound(name: str) -> None:
    losses = CASES[name].clip(0, LARGEST).astype(np.float32)
    found = read(losses)
    assert np.isfinite(found).all()
    if losses.size:
        bound = error_bound(losses, largest_of_blocks(losses))
        assert (np.abs(found.astype(np.float64) - losses) <= bound).all()
    assert (found[losses == 0] == 0).all()


def test_the_bound_is_not_far_from_the_error() -> None:
    losses = RNG.exponential(2.0, 100_000).astype(np.float32)
    share = np.abs(read(losses).astype(np.float64) - losses) / error_bound(losses, largest_of_blocks(losses))
    assert 0.95 < share.max() <= 1
    assert 0.4 < share.mean() < 0.6


def test_decoding_is_the_nearest_of_all_codes() -> None:
    losses = RNG.exponential(2.0, BLOCK).astype(np.float32)
    codes, steps = encode(losses)
    every = decode(np.arange(256, dtype=np.uint8), np.repeat(steps, 256))
    nearest = np.abs(np.sqrt(every)[:, None] - np.sqrt(losses)).argmin(axis=0)
    np.testing.assert_array_equal(codes, nearest)


@pytest.mark.parametrize("sizes", [[], [0], [1], [127, 1], [128], [129, 300, 0, 5], [1] * 260])
def test_losses_in_pieces_have_the_codes_of_all_together(sizes: list[int]) -> None:
    losses = RNG.exponential(2.0, sum(sizes)).astype(np.float32)
    encoder = Encoder()
    pieces = [encoder.add(piece) for piece in np.split(losses, np.cumsum(sizes)[:-1])] if sizes else []
    pieces.append(encoder.end())
    for found, expected in zip(map(np.concatenate, zip(*pieces, strict=True)), encode(losses), strict=True):
        np.testing.assert_array_equal(found, expected)
    errors = read(losses).astype(np.float64) - losses
    assert encoder.errors.tokens == losses.size
    if losses.size:
        assert encoder.errors.mean == pytest.approx(errors.mean())
        assert encoder.errors.rms == pytest.approx(np.sqrt((errors**2).mean()))
        assert encoder.errors.largest == np.abs(errors).max()
    else:
        assert encoder.errors == Errors()
        assert (encoder.errors.mean, encoder.errors.rms) == (0, 0)
