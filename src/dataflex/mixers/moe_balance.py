"""Shares that grow for domains a mixture of experts routes unlike the others: what is redundant gets less.

For every decision a few samples of each domain are run through the model. With l_i the mean share of tokens each
expert gets from domain i, layer by layer, and K domains,

    Delta_i = (1/K) sum_j dist(l_i, l_j),    w <- softmax(log w + eta Delta),    w <- (1 - c) w + c / K.

The sum over j has the distance of a domain to itself, 0, as in the code; without it eta would be K / (K - 1) as large.

Source: Zhu et al., Dynamic Data Mixing Maximizes Instruction Tuning for Mixture-of-Experts (NAACL 2025, arXiv
2406.11256); code Spico197/MoE-SFT. There the loads are those of the last layer alone, and every batch counts by its
tokens. Here all routed layers count, so that the result does not hang on one of them, and every sample counts the same.
Distances are the root mean square over the layers, which keeps them, and the meaning of eta, on the scale of one layer.
Cost: a forward of ``samples_per_domain`` samples of each domain per decision.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    ExpertLoads,
    Measurement,
    Mixer,
    MixerParams,
    Needs,
    RoundContext,
    RunOutline,
    RunView,
    State,
    register,
)
from dataflex.mixers.base_loss_weights import exponentiated_update


class MoeBalanceParams(MixerParams):
    """Parameters of the mixer for mixtures of experts."""

    eta: float = Field(10.0, gt=0, description="Step size: how strongly distances move the shares.")
    smoothing: float = Field(0.05, ge=0, le=1, description="c: no share is below c / K.")
    distance: Literal["l2", "cos"] = Field(
        "l2", description="Between two domains' loads: Euclidean, or 1 minus their cosine."
    )
    samples_per_domain: int = Field(64, ge=1, description="Samples drawn from each domain for every decision.")


@register("mixer", "moe_balance")
class MoeBalanceMixer(Mixer[MoeBalanceParams]):
    """Moves the shares towards domains with a routing of their own."""

    begins_with_initial: ClassVar[bool] = True

    def __init__(self, params: MoeBalanceParams) -> None:
        super().__init__(params)
        self._weights: NDArray[np.float64] = np.empty(0)

    def needs(self, run: RunView) -> Needs:
        """Return the routing of samples."""
        return Needs(measurements=(ExpertLoads(),))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield that the model has no experts, if its configuration is here to be read."""
        file = Path(str(run.llamafactory.get("model_name_or_path"))).expanduser() / "config.json"
        if file.is_file() and "expert" not in file.read_text(encoding="utf-8"):
            yield "method", f"needs a mixture of experts, and {file} names no experts; use another mixer."

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the samples drawn of each domain at every decision."""
        drawn = min(self.params.samples_per_domain * run.domains, run.pool_size or 0)
        return float(drawn * run.decisions)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the shares after one more update, sum 1; before the first they are the initial ones."""
        if not self._weights.size:
            given = self.initial(ctx)
            self._weights = given / given.sum()
        gains = self.params.eta * mean_distances(self._loads(ctx), self.params.distance)
        self._weights = exponentiated_update(self._weights, gains, self.params.smoothing)
        return self._weights

    def _loads(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return each domain's mean loads over freshly drawn samples, (K, layers * experts), sum 1 in each layer."""
        drawn = [
            start + np.sort(ctx.rng.choice(size, min(size, self.params.samples_per_domain), replace=False))
            for start, size in zip(ctx.pool.offsets[:-1], ctx.pool.domain_sizes, strict=True)
        ]
        loads = ctx.probe.measure(ExpertLoads(), np.concatenate(drawn)).astype(np.float64)
        parts = np.split(loads, np.cumsum([part.size for part in drawn])[:-1])
        return np.stack([part.mean(axis=0) for part in parts])

    def state_dict(self) -> State:
        """Return the shares."""
        return {"weights": self._weights}

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._weights = state["weights"]


def mean_distances(loads: NDArray[np.float64], distance: str) -> NDArray[np.float64]:
    """Return each domain's mean distance to all domains, itself included, (K,).

    Args:
        loads: non-negative, sum 1 in each layer, (K, layers * experts).
        distance: ``l2``, the root mean square over the layers of the Euclidean distance, in [0, sqrt(2)]; or ``cos``,
            1 - cosine of all layers together, in [0, 1].
    """
    if distance == "cos":
        directions = loads / np.linalg.norm(loads, axis=1, keepdims=True)
        return 1.0 - (directions @ directions.T).mean(axis=1)
    from scipy.spatial.distance import cdist

    layers = loads.sum(axis=1).mean()
    return np.asarray(cdist(loads, loads).mean(axis=1) / np.sqrt(layers), dtype=np.float64)
