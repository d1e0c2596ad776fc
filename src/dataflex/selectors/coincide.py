"""COINCIDE: more samples from clusters that are similar to others and spread out, and the most typical samples of each.

The candidates are clustered by spherical k-means on their embeddings. With c_i the centre of cluster i and C_i its
samples,

    S_i = mean of cos(c_i, c_j) over the clusters j with cos(c_i, c_j) <= similar,
    D_i = mean over x, y in C_i of k(x, y),    k(x, y) = exp(-|x - y|^2 / (2 gamma^2)),
    P_i = exp(S_i / (tau D_i)) / sum_j exp(S_j / (tau D_j)).

Clusters are visited by falling P_i. Cluster i gives round(n_left * P_i / sum of P_j over the clusters not yet visited)
samples, at most all of its samples, with n_left the samples still to be chosen. Inside a cluster samples are chosen
greedily: the next sample is the one for which the maximum mean discrepancy

    mean k(C_i, C_i) + mean k(T, T) - 2 mean k(C_i, T)

between the cluster and its chosen samples T is smallest.

Source: Lee et al., Concept-skill Transferability-based Data Selection for Large Vision-Language Models (EMNLP 2024),
section 3 (arXiv 2406.10995; code G-JWLee/COINCIDE_code). ``similar: 0.9``, gamma and the 50 iterations are the defaults
of the code, tau is the value of its scripts. ``similar: 1`` gives the paper's S_i.
Differs from it: embeddings are those of the run, not five layers of a small vision model; with
``embedding_text: image_and_text`` images and text are two halves of a vector, as in the source. If rounding or small
clusters leave samples to be chosen, other clusters give them.
Cost: the embeddings, N K H multiplications for each iteration of k-means with K clusters, and the kernels within
clusters.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import ClassVar

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
    State,
    on_main,
    register,
    spherical_kmeans,
)
from dataflex.selectors.base_neighbours import usable, vectors_of

Numbers = NDArray[np.float64]
Clusters = tuple[IndexArray, NDArray[np.float32]]
"""The cluster of every candidate, (n,), and the centres, (K, H)."""

_CLUSTER_SIZE = 64
"""Mean number of samples in a cluster if the number of clusters is not set."""
_MOST_CLUSTERS = 10_000
"""Largest number of clusters if it is not set."""
_ROWS = 2048
"""Rows of a kernel or cosine matrix that are computed at a time, to bound the memory."""
_DIGITS = 12
"""Decimals of a discrepancy that are compared. Further decimals are rounding errors, which must not decide."""


class CoincideParams(EmbeddingParams):
    """Parameters of COINCIDE."""

    clusters: int | None = Field(
        None,
        ge=1,
        description="Number of clusters, at most the number of candidates. If null, one for 64 candidates, at most "
        "10,000.",
    )
    cluster_iterations: int = Field(50, ge=1, description="Largest number of k-means iterations.")
    similar: float = Field(
        0.9,
        ge=-1,
        le=1,
        description="Clusters whose centres have a larger cosine do not count in S. With 1 all other clusters count.",
    )
    gamma: float = Field(1.0, gt=0, description="Width of the kernel.")
    tau: float = Field(
        0.1, gt=0, description="Temperature of the cluster shares; larger values make the shares more equal."
    )


@register("selector", "coincide")
class CoincideSelector(Selector[CoincideParams]):
    """Takes a share of samples from each cluster, the most typical ones first."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset(EmbeddingParams.model_fields) | {
        "clusters",
        "cluster_iterations",
    }

    def __init__(self, params: CoincideParams) -> None:
        super().__init__(params)
        self._kept: dict[str, Clusters] = {}
        """Clusters by the digest of the candidates; filled only if the embeddings are those of a fixed encoder."""

    def needs(self, run: RunView) -> Needs:
        """Return the embeddings."""
        return Needs(embeddings=self.params)

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return the chosen samples, cluster by cluster."""
        trained = usable(self, ctx, candidates, count)
        vectors = vectors_of(ctx, trained)
        labels, centres = self._clusters(ctx, trained, vectors)
        places = on_main(partial(self._chosen, vectors, labels, centres, count))
        return Selection(trained[places], None, candidates.size - trained.size)

    def _clusters(self, ctx: RoundContext, candidates: IndexArray, vectors: EmbeddingArray) -> Clusters:
        """Return the cluster of each candidate and the centres, stored if the embeddings are fixed."""
        key = hashlib.sha256(np.ascontiguousarray(candidates).tobytes()).hexdigest()
        if key not in self._kept:
            number = self.params.clusters or min(_MOST_CLUSTERS, -(-candidates.size // _CLUSTER_SIZE))
            number, iterations = min(number, candidates.size), self.params.cluster_iterations
            found: Clusters = on_main(lambda: spherical_kmeans(vectors, number, iterations, ctx.rng))
            if self.params.encoder is None:
                return found
            self._kept[key] = found
        return self._kept[key]

    def _chosen(
        self, vectors: EmbeddingArray, labels: IndexArray, centres: NDArray[np.float32], count: int
    ) -> IndexArray:
        """Return the positions of the chosen vectors: from each cluster, those that best stand for it."""
        members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
        densities = np.array([density(_rows(vectors, each), self.params.gamma) for each in members])
        shares = cluster_shares(transferability(centres, self.params.similar), densities, self.params.tau)
        sizes = np.array([each.size for each in members])
        chosen = [
            each if wanted == each.size else each[standing_for(_rows(vectors, each), int(wanted), self.params.gamma)]
            for each, wanted in zip(members, allocated(shares, sizes, count), strict=True)
        ]
        return np.concatenate(chosen)

    def state_dict(self) -> State:
        """Return the clusters that hold for the whole run."""
        return {key: {"labels": labels, "centres": centres} for key, (labels, centres) in self._kept.items()}

    def load_state_dict(self, state: State) -> None:
        """Restore the clusters."""
        self._kept = {key: (each["labels"], each["centres"]) for key, each in state.items()}


def _rows(vectors: EmbeddingArray, rows: IndexArray) -> Numbers:
    return np.asarray(vectors[rows], dtype=np.float64)


def transferability(centres: NDArray[np.floating], similar: float) -> Numbers:
    """Return the mean cosine of each centre with the other centres that are not too similar to it, shape (K,).

    Args:
        centres: unit vectors, shape (K, H).
        similar: cosines above this do not count. The cosine of a centre with itself never counts.

    Returns:
        S of every cluster; 0 if no other centre counts.
    """
    vectors = centres.astype(np.float64)
    found = np.zeros(len(vectors))
    for begin in range(0, len(vectors), _ROWS):
        cosines = vectors[begin : begin + _ROWS] @ vectors.T
        counts = cosines <= similar
        rows = np.arange(len(cosines))
        counts[rows, begin + rows] = False
        number = counts.sum(axis=1)
        found[begin : begin + _ROWS] = np.where(counts, cosines, 0).sum(axis=1) / np.maximum(number, 1)
    return found


def kernel(vectors: Numbers, others: Numbers, gamma: float) -> Numbers:
    """Return exp(-|x - y|^2 / (2 gamma^2)) of all pairs, shape (n, m)."""
    squares = (vectors**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * vectors @ others.T
    values: Numbers = np.exp(-np.maximum(squares, 0) / (2 * gamma**2))
    return values


def _mean_kernels(vectors: Numbers, gamma: float) -> Numbers:
    """Return the mean kernel of each vector with all vectors, itself included, shape (n,)."""
    blocks = [vectors[begin : begin + _ROWS] for begin in range(0, len(vectors), _ROWS)]
    return sum((kernel(vectors, block, gamma).sum(axis=1) for block in blocks), np.zeros(len(vectors))) / len(vectors)


def density(vectors: Numbers, gamma: float) -> float:
    """Return the mean kernel over all pairs of vectors, each paired with itself too. A single vector has 1."""
    return float(_mean_kernels(vectors, gamma).mean())


def cluster_shares(transfer: Numbers, densities: Numbers, tau: float) -> Numbers:
    """Return P of every cluster, shape (K,).

    Args:
        transfer: S of every cluster, shape (K,).
        densities: D of every cluster, shape (K,).
        tau: the temperature.
    """
    logits = transfer / densities / tau
    shares: Numbers = np.exp(logits - logits.max())
    return shares / shares.sum()


def allocated(shares: Numbers, sizes: IndexArray, count: int) -> IndexArray:
    """Return the number of samples that each cluster gives, shape (K,), in all ``count``.

    No cluster gives more samples than it has.

    Args:
        shares: P of every cluster.
        sizes: the number of samples of every cluster; their sum is at least ``count``.
        count: the number of samples to choose.
    """
    given = np.zeros_like(sizes)
    # A pass may give too few samples, because of rounding or small clusters. Further passes give the rest.
    while (left := count - int(given.sum())) > 0:
        order = np.argsort(-shares, kind="stable")
        order = order[given[order] < sizes[order]]
        rest = shares[order][::-1].cumsum()[::-1]
        for place, number in enumerate(order):
            # Shares may underflow to 0; the clusters left then give equal parts.
            part = shares[number] / rest[place] if rest[place] > 0 else 1 / (order.size - place)
            taken = min(round(left * float(part)), int(sizes[number] - given[number]))
            given[number] += taken
            left -= taken
    return given


def standing_for(vectors: Numbers, count: int, gamma: float) -> IndexArray:
    """Return ``count`` rows, chosen greedily so that their discrepancy to all rows is smallest, in the order chosen.

    Of equal rows the one with the lowest index is chosen.

    Args:
        vectors: embeddings of one cluster, shape (n, H).
        count: at most n.
        gamma: width of the kernel.
    """
    mean = _mean_kernels(vectors, gamma)
    towards, within, to_all = np.zeros(len(vectors)), 0.0, 0.0
    left = np.ones(len(vectors), dtype=bool)
    chosen = np.empty(count, dtype=np.int64)
    for number in range(count):
        size = number + 1
        # The discrepancy after adding each row, without mean k(C, C), which is the same for all. k(x, x) is 1.
        values = (within + 2 * towards + 1) / size**2 - 2 * (to_all + mean) / size
        best = int(np.where(left, np.round(values, _DIGITS), np.inf).argmin())
        within += 2 * towards[best] + 1
        to_all += mean[best]
        towards += kernel(vectors, vectors[best : best + 1], gamma)[:, 0]
        left[best], chosen[number] = False, best
    return chosen
