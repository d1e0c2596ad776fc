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
    """Base of all orders: arranges the samples of a plan.

    Example:
        Short samples first:

        >>> from types import SimpleNamespace
        >>> import numpy as np
        >>> from dataflex import ComponentParams, Order, Selection
        >>> class ShortFirst(Order[ComponentParams]):
        ...     def arrange(self, ctx, selection):
        ...         return np.argsort(ctx.pool.lengths[selection.indices], kind="stable")
        >>> ctx = SimpleNamespace(pool=SimpleNamespace(lengths=np.array([30, 10, 20])))
        >>> ShortFirst(ComponentParams()).arrange(ctx, Selection(np.array([0, 2, 1])))
        array([2, 1, 0])
    """

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that every round has one step: the gradient of a step does not depend on the order of its samples.

        For an order that walks, return that the run has one step or ends before its pass.
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
        """Return the number of samples in all plans, or for an order that walks, in all passes that it orders."""
        trained, pool = run.decided_steps * run.global_batch_size, run.pool_size
        if not self.walks or pool is None:
            return float(trained)
        if self.renews:  # The rest of the pass at every decision, and the passes that begin in its round.
            begins = np.arange(run.decisions) * run.round_samples % pool
            begun = -(-(begins + run.round_samples) // pool)
            return float((begun * pool - begins).sum())
        if not self.repeats:
            return float(pool * math.ceil(trained / pool))
        # A pass that begins with a warm-up has a separate order.
        warmup = run.schedule.warmup_steps > 0 and run.total_steps * run.global_batch_size > pool
        return float(2 * pool if warmup else pool)

    @property
    def reads_scores(self) -> bool:
        """Whether :meth:`arrange` reads ``selection.scores``. Not every selector provides scores."""
        return False

    draws: ClassVar[bool] = False
    """Whether :meth:`draw` chooses the samples of every round, so that the run has no selector or mixer."""

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Return a parameter and its problem with these domains, or None. Called before a model is loaded."""
        return None

    def draw(self, ctx: RoundContext) -> IndexArray:
        """Return the samples of a round in training order, shape (ctx.size,). Only for an order that draws.

        Called for warm-up rounds, too. ``ctx.rng`` gives the same random values in every round.
        """
        raise NotImplementedError(f"order {self.name!r} does not define draw()")

    @property
    def walks(self) -> bool:
        """Whether the order arranges the samples of a whole pass instead of a round. Rounds then follow the pass.

        :meth:`arrange` is then called when a pass over the pool (with a mixer, over a domain) begins. It is also called
        in the middle of a pass if earlier rounds had another arrangement. It receives the remaining samples of the pass
        in the order of the pool. Its random values are keyed by the pass. The framework stores the order, also in
        checkpoints.
        """
        return False

    @property
    def repeats(self) -> bool:
        """Whether the order of one pass also holds for the next passes. Only for an order that walks."""
        return True

    @property
    def renews(self) -> bool:
        """Whether an order that walks reorders the rest of a pass at every decision."""
        return False

    def outline(self, run: RunOutline, is_mixed: bool) -> list[str]:
        """Return further lines for the printed plan of the run, without a full stop.

        Args:
            run: the outline of the run.
            is_mixed: whether the run has a mixer.
        """
        return []

    keeps_passes: ClassVar[bool] = False
    """Whether the passes over a domain stay separate whatever :meth:`arrange` returns. The samples of an earlier pass
    over a domain then come before the samples of a later pass over it."""

    def arrange(self, ctx: RoundContext, selection: Selection) -> IndexArray:
        """Return the positions of ``selection.indices`` in training order: a permutation of ``range(n)``."""
        raise NotImplementedError(f"order {self.name!r} does not define arrange()")
