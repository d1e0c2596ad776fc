"""Selection under ``select.max_overhead``: clocks, calibration and stored scores around the policy in ``budget``.

A decision first scores a small draw of candidates. This call also pays the fixed cost that every decision has, such as
the validation features. The decision then scores as many more candidates as the limit allows. The difference separates
the two costs. The very first decision knows no cost yet, so it scores two small draws before it computes how many more
it may score. All seconds are measured on rank 0 and sent to all ranks, so that all ranks decide the same. A run with a
limit is reproducible given the seconds in its record. Checkpoints store the rounds that are already planned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.api.component import State
from dataflex.api.context import RoundContext
from dataflex.api.selection import Selection
from dataflex.api.selector import check_scores, checked_positions, overrides
from dataflex.data.clusters import token_clusters
from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError
from dataflex.planning.budget import Budget, Costs, Draw, LimitedDecision, ScoreBook, affordable, draw_by_rule

if TYPE_CHECKING:
    from dataflex.api.schedule import Schedule
    from dataflex.api.selector import Selector
    from dataflex.data.pool import Pool

_CLUSTER_SIZE = 64
"""Samples of the pool for each cluster, within the limits of _CLUSTERS."""
_CLUSTERS = (8, 256)
"""Fewest and most clusters."""
_CALIBRATION = 16
"""Samples in the draw that measures the fixed cost of a decision."""
_CHOICE_ONLY = {"rule", "temperature", "max_overhead"}
"""Parameters of a selector that its scores do not depend on."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spent:
    """Seconds that the run has spent so far, measured on rank 0."""

    train_seconds: float
    decision_seconds: float


@dataclass
class _Decision:
    """Progress of the present decision, over all groups."""

    may_score: bool
    """Whether the selector decides at this decision."""
    allowed: int | None = None
    """How many samples the decision may score. None if not computed yet."""
    has_begun: bool = False
    """Whether the selector's ``begin`` was called in this decision."""
    has_paid: bool = False
    """Whether the fixed cost of the decision is measured."""
    by_own_score: int = 0
    """Number of chosen samples that were chosen by a score, not by an estimate."""
    chosen: int = 0
    """Number of chosen samples."""


class LimitedScoring:
    """Scores some candidates, stores the scores, and chooses by the scores and estimates known so far.

    Args:
        pool: the samples.
        max_overhead: limit on the run's decision seconds divided by its training seconds.
        seed: seed of the clusters.
        schedule: the rounds.
        spent: returns the seconds so far, including those of the running decision. Called on rank 0.
    """

    def __init__(
        self, pool: Pool, max_overhead: float, seed: int, schedule: Schedule, spent: Callable[[], Spent]
    ) -> None:
        self.pool, self.budget, self.seed, self.schedule = pool, Budget(max_overhead), seed, schedule
        self._spent = spent
        self._book: ScoreBook | None = None
        """Clusters, scores and estimates of the pool's samples. None before the first decision."""
        self._made_with: dict[str, Any] = {}
        """Parameters of the selector that the stored scores depend on."""
        self._seconds, self._samples = 0.0, 0
        """Seconds of scoring without the fixed cost of decisions, and number of samples scored in them."""
        self._fixed_seconds, self._fixed_count = 0.0, 0
        """Sum of the fixed costs of decisions in seconds, and number of decisions in the sum."""
        self.done: LimitedDecision | None = None
        """Record of the present decision. None before it chose."""
        self._now = _Decision(True)
        self._decisions, self._scoring, self._scored = 0, 0, 0
        """Number of decisions, number of decisions that scored, and number of scores in the run."""
        self._first_seconds, self._scoring_seconds = 0.0, 0.0
        """Decision seconds when the first decision had measured the costs, and seconds of all scoring."""

    def open(self, may_score: bool = True) -> None:
        """Begin a decision.

        Args:
            may_score: whether the selector decides at this decision. If not, the stored scores are used.
        """
        self.done, self._now = None, _Decision(may_score)

    def choose(self, selector: Selector, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return ``count`` of the candidates, after scoring at most as many of them as the limit allows."""
        made_with = {**selector.params.model_dump(mode="json", exclude=_CHOICE_ONLY), "method": selector.name}
        if self._book is not None and made_with != self._made_with:
            logger.warning(
                "select %s: its parameters changed, so its stored scores are discarded and computed again.",
                selector.name,
            )
            self._book, self._seconds, self._samples, self._fixed_seconds, self._fixed_count = None, 0.0, 0, 0.0, 0
        self._made_with = made_with
        book = self._book_now()
        now = self._now
        if self.done is None:
            self.done = LimitedDecision(int(book.clusters.max()) + 1, 0, 0, 0, 0.0)
        done = self.done
        if now.allowed is None:
            now.allowed = self._allowed(ctx, book) if now.may_score else 0
            self._decisions += 1
        share = count / ctx.size
        if round(now.allowed * share):
            self._score(selector, ctx, book, candidates, share)
        done.allowed = now.allowed
        max_age = book.max_age(candidates, count, ctx.update)
        used, estimated = book.used[candidates], book.estimates(candidates, ctx.update, max_age)
        try:
            chosen, estimates = book.choose(candidates, count, ctx.update, ctx.rng, draw=_draw_of(selector))
        except ValueError as error:
            raise ComponentError(f"selector {selector.name!r}: {error}") from error
        # Summed over all groups of the decision: with a mixer each domain is a group.
        now.by_own_score += int((book.scored_at[chosen] > ctx.update - max_age).sum())
        now.chosen += chosen.size
        done.max_age = max(max_age, done.max_age)
        done.chosen_by_own_score = round(now.by_own_score / now.chosen, 4)
        ranks = _ranks(selector, estimated, used, np.searchsorted(candidates, chosen))
        unscored = int(book.unscorable(candidates).sum())
        ranked = 0 if ranks is None else candidates.size - unscored
        why = None if book.has_scores(candidates) else "the limit allowed no score yet, the draw is random"
        return Selection(chosen, estimates, unscored, ranks=ranks, ranked=ranked, undecided=why)

    def _book_now(self) -> ScoreBook:
        """Return the book of clusters and scores. The first call computes the clusters."""
        if self._book is None:
            number = int(np.clip(self.pool.size // _CLUSTER_SIZE, *_CLUSTERS))
            clusters = token_clusters(self.pool, number, self.seed)
            self._book = ScoreBook(clusters, self.budget)
        return self._book

    def _allowed(self, ctx: RoundContext, book: ScoreBook) -> int:
        """Return how many samples this decision may score in all groups together."""
        everyone = np.arange(self.pool.size)
        if not self._samples:  # no cost is known yet: two calibration draws, then more if affordable
            return min(2 * _CALIBRATION, self.pool.size)
        return self._affordable(ctx, book.has_scores(everyone), 0.0)

    def _affordable(self, ctx: RoundContext, has_scores: bool, paid_fixed: float) -> int:
        """Return the number of samples that the limit allows to score in this decision, from the costs measured so far.

        Args:
            ctx: the round.
            has_scores: whether some sample has a score already.
            paid_fixed: seconds of the fixed cost that this decision has already spent.
        """
        spent = distributed.on_main(self._spent)
        fixed = self._fixed_seconds / max(1, self._fixed_count)
        costs = Costs(
            train_seconds=spent.train_seconds,
            train_steps=ctx.start_step,
            decision_seconds=spent.decision_seconds,
            seconds_per_sample=self._seconds / self._samples,
            fixed_seconds=max(0.0, fixed - paid_fixed),
        )
        assert self.done is not None
        self.done.seconds_per_sample = round(costs.seconds_per_sample, 6)
        self.done.fixed_seconds = round(fixed, 4)
        self.done.step_seconds = round(costs.expected_step_seconds, 6)
        return affordable(
            costs,
            self.budget,
            round_steps=self._steps_to_next(ctx),
            remaining_steps=ctx.total_steps - ctx.start_step,
            candidates=self.pool.size,
            has_scores=has_scores,
        )

    def _steps_to_next(self, ctx: RoundContext) -> int:
        """Return the optimizer steps until the next decision, including a warm-up round between."""
        step = ctx.start_step + ctx.steps
        while step < ctx.total_steps:
            slot = self.schedule.slot_at(step)
            if slot.update is not None:
                break
            step += slot.steps
        return step - ctx.start_step

    def _score(
        self, selector: Selector, ctx: RoundContext, book: ScoreBook, candidates: IndexArray, share: float
    ) -> None:
        """Score ``share`` of the allowed samples, and record the scores and costs.

        The first decision may score more afterwards if the measured costs allow it.
        """
        now, unknown = self._now, not self._samples
        assert now.allowed is not None
        picked = book.pick(candidates, max(round(now.allowed * share), 2 if unknown else 1), ctx.rng)
        if picked.size < (2 if unknown else 1):
            return
        # The first scoring of a decision also pays its fixed cost, such as `begin`. So a small part is timed first, and
        # the cost per sample comes from the rest.
        lead, rest = picked[:0], picked
        if not now.has_paid:
            order = ctx.rng.permutation(picked.size)
            half = min(_CALIBRATION, (picked.size + 1) // 2)
            lead, rest = np.sort(picked[order[:half]]), np.sort(picked[order[half:]])
        scores, fixed = self._timed(selector, ctx, lead)
        more, seconds = self._timed(selector, ctx, rest)
        done, values = [lead, rest], [scores, more]
        self._seconds, self._samples = self._seconds + seconds, self._samples + rest.size
        if not now.has_paid:
            fixed = max(0.0, fixed - lead.size * self._seconds / self._samples)
            self._fixed_seconds, self._fixed_count = self._fixed_seconds + fixed, self._fixed_count + 1
            now.has_paid = True
        if unknown:
            allowed = self._affordable(ctx, False, fixed)
            now.allowed = max(now.allowed, allowed)
            extra = min(round(allowed * share), candidates.size - picked.size)
            if extra > 0:
                further = book.pick(np.setdiff1d(candidates, picked), extra, ctx.rng)
                scores, seconds = self._timed(selector, ctx, further)
                done.append(further)
                values.append(scores)
                self._seconds, self._samples = self._seconds + seconds, self._samples + further.size
            self._warn_if_over(selector, ctx)
        book.record(np.concatenate(done), np.concatenate(values), ctx.update)
        scored = sum(part.size for part in done)
        assert self.done is not None
        self._scoring += not self.done.scored
        self._scored += scored
        self.done.scored += scored

    def _warn_if_over(self, selector: Selector, ctx: RoundContext) -> None:
        """Log a warning if the first decision alone took more time than the limit allows for the whole run."""
        spent = distributed.on_main(self._spent)
        self._first_seconds = spent.decision_seconds
        if not ctx.start_step:
            return
        whole = spent.train_seconds * ctx.total_steps / ctx.start_step
        if spent.decision_seconds > self.budget.max_overhead * whole:
            logger.warning(
                "select %s: max_overhead of %g allows %.3g s of decisions in the whole run, but measuring the cost of "
                "scoring took %.3g s. The run exceeds the limit, and nothing more is scored.",
                selector.name,
                self.budget.max_overhead,
                self.budget.max_overhead * whole,
                spent.decision_seconds,
            )

    def _timed(self, selector: Selector, ctx: RoundContext, indices: IndexArray) -> tuple[ScoreArray, float]:
        """Return the scores of samples and the seconds that scoring took on rank 0, with ``begin`` if it is due."""
        if not indices.size:
            return np.empty(0, dtype=np.float32), 0.0
        began = time.perf_counter()
        if not self._now.has_begun:
            self._now.has_begun = True
            selector.begin(ctx)
        scores = check_scores(selector, selector.score(ctx, indices), indices)
        seconds = distributed.on_main(lambda: time.perf_counter() - began)
        self._scoring_seconds += seconds
        return scores, seconds

    def closing(self, spent: Spent) -> dict[str, Any]:
        """Return how the run kept to its limit: numbers, and a sentence that explains a missed limit.

        Args:
            spent: seconds of the whole run.
        """
        limit, share = self.budget.max_overhead, spent.decision_seconds / max(spent.train_seconds, 1e-9)
        found = {
            "max_overhead": limit,
            "decisions": self._decisions,
            "decisions_that_scored": self._scoring,
            "scores": self._scored,
        }
        times = "time" if self._decisions == 1 else "times"
        rests = (
            f"it was decided {self._decisions} {times}, on {self._scored} scores, made at {self._scoring} of the "
            "decisions"
        )
        if share <= limit:
            return {**found, "kept": True, "text": f"within max_overhead ({limit:g}); {rests}"}
        return {**found, "kept": False, "text": f"above max_overhead ({limit:g}), {self._missed(spent)}; {rests}"}

    def _missed(self, spent: Spent) -> str:
        """Return why decisions took more time than the limit allows."""
        allowed = self.budget.max_overhead * spent.train_seconds
        sample = f"a sample {self._seconds / max(self._samples, 1):.2g} s to score"
        if self._first_seconds > allowed:
            return (
                f"because the limit is {allowed:.3g} s in this run and the first decision, which has to measure the "
                f"cost of scoring, took {self._first_seconds:.3g} s ({sample}; the rest is the fixed cost of a "
                "decision, such as clusters, validation samples and selectors before this one)"
            )
        others = spent.decision_seconds - self._scoring_seconds
        if others > self._scoring_seconds:
            return (
                f"because {others:.3g} of {spent.decision_seconds:.3g} s of decisions were not scoring (clusters, "
                "mixing, ordering)"
            )
        return (
            f"because decisions took longer, or training steps less time, than those before them ({allowed:.3g} s "
            f"allowed, {spent.decision_seconds:.3g} s spent; {sample})"
        )

    def state_dict(self) -> State:
        """Return the scores and the measured costs."""
        if self._book is None:
            return {}
        costs = [self._seconds, self._samples, self._fixed_seconds, self._fixed_count]
        return {
            "book": self._book.state_dict(),
            "costs": np.array(costs, dtype=np.float64),
            "made": [self._decisions, self._scoring, self._scored, self._first_seconds, self._scoring_seconds],
            "made_with": self._made_with,
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        if not state:
            return
        self._made_with = state["made_with"]
        self._book = ScoreBook(np.asarray(state["book"]["clusters"]), self.budget)
        self._book.load_state_dict(state["book"])
        seconds, samples, fixed, count = state["costs"].tolist()
        self._seconds, self._samples = seconds, int(samples)
        self._fixed_seconds, self._fixed_count = fixed, int(count)
        made = state["made"]
        self._decisions, self._scoring, self._scored = map(int, made[:3])
        self._first_seconds, self._scoring_seconds = map(float, made[3:])


def _draw_of(selector: Selector) -> Draw:
    """Return a draw by estimates that follows the selector's rule for scores. Ties are in random order."""
    if not overrides(type(selector), "pick"):
        return partial(draw_by_rule, rule=selector.params.rule, temperature=selector.params.temperature)

    def draw(positions: IndexArray, estimated: ScoreArray, count: int, rng: np.random.Generator) -> IndexArray:
        shuffled = rng.permutation(positions)
        values = estimated[shuffled]
        return shuffled[checked_positions(selector, selector.pick(values, count, rng), values, count)]

    return draw


def _ranks(selector: Selector, estimated: ScoreArray, used: NDArray[np.bool_], chosen: IndexArray) -> IndexArray | None:
    """Return the rank of each chosen position by its estimate, shape (k,), or None if the selector ranks nothing.

    Used candidates come after all others.

    Args:
        selector: the selector that ranks.
        estimated: estimates of all candidates. NaN if a candidate cannot be scored.
        used: whether each candidate was chosen since it was last scored.
        chosen: positions, ascending.
    """
    ranks = np.empty(chosen.size, dtype=np.int64)
    ahead = 0
    for kind in (~used & ~np.isnan(estimated), used & ~np.isnan(estimated)):
        among, own = np.flatnonzero(kind), np.flatnonzero(kind[chosen])
        if own.size:
            found = selector.rank(estimated[among], np.searchsorted(among, chosen[own]))
            if found is None:
                return None
            ranks[own] = ahead + found
        ahead += among.size
    return ranks
