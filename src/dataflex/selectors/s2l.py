"""S2L: an equal number of samples from each cluster of loss trajectories, the smallest clusters first.

The trajectory of a sample consists of its losses in the steps that trained on it. They are the losses that the training
computes anyway, so no further forward pass is needed. The last ``points`` losses are stored; a shorter trajectory is
extended with its last loss. k-means divides the candidates' trajectories into ``clusters`` clusters. Samples that were
not trained on yet are one more cluster. Clusters give samples in the order from the smallest to the largest: each gives
all it has, or an equal part of the samples still wanted, drawn at random. Clusters of at most ``leftover_size`` samples
come after all others.

Source: Yang et al., SmallToLarge (S2L): Scalable Data Selection for Fine-tuning Large Language Models by Summarizing
Training Trajectories of Small Models (NeurIPS 2024, arXiv 2403.07384), and its code ``schedules/s2l.py``.
Differs from it: the paper trains a small proxy model first and measures its losses of all samples every 500 steps.
Cost: none of the model; k-means on the main process at every decision.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    IndexArray,
    Needs,
    RoundContext,
    RunOutline,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    State,
    StepStatistics,
    on_main,
    register,
)

_EXACT_KMEANS = 50_000
"""Largest number of samples for exact k-means; more samples use mini-batches."""
_UNSEEN = -1
"""Cluster number of samples that were not trained on yet."""


class S2lParams(SelectorParams):
    """Parameters of S2L."""

    points: int = Field(
        8, ge=1, description="Number of losses in a trajectory: the losses of the last times the sample was trained on."
    )
    clusters: int = Field(100, ge=1, description="Number of clusters of trajectories.")
    iterations: int = Field(20, ge=1, description="Largest number of k-means iterations.")
    leftover_size: int = Field(2, ge=0, description="Clusters of at most this number of samples come after all others.")


@register("selector", "s2l")
class S2lSelector(Selector[S2lParams]):
    """Chooses evenly from clusters of samples that are learned alike."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset({"points"})
    partial_scores: ClassVar[str | None] = "the losses are those of the training steps, at no extra cost; remove it"

    def __init__(self, params: S2lParams) -> None:
        super().__init__(params)
        self._losses = np.empty((0, params.points), dtype=np.float32)
        """The last losses of each sample, the oldest first, shape (N or less, points)."""
        self._times = np.empty(0, dtype=np.int32)
        """How often each sample was trained on, shape (N or less,)."""

    def needs(self, run: RunView) -> Needs:
        """Return the losses of the samples of every step."""
        return Needs(step_losses="samples")

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield a problem if a pool is only scored, as nothing is trained then."""
        if run.offline:
            yield "method", "s2l chooses by the losses of training steps, and scoring a pool trains nothing."

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if the only decision comes before any losses, or with losses of a part of the pool only."""
        if run.decisions != 1:
            return None
        if not run.schedule.warmup_steps:
            return "the only decision comes before the first step, and it needs losses of steps; set warmup_steps"
        warmup = run.schedule.warmup_steps * run.global_batch_size
        if run.pool_size is not None and warmup < run.pool_size:
            return (
                f"the warm-up trains {warmup} of about {run.pool_size} samples; the others have no trajectory at the "
                "only decision and form one cluster. Set warmup_steps to one pass or more, or lower update_steps"
            )
        return None

    def on_step(self, statistics: StepStatistics) -> None:
        """Store the losses of a step's samples."""
        known = ~np.isnan(statistics.sample_losses)
        indices, losses = statistics.indices[known], statistics.sample_losses[known]
        if not indices.size:
            return
        self._make_room(int(indices.max()) + 1)
        # A sample may be in a step several times. Each turn of the loop stores one loss per distinct sample, because
        # an assignment with repeated indices would store only one of the losses.
        while indices.size:
            first = np.unique(indices, return_index=True)[1]
            self._keep(indices[first], losses[first])
            rest = np.setdiff1d(np.arange(indices.size), first)
            indices, losses = indices[rest], losses[rest]

    def _make_room(self, size: int) -> None:
        missing = size - self._times.size
        if missing > 0:
            self._times = np.concatenate([self._times, np.zeros(missing, dtype=np.int32)])
            self._losses = np.concatenate([self._losses, np.full((missing, self.params.points), np.nan, np.float32)])

    def _keep(self, indices: IndexArray, losses: ScoreArray) -> None:
        full = indices[self._times[indices] >= self.params.points]
        self._losses[full] = np.roll(self._losses[full], -1, axis=1)
        self._losses[indices, np.minimum(self._times[indices], self.params.points - 1)] = losses
        self._times[indices] += 1

    def begin(self, ctx: RoundContext) -> None:
        """Extend the storage to the whole pool, with empty trajectories for samples not trained on yet."""
        self._make_room(ctx.pool.size)
        if not self._times[ctx.candidates].any():
            ctx.not_decided("no sample was trained on yet, the draw is random")

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return a score in (0, 1] that falls with the position of a candidate in the choice.

        A candidate without a token to train on has NaN.
        """
        scores = np.full(candidates.size, np.nan, dtype=np.float32)
        usable = np.flatnonzero(ctx.pool.trained[candidates])
        samples = candidates[usable]
        clusters = np.full(samples.size, _UNSEEN, dtype=np.int64)
        seen = self._times[samples] > 0
        seed = int.from_bytes(ctx.rng.bytes(4), "little")
        if seen.any():
            points = filled(self._losses[samples[seen]], self._times[samples[seen]])
            clusters[seen] = on_main(partial(clusters_of, points, self.params, seed))
        order = evenly(clusters, self.params.leftover_size, ctx.rng)
        scores[usable[order]] = np.arange(order.size, 0, -1) / max(order.size, 1)
        return scores

    def state_dict(self) -> State:
        """Return the trajectories."""
        return {"losses": self._losses.copy(), "times": self._times.copy()}

    def load_state_dict(self, state: State) -> None:
        """Restore the trajectories."""
        self._losses = np.array(state["losses"], dtype=np.float32)
        self._times = np.array(state["times"], dtype=np.int32)


def filled(losses: NDArray[np.float32], times: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return trajectories whose missing points are filled with the last loss, shape (n, points).

    Args:
        losses: the stored losses, the oldest first, shape (n, points).
        times: how often each sample was trained on, at least once, shape (n,).
    """
    places = np.arange(losses.shape[1])
    last = np.minimum(places[None, :], np.minimum(times, losses.shape[1])[:, None] - 1)
    return np.take_along_axis(losses, last, axis=1)


def clusters_of(points: NDArray[np.float32], params: S2lParams, seed: int) -> NDArray[np.int64]:
    """Return the k-means cluster of each trajectory, shape (n,).

    There are at most as many clusters as distinct trajectories.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    number = _different(points, params.clusters)
    kind = KMeans if points.shape[0] <= _EXACT_KMEANS else MiniBatchKMeans
    model = kind(number, n_init=1, max_iter=params.iterations, random_state=seed)
    labels: NDArray[np.int64] = model.fit_predict(points).astype(np.int64)
    return labels


def _different(points: NDArray[np.float32], enough: int) -> int:
    """Return the number of distinct trajectories, at most ``enough``.

    A growing part of the trajectories is examined, because a few of them usually contain ``enough`` distinct ones.
    """
    looked_at, found = 0, 0
    while looked_at < len(points) and found < enough:
        looked_at = max(4 * enough, 4 * looked_at)
        found = np.unique(points[:looked_at], axis=0).shape[0]
    return min(found, enough)


def evenly(clusters: NDArray[np.int64], leftover_size: int, rng: np.random.Generator) -> IndexArray:
    """Return positions in an order whose first k are, for every k, an even choice from the clusters.

    The choice of k samples visits the clusters from the smallest to the largest. Each gives (k - given so far) //
    (clusters left) samples, or all it has. The same choice results if all clusters give one sample per turn, the
    largest cluster first; this order is returned. Members of a cluster are in random order. Clusters of at most
    ``leftover_size`` samples come last, all in random order.

    Args:
        clusters: the cluster of each sample, shape (n,).
        leftover_size: largest size of the clusters that come last.
        rng: the source of draws.
    """
    _, numbers, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    rising = np.empty(sizes.size, dtype=np.int64)
    rising[np.argsort(sizes, kind="stable")] = np.arange(sizes.size)
    shuffled = rng.permutation(clusters.size)
    grouped = shuffled[np.argsort(numbers[shuffled], kind="stable")]
    turn = np.empty(clusters.size, dtype=np.int64)  # position of a sample within its cluster
    turn[grouped] = np.arange(clusters.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    last = sizes[numbers] <= leftover_size
    turn[last], rank = clusters.size, -rising[numbers]
    rank[last] = 0
    return shuffled[np.lexsort((rank[shuffled], turn[shuffled]))]
