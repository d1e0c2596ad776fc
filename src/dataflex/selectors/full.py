"""All data: passes over the pool, with every sample once before any sample repeats. The plain-training baseline.

With ``disable_shuffling: true`` the samples have the order of the data sets, as in LLaMA-Factory. If the number of
samples is not a multiple of the global batch size, the last step of a pass is filled from the next pass.
Cost: none.
"""

from __future__ import annotations

from dataflex import ComponentParams, Group, RoundContext, Selection, Selector, register


@register("selector", "full")
class FullSelector(Selector[ComponentParams]):
    """Takes the next samples of the running pass over the pool."""

    may_exceed_pool = True
    scores_samples = False
    chooses = False

    def select(self, ctx: RoundContext, group: Group) -> Selection:
        """Return the next ``group.budget`` samples of the pass."""
        return group.draw_passes()
