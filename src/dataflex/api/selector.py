"""Selectors choose the samples of the next plan from the pool."""

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
    """Parameters of selectors that choose by one score per sample.

    Example:
        >>> from pydantic import Field
        >>> from dataflex import SelectorParams
        >>> class FocusParams(SelectorParams):
        ...     center: float = Field(1.0, description="The preferred loss.")
        >>> FocusParams(rule="sample", temperature=0.5).center
        1.0
    """

    rule: Literal["top_k", "sample"] = Field(
        "top_k",
        description="top_k: the best scores; sample: draw without replacement, p ~ exp(z / temperature).",
    )
    temperature: float = Field(
        1.0, gt=0, description="For rule 'sample': temperature of the standardised scores z; larger is flatter."
    )
    max_overhead: float | None = Field(
        None,
        gt=0,
        description="Largest ratio of decision time to training time. If null, every decision scores every candidate.",
    )
    within: Literal["pool", "domain"] = Field(
        "pool",
        description="Compare a sample with the whole pool, or within its domain; each domain then has its share.",
    )


class Selector(Component[ParamsT]):
    """Base of all selectors: chooses the samples of the next plan from the pool.

    Define :meth:`score` (higher is better) and leave the choice to the ``rule`` parameter, or override :meth:`pick` for
    another rule. A method that does not choose by one score per sample overrides :meth:`choose`.

    Example:
        >>> from types import SimpleNamespace
        >>> import numpy as np
        >>> from dataflex import Selector, SelectorParams
        >>> class Longest(Selector[SelectorParams]):
        ...     def score(self, ctx, candidates):
        ...         return ctx.pool.lengths[candidates]
        >>> longest = Longest(SelectorParams())
        >>> ctx = SimpleNamespace(pool=SimpleNamespace(lengths=np.array([5, 30, 20], dtype=np.float32)))
        >>> longest.pick(longest.score(ctx, np.arange(3)), 2, np.random.default_rng(0))
        array([1, 2])
    """

    Params: ClassVar[type[ComponentParams]] = SelectorParams
    may_exceed_pool: ClassVar[bool] = False
    """Whether a round may be longer than the pool (whole passes, then a choice for the rest)."""
    scores_samples: ClassVar[bool] = True
    """Whether its selections have scores."""
    chooses: ClassVar[bool] = True
    """Whether it deliberately leaves out samples if a round is shorter than a pass. False for ``full``."""
    partial_scores: ClassVar[str | None] = None
    """Why ``max_overhead`` is refused: scores of some candidates say nothing about the others, or scores cost nothing.
    None means that ``max_overhead`` is allowed."""

    @property
    def may_repeat(self) -> bool:
        """Whether :meth:`choose` may return a candidate several times."""
        return False

    without_score: ClassVar[str | None] = None
    """Why a candidate with a trained token may have no score, and the setting to change. None means that every such
    candidate has a score."""

    @property
    def rule_params(self) -> SelectorParams | None:
        """The parameters, if the selector chooses by one score per sample; otherwise None."""
        return self.params if isinstance(self.params, SelectorParams) else None

    def wanted_rounds(self, domains: int) -> int:
        """Return 4, so that a round is at most a quarter of the pool and a run has several decisions."""
        return 4 if self.chooses else 1

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that a run under ``max_overhead`` makes its only decision before the time of any step is known."""
        if overhead_limit(self) is None or run.schedule.warmup_steps or run.decisions != 1:
            return None
        return (
            "max_overhead is a share of the time of training steps, and this time is unknown before the first step, so "
            "the only decision scores the 32 samples that are always scored; set dataflex.warmup_steps, or lower "
            "dataflex.update_steps"
        )

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the number of samples scored in the whole run, including validation samples, over all decisions."""
        samples = self.scored_samples(run.pool_size or 0) + run.validation
        return float(samples * self.expected_passes(run.decisions))

    def expected_passes(self, decisions: int) -> int:
        """Return how many times the run scores :meth:`scored_samples`, to estimate the cost of the run."""
        return decisions

    def scored_samples(self, pool_size: int) -> int:
        """Return how many samples of the pool one decision scores, to estimate the cost of the run."""
        return pool_size

    def begin(self, ctx: RoundContext) -> None:
        """Prepare a decision: measure the data that all its scores share, and change the state.

        Called once per decision, before any sample is scored or chosen. Not called in a decision that scores nothing.
        ``ctx.candidates`` are all candidates of the decision. ``ctx.rng`` continues its stream in the first call of
        :meth:`score`.
        """

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return one score per candidate, shape (n,). Higher is better; NaN means that the candidate has no score.

        A candidate without a score is never chosen. A decision may call this method several times, for each domain or
        for parts of the candidates. The method must not change the state.
        """
        raise NotImplementedError(f"selector {self.name!r} defines neither score() nor choose()")

    def pick(self, scores: ScoreArray, count: int, rng: np.random.Generator) -> IndexArray:
        """Return ``count`` distinct positions of scores that are not NaN. The default follows the ``rule`` parameter.

        Args:
            scores: scores of all candidates, shape (n,), NaN for a candidate without a score. At least ``count`` are
                not NaN.
            count: at least 1.
            rng: the random generator for draws.
        """
        params: Any = self.params  # Registration refuses a selector that inherits pick() but lacks these parameters.
        scored = np.flatnonzero(~np.isnan(scores))
        values = scores[scored]
        if params.rule == "top_k":
            return scored[top_k(values, count)]
        spread = float(values.std()) or 1.0  # equal scores have a deviation of 0
        return scored[sample_softmax(values.astype(np.float64) / (spread * params.temperature), count, rng)]

    def rank(self, scores: ScoreArray, picked: IndexArray) -> IndexArray | None:
        """Return the rank of each picked position among the scores, 1 for the best; None if the rule has no ranking.

        Args:
            scores: scores of all candidates, NaN for a candidate without a score.
            picked: the return value of :meth:`pick`. If these are the best scores, equal scores rank in the order of
                ``picked``.
        """
        draws = self.rule_params is not None and self.rule_params.rule == "sample"
        return ranks_of(scores, picked, keep_order=not draws)

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return ``count`` distinct candidates. ``count`` is at most the number of candidates."""
        scores = check_scores(self, self.score(ctx, candidates), candidates)
        return choice_by_scores(self, ctx, candidates, scores, count)

    def select(self, ctx: RoundContext, group: Group) -> Selection:
        """Return ``group.budget`` samples: whole passes while the budget exceeds the group, then a choice.

        Override this method only in a selector that draws from the group's running pass itself.
        """

        def choose(candidates: IndexArray, count: int) -> Selection:
            return checked_choice(self, self.choose(ctx, candidates, count), candidates, group.name)

        return with_whole_passes(group.candidates, group.budget, choose)


def overhead_limit(selector: Selector) -> float | None:
    """Return a selector's ``max_overhead``, or None if it is not set or the selector has no such parameter."""
    return None if selector.rule_params is None else selector.rule_params.max_overhead


def compares_in_domains(selector: Selector) -> bool:
    """Return whether a selector compares samples only within their domain."""
    return selector.rule_params is not None and selector.rule_params.within == "domain"


def overrides(cls: type[Component], method: str) -> bool:
    """Return whether a selector's class, or a base of it, overrides a method of :class:`Selector`."""
    return bool(getattr(cls, method) is not getattr(Selector, method))


def chooses_sets(cls: type[Component]) -> bool:
    """Return whether selectors of a class choose by their own code and not by one score per sample."""
    return overrides(cls, "choose") or overrides(cls, "select")


def refuses_limit(cls: type[Component]) -> bool:
    """Return whether a class does not support ``max_overhead``, because it cannot score a part of the candidates."""
    return issubclass(cls, Selector) and (chooses_sets(cls) or cls.partial_scores is not None)


def choice_by_scores(
    selector: Selector, ctx: RoundContext, candidates: IndexArray, scores: ScoreArray, count: int
) -> Selection:
    """Return the choice of a selector's rule for the given scores.

    Args:
        selector: the selector with the rule.
        ctx: the context of the decision.
        candidates: shape (n,).
        scores: scores of the candidates, already checked.
        count: how many candidates to choose.

    Raises:
        ComponentError: if fewer than ``count`` candidates have a score, or if the rule returns anything but positions
            of scored candidates.
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
    """Return the message that too few candidates have a score, with the cause: the data or the selector."""
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
    """Return the picked positions as integers.

    Raises:
        ComponentError: if they are not ``count`` distinct positions of scores that are not NaN.
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
    """Return the selection of a selector after checking it.

    Raises:
        ComponentError: if the value is no selection, repeats a sample, or contains a sample that is no candidate.
    """
    label = label_of(selector, ("choose",))
    check_form(label, chosen)
    if not chosen.indices.size or not np.issubdtype(chosen.indices.dtype, np.integer):
        return chosen  # The planner reports a wrong shape or dtype.
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
    """Return ``scores`` as float32 after checking that there is one value per candidate, finite or NaN.

    Raises:
        ComponentError: if the scores are not valid. The message names the component and the first wrong samples.

    Example:
        >>> import numpy as np
        >>> from dataflex import Selector, SelectorParams, check_scores
        >>> class Longest(Selector[SelectorParams]):
        ...     family, name = "selector", "longest"
        >>> check_scores(Longest(SelectorParams()), [3, 5], np.array([10, 11]))
        array([3., 5.], dtype=float32)
    """
    label = label_of(component, ("score",))
    if scores is None:
        raise ComponentError(f"{label} returned None; one number per candidate is needed. Is a return missing?")
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
