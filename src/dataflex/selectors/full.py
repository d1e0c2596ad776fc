"""All data: passes over the pool, every sample once before any comes again. The plain-training baseline.

With ``disable_shuffling: true`` the samples come in the order of the data sets, as in LLaMA-Factory. A run's last step
is filled from the next pass where the number of samples is not a multiple of the global batch size.
Cost: none.
"""

from __future__ import annotations

from dataflex import ComponentParams, Group, RoundContext, Selection, Selector, register


@register("selector", "full")
class FullSelector(Selector[ComponentParams]):
    """Goes on with the running pass over the group."""

    may_exceed_pool = True
    scores_samples = False
    chooses = False

    def select(self, ctx: RoundContext, group: Group) -> Selection:
        """Return the next ``group.budget`` samples of the pass."""
        return group.draw_passes()
