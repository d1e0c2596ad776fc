"""Diversity: samples that together cover the pool, by their embeddings.

- ``k_center``: the first sample is drawn at random. Each further sample is the candidate farthest from the chosen
  samples. The distance of a candidate is 1 - its largest cosine with a chosen sample. In the Euclidean distance, the
  farthest candidate is then at most twice as far from a chosen sample as in the best possible choice.
- ``facility_location``: each sample is the candidate that adds most to

      mean over x of max over chosen s of (1 + cos(x, s)),

  with x the ``covered`` candidates, drawn for each decision. The value reached is at least 1 - 1/e of the best possible
  value.

Source: k-centre: Gonzalez (1985); Sener and Savarese, Active Learning for Convolutional Neural Networks (ICLR 2018),
algorithm 1 (arXiv 1708.00489). Facility location: Wei et al., Submodularity in Data Subset Selection and Active
Learning (ICML 2015), by lazy evaluation (Minoux 1978).
Cost: the embeddings. ``k_center`` multiplies all candidates with every chosen sample. ``facility_location`` multiplies
the ``covered`` samples with every candidate whose gain is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    EmbeddingArray,
    EmbeddingParams,
    IndexArray,
    Needs,
    RoundContext,
    RunView,
    Selection,
    Selector,
    register,
)
from dataflex.selectors.base_neighbours import usable, vectors_of

_ROWS = 8192
"""Candidates that are compared with chosen samples at a time."""
_BATCH = 256
"""Most promising candidates, which are compared among themselves before all candidates are compared again."""
_EQUAL = 1e-6
"""Gains that differ by less count as equal."""
_SAME = 1e-5
"""Distances up to this count as 0: the vectors differ by rounding alone."""

Numbers = NDArray[np.float64]


class DiversityParams(EmbeddingParams):
    """Parameters of the selection by diversity."""

    criterion: Literal["k_center", "facility_location"] = Field(
        "k_center",
        description="k_center: no candidate is far from a chosen sample; facility_location: candidates are near a "
        "chosen sample on average.",
    )
    covered: int = Field(
        10_000, ge=1, description="For facility_location: number of candidates to cover, drawn for every decision."
    )


@register("selector", "diversity")
class DiversitySelector(Selector[DiversityParams]):
    """Takes samples that are far from each other, or near to all others."""

    def needs(self, run: RunView) -> Needs:
        """Return the embeddings."""
        return Needs(embeddings=self.params)

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return samples that cover the candidates."""
        trained = usable(self, ctx, candidates, count)
        vectors = vectors_of(ctx, trained)
        if self.params.criterion == "k_center":
            places, gains = farthest_first(vectors, count, int(ctx.rng.integers(trained.size)))
        else:
            number = min(self.params.covered, trained.size)
            drawn = np.sort(ctx.rng.choice(trained.size, number, replace=False))
            places, gains = best_facilities(vectors, np.asarray(vectors[drawn], dtype=np.float32), count)
        return Selection(
            trained[places],
            gains.astype(np.float32),
            candidates.size - trained.size,
            ranks=np.arange(1, count + 1),
            ranked=trained.size,
        )


def farthest_first(vectors: EmbeddingArray, count: int, first: int) -> tuple[IndexArray, Numbers]:
    """Return ``count`` rows, each the farthest from the rows before it, and its distance to them; ties by index.

    A batch of the farthest rows is compared among itself. As long as one of them is farther than every row outside the
    batch was before, it is the next row, and the rows outside need no comparison.

    Args:
        vectors: of length 1 or 0, shape (N, H).
        count: at most N.
        first: the first row; its distance is given as 2.
    """
    distances = np.full(len(vectors), 2.0)
    chosen, found = [first], [2.0]
    fresh = [first]
    while True:
        _come_nearer(distances, vectors, fresh)
        distances[chosen] = -1.0
        if len(chosen) >= count:
            break
        if distances.max() <= 0:  # only duplicates of chosen rows are left
            rest = np.flatnonzero(distances == 0)[: count - len(chosen)]
            return np.append(chosen, rest), np.append(found, np.zeros(rest.size))
        batch, bound = _largest(distances, _BATCH)
        few = np.asarray(vectors[batch], dtype=np.float64)
        among, own = _distances(few @ few.T), distances[batch]
        fresh = []
        while len(chosen) < count:
            best = int(own.argmax())
            if fresh and own[best] <= bound:
                break
            fresh.append(int(batch[best]))
            chosen.append(int(batch[best]))
            found.append(float(own[best]))
            own = np.minimum(own, among[best])
            own[best] = -1.0
    return np.array(chosen), np.array(found)


def _come_nearer(distances: Numbers, vectors: EmbeddingArray, rows: list[int]) -> None:
    """Lower the distances in place to the distances to newly chosen rows, if these are smaller."""
    centres = np.asarray(vectors[rows], dtype=np.float64).T
    for begin, block in _blocks(vectors):
        part = distances[begin : begin + len(block)]
        np.minimum(part, _distances((block.astype(np.float64) @ centres).max(axis=1)), out=part)


def _blocks(vectors: EmbeddingArray) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for begin in range(0, len(vectors), _ROWS):
        yield begin, np.asarray(vectors[begin : begin + _ROWS], dtype=np.float32)


def _distances(cosines: Numbers) -> Numbers:
    """Return the distances in single precision, with 0 for those up to ``_SAME``.

    The last bits of a product depend on the position of a row in its block. After rounding from double precision the
    distances of equal rows are equal, so ties are decided by the index.
    """
    distances = (1 - cosines).astype(np.float32)
    return np.where(distances <= _SAME, 0.0, distances).astype(np.float64)


def _largest(values: Numbers, count: int) -> tuple[IndexArray, float]:
    """Return the positions of the ``count`` largest values, ascending, and the largest of the other values.

    Of equal values the lower positions come first.
    """
    if values.size <= count:
        return np.arange(values.size), -np.inf
    least, bound = np.sort(np.partition(values, values.size - count - 1)[values.size - count - 1 :])[[1, 0]]
    above = np.flatnonzero(values > least)
    ties = np.flatnonzero(values == least)[: count - above.size]
    return np.sort(np.concatenate([above, ties])), float(bound)


def best_facilities(vectors: EmbeddingArray, covered: NDArray[np.float32], count: int) -> tuple[IndexArray, Numbers]:
    """Return ``count`` rows, each the one with the largest gain in coverage, and these gains.

    The gain of a row falls as rows are chosen, so an earlier gain is an upper bound. Only the rows with the largest
    bounds are computed again.

    Args:
        vectors: of length 1 or 0, shape (N, H).
        covered: vectors to cover, shape (A, H).
        count: at most N.
    """
    reach = np.zeros(len(covered), dtype=np.float32)
    total = covered.mean(axis=0, dtype=np.float64)
    bounds = 1 + np.concatenate([block.astype(np.float64) @ total for _, block in _blocks(vectors)])
    chosen, gains = list[int](), list[float]()
    while len(chosen) < count:
        if bounds.max() <= _EQUAL:  # everything is covered, no row has a gain
            rest = np.flatnonzero(bounds > -np.inf)[: count - len(chosen)]
            return np.append(chosen, rest), np.append(gains, np.zeros(rest.size))
        batch, outside = _largest(bounds, _BATCH)
        near = 1 + np.asarray(vectors[batch], dtype=np.float32) @ covered.T
        for repeat in range(count - len(chosen)):
            fresh = np.maximum(near - reach, 0).mean(axis=1, dtype=np.float64)
            fresh[np.isneginf(bounds[batch])] = -np.inf
            is_known = not repeat and bool(np.allclose(fresh, bounds[batch], rtol=0, atol=_EQUAL))
            bounds[batch] = fresh
            # If the bounds of the batch were exact, its best row is the best of all, even if a bound outside is as
            # large. Otherwise another batch is formed with the lower bounds.
            largest = fresh.max()
            if np.isneginf(largest) or (largest < outside + _EQUAL and not is_known):
                break
            best = int(np.flatnonzero(fresh >= largest - _EQUAL)[0])
            chosen.append(int(batch[best]))
            gains.append(float(fresh[best]))
            np.maximum(reach, near[best], out=reach)
            bounds[chosen[-1]] = -np.inf
    return np.array(chosen), np.array(gains)
