"""Count sketches of gradients in one pass on a CPU: direction, signs, rotations and the sum over blocks. Needs Numba.

The operations of :mod:`dataflex.probe.projections` read and write every element several times. This kernel reads every
gradient element once and writes only to the sketch, which stays in the CPU's cache. Threads divide the elements of the
sketch among them, and every element adds up its blocks in order. So the result does not depend on the number of
threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from dataflex.probe.preconditioners import AdamTerms


class BlockSums:
    """Adds the count sketches of gradients, or of Adam's directions, on several threads.

    Args:
        threads: number of threads, at least 1.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def add(
        self, out: Tensor, values: Tensor, start: int, signs: Tensor, rotations: Tensor, terms: AdamTerms | None
    ) -> None:
        """Add the count sketch of a piece of one parameter's gradients, or of their directions.

        Args:
            out: the sketches, float32, (B, at least dim), contiguous. The first dim columns are changed in place.
            values: the gradients, float32, (B, n).
            start: index of the piece's first element in the flattened parameter.
            signs: signs of the J blocks of ``dim`` elements that the piece touches, int8, (J, dim).
            rotations: rotations of these blocks, int64, (J,).
            terms: terms of Adam's direction, with float32 moments. None adds the gradients themselves.
        """
        values = values.contiguous()
        # Without terms the kernel reads no moments, but its argument needs arrays of the same type.
        used = (values[0], values[0]) if terms is None else (terms.average, terms.square)
        moments = tuple(tensor.numpy() for tensor in used)
        scales = np.array([] if terms is None else terms.scales, dtype=np.float32)
        arrays = [tensor.numpy() for tensor in (out, values, signs, rotations)]
        dim = signs.shape[1]
        if self._threads == 1:
            _add(*arrays, start, moments, scales, (0, dim))
        else:
            edges = np.array([dim * number // self._threads for number in range(self._threads + 1)])
            _add_spans(*arrays, start, moments, scales, edges)

    @staticmethod
    def serves(values: Tensor, terms: AdamTerms | None) -> bool:
        """Return whether the kernel supports the types of the gradients and moments; all must be float32."""
        used = [values] if terms is None else [values, terms.average, terms.square]
        return all(tensor.dtype == torch.float32 for tensor in used)


# Of the fast-math rules only contraction is on, which may fuse a product and a sum. Other rules would not preserve NaN.
@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _add(
    out: np.ndarray,
    values: np.ndarray,
    signs: np.ndarray,
    rotations: np.ndarray,
    start: int,
    moments: tuple[np.ndarray, np.ndarray],
    scales: np.ndarray,
    span: tuple[int, int],
) -> None:
    """Add the signed elements that fall on the columns ``span`` of the sketches.

    Empty ``scales`` add the gradients themselves, without Adam.
    """
    begin, end = span
    average, square = moments
    adam = scales.size > 0
    batch, size = values.shape
    blocks, dim = signs.shape
    first = start // dim
    above, below = np.empty(end - begin, np.float32), np.empty(end - begin, np.float32)
    for block in range(blocks):
        for wrapped in range(2):
            # Element e of a block goes to column (e + rotation) % dim: first the elements that stay inside the block,
            # then the elements that wrap around.
            shift = (first + block) * dim - rotations[block] + wrapped * dim  # from a column to an element
            low = begin if wrapped else max(begin, rotations[block])
            high = min(end, rotations[block]) if wrapped else end
            low, high = max(low, start - shift), min(high, start + size - shift)
            count = high - low
            if count <= 0:
                continue
            element = low + shift
            sign = signs[block, element - (first + block) * dim : element - (first + block) * dim + count]
            if adam:
                mean, spread = average[element : element + count], square[element : element + count]
                for place in range(count):  # all samples share these terms
                    above[place] = scales[0] * mean[place]
                    below[place] = scales[2] * spread[place] + scales[4]
            for sample in range(batch):
                gradient = values[sample, element - start : element - start + count]
                sums = out[sample, low:high]
                if adam:
                    for place in range(count):
                        value = gradient[place]
                        root = np.sqrt(below[place] + scales[3] * value * value) + scales[5]
                        sums[place] += (above[place] + scales[1] * value) / root * np.float32(sign[place])
                else:
                    for place in range(count):
                        sums[place] += gradient[place] * np.float32(sign[place])


# PyTorch's OpenMP threads keep a core busy for a while after every product. OpenMP threads start beside them at once; a
# pool of Python threads takes twice as long.
@njit(nogil=True, parallel=True)
def _add_spans(
    out: np.ndarray,
    values: np.ndarray,
    signs: np.ndarray,
    rotations: np.ndarray,
    start: int,
    moments: tuple[np.ndarray, np.ndarray],
    scales: np.ndarray,
    edges: np.ndarray,
) -> None:
    """Call :func:`_add` for the spans between ``edges`` on several threads."""
    for number in prange(edges.size - 1):
        _add(out, values, signs, rotations, start, moments, scales, (edges[number], edges[number + 1]))
