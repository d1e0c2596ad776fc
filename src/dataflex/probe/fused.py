"""One GPU kernel from gradients to a sketch: direction, signs, rotations and the sum over blocks. Needs Triton.

Every element of a partial sketch belongs to one program, which adds up its blocks in order. So the kernel needs no
atomic additions, and the same call gives the same bits. The blocks are divided among a few programs, and the partial
sketches are summed afterwards. A program handles the same positions of several samples: signs and moments are computed
or read once for all of these samples, and every gradient element is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dataflex.probe.preconditioners import AdamTerms
from dataflex.probe.signs import FACTORS, ROTATION_PLACE, SHIFTS, key_words

_PROGRAMS = 1024
"""Number of programs that share the work: a few for each multiprocessor."""
_TILE = 2048
"""Elements in the tile of a program, over all samples of the program."""
_SAMPLES = 8
"""Most samples in the tile of a program."""

_F0, _F1, _F2 = (tl.constexpr(factor) for factor in FACTORS)
_S0, _S1, _S2, _S3 = (tl.constexpr(shift) for shift in SHIFTS)
_ROTATION_PLACE = tl.constexpr(ROTATION_PLACE)


@triton.jit
def _stepped(values: tl.tensor) -> tl.tensor:
    """Return the first step of the hash ``triple32``; see ``signs``."""
    values = values ^ (values >> _S0)
    return values * tl.full((), _F0, tl.uint32)


@triton.jit
def _finished(values: tl.tensor) -> tl.tensor:
    """Return the other steps of the hash ``triple32``."""
    values = values ^ (values >> _S1)
    values = values * tl.full((), _F1, tl.uint32)
    values = values ^ (values >> _S2)
    values = values * tl.full((), _F2, tl.uint32)
    return values ^ (values >> _S3)


@triton.jit
def _row_key(low: tl.tensor, high: tl.tensor, one: tl.tensor, two: tl.tensor) -> tl.tensor:
    """Return one of a row's two 32-bit keys from the row number's halves and two words of the key."""
    return _finished(_stepped(_finished(_stepped(low ^ one)) ^ high ^ two))


@triton.jit
def _word(places: tl.tensor, left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """Return the words of a row at some positions, 32 signs each, from the row's two keys."""
    return _finished(_stepped(places + left) ^ right)


# Triton compiles a kernel again for special values of integers, which here would be nearly every parameter.
@triton.jit(do_not_specialize=["size", "start", "dim", "first", "batch", "key_a", "key_b", "key_c", "key_d"])
def _sketch(
    values: tl.tensor,
    average: tl.tensor,
    square: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    start: tl.tensor,
    dim: tl.tensor,
    first: tl.tensor,
    batch: tl.tensor,
    key_a: tl.tensor,
    key_b: tl.tensor,
    key_c: tl.tensor,
    key_d: tl.tensor,
    average_scale: tl.tensor,
    gradient_scale: tl.tensor,
    square_scale: tl.tensor,
    squared_gradient_scale: tl.tensor,
    inside: tl.tensor,
    outside: tl.tensor,
    ADAM: tl.constexpr,
    SAMPLES: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Add the signed and rotated blocks of one tile and one share of the blocks, and store the sums."""
    one, two = key_a.to(tl.uint32, bitcast=True), key_b.to(tl.uint32, bitcast=True)
    three, four = key_c.to(tl.uint32, bitcast=True), key_d.to(tl.uint32, bitcast=True)
    places = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    samples = tl.program_id(1) * SAMPLES + tl.arange(0, SAMPLES)
    split = tl.program_id(2)
    begins = samples.to(tl.int64) * size
    sums = tl.full((SAMPLES, PLACES), 0.0, tl.float32)
    for number in range(0, BLOCKS):
        row = (first + split * BLOCKS + number).to(tl.int64)
        low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
        left, right = _row_key(low, high, one, two), _row_key(low, high, three, four)
        rotation = (_word(tl.full((), _ROTATION_PLACE, tl.uint32), left, right).to(tl.int64) * dim) >> 32
        source = places - rotation.to(tl.int32)
        source = tl.where(source < 0, source + dim, source)
        # Elements are contiguous except at one position, where the rotation wraps around. Without this hint the
        # compiler puts threads side by side along the samples, which are far apart in memory. The hint makes no load a
        # vector load, because no start is known to be aligned.
        source = tl.max_contiguous(source, PLACES)
        element = row * dim + source
        inside_piece = (places < dim) & (element >= start) & (element < start + size)
        mask = (samples < batch)[:, None] & inside_piece[None, :]
        moved = tl.load(values + begins[:, None] + (element - start)[None, :], mask=mask, other=0.0).to(tl.float32)
        if ADAM:
            mean = tl.load(average + element, mask=inside_piece, other=0.0).to(tl.float32) * average_scale
            spread = tl.load(square + element, mask=inside_piece, other=1.0).to(tl.float32) * square_scale + inside
            below = tl.sqrt(spread[None, :] + moved * moved * squared_gradient_scale) + outside
            moved = tl.where(mask, (mean[None, :] + moved * gradient_scale) / below, 0.0)
        word = _word((source >> 5).to(tl.uint32), left, right)
        positive = ((word >> (source & 31).to(tl.uint32)) & 1) == 1
        sums += tl.where(positive[None, :], moved, -moved)
    target = (split * batch + samples).to(tl.int64) * dim
    kept = (samples < batch)[:, None] & (places < dim)[None, :]
    tl.store(out + target[:, None] + places[None, :], sums, mask=kept)


def sketch(
    values: Tensor, start: int, key: int, dim: int, terms: AdamTerms | None, programs: int = _PROGRAMS
) -> Tensor:
    """Return the count sketch of a piece of one parameter's gradients, or of their directions: float32, (B, dim).

    Args:
        values: the gradients, float32, float16 or bfloat16, (B, n).
        start: index of the piece's first element in the flattened parameter.
        key: key of the parameter's signs and rotations.
        dim: length of a sketch, below 2^30.
        terms: terms of Adam's direction. None means the gradients themselves.
        programs: number of programs that share the work. It changes the order of sums and so the rounding.
    """
    values = values.contiguous()
    batch, size = values.shape
    first = start // dim
    blocks = -(-(start + size) // dim) - first
    samples = min(_SAMPLES, _power_of_two(batch))
    places = min(_power_of_two(dim), _TILE // samples)
    tiles = (-(-dim // places), -(-batch // samples))
    splits = max(1, min(blocks, programs // (tiles[0] * tiles[1])))
    each = _power_of_two(-(-blocks // splits))  # few distinct values, because each one compiles the kernel again
    splits = -(-blocks // each)
    out = torch.empty(splits, batch, dim, dtype=torch.float32, device=values.device)
    moments = (values, values) if terms is None else (terms.average, terms.square)
    scales = (0.0,) * 6 if terms is None else terms.scales
    # Signed, so that every word has the type int32: Triton would pass words of 2^31 and more as int64.
    keys = [word - (1 << 32) if word >> 31 else word for word in key_words(key)]
    with torch.cuda.device_of(values):  # Triton starts its kernels on the current device
        _sketch[(*tiles, splits)](
            values,
            *moments,
            out,
            size,
            start,
            dim,
            first,
            batch,
            *keys,
            *scales,
            ADAM=terms is not None,
            SAMPLES=samples,
            PLACES=places,
            BLOCKS=each,
        )
    return out.sum(0)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()
