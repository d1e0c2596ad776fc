"""Selectors choose which samples of the pool are in the next plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dataflex.api.component import Component, ParamsT
from dataflex.api.context import RoundContext
from dataflex.api.measurement import Measurement
from dataflex.api.params import ComponentParams
from dataflex.api.schedule import RunOutline
from dataflex.api.selection import Group, Selection, check_form, join
from dataflex.api.source import label_of
from dataflex.data.rules import ScoreArray, ranks_among, ranks_of_best, sample_softmax, top_k
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError


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


class Selector(Component[ParamsT]):
    """Chooses which samples of the pool are in the next plan.

    Write :meth:`score` (higher is better) and leave the choice to the ``rule`` parameter, or override :meth:`choose`.
    """

    Params: ClassVar[type[ComponentParams]] = SelectorParams
    may_exceed_pool: ClassVar[bool] = False
    """Whether a round longer than the pool makes sense (whole passes, then a choice for the rest)."""
    scores_samples: ClassVar[bool] = True
    """Whether its selections carry scores."""
    leaves_out_unscored: ClassVar[bool] = False
    """Whether :meth:`score` may return NaN for samples without a trained token; they are never chosen."""
    chooses: ClassVar[bool] = True
    """Whether it leaves samples out of a round that is shorter than a pass for good reason; ``full`` does not."""

    def wanted_rounds(self, domains: int) -> int:
        """Return 4: a round is then at most a quarter of the pool, and a run has several decisions."""
        return 4 if self.chooses else 1

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that a capped run has one decision, before anything is known of the time of a step."""
        capped = isinstance(self.params, SelectorParams) and self.params.max_overhead is not None
        if not capped or run.schedule.warmup_steps or run.decisions != 1:
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

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return one number per candidate, shape (n,); higher is chosen first."""
        raise NotImplementedError(f"selector {self.name!r} defines neither score() nor choose()")

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return ``count`` distinct candidates, ``count`` at most their number."""
        if ctx.capped is not None:
            return ctx.capped.choose(self, ctx, candidates, count)
        scores = check_scores(self, self.score(ctx, candidates), candidates, self.leaves_out_unscored)
        scored = np.flatnonzero(~np.isnan(scores))
        if scored.size < count:
            raise ComponentError(
                f"{count} samples are wanted but only {scored.size} of {candidates.size} have a score (the others have "
                "no token to train on). Shorten update_steps or check the data."
            )
        values = scores[scored]
        params: Any = self.params  # registration refuses a selector without these that leaves choose() as it is
        if params.rule == "top_k":
            chosen = top_k(values, count)
            ranks = ranks_of_best(values[chosen])
        else:
            spread = float(values.std()) or 1.0
            chosen = sample_softmax(values.astype(np.float64) / (spread * params.temperature), count, ctx.rng)
            ranks = ranks_among(values, chosen)
        return Selection(
            candidates[scored[chosen]],
            values[chosen],
            candidates.size - scored.size,
            ranks=ranks,
            ranked=scored.size,
        )

    def select(self, ctx: RoundContext, group: Group) -> Selection:
        """Return ``group.budget`` samples: whole passes while the budget exceeds the group, then a choice."""
        passes, rest = divmod(group.budget, group.size)
        candidates = group.candidates
        whole = Selection(np.tile(candidates, passes), passes=np.repeat(np.arange(passes), group.size))
        if not rest:
            return replace(whole, undecided="every sample is taken")
        chosen = self.choose(ctx, candidates, rest)
        check_form(label_of(self, ("choose",)), chosen)
        self._check_distinct(chosen, group)
        if not passes:
            return chosen
        return join([whole, replace(chosen, passes=np.full(rest, passes))])

    def _check_distinct(self, chosen: Selection, group: Group) -> None:
        inside = chosen.indices[(chosen.indices >= group.start) & (chosen.indices < group.stop)]
        seen = np.zeros(group.size, dtype=bool)
        seen[inside - group.start] = True
        if np.count_nonzero(seen) < inside.size:
            raise ComponentError(f"{label_of(self, ('choose',))} chose a sample of {group.name!r} more than once.")


def check_scores(
    component: Component, scores: ScoreArray, candidates: IndexArray, nan_allowed: bool = False
) -> ScoreArray:
    """Return ``scores`` as float32 after checking one finite number (or NaN, where allowed) per candidate.

    Raises:
        ComponentError: naming the component and the first offending samples.
    """
    label = label_of(component, ("score",))
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
    bad = np.flatnonzero(np.isinf(values) if nan_allowed else ~np.isfinite(values))
    if bad.size:
        raise ComponentError(
            f"{label} returned {bad.size} scores that are NaN or infinite (pool indices "
            f"{', '.join(map(str, candidates[bad[:5]]))}{', ...' if bad.size > 5 else ''}). "
            "Return a finite number for every candidate."
        )
    return values
