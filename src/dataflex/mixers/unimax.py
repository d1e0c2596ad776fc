"""UniMax: shares as equal as possible, but with at most N passes over each domain in the run.

The run trains on B samples. The domains are visited from the smallest to the largest. Each gets an equal part of the
rest of B, or N times its size if that is less. The shares are proportional to these parts. With ``unit: tokens`` the
parts are equal in tokens: a domain with mean length m_k gets part / m_k samples. B stays a number of samples.

Source: Chung et al. 2023, arXiv 2304.09151, Algorithm 1. If the caps of all domains add up to less than the
budget, every domain is at its cap, and the shares are proportional to the sizes, as in the algorithm.
Differs from the algorithm: sizes are counted in samples or tokens instead of characters, and the budget is that of the
run.
Cost: none. ``unit: tokens`` reads the lengths of all samples once.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import Mixer, MixerParams, RoundContext, RunOutline, register


class UnimaxParams(MixerParams):
    """Parameters of the unimax mixer."""

    max_epochs: float = Field(1.0, gt=0, description="N, the most passes over each domain in the whole run.")
    unit: Literal["samples", "tokens"] = Field("samples", description="Unit in which the domains get equal parts.")


@register("mixer", "unimax")
class UnimaxMixer(Mixer[UnimaxParams]):
    """Equal shares, with a cap on the passes over each domain."""

    constant_shares: ClassVar[bool] = True

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return that every domain is at its cap, if the run is that long."""
        samples, most = run.total_steps * run.global_batch_size, self.params.max_epochs * (run.pool_size or 0)
        if samples < most:
            return None
        return (
            f"the run trains on {samples} samples and max_epochs ({self.params.max_epochs:g}) allows {most:g}, so "
            "every domain is at its cap, and the shares are proportional to the sizes. Raise max_epochs, or train less"
        )

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the configured initial proportions, or the mixer's own."""
        return super().initial(ctx) if self.params.initial_proportions is not None else self.mix(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the shares of samples, the same in every round of a run, shape (K,), sum 1."""
        sizes = ctx.pool.domain_sizes.astype(np.float64)
        lengths = ctx.pool.domain_tokens / sizes if self.params.unit == "tokens" else np.ones_like(sizes)
        budget = ctx.total_steps * (ctx.size / ctx.steps)
        given = capped_parts(budget, self.params.max_epochs * sizes, lengths)
        return given / given.sum()


def capped_parts(budget: float, caps: NDArray[np.float64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how many samples of each domain make equal parts of a budget without exceeding a cap, shape (K,).

    The parts add up to the budget, or to the sum of the caps if that is less.

    Args:
        budget: samples to distribute, > 0.
        caps: most samples of each domain, > 0, shape (K,).
        lengths: size of one sample of each domain, in the unit in which the parts are equal, > 0, shape (K,).
    """
    given = np.zeros_like(caps)
    order = np.argsort(caps * lengths, kind="stable")
    for place, domain in enumerate(order):
        part = budget / (1.0 / lengths[order[place:]]).sum()
        given[domain] = min(part / lengths[domain], caps[domain])
        budget -= given[domain]
    return given
