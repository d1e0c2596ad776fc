"""ICONS: samples that are influential for many sub-tasks, by vote.

With I_j(z) the mean cosine between the gradient of z and the gradients of sub-task j's validation samples,

    vote_j(z) = 1 if I_j(z) is among the largest ``vote_share`` of the candidates, else 0,
    score(z)  = sum over j of vote_j(z),  ties broken by the mean percentile of I_j(z).

Source: Wu et al., ICONS: Influence Consensus for Vision-Language Data Selection (arXiv 2501.00654), section 3: votes
for the top 20 %, gradients without a preconditioner.
Cost: one forward and backward pass over all candidates and validation samples per decision.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from dataflex import IndexArray, RoundContext, ScoreArray, exactly, register
from dataflex.selectors.base_gradients import InfluenceParams, InfluenceSelector


class IconsParams(InfluenceParams):
    """Parameters of ICONS."""

    vote_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the candidates that each sub-task votes for; best near the share of the candidates "
        "that is selected.",
    )


@register("selector", "icons")
class IconsSelector(InfluenceSelector[IconsParams]):
    """Prefers samples that many sub-tasks vote for."""

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the votes plus the mean percentile in (0, 1); NaN if no token is trained on."""
        influence = self.influence(ctx, candidates, self.params.settings())
        return consensus(influence, self.params.vote_share)


def consensus(influence: ScoreArray, vote_share: float) -> ScoreArray:
    """Return each sample's votes plus its mean percentile, shape (n,), float32; NaN for rows with NaN.

    Args:
        influence: influence of each sample on every sub-task, shape (n, S).
        vote_share: share of the samples that each sub-task votes for. Their number is rounded up, and all samples tied
            at the cut get a vote.
    """
    from scipy.stats import rankdata  # imported here, as `check` and `list` would wait half a second for it

    scores = np.full(influence.shape[0], np.nan, dtype=np.float32)
    scored = ~np.isnan(influence).any(axis=1)
    values = influence[scored]
    if not values.size:
        return scores
    count = math.ceil(exactly(vote_share) * values.shape[0])
    cut = np.partition(values, values.shape[0] - count, axis=0)[values.shape[0] - count]
    percentiles = rankdata(values, axis=0) / (values.shape[0] + 1)
    scores[scored] = (values >= cut).sum(axis=1) + percentiles.mean(axis=1)
    return scores
