"""UniMax: as even as possible, but no domain is gone through more than N times in the run.

The run trains on B samples. Going through the domains from the smallest to the largest, each is given an equal part of
what is left, or N times its size where that is less; the shares are what they were given. With ``unit: tokens`` the
parts are equal in tokens, a domain of mean length m_k getting part / m_k samples, and B stays a number of samples.

Source: Chung et al. 2023, arXiv 2304.09151, Algorithm 1. As there, where the caps of all domains do not add up to the
budget every domain is at its cap, and the shares are those of the sizes.
Differs from it: sizes are counted in samples or tokens, not in characters, and the budget is the run's own.
Cost: none; with ``unit: tokens`` the lengths of all samples are read once.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import Mixer, MixerParams, RoundContext, RunOutline, register


class UnimaxParams(MixerParams):
    """Parameters of the unimax mixer."""

    max_epochs: float = Field(1.0, gt=0, description="N, times a domain is gone through in the whole run at most.")
    unit: Literal["samples", "tokens"] = Field("samples", description="What the domains get equal parts of.")


@register("mixer", "unimax")
class UnimaxMixer(Mixer[UnimaxParams]):
    """Equal shares, with a cap on the passes over each domain."""

    constant_shares: ClassVar[bool] = True

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return that every domain is at its cap."""
        samples, most = run.total_steps * run.global_batch_size, self.params.max_epochs * (run.pool_size or 0)
        if samples < most:
            return None
        return (
            f"the run trains on {samples} samples and max_epochs ({self.params.max_epochs:g}) allows {most:g}: every "
            "domain is at its cap, and the shares are those of the sizes. Raise max_epochs, or train less"
        )

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the given initial proportions, or the mixer's own."""
        return super().initial(ctx) if self.params.initial_proportions is not None else self.mix(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the shares of samples, the same in every round of a run, shape (K,), sum 1."""
        sizes = ctx.pool.domain_sizes.astype(np.float64)
        lengths = ctx.pool.domain_tokens / sizes if self.params.unit == "tokens" else np.ones_like(sizes)
        budget = ctx.total_steps * (ctx.size / ctx.steps)
        given = capped_parts(budget, self.params.max_epochs * sizes, lengths)
        return given / given.sum()


def capped_parts(budget: float, caps: NDArray[np.float64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how many samples of each domain make equal parts of a budget, none above its cap, shape (K,).

    Their sum is the budget, or that of the caps where it is less.

    Args:
        budget: samples to hand out, > 0.
        caps: most samples of each domain, > 0, shape (K,).
        lengths: size of a sample of each domain in the unit the parts are to be equal in, > 0, shape (K,).
    """
    given = np.zeros_like(caps)
    order = np.argsort(caps * lengths, kind="stable")
    for place, domain in enumerate(order):
        part = budget / (1.0 / lengths[order[place:]]).sum()
        given[domain] = min(part / lengths[domain], caps[domain])
        budget -= given[domain]
    return given
