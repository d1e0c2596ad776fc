"""Selection under a limit on its cost: how many samples to score, which ones, and estimates for the others.

Scoring the whole pool at every decision can cost many times the training. Under ``max_overhead`` a decision scores as
many candidates as the run's measured costs allow (:func:`affordable`). They are drawn evenly from clusters of similar
samples (:meth:`ScoreBook.pick`). Scores are stored and reused until there are enough newer ones
(:meth:`ScoreBook.max_age`). A candidate without a score gets the mean of its cluster, shrunk towards the mean of all
(:meth:`ScoreBook.estimates`).

Nothing in this module reads a clock. Measured seconds are arguments, and the same arguments give the same decisions.
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
"""Entry of :attr:`ScoreBook.scored_at` for a sample that was not scored yet."""


@dataclass(frozen=True)
class Budget:
    """Parameters of the policy that limits the cost of decisions.

    Attributes:
        max_overhead: limit on the run's decision seconds divided by its training seconds, > 0.
        safety: share of the limit that is used for planning, in (0, 1]. It leaves a margin, because the cost of the
            last decision is known only after the decision, and later steps may be faster than the measured ones.
        minimum: fewest samples that a decision scores, or all candidates if there are fewer. With fewer scores their
            mean and spread would say little.
        coverage: a score stays valid until newer scores exist for this many times the wanted samples, >= 1.
        prior: weight of the mean of all samples in the estimate of a cluster, counted in samples, > 0.
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
    """Record of one decision under the limit, over all groups."""

    clusters: int
    """Number of clusters of the pool."""
    scored: int
    """Number of samples scored."""
    allowed: int
    """Number of samples that the limit allowed to score."""
    max_age: int
    """Number of latest decisions, including this decision, whose scores are valid."""
    chosen_by_own_score: float
    """Share of the chosen samples with a valid score instead of an estimate, in [0, 1]."""
    seconds_per_sample: float | None = None
    """Measured seconds of scoring one sample on all processes together. None before the first scores."""
    fixed_seconds: float | None = None
    """Mean measured seconds of a decision that do not depend on the number of scored samples."""
    step_seconds: float | None = None
    """Mean seconds of a training step so far."""


@dataclass(frozen=True)
class Costs:
    """Cost of training and of decisions in the run so far, in seconds. Equal on all ranks."""

    train_seconds: float
    """Seconds spent on training steps so far."""
    train_steps: int
    """Number of training steps done in these seconds."""
    decision_seconds: float
    """Seconds spent on decisions so far: scoring, calibration, clusters, planning."""
    seconds_per_sample: float
    """Seconds of scoring one average sample on all ranks together (wall time over samples), > 0."""
    fixed_seconds: float
    """Seconds of a decision besides scoring (validation features, planning), >= 0."""
    step_seconds: float | None = None
    """Expected seconds of a future training step. None means the mean of the steps so far."""

    @property
    def expected_step_seconds(self) -> float:
        """Expected seconds of a future training step, or 0 before the first step if none are given."""
        if self.step_seconds is not None:
            return self.step_seconds
        return self.train_seconds / self.train_steps if self.train_steps else 0.0


def affordable(
    costs: Costs, budget: Budget, *, round_steps: int, remaining_steps: int, candidates: int, has_scores: bool
) -> int:
    """Return how many candidates may be scored at this decision. 0 means to skip it, including its fixed cost.

    The allowance of a decision is ``safety x max_overhead x (training so far + round_steps to come)`` minus the cost of
    all decisions so far. Unspent allowance is left for the next decisions, and overspending reduces it. The last
    decision may use the allowance of the whole run, so the run ends under the limit as far as the costs are known. The
    run can miss the limit by about the error in the estimated cost of one decision. This error matters only if the run
    affords few decisions that each cost much.

    - A decision is worth its fixed cost if it scores at least ``minimum`` samples and spends at least as much time on
      scoring as on the fixed part. Otherwise the decision is skipped, and its allowance is left for a later one. The
      last decision only needs ``minimum`` samples, because there is no later one.
    - If there is no score yet, the decision may use the allowance of later rounds in advance, up to the amount that
      makes it worth its fixed cost. Without scores, every round until then would be drawn at random. Later decisions
      are skipped until the advance is paid back. If even the allowance of the whole run does not cover the fixed cost
      and ``minimum`` samples, nothing is scored.

    The result is 0 as long as the time of a training step is unknown.

    Args:
        costs: measured costs so far.
        budget: parameters of the policy.
        round_steps: optimizer steps until the next decision, including those of a warm-up round between.
        remaining_steps: optimizer steps until the run ends, at least ``round_steps``.
        candidates: number of samples that could be scored.
        has_scores: whether earlier decisions left scores that can be used.

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
    """Return how many samples, at most ``most``, the allowance after ``steps`` more steps pays for."""
    trained = costs.train_seconds + steps * costs.expected_step_seconds
    allowance = budget.safety * budget.max_overhead * trained - costs.decision_seconds - costs.fixed_seconds
    return max(0, int(min(most, allowance / costs.seconds_per_sample)))


class ScoreBook:
    """Scores of the pool's samples, their age, and estimates for samples without a score.

    Scores are also stored as z-scores of their decision: the decision's mean score is subtracted, and the difference is
    divided by the standard deviation of its scores. z-scores of different decisions are comparable under two
    conditions. Each decision scores a random draw of the same candidates, as :meth:`pick` returns. And training shifts
    and scales the scores of all samples alike. z-scores within a domain and within the whole pool are not comparable,
    so a book holds both only if every decision records each set of candidates separately.

    Indices are pool indices. ``N`` is the size of the pool.

    Args:
        clusters: the cluster of every sample, from 0, shape (N,).
        budget: parameters of the policy.

    Attributes:
        scores: the recorded scores, shape (N,), float32. NaN if the sample was never scored or has no score.
        standard: their z-scores, shape (N,), float32. NaN as in ``scores``.
        scored_at: number of the decision that scored each sample, shape (N,), int32, or ``NEVER``. A sample that was
            scored and has the score NaN cannot be scored (it has no trained token), and is neither picked nor chosen
            again.
        used: whether each sample was chosen since it was last scored, shape (N,), bool. Training on a sample makes its
            old score obsolete, so used samples come after all others.
    """

    def __init__(self, clusters: ClusterArray, budget: Budget) -> None:
        self.budget = budget
        self.clusters = np.asarray(clusters, dtype=np.int32)
        self.scores = np.full(self.clusters.size, np.nan, dtype=np.float32)
        self.standard = np.full(self.clusters.size, np.nan, dtype=np.float32)
        self.scored_at = np.full(self.clusters.size, NEVER, dtype=np.int32)
        self.used = np.zeros(self.clusters.size, dtype=bool)

    def has_scores(self, candidates: IndexArray) -> bool:
        """Return whether any of ``candidates`` has a score of any age."""
        return not bool(np.isnan(self.scores[candidates]).all())

    def unscorable(self, candidates: IndexArray) -> NDArray[np.bool_]:
        """Return which of ``candidates`` were scored and have no score, shape (n,)."""
        return (self.scored_at[candidates] != NEVER) & np.isnan(self.scores[candidates])

    def pick(self, candidates: IndexArray, count: int, rng: np.random.Generator) -> IndexArray:
        """Return the candidates to score at this decision.

        Every cluster gets a share of ``count`` in proportion to its scorable candidates. The share is rounded up or
        down at random, so that it is exact on average (systematic sampling). All clusters therefore have a chance, even
        if there are more clusters than samples to score. Within a cluster the samples that were never scored come
        first, then those with the oldest scores. Ties are broken at random.

        Returns:
            Distinct scorable candidates, ascending, shape (count,), or all of them if there are fewer than ``count``.
        """
        scorable = candidates[~self.unscorable(candidates)]
        if count >= scorable.size:
            return np.sort(scorable)
        shuffled = rng.permutation(scorable)
        clusters, ages = self.clusters[shuffled].astype(np.int64), self.scored_at[shuffled].astype(np.int64)
        shuffled = shuffled[np.argsort(clusters * (ages.max() + 2) + ages, kind="stable")]
        sizes = np.bincount(clusters)
        ends = np.cumsum(sizes)
        # Integers keep this exact: the number of equally spaced marks, shifted at random, before each cluster's end.
        marks = (ends * count + int(rng.integers(scorable.size))) // scorable.size
        counts = np.diff(marks, prepend=0)
        rank = np.arange(scorable.size) - np.repeat(ends - sizes, sizes)
        return np.sort(shuffled[rank < np.repeat(counts, sizes)])

    def record(self, indices: IndexArray, scores: ScoreArray, update: int) -> None:
        """Store the scores of a decision. Call it once for each set of candidates, after :meth:`pick`.

        Args:
            indices: distinct samples, shape (n,).
            scores: shape (n,). Higher scores are chosen first. NaN means that the sample has no score.
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
        """Return the number of latest decisions, including the present one, whose scores are valid.

        It is the smallest number of latest decisions that scored at least ``coverage x wanted`` of the candidates, or
        all decisions so far if none is large enough. Scores are thus as new as possible, while each sample is still
        chosen from several scored ones.

        Args:
            candidates: samples to choose from.
            wanted: number of samples to choose.
            update: number of the present decision. Its scores must be recorded already.

        Returns:
            Between 1 and ``update + 1``.
        """
        made = self.scored_at[candidates][~np.isnan(self.scores[candidates])]
        newest_first = np.cumsum(np.bincount(update - made, minlength=update + 1))
        enough = np.flatnonzero(newest_first >= self.budget.coverage * wanted)
        return int(enough[0]) + 1 if enough.size else update + 1

    def estimates(self, candidates: IndexArray, update: int, max_age: int) -> ScoreArray:
        """Return the expected z-score of each candidate, shape (n,), float32. NaN if it cannot be scored.

        A score of one of the last ``max_age`` decisions is used as it is. Any other candidate gets the mean m of the n
        valid z-scores in its cluster, shrunk towards the mean of all: ``all + n / (n + prior) * (m - all)``. If no
        score is valid, every estimate is 0.
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
        """Choose candidates by their estimates, and mark them as ``used``.

        Candidates that were chosen since they were last scored are chosen again only if the others are too few.

        Args:
            candidates: samples to choose from.
            count: number of samples to choose.
            update: number of the present decision. Its scores must be recorded already.
            rng: breaks ties and draws the sample. Members of a cluster without a score have equal estimates.
            draw: draws a number of positions by their estimates.

        Returns:
            Distinct pool indices, ascending, and their estimates (float32), both of shape (count,).

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
        """Return the clusters, scores, ages and marks as numpy arrays."""
        return {
            "clusters": self.clusters.copy(),
            "scores": self.scores.copy(),
            "standard": self.standard.copy(),
            "scored_at": self.scored_at.copy(),
            "used": self.used.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            ValueError: if the state is of a pool of another size.
        """
        if state["clusters"].shape != self.clusters.shape:
            raise ValueError(f"the state is of {state['clusters'].size} samples, the pool has {self.clusters.size}")
        self.clusters = np.array(state["clusters"], dtype=np.int32)
        self.scores = np.array(state["scores"], dtype=np.float32)
        self.standard = np.array(state["standard"], dtype=np.float32)
        self.scored_at = np.array(state["scored_at"], dtype=np.int32)
        self.used = np.array(state["used"], dtype=bool)


Draw = Callable[[IndexArray, ScoreArray, int, np.random.Generator], IndexArray]
"""Draws some of the positions by the estimates of all candidates: (positions, estimates, count, rng) -> positions."""


def draw_by_rule(
    positions: IndexArray,
    estimated: ScoreArray,
    count: int,
    rng: np.random.Generator,
    rule: Literal["top_k", "sample"] = "top_k",
    temperature: float = 1.0,
) -> IndexArray:
    """Return ``count`` of ``positions`` by their estimates, with ties broken at random.

    Args:
        positions: positions among the candidates.
        estimated: estimates of all candidates.
        count: at most the number of positions. 0 returns no position.
        rng: the source of randomness.
        rule: ``top_k`` returns the best estimates. ``sample`` draws without replacement, p ~ exp(estimate /
            temperature).
        temperature: for ``sample``, in units of z-scores, > 0.
    """
    if rule == "sample":
        return positions[sample_softmax(estimated[positions].astype(np.float64) / temperature, count, rng)]
    shuffled = rng.permutation(positions)
    return shuffled[top_k(estimated[shuffled], count)]


def _standardised(scores: ScoreArray) -> ScoreArray:
    """Return z-scores over the scores that are not NaN. All are 0 if these scores are all equal."""
    known = scores[~np.isnan(scores)].astype(np.float64)
    if not known.size:
        return scores
    mean, spread = known.mean(), known.std()
    if spread <= 1e-6 * abs(mean):  # only rounding errors differ
        spread = np.inf
    return ((scores - mean) / spread).astype(np.float32)
