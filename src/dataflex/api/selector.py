"""Selectors choose which samples of the pool are in the next plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dataflex.api.component import Component, ParamsT
from dataflex.api.context import RoundContext
from dataflex.api.measurement import Measurement
from dataflex.api.params import ComponentParams
from dataflex.api.schedule import RunOutline
from dataflex.api.selection import Group, Selection, check_form, with_whole_passes
from dataflex.api.source import label_of
from dataflex.data.rules import ScoreArray, count_nan, ranks_of, sample_softmax, top_k
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError

if TYPE_CHECKING:
    from dataflex.data.pool import Pool


class SelectorParams(ComponentParams):
    """Parameters of selectors that turn one score per sample into a selection."""

    rule: Literal["top_k", "sample"] = Field(
        "top_k",
        description="top_k: the best scores; sample: draw without replacement, p ~ exp(z / temperature).",
    )
    temperature: float = Field(
        1.0, gt=0, description="For rule 'sample': of the standardised scores z; larger is flatter."
    )
    max_overhead: float | None = Field(
        None, gt=0, description="Cap on decision time over training time; none: every candidate is scored every time."
    )
    within: Literal["pool", "domain"] = Field(
        "pool",
        description="What a sample is compared with: the pool, or its own domain, each of which then has its share.",
    )


class Selector(Component[ParamsT]):
    """Chooses which samples of the pool are in the next plan.

    Write :meth:`score` (higher is better) and leave the choice to the ``rule`` parameter, or override :meth:`pick` for
    another rule. A method whose choice is no matter of one score per sample overrides :meth:`choose`.
    """

    Params: ClassVar[type[ComponentParams]] = SelectorParams
    may_exceed_pool: ClassVar[bool] = False
    """Whether a round longer than the pool makes sense (whole passes, then a choice for the rest)."""
    scores_samples: ClassVar[bool] = True
    """Whether its selections carry scores."""
    chooses: ClassVar[bool] = True
    """Whether it leaves samples out of a round that is shorter than a pass for good reason; ``full`` does not."""
    partial_scores: ClassVar[str | None] = None
    """Why ``max_overhead`` is refused: scores of some candidates do not tell about the others, or scores cost nothing;
    None: it is not refused."""

    @property
    def may_repeat(self) -> bool:
        """Whether :meth:`choose` may return a candidate several times."""
        return False

    without_score: ClassVar[str | None] = None
    """Why a candidate with a token to train on may have no score, and what to set then; None: each has one."""

    @property
    def rule_params(self) -> SelectorParams | None:
        """Its parameters, if they are those of a selector that chooses by one score per sample; else None."""
        return self.params if isinstance(self.params, SelectorParams) else None

    def wanted_rounds(self, domains: int) -> int:
        """Return 4: a round is then at most a quarter of the pool, and a run has several decisions."""
        return 4 if self.chooses else 1

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that a run under ``max_overhead`` has one decision, before anything is known of the time of a step."""
        if overhead_limit(self) is None or run.schedule.warmup_steps or run.decisions != 1:
            return None
        return (
            "max_overhead is a share of the time of training steps, of which nothing is known before the first one, so "
            "the only decision scores the 32 samples that are always scored; set dataflex.warmup_steps, or lower "
            "dataflex.update_steps"
        )

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the samples scored in the whole run, validation samples included, each as often as it takes."""
        samples = self.scored_samples(run.pool_size or 0) + run.validation
        return float(samples * self.expected_passes(run.decisions))

    def expected_passes(self, decisions: int) -> int:
        """Return how often :meth:`scored_samples` are scored in a run, for the estimate of its cost."""
        return decisions

    def scored_samples(self, pool_size: int) -> int:
        """Return how many samples of the pool one decision scores, for the estimate of a run's cost."""
        return pool_size

    def begin(self, ctx: RoundContext) -> None:
        """Prepare a decision: measure what all its scores share, and change the state.

        Called once in a decision, before anything is scored or chosen; not at all in a decision that scores nothing.
        ``ctx.candidates`` are all the samples of the decision; ``ctx.rng`` goes on in the first call of :meth:`score`.
        """

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return one number per candidate, shape (n,); higher is better, NaN: the candidate has no score.

        A candidate without a score is never chosen. A decision may call this several times, for each domain or for
        parts of the candidates; it must not change the state.
        """
        raise NotImplementedError(f"selector {self.name!r} defines neither score() nor choose()")

    def pick(self, scores: ScoreArray, count: int, rng: np.random.Generator) -> IndexArray:
        """Return ``count`` distinct positions of scores that are not NaN; by default as the ``rule`` parameter says.

        Args:
            scores: of all candidates, NaN where one has none, shape (n,); at least ``count`` are not.
            count: at least 1.
            rng: the source of draws.
        """
        params: Any = self.params  # registration refuses a selector without these that leaves pick() as it is
        scored = np.flatnonzero(~np.isnan(scores))
        values = scores[scored]
        if params.rule == "top_k":
            return scored[top_k(values, count)]
        spread = float(values.std()) or 1.0
        return scored[sample_softmax(values.astype(np.float64) / (spread * params.temperature), count, rng)]

    def rank(self, scores: ScoreArray, picked: IndexArray) -> IndexArray | None:
        """Return the rank of each picked position among the scores, 1 the best; None if the rule prefers none.

        Args:
            scores: of all candidates, NaN where one has none.
            picked: what :meth:`pick` returned. If these are the best scores, equal ones rank in the order given.
        """
        draws = self.rule_params is not None and self.rule_params.rule == "sample"
        return ranks_of(scores, picked, keep_order=not draws)

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return ``count`` distinct candidates, ``count`` at most their number."""
        scores = check_scores(self, self.score(ctx, candidates), candidates)
        return choice_by_scores(self, ctx, candidates, scores, count)

    def select(self, ctx: RoundContext, group: Group) -> Selection:
        """Return ``group.budget`` samples: whole passes while the budget exceeds the group, then a choice.

        Overridden only by what draws from the group's running pass itself.
        """

        def choose(candidates: IndexArray, count: int) -> Selection:
            return checked_choice(self, self.choose(ctx, candidates, count), candidates, group.name)

        return with_whole_passes(group.candidates, group.budget, choose)


def overhead_limit(selector: Selector) -> float | None:
    """Return a selector's ``max_overhead``; None if it is not given, or the selector has no such parameter."""
    return None if selector.rule_params is None else selector.rule_params.max_overhead


def compares_in_domains(selector: Selector) -> bool:
    """Return whether a selector compares the samples of each domain with one another alone."""
    return selector.rule_params is not None and selector.rule_params.within == "domain"


def overrides(cls: type[Component], method: str) -> bool:
    """Return whether a selector's class, or a base of it, has its own way of deciding."""
    return bool(getattr(cls, method) is not getattr(Selector, method))


def chooses_sets(cls: type[Component]) -> bool:
    """Return whether selectors of a class have a way of their own to choose, not by one score per sample."""
    return overrides(cls, "choose") or overrides(cls, "select")


def refuses_limit(cls: type[Component]) -> bool:
    """Return whether a class has no use for ``max_overhead``: it cannot score a part of the candidates."""
    return issubclass(cls, Selector) and (chooses_sets(cls) or cls.partial_scores is not None)


def choice_by_scores(
    selector: Selector, ctx: RoundContext, candidates: IndexArray, scores: ScoreArray, count: int
) -> Selection:
    """Return what a selector's rule picks by given scores.

    Args:
        selector: whose rule it is.
        ctx: of the decision.
        candidates: shape (n,).
        scores: of the candidates, checked.
        count: how many to choose.

    Raises:
        ComponentError: if fewer candidates have a score, or the rule returns something else than positions of them.
    """
    unscored = count_nan(scores)
    if candidates.size - unscored < count:
        raise ComponentError(too_few_scores(selector, ctx.pool, candidates, scores, count))
    picked = checked_positions(selector, selector.pick(scores, count, ctx.rng), scores, count)
    ranks = selector.rank(scores, picked)
    if (np.diff(picked) < 0).any():
        order = np.argsort(picked, kind="stable")
        picked, ranks = picked[order], None if ranks is None else ranks[order]
    ranked = 0 if ranks is None else candidates.size - unscored
    return Selection(candidates[picked], scores[picked], unscored, ranks=ranks, ranked=ranked)


def too_few_scores(selector: Selector, pool: Pool, candidates: IndexArray, scores: ScoreArray, count: int) -> str:
    """Return what says that fewer candidates have a score than are wanted, and whose fault it is."""
    without = candidates[np.isnan(scores)]
    strange = without[pool.trained[without]]
    untrained = without.size - strange.size
    scored = f"only {candidates.size - without.size} of {candidates.size} have a score"
    if not strange.size:
        return (
            f"{count} samples are wanted but {scored} (the others have no token to train on). Shorten update_steps or "
            "check the data."
        )
    if selector.without_score is not None:
        return (
            f"select {selector.name}: {count} samples are wanted but {scored}: {selector.without_score}. Or shorten "
            "update_steps."
        )
    shown = ", ".join(map(str, strange[:5])) + (", ..." if strange.size > 5 else "")
    others = f", {untrained} more have none" if untrained else ""
    return (
        f"{label_of(selector, ('score',))} returned NaN for {strange.size} candidates that have a token to train on "
        f"(pool indices {shown}){others}: {count} samples are wanted but {scored}. Return a number for them, or "
        "shorten update_steps."
    )


def checked_positions(selector: Selector, picked: Any, scores: ScoreArray, count: int) -> IndexArray:
    """Return what a rule picked, as integers.

    Raises:
        ComponentError: if it is not ``count`` distinct positions of scores that are not NaN.
    """
    label = label_of(selector, ("pick",))
    try:
        positions = np.asarray(picked)
    except ValueError as error:
        raise ComponentError(f"{label} returned a {type(picked).__name__} that is no array: {error}") from error
    if positions.shape != (count,) or not np.issubdtype(positions.dtype, np.integer):
        raise ComponentError(
            f"{label} returned {positions.dtype} positions of shape {positions.shape}; {count} integers are needed."
        )
    if positions.min() < 0 or positions.max() >= scores.size:
        raise ComponentError(f"{label} returned positions outside 0 to {scores.size - 1}, those of the scores.")
    seen = np.zeros(scores.size, dtype=bool)
    seen[positions] = True
    if np.count_nonzero(seen) < count:
        raise ComponentError(f"{label} picked a position more than once.")
    if np.isnan(scores[positions]).any():
        raise ComponentError(f"{label} picked {np.isnan(scores[positions]).sum()} candidates without a score (NaN).")
    return positions.astype(np.int64, copy=False)


def checked_choice(selector: Selector, chosen: Selection, candidates: IndexArray, group: str) -> Selection:
    """Return what a selector chose.

    Raises:
        ComponentError: if it is no selection, or has a sample more than once or one that is no candidate.
    """
    label = label_of(selector, ("choose",))
    check_form(label, chosen)
    if not chosen.indices.size or not np.issubdtype(chosen.indices.dtype, np.integer):
        return chosen  # the planner refuses its shape or its kind
    first, last = int(candidates[0]), int(candidates[-1])
    inside = chosen.indices[(chosen.indices >= first) & (chosen.indices <= last)]
    ascending = np.sort(inside)
    is_first = np.diff(ascending, prepend=first - 1) != 0
    if not is_first.all() and not selector.may_repeat:
        raise ComponentError(f"{label} chose a sample of {group!r} more than once.")
    strange = np.count_nonzero(is_first & (candidates[np.searchsorted(candidates, ascending)] != ascending))
    if strange:
        raise ComponentError(f"{label} chose {strange} samples of {group!r} that were no candidates.")
    return chosen


def check_scores(component: Component[Any], scores: ScoreArray, candidates: IndexArray) -> ScoreArray:
    """Return ``scores`` as float32 after checking one number per candidate, finite or NaN.

    Raises:
        ComponentError: naming the component and the first offending samples.
    """
    label = label_of(component, ("score",))
    if scores is None:
        raise ComponentError(f"{label} returned None; needed is one number per candidate. Is a return missing?")
    try:
        values = np.asarray(scores, dtype=np.float32)
    except (TypeError, ValueError) as error:
        kind = type(scores).__name__
        raise ComponentError(f"{label} returned a {kind} that is no array of numbers: {error}") from error
    if values.shape != candidates.shape:
        raise ComponentError(
            f"{label} returned scores of shape {values.shape} for {candidates.size} candidates; "
            "one number per candidate is needed."
        )
    bad = np.flatnonzero(np.isinf(values))
    if bad.size:
        raise ComponentError(
            f"{label} returned {bad.size} scores that are infinite (pool indices "
            f"{', '.join(map(str, candidates[bad[:5]]))}{', ...' if bad.size > 5 else ''}). "
            "Return a finite number, or NaN for a candidate without a score."
        )
    return values
