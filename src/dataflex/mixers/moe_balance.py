"""Shares that grow for domains that a mixture of experts routes differently from the others.

Domains with similar routing are redundant and get smaller shares. For every decision a few samples of each domain are
run through the model. With l_i the mean share of tokens that domain i sends to each expert, layer by layer, and K
domains,

    Delta_i = (1/K) sum_j dist(l_i, l_j),    w <- softmax(log w + eta Delta),    w <- (1 - c) w + c / K.

The sum over j includes the distance of a domain to itself, 0, as in the authors' code. A mean over
the other K - 1 domains would make Delta, and so the effect of eta, K / (K - 1) times as large.

Source: Zhu et al., Dynamic Data Mixing Maximizes Instruction Tuning for Mixture-of-Experts (NAACL 2025, arXiv
2406.11256); code Spico197/MoE-SFT. The code uses the loads of the last layer only, and weighs every batch by its
tokens. Here all routed layers count, so that the result does not depend on one layer, and every sample counts the same.
Distances are the root mean square over the layers, so that they and eta keep the scale of one layer.
Cost: a forward pass over ``samples_per_domain`` samples of each domain for every decision.
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

    eta: float = Field(10.0, gt=0, description="Step size: how strongly the distances move the shares.")
    smoothing: float = Field(0.05, ge=0, le=1, description="c: every share is at least c / K.")
    distance: Literal["l2", "cos"] = Field(
        "l2", description="Distance between the expert loads of two domains: Euclidean, or 1 minus the cosine."
    )
    samples_per_domain: int = Field(64, ge=1, description="Samples drawn from each domain for every decision.")


@register("mixer", "moe_balance")
class MoeBalanceMixer(Mixer[MoeBalanceParams]):
    """Moves the shares towards domains whose expert routing differs from the others."""

    begins_with_initial: ClassVar[bool] = True

    def __init__(self, params: MoeBalanceParams) -> None:
        super().__init__(params)
        self._weights: NDArray[np.float64] = np.empty(0)
        """Shares after the last update, shape (K,). Empty before the first update."""

    def needs(self, run: RunView) -> Needs:
        """Ask for the expert loads of samples."""
        return Needs(measurements=(ExpertLoads(),))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield that the model has no experts, if its configuration file can be read before loading."""
        file = Path(str(run.llamafactory.get("model_name_or_path"))).expanduser() / "config.json"
        if file.is_file() and "expert" not in file.read_text(encoding="utf-8"):
            yield (
                "method",
                f"moe_balance needs a mixture-of-experts model, and {file} names no experts. Use another mixer.",
            )

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the samples drawn for all decisions."""
        drawn = min(self.params.samples_per_domain * run.domains, run.pool_size or 0)
        return float(drawn * run.decisions)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the shares after one more update, shape (K,), sum 1.

        The first update starts from the initial shares.
        """
        if not self._weights.size:
            given = self.initial(ctx)
            self._weights = given / given.sum()
        gains = self.params.eta * mean_distances(self._loads(ctx), self.params.distance)
        self._weights = exponentiated_update(self._weights, gains, self.params.smoothing)
        return self._weights

    def _loads(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return each domain's mean loads over newly drawn samples, (K, layers * experts), sum 1 in each layer."""
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
        """Restore the state that :meth:`state_dict` returned."""
        self._weights = state["weights"]


def mean_distances(loads: NDArray[np.float64], distance: str) -> NDArray[np.float64]:
    """Return each domain's mean distance to all K domains, including itself, (K,).

    Args:
        loads: non-negative, sum 1 in each layer, (K, layers * experts).
        distance: ``l2`` is the root mean square over the layers of the Euclidean distance, in [0, sqrt(2)]. ``cos`` is
            1 - cosine of all layers together, in [0, 1].
    """
    if distance == "cos":
        directions = loads / np.linalg.norm(loads, axis=1, keepdims=True)
        return 1.0 - (directions @ directions.T).mean(axis=1)
    from scipy.spatial.distance import cdist

    layers = loads.sum(axis=1).mean()  # the loads of each layer sum to 1
    return np.asarray(cdist(loads, loads).mean(axis=1) / np.sqrt(layers), dtype=np.float64)
