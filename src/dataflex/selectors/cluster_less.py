"""Cluster-LESS: LESS on a few representatives of each cluster of samples, for a sixteenth of the gradients.

The first decision clusters the pool by k-means on mean-pooled last hidden states of length 1, with about
``cluster_size`` samples in each cluster. Every decision draws ``representatives`` members of each cluster that have a
token to train on. The score of a cluster for a sub-task is the mean LESS score of its representatives. Every member
with a token to train on has the score of its cluster,

    score(z) = max over sub-tasks j of  mean over representatives r of z's cluster of  mean over v in V_j of
               cos(g(v), Gamma(r)).

Members of one cluster have equal scores. If the budget ends inside a cluster, its chosen members are drawn at random.

Source: the cluster-LESS selector of DataFlex (arXiv 2603.26164), which has the same cluster sizes.
Differs from it: the score is the mean of the representatives' scores, not the score of their mean gradient, so no
gradient has to be stored. Equal scores are drawn at random, not cut by index. Clusters are part of the checkpoint.
Cost: one forward pass over the pool, once. Then ``representatives / cluster_size`` of the cost of LESS.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    Embeddings,
    IndexArray,
    Measurement,
    Needs,
    RoundContext,
    RunOutline,
    RunView,
    ScoreArray,
    State,
    on_main,
    register,
)
from dataflex.selectors.base_gradients import CheckpointSelector, LessParams

_EXACT_KMEANS = 50_000
"""Largest number of samples for exact k-means; larger pools use mini-batches."""


class ClusterLessParams(LessParams):
    """Parameters of cluster-LESS."""

    cluster_size: int = Field(64, ge=1, description="Mean number of samples in a cluster.")
    representatives: int = Field(4, ge=1, description="Members of each cluster whose gradients are computed.")
    cluster_iterations: int = Field(10, ge=1, description="Largest number of k-means iterations.")


@register("selector", "cluster_less")
class ClusterLessSelector(CheckpointSelector[ClusterLessParams]):
    """Prefers clusters whose representatives would reduce the validation loss most."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset({"cluster_size", "cluster_iterations"})
    partial_scores: ClassVar[str | None] = (
        "cluster_size and representatives already bound the cost of cluster_less; use less for a limit"
    )

    def __init__(self, params: ClusterLessParams) -> None:
        super().__init__(params)
        self._clusters: NDArray[np.int32] | None = None
        """The cluster of every sample of the pool, shape (N,)."""

    def needs(self, run: RunView) -> Needs:
        """Return the gradients of representatives and validation samples, and the embeddings that are clustered."""
        asked = super().needs(run)
        return replace(asked, measurements=(*asked.measurements, Embeddings()))

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the representatives and validation samples of all decisions; for embeddings, the pool once."""
        if isinstance(measurement, Embeddings):
            return float(run.pool_size or 0)
        return super().measured_samples(measurement, run)

    def scored_samples(self, pool_size: int) -> int:
        """Return the number of representatives of one decision."""
        clusters = -(-pool_size // self.params.cluster_size)
        return int(min(pool_size, clusters * self.params.representatives))

    def begin(self, ctx: RoundContext) -> None:
        """Cluster the pool at the first decision, and measure the features of the validation samples."""
        super().begin(ctx)
        if self._clusters is None:
            embeddings = ctx.probe.measure(Embeddings(), np.arange(ctx.pool.size))
            # Drawn on every process, so that the processes draw the same representatives later.
            seed = int.from_bytes(ctx.rng.bytes(4), "little")
            self._clusters = on_main(partial(self._cluster, embeddings, seed))

    def pick(self, scores: ScoreArray, count: int, rng: np.random.Generator) -> IndexArray:
        """Return ``count`` positions by the ``rule`` parameter; ``top_k`` draws among equal scores at random.

        With ``top_k`` the best come first. All members of a cluster have equal scores.
        """
        if self.params.rule != "top_k":
            return super().pick(scores, count, rng)
        scored = np.flatnonzero(~np.isnan(scores))
        return scored[np.lexsort((rng.random(scored.size), -scores[scored]))[:count]]

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the score of every candidate's cluster; NaN if the candidate has no token to train on."""
        assert self._clusters is not None
        scores: ScoreArray = np.full(candidates.size, np.nan, dtype=np.float32)
        trained = ctx.pool.trained[candidates]
        if not trained.any():
            return scores
        members, clusters = candidates[trained], self._clusters[candidates[trained]]
        chosen = draw_members(clusters, self.params.representatives, ctx.rng)
        cosines = self.measured(ctx, members[chosen], self.params.settings())
        scored = ~np.isnan(cosines).any(axis=1)
        number, width = int(clusters.max()) + 1, cosines.shape[1]
        sums, counts = np.zeros((number, width)), np.zeros(number)
        np.add.at(sums, clusters[chosen[scored]], cosines[scored])
        np.add.at(counts, clusters[chosen[scored]], 1)
        with np.errstate(invalid="ignore"):
            means = sums / counts[:, None]
        best = means.max(axis=1) if self.params.aggregation == "max" else means.mean(axis=1)
        scores[trained] = best[clusters]
        return scores

    def _cluster(self, embeddings: ScoreArray, seed: int) -> NDArray[np.int32]:
        from sklearn.cluster import KMeans, MiniBatchKMeans

        number = -(-embeddings.shape[0] // self.params.cluster_size)
        kind = KMeans if embeddings.shape[0] <= _EXACT_KMEANS else MiniBatchKMeans
        model = kind(number, n_init=1, max_iter=self.params.cluster_iterations, random_state=seed)
        labels: NDArray[np.int32] = model.fit_predict(embeddings).astype(np.int32)
        return labels

    def state_dict(self) -> State:
        """Return the clusters, if they exist."""
        return {} if self._clusters is None else {"clusters": self._clusters}

    def load_state_dict(self, state: State) -> None:
        """Restore the clusters."""
        self._clusters = state.get("clusters")


def draw_members(clusters: NDArray[np.int32], count: int, rng: np.random.Generator) -> IndexArray:
    """Return the positions of up to ``count`` random members of each cluster, ascending.

    Args:
        clusters: the cluster of each sample, shape (n,).
        count: the number of members.
        rng: the source of draws.
    """
    order = np.lexsort((rng.random(clusters.size), clusters))
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    place = np.arange(clusters.size) - np.repeat(starts, np.diff(np.append(starts, clusters.size)))
    return np.sort(order[place < count]).astype(np.int64)
