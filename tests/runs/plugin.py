"""A selector for the tests that draws blindly, with or without looking at the model first."""

from dataflex import ComponentParams, Selection, Selector, register


class BlindParams(ComponentParams):
    look: bool = False


@register("selector", "test_blind")
class Blind(Selector):
    """Draws at random, after a probe where asked."""

    Params = BlindParams

    def choose(self, ctx, candidates, count):
        if self.params.look:
            ctx.probe.losses(candidates)
        return Selection(candidates[ctx.rng.choice(candidates.size, count, replace=False)])
