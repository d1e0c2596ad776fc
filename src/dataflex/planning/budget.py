"""Selection under a cap on its cost: how many samples are scored now, which, and what stands in for the others.

Scoring the whole pool at every decision can cost many times the training. Under ``max_overhead`` a decision scores as
many candidates as the run's measured costs allow (:func:`affordable`), drawn evenly from clusters of similar samples
(:meth:`ScoreBook.pick`). Scores are kept and used until newer ones are plenty (:meth:`ScoreBook.max_age`); a candidate
without one gets the mean of its cluster, shrunk to that of all (:meth:`ScoreBook.estimates`).

Nothing here reads a clock: measured seconds are arguments, and the same arguments give the same decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.data.rules import ScoreArray, sample_softmax, top_k
from dataflex.data.sampling import IndexArray

ClusterArray = NDArray[np.int32]

NEVER = -1
"""In :attr:`ScoreBook.scored_at`: not scored yet."""


@dataclass(frozen=True)
class Budget:
    """The policy's parameters.

    Attributes:
        max_overhead: cap on decision seconds over training seconds, of the whole run, > 0.
        safety: share of the cap that is planned with. The last decision's cost is known only when it is spent, and
            later steps may be faster than those measured.
        minimum: fewest samples a decision scores (all candidates where there are fewer); below it the mean and
            spread of the fresh scores say little.
        coverage: a score stays valid until this many times the wanted samples have newer ones.
        prior: what the mean of all counts in a cluster's estimate, in samples, > 0.
    """

    max_overhead: float
    safety: float = 0.9
    minimum: int = 64
    coverage: float = 4.0
    prior: float = 1.5

    def __post_init__(self) -> None:
        if not self.max_overhead > 0:
            raise ValueError(f"max_overhead must be positive, got {self.max_overhead}")
        if not 0 < self.safety <= 1:
            raise ValueError(f"safety must be in (0, 1], got {self.safety}")
        if self.minimum < 1 or self.coverage < 1:
            raise ValueError(f"minimum and coverage must be at least 1, got {self.minimum} and {self.coverage}")
        if not self.prior > 0:
            raise ValueError(f"prior must be positive, got {self.prior}")


@dataclass
class LimitedDecision:
    """What one decision did under the cap, in all groups."""

    clusters: int
    """Clusters of the pool."""
    scored: int
    """Samples scored."""
    allowed: int
    """Samples the cap allowed."""
    max_age: int
    """Decisions, this one included, for which a score is valid."""
    chosen_by_own_score: float
    """Share of the chosen samples with a valid score of their own."""
    seconds_per_sample: float | None = None
    """Measured, of scoring one sample on all processes together; None before the first scores."""
    fixed_seconds: float | None = None
    """Measured, of what a decision costs whatever it scores: the mean so far."""
    step_seconds: float | None = None
    """Mean time of a training step so far."""


@dataclass(frozen=True)
class Costs:
    """What training and decisions have cost in this run so far, in seconds; equal on all ranks."""

    train_seconds: float
    """Spent on training steps so far."""
    train_steps: int
    """Steps that took."""
    decision_seconds: float
    """Spent on decisions so far: scoring, calibration, clusters, planning."""
    seconds_per_sample: float
    """Of scoring one average sample on all ranks together (wall time over samples), > 0."""
    fixed_seconds: float
    """Of a decision whatever it scores (validation features, planning), >= 0."""
    step_seconds: float | None = None
    """Expected of a training step to come; none: the mean of those so far."""

    @property
    def expected_step_seconds(self) -> float:
        """What a training step to come is expected to take; 0 where nothing says."""
        if self.step_seconds is not None:
            return self.step_seconds
        return self.train_seconds / self.train_steps if self.train_steps else 0.0


def affordable(
    costs: Costs, budget: Budget, *, round_steps: int, remaining_steps: int, candidates: int, has_scores: bool
) -> int:
    """Return how many candidates may be scored at this decision; 0: skip it, fixed cost and all.

    The allowance of a decision is ``safety x max_overhead x (training so far + round_steps to come)`` less what
    decisions have cost so far. What one decision does not spend, the next ones have; what one overspends, they lack.
    The last decision's allowance is that of the whole run, so the run ends under the cap as far as the costs are known:
    it can miss it by about the error of one decision's estimated cost, which is much only where few dear decisions fit.

    - A decision is worth its fixed cost when it scores at least ``minimum`` samples and spends at least as much on
      scoring as on the rest. Otherwise it is skipped, and a later one has its allowance too. The last decision, which
      has none to save for, only needs ``minimum`` samples.
    - Where there is no score yet, the decision may take an advance on the allowance of later rounds, up to what makes
      it worth its fixed cost: without scores every round until then would be drawn at random. Later decisions are
      skipped until the advance is paid back. If not even the whole run's allowance is enough for the fixed cost and
      ``minimum`` samples, nothing is scored.

    Before anything is known about the time of a training step the answer is 0.

    Args:
        costs: measured so far.
        budget: the policy.
        round_steps: optimizer steps until the next decision, those of a warm-up round between included.
        remaining_steps: optimizer steps until the run ends, at least ``round_steps``.
        candidates: samples that could be scored.
        has_scores: whether there are scores of earlier decisions to go on with.

    Raises:
        ValueError: if the cost of a sample is not positive.
    """
    if not costs.seconds_per_sample > 0:
        raise ValueError(f"seconds_per_sample must be positive, got {costs.seconds_per_sample}")
    least = min(budget.minimum, candidates)
    worthwhile = min(candidates, max(least, int(np.ceil(costs.fixed_seconds / costs.seconds_per_sample))))
    count = _payable(costs, budget, round_steps, candidates)
    if count >= worthwhile or (round_steps >= remaining_steps and count >= least):
        return count
    if has_scores:
        return 0
    advanced = _payable(costs, budget, remaining_steps, worthwhile)
    return advanced if advanced >= least else 0


def _payable(costs: Costs, budget: Budget, steps: int, most: int) -> int:
    """Return how many samples, at most ``most``, can be scored out of the allowance after ``steps`` more steps."""
    trained = costs.train_seconds + steps * costs.expected_step_seconds
    allowance = budget.safety * budget.max_overhead * trained - costs.decision_seconds - costs.fixed_seconds
    return max(0, int(min(most, allowance / costs.seconds_per_sample)))


class ScoreBook:
    """The scores of the pool's samples, how old they are, and what they say about samples without one.

    Scores are kept as z-scores of the decision they were made at: less the mean of that decision's fresh scores, over
    their standard deviation. This makes scores of different decisions comparable as long as each fresh set is a random
    draw from the same candidates, which :meth:`pick` sees to, and while training moves and stretches the scores of all
    samples alike. Of a domain's candidates and of the whole pool's they are not comparable: one book holds both only if
    each decision records every set of candidates on its own.

    Indices are pool indices. ``N`` is the size of the pool.

    Args:
        clusters: the cluster of every sample, from 0, shape (N,).
        budget: the policy.

    Attributes:
        scores: as recorded, shape (N,), float32; NaN: never scored, or no score exists.
        standard: their z-scores, shape (N,), float32; NaN likewise.
        scored_at: number of the decision that scored each, shape (N,), int32; ``NEVER`` where none did. With a NaN
            score a sample cannot be scored (no token to train on) and is neither picked nor chosen again.
        used: whether each was chosen since it was last scored, shape (N,), bool. An old score says nothing new about a
            sample trained on since, so those come after all others.
    """

    def __init__(self, clusters: ClusterArray, budget: Budget) -> None:
        self.budget = budget
        self.clusters = np.asarray(clusters, dtype=np.int32)
        self.scores = np.full(self.clusters.size, np.nan, dtype=np.float32)
        self.standard = np.full(self.clusters.size, np.nan, dtype=np.float32)
        self.scored_at = np.full(self.clusters.size, NEVER, dtype=np.int32)
        self.used = np.zeros(self.clusters.size, dtype=bool)

    def has_scores(self, candidates: IndexArray) -> bool:
        """Return whether any of ``candidates`` has a score, of whatever age."""
        return not bool(np.isnan(self.scores[candidates]).all())

    def unscorable(self, candidates: IndexArray) -> NDArray[np.bool_]:
        """Return which of ``candidates`` are known to have no score, shape (n,)."""
        return (self.scored_at[candidates] != NEVER) & np.isnan(self.scores[candidates])

    def pick(self, candidates: IndexArray, count: int, rng: np.random.Generator) -> IndexArray:
        """Return which candidates to score now.

        Every cluster gives its share of ``count``, rounded up or down at random so that on average the shares are
        exact (systematic sampling): also where there are more clusters than samples to score, every cluster has its
        turn. Within a cluster those never scored come first, then those with the oldest scores, ties at random.

        Returns:
            Distinct candidates that can be scored, ascending, shape (count,) or fewer where there are not as many.
        """
        scorable = candidates[~self.unscorable(candidates)]
        if count >= scorable.size:
            return np.sort(scorable)
        shuffled = rng.permutation(scorable)
        clusters, ages = self.clusters[shuffled].astype(np.int64), self.scored_at[shuffled].astype(np.int64)
        shuffled = shuffled[np.argsort(clusters * (ages.max() + 2) + ages, kind="stable")]
        sizes = np.bincount(clusters)
        ends = np.cumsum(sizes)
        # Exact in integers: how many of the equally spaced marks, shifted by chance, lie before each cluster's end.
        marks = (ends * count + int(rng.integers(scorable.size))) // scorable.size
        counts = np.diff(marks, prepend=0)
        rank = np.arange(scorable.size) - np.repeat(ends - sizes, sizes)
        return np.sort(shuffled[rank < np.repeat(counts, sizes)])

    def record(self, indices: IndexArray, scores: ScoreArray, update: int) -> None:
        """Remember the scores made at a decision; once for each set of candidates, after :meth:`pick`.

        Args:
            indices: distinct samples, shape (n,).
            scores: higher is chosen first, shape (n,); NaN where the sample has none.
            update: number of the decision, from 0.

        Raises:
            ValueError: if the shapes differ or a score is infinite.
        """
        values = np.asarray(scores, dtype=np.float32)
        if values.shape != indices.shape:
            raise ValueError(f"{indices.size} samples were scored but the scores have shape {values.shape}")
        if np.isinf(values).any():
            raise ValueError(f"the score of pool index {indices[np.isinf(values)][0]} is infinite")
        self.scores[indices] = values
        self.scored_at[indices] = update
        self.standard[indices] = _standardised(values)
        self.used[indices] = False

    def max_age(self, candidates: IndexArray, wanted: int, update: int) -> int:
        """Return for how many decisions, the present one included, a score is valid.

        The smallest number of latest decisions that scored ``coverage x wanted`` of the candidates, or all decisions
        so far if that is not reached: scores are as new as they can be while there are several to choose each from.

        Args:
            candidates: samples to choose from.
            wanted: samples to be chosen.
            update: number of the present decision, its scores recorded.

        Returns:
            Between 1 and ``update + 1``.
        """
        made = self.scored_at[candidates][~np.isnan(self.scores[candidates])]
        newest_first = np.cumsum(np.bincount(update - made, minlength=update + 1))
        enough = np.flatnonzero(newest_first >= self.budget.coverage * wanted)
        return int(enough[0]) + 1 if enough.size else update + 1

    def estimates(self, candidates: IndexArray, update: int, max_age: int) -> ScoreArray:
        """Return the expected z-score of each candidate, shape (n,), float32; NaN where it cannot be scored.

        A score made at one of the last ``max_age`` decisions counts as it is. The others have the mean z-score m of the
        n valid ones in their cluster, shrunk to the mean of all: ``all + n / (n + prior) * (m - all)``. Without any
        valid score every estimate is 0.
        """
        own = self.standard[candidates]
        valid = ~np.isnan(own) & (update - self.scored_at[candidates] < max_age)
        clusters = self.clusters[candidates]
        members = np.bincount(clusters[valid], minlength=int(self.clusters.max()) + 1)
        sums = np.bincount(clusters[valid], weights=own[valid], minlength=members.size)
        overall = float(own[valid].mean(dtype=np.float64)) if valid.any() else 0.0
        shrunk = overall + (sums - members * overall) / (members + self.budget.prior)
        estimated = np.where(valid, own, shrunk[clusters].astype(np.float32))
        estimated[self.unscorable(candidates)] = np.nan
        return estimated

    def choose(
        self,
        candidates: IndexArray,
        count: int,
        update: int,
        rng: np.random.Generator,
        draw: Draw,
    ) -> tuple[IndexArray, ScoreArray]:
        """Return the chosen candidates and their estimates; they are ``used`` from now on.

        Candidates chosen since they were last scored are taken only when the others are too few.

        Args:
            candidates: samples to choose from.
            count: samples to choose.
            update: number of the present decision, its scores recorded.
            rng: breaks ties (members of a cluster without a score of their own are tied) and draws the sample.
            draw: takes so many of some candidates by their estimates.

        Returns:
            Distinct pool indices, ascending, and estimates (float32), both of shape (count,).

        Raises:
            ValueError: if fewer than ``count`` candidates can be scored.
        """
        estimated = self.estimates(candidates, update, self.max_age(candidates, count, update))
        usable = np.flatnonzero(~np.isnan(estimated))
        if usable.size < count:
            raise ValueError(
                f"{count} samples are wanted but only {usable.size} of {candidates.size} can have a score (the others "
                "have no token to train on)"
            )
        used = self.used[candidates[usable]]
        fresh, rest = usable[~used], usable[used]
        missing = count - fresh.size
        if missing > 0:
            again = draw(rest, estimated, missing, rng)
            chosen = np.concatenate([fresh, again])
            self.used[candidates[rest]] = False
        else:
            chosen = draw(fresh, estimated, count, rng)
        chosen = chosen[np.argsort(candidates[chosen])]
        self.used[candidates[chosen]] = True
        return candidates[chosen], estimated[chosen]

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, the clusters included, as numpy arrays."""
        return {
            "clusters": self.clusters.copy(),
            "scores": self.scores.copy(),
            "standard": self.standard.copy(),
            "scored_at": self.scored_at.copy(),
            "used": self.used.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of a pool of another size.
        """
        if state["clusters"].shape != self.clusters.shape:
            raise ValueError(f"the state is of {state['clusters'].size} samples, the pool has {self.clusters.size}")
        self.clusters = np.array(state["clusters"], dtype=np.int32)
        self.scores = np.array(state["scores"], dtype=np.float32)
        self.standard = np.array(state["standard"], dtype=np.float32)
        self.scored_at = np.array(state["scored_at"], dtype=np.int32)
        self.used = np.array(state["used"], dtype=bool)


Draw = Callable[[IndexArray, ScoreArray, int, np.random.Generator], IndexArray]
"""Returns so many of some positions by the estimates of all: (positions, estimates, count, rng)."""


def draw_by_rule(
    positions: IndexArray,
    estimated: ScoreArray,
    count: int,
    rng: np.random.Generator,
    rule: Literal["top_k", "sample"] = "top_k",
    temperature: float = 1.0,
) -> IndexArray:
    """Return ``count`` of ``positions`` by their estimates, ties drawn at random.

    Args:
        positions: of candidates.
        estimated: estimates of all candidates.
        count: at most the number of positions; at 0 none are taken.
        rng: the source of draws.
        rule: ``top_k``: the best estimates; ``sample``: without replacement, p ~ exp(estimate / temperature).
        temperature: for ``sample``, of the z-scores, > 0.
    """
    if rule == "sample":
        return positions[sample_softmax(estimated[positions].astype(np.float64) / temperature, count, rng)]
    shuffled = rng.permutation(positions)
    return shuffled[top_k(estimated[shuffled], count)]


def _standardised(scores: ScoreArray) -> ScoreArray:
    """Return z-scores over the scores that are not NaN; 0 where they are all equal."""
    known = scores[~np.isnan(scores)].astype(np.float64)
    if not known.size:
        return scores
    mean, spread = known.mean(), known.std()
    if spread <= 1e-6 * abs(mean):
        spread = np.inf
    return ((scores - mean) / spread).astype(np.float32)
