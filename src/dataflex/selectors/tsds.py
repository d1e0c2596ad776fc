"""TSDS: samples whose distribution matches the distribution of the validation samples and stays diverse.

d_ij is the Euclidean distance between the embeddings of validation sample i (of M) and candidate j, and rho_j the
density of the candidates at j. The masses g_ij minimise

    (alpha / C) sum_ij g_ij d_ij + (1 - alpha) t    subject to  sum_j g_ij = 1 / M  and  rho_j g_ij <= t / M,

and sample j is drawn with probability p_j = sum_i g_ij. For a given t = 1 / s every validation sample fills its nearest
candidates one after another with 1 / (M s rho_j) until its mass is spent. The minimum is exact: the search visits all
values of s at which one more candidate is filled. With variant ``kde``

    rho_u = sum over the kde_k nearest u' in U of max(0, 1 - |u - u'|^2 / sigma^2),

with U the ``max_k`` nearest candidates of all validation samples together. A group of near-duplicates then has about
the mass of one sample. With ``uniform``, or sigma 0, rho = 1.

Source: Liu et al., TSDS: Data Selection for Task-Specific Model Finetuning (NeurIPS 2024, arXiv 2410.11303), algorithms
1 and 2, with the steps and defaults of its code (ZifanL/TSDS).
Differs from it: searches are exact. ``max_k`` and ``kde_k`` are not limited to a tenth of the pool. A validation sample
that has filled no candidate when the search for s ends gives its whole mass 1 / M to its nearest candidate; the code
stops with an assertion.
Cost: the embeddings, one product of validation samples and candidates, and for ``kde`` one product of the candidates
whose density is needed with U.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dataflex import (
    ComponentError,
    EmbeddingArray,
    IndexArray,
    InputPath,
    Needs,
    Pool,
    RoundContext,
    RunOutline,
    RunView,
    ScoreArray,
    Selection,
    State,
    kernel_densities,
    ranks_among,
    register,
    sample_without_replacement,
)
from dataflex.selectors.base_neighbours import (
    NeighbourParams,
    NeighbourSelector,
    array_file,
    file_problems,
    usable,
    vectors_of,
)

Numbers = NDArray[np.float64]

_MEASURED = 1000
"""Nearest neighbours whose order is exact; the distances of the others are in single precision."""


class TsdsParams(NeighbourParams):
    """Parameters of TSDS."""

    variant: Literal["kde", "uniform"] = Field(
        "kde", description="kde: near-duplicates share the mass of one sample; uniform: every sample counts the same."
    )
    alpha: float = Field(0.5, gt=0, lt=1, description="Weight of nearness; diversity has the weight 1 - alpha.")
    c: float = Field(
        5.0, gt=0, description="C of the paper, a distance; a larger value makes the selection more diverse."
    )
    sigma: float = Field(
        0.75, ge=0, description="For kde: distance below which samples count as near-duplicates; 0 means as uniform."
    )
    max_k: int = Field(
        5000, ge=1, description="Number of nearest candidates that each validation sample can give mass to."
    )
    kde_k: int = Field(
        1000, ge=1, description="For kde: largest number of near-duplicates that count in the density of a sample."
    )
    replacement: bool = Field(False, description="Draw with replacement, so that a sample may occur several times.")
    probs_path: InputPath | None = Field(
        None,
        description="Probabilities from a .npy file, a number for each sample of the pool. If null, they are computed.",
    )

    @model_validator(mode="after")
    def _used(self) -> Self:
        idle = sorted({"sigma", "kde_k"} & self.model_fields_set) if self.variant == "uniform" else []
        if idle:
            raise ValueError(f"{' and '.join(idle)} has no use with variant uniform; remove {' and '.join(idle)}")
        idle = sorted(self.model_fields_set - {"probs_path", "replacement"}) if self.probs_path is not None else []
        if idle:
            raise ValueError(f"{', '.join(idle)}: not used, as probs_path gives the probabilities; remove them")
        return self


@register("selector", "tsds")
class TsdsSelector(NeighbourSelector[TsdsParams]):
    """Draws samples whose distribution matches the distribution of the validation samples and stays diverse."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset(TsdsParams.model_fields) - {"replacement"}

    def __init__(self, params: TsdsParams) -> None:
        super().__init__(params)
        self._kept: dict[str, tuple[IndexArray, Numbers]] = {}
        """Positions and probabilities of the candidates with a positive probability, by the digest of the candidates.

        Filled only if the embeddings are those of a fixed encoder.
        """

    @property
    def may_repeat(self) -> bool:
        """Whether samples are drawn with replacement."""
        return self.params.replacement

    def needs(self, run: RunView) -> Needs:
        """Return the embeddings and the validation samples; nothing if the probabilities come from a file."""
        return super().needs(run) if self.params.probs_path is None else Needs()

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield problems of the search and of the file of probabilities."""
        yield from super().problems(run)
        if self.params.probs_path is not None:
            yield from file_problems("probs_path", self.params.probs_path, 1)

    def pool_problems(self, pool: Pool) -> Iterator[tuple[str, str]]:
        """Yield a problem if the file does not hold one probability for each sample of the pool."""
        path = self.params.probs_path
        if path is None:
            return
        given = array_file(path, 1)
        if given.size != pool.size:
            yield (
                "probs_path",
                f"{path!r} holds {given.size} numbers, and the pool has {pool.size} samples. Write the file for this "
                "data.",
            )
        elif not np.isfinite(given).all() or given.min() < 0 or given.sum() <= 0:
            yield "probs_path", f"{path!r} must hold finite numbers of 0 or more that are not all 0."

    def unfit(self, run: RunOutline) -> tuple[str, str] | None:
        """Return a problem if the file gives fewer samples a probability than a round takes without replacement."""
        path = self.params.probs_path
        if path is None or self.params.replacement or any(file_problems("probs_path", path, 1)):
            return None
        given = array_file(path, 1)
        positive = int(np.count_nonzero(given > 0))
        if positive >= run.round_samples:
            return None
        return "probs_path", (
            f"{positive} of {given.size} samples have a probability above 0 in {path!r}, and a round takes "
            f"{run.round_samples} without replacement. Lower update_steps, or set replacement: true."
        )

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return candidates drawn by their probabilities."""
        trained = usable(self, ctx, candidates, 1 if self.params.replacement else count)
        places, shares = self._probabilities(ctx, trained)
        scores = np.zeros(trained.size)
        scores[places] = shares
        if self.params.replacement:
            drawn = np.repeat(places, ctx.rng.multinomial(count, shares / shares.sum()))
        else:
            if places.size < count:
                raise ComponentError(self._too_few(places.size, count, trained.size))
            drawn = places[sample_without_replacement(shares, count, ctx.rng)]
        distinct, number = np.unique(drawn, return_inverse=True)
        return Selection(
            trained[drawn],
            scores[drawn].astype(np.float32),
            candidates.size - trained.size,
            ranks=ranks_among(scores, distinct)[number],
            ranked=trained.size,
        )

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the probability of every candidate, for offline scores; NaN without a token to train on."""
        scores = np.full(candidates.size, np.nan, dtype=np.float32)
        trained = usable(self, ctx, candidates, 1)
        places, shares = self._probabilities(ctx, trained)
        inside = np.zeros(trained.size)
        inside[places] = shares
        scores[np.searchsorted(candidates, trained)] = inside
        return scores

    def _too_few(self, positive: int, count: int, candidates: int) -> str:
        given = self.params.probs_path is not None
        raised = "Give more of them one in the file" if given else "Raise max_k or c, lower alpha"
        return (
            f"selector 'tsds': {count} samples are wanted without replacement, and only {positive} of {candidates} "
            f"candidates have a probability above 0. {raised}, lower update_steps, or set replacement: true."
        )

    def _probabilities(self, ctx: RoundContext, candidates: IndexArray) -> tuple[IndexArray, Numbers]:
        """Return the positions of the candidates with a positive probability, ascending, and these probabilities."""
        if self.params.probs_path is not None:
            given = np.asarray(array_file(self.params.probs_path, 1)[candidates], dtype=np.float64)
            places = np.flatnonzero(given)
            if not places.size:
                raise ComponentError(
                    f"selector 'tsds': none of {candidates.size} candidates has a probability above 0 in "
                    f"{self.params.probs_path!r}. Write the file for this data."
                )
            return places, given[places]
        key = hashlib.sha256(np.ascontiguousarray(candidates).tobytes()).hexdigest()
        if key not in self._kept:
            vectors = vectors_of(ctx, candidates)
            ids, distances = self.neighbours(ctx, vectors, self.params.max_k, "l2", _MEASURED)
            shares = probabilities(ids, distances, vectors, self.params)
            places = np.flatnonzero(shares)
            if self.params.encoder is None:
                return places, shares[places]
            self._kept[key] = places, shares[places]
        return self._kept[key]

    def state_dict(self) -> State:
        """Return the probabilities that hold for the whole run."""
        return {key: {"places": places, "shares": shares} for key, (places, shares) in self._kept.items()}

    def load_state_dict(self, state: State) -> None:
        """Restore the probabilities."""
        self._kept = {key: (each["places"], each["shares"]) for key, each in state.items()}


class Filled(NamedTuple):
    """Result of the search for s: the candidates that each query fills.

    Attributes:
        level: s; the mass of a query fills s candidates of density 1.
        last: index of the last neighbour that each query fills completely, counted from 0; -1 means none.
        is_found: whether s is optimal. If not, s is the largest value that the neighbours given allow.
    """

    level: float
    last: IndexArray
    is_found: bool


def probabilities(ids: IndexArray, distances: NDArray[np.float32], base: EmbeddingArray, params: TsdsParams) -> Numbers:
    """Return the probability of every candidate, shape (N,), float64, sum 1.

    Args:
        ids: the nearest candidates of every validation sample, nearest first, shape (M, k).
        distances: the distances to these candidates, shape (M, k).
        base: embeddings of the candidates, shape (N, H).
        params: parameters of TSDS.
    """
    densities: Callable[[int], Numbers] = lambda columns: np.ones((len(ids), columns))  # noqa: E731
    if params.variant == "kde" and params.sigma > 0:
        densities = _Densities(ids, base, params)
    balance = (1 - params.alpha) * params.c / params.alpha * len(ids)
    filled, rho = fill(distances.astype(np.float64), densities, balance)
    return shares_of_candidates(ids, rho, filled, len(base))


class _Densities:
    """Densities of the candidates in the first columns of a table of neighbours, each computed once."""

    def __init__(self, ids: IndexArray, base: EmbeddingArray, params: TsdsParams) -> None:
        self.known, places = np.unique(ids, return_inverse=True)
        self.places = places.reshape(ids.shape)
        self.vectors = base if self.known.size == len(base) else base[self.known]
        self.params = params
        self.values = np.zeros(self.known.size)

    def __call__(self, columns: int) -> Numbers:
        rows = np.unique(self.places[:, :columns])
        rows = rows[self.values[rows] == 0]  # a density is at least 1, so 0 means not computed yet
        self.values[rows] = kernel_densities(self.vectors, rows, self.params.sigma, self.params.kde_k, share=True)
        return self.values[self.places[:, :columns]]


def fill(distances: Numbers, densities: Callable[[int], Numbers], balance: float) -> tuple[Filled, Numbers]:
    """Return the neighbours that each query fills, and the densities of the columns examined.

    Let m_ik be the sum of 1 / rho over the first k + 1 neighbours of query i. At s = m_ik query i fills these
    neighbours. With growing t, the cost of its distances falls at the rate 1 / M times the sum of (d_i,k+1 - d_ij) /
    rho_j over the filled neighbours j. At s = m_ik this sum grows by m_ik (d_i,k+1 - d_ik). The optimal s is the
    smallest one at which the sum over all queries reaches ``balance``.

    Args:
        distances: to the neighbours of each query, ascending, shape (M, L).
        densities: function that returns rho of the first ``columns`` neighbours, shape (M, columns).
        balance: (1 - alpha) C M / alpha.
    """
    width = distances.shape[1]
    # Densities are costly, so they are computed for few columns first. With rho >= 1 masses reach at least as far as
    # with rho = 1, which gives the first number of columns.
    reach = np.cumsum((np.diff(distances, axis=1) * np.arange(1, width)).sum(axis=0))
    columns = min(width, 2 * int(np.searchsorted(reach, balance)) + 2)
    while True:
        rho = densities(columns)
        filled = _filled(distances[:, :columns], rho, balance)
        # A query that fills all columns examined might also fill later neighbours below this s.
        is_inside = filled.is_found and bool((filled.last < columns - 2).all())
        if is_inside or columns == width:
            return filled, rho
        columns = min(width, 2 * columns)


def _filled(distances: Numbers, rho: Numbers, balance: float) -> Filled:
    """Return the neighbours that each query fills among the neighbours given.

    Args:
        distances: to the neighbours of each query, ascending, shape (M, L).
        rho: densities of the neighbours, shape (M, L).
        balance: as for :func:`fill`.
    """
    number, width = distances.shape
    masses = np.cumsum(1 / rho[:, :-1], axis=1)
    growth = (np.diff(distances, axis=1) * masses).T.ravel()
    levels = masses.T.ravel()  # neighbour by neighbour: the stable sort keeps this order for equal levels
    order = np.argsort(levels, kind="stable")
    stop = int(np.searchsorted(np.cumsum(growth[order]), balance))
    if stop == order.size:
        return Filled(float(masses.max()) if masses.size else 1.0, np.full(number, width - 2, dtype=np.int64), False)
    counts = np.bincount(order[:stop] % number, minlength=number)
    return Filled(float(levels[order[stop]]), counts - 1, True)


def shares_of_candidates(ids: IndexArray, rho: Numbers, filled: Filled, size: int) -> Numbers:
    """Return the mass of every candidate, shape (size,), sum 1.

    Each query gives 1 / (M s rho) to its neighbours up to the last filled one, and the rest of its 1 / M to the next
    neighbour.

    Args:
        ids: the nearest candidates of every query, nearest first, shape (M, k).
        rho: densities of the first neighbours, shape (M, L), L at most k.
        filled: the neighbours that each query fills.
        size: number of candidates.
    """
    number, width = rho.shape
    full = np.arange(width) <= filled.last[:, None]
    mass = np.where(full, 1 / (number * filled.level * rho), 0)
    rest = np.maximum(0, 1 / number - mass.sum(axis=1))
    mass[np.arange(number), filled.last + 1] = rest
    shares = np.bincount(ids[:, :width].ravel(), mass.ravel(), minlength=size)
    return shares / shares.sum()
