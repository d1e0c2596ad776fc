"""Orders arrange the samples of a plan."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from dataflex.api.component import Component, ParamsT
from dataflex.api.context import RoundContext
from dataflex.api.measurement import Measurement
from dataflex.api.schedule import RunOutline
from dataflex.api.selection import Selection
from dataflex.data.sampling import IndexArray


class Order(Component[ParamsT]):
    """Arranges the samples of a plan."""

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that rounds of one step leave nothing to arrange: a step's gradient does not depend on the order.

        Of an order that walks, that there is one step, or that the run ends before its pass does.
        """
        if self.walks and run.decided_steps > 1:
            return self._ends_early(run)
        if min(run.schedule.update_steps, run.decided_steps) > 1:
            return None
        return (
            "every round is one optimizer step, and the order of samples inside a step changes nothing; raise "
            "dataflex.update_steps"
        )

    def _ends_early(self, run: RunOutline) -> str | None:
        trained = run.decided_steps * run.global_batch_size
        if run.pool_size is None or trained >= run.pool_size:
            return None
        return (
            f"the run trains on {trained:,} samples and the pool has {run.pool_size:,}, so the end of the order is "
            "never reached; train a whole pass (num_train_epochs: 1), or put each round in order"
        )

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the samples of all plans, or of an order that walks the pool for each pass that it puts in order."""
        trained, pool = run.decided_steps * run.global_batch_size, run.pool_size
        if not self.walks or pool is None:
            return float(trained)
        if self.renews:  # the rest of the running pass at every decision, and the passes that begin in its round
            begins = np.arange(run.decisions) * run.round_samples % pool
            begun = -(-(begins + run.round_samples) // pool)
            return float((begun * pool - begins).sum())
        if not self.repeats:
            return float(pool * math.ceil(trained / pool))
        # A pass that begins with a warm-up has an order of its own.
        warmup = run.schedule.warmup_steps > 0 and run.total_steps * run.global_batch_size > pool
        return float(2 * pool if warmup else pool)

    @property
    def reads_scores(self) -> bool:
        """Whether :meth:`arrange` reads ``selection.scores``, which not every selector gives."""
        return False

    draws: ClassVar[bool] = False
    """Whether :meth:`draw` says which samples come when, so that nothing is left for a selector or a mixer."""

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Return a parameter and what is wrong with it for these domains, or None. Called before a model is loaded."""
        return None

    def draw(self, ctx: RoundContext) -> IndexArray:
        """Return the samples of a round in training order, shape (ctx.size,), of an order that draws.

        Called for warm-up rounds, too. ``ctx.rng`` gives the same numbers in every round.
        """
        raise NotImplementedError(f"order {self.name!r} does not define draw()")

    @property
    def walks(self) -> bool:
        """Whether it arranges the samples of a whole pass, along which the rounds walk, instead of those of a round.

        :meth:`arrange` is then asked when a pass over the pool (with a mixer, over a domain) begins, or in the middle
        of one if rounds before were arranged otherwise: with the samples that are still to come, in the order of the
        pool. Its random numbers are keyed by the pass. The framework keeps the order, also in checkpoints.
        """
        return False

    @property
    def repeats(self) -> bool:
        """Whether the order of one pass is that of the next ones too, for an order that walks."""
        return True

    @property
    def renews(self) -> bool:
        """Whether an order that walks puts what is left of a pass in order anew at every decision."""
        return False

    def outline(self, run: RunOutline, is_mixed: bool) -> list[str]:
        """Return what else the plan of the run says of it, lines without a full stop.

        Args:
            run: what is known of it.
            is_mixed: whether there is a mixer.
        """
        return []

    keeps_passes: ClassVar[bool] = False
    """Whether the samples of a domain come in passes whatever :meth:`arrange` returns: of one domain, those of an
    earlier pass then take the places before those of a later one."""

    def arrange(self, ctx: RoundContext, selection: Selection) -> IndexArray:
        """Return the positions of ``selection.indices`` in training order: a permutation of ``range(n)``."""
        raise NotImplementedError(f"order {self.name!r} does not define arrange()")
