"""Routing of each sample's tokens in a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dataflex.api.measurement import MeasuredBatch, Measurement, MeasurementRun, register_measurement
from dataflex.data.rules import ScoreArray
from dataflex.errors import ComponentError

if TYPE_CHECKING:
    from torch import Tensor


@register_measurement("expert_loads")
@dataclass(frozen=True)
class ExpertLoads(Measurement):
    """The share of each sample's routing slots that each expert gets, shape (n, layers * experts).

    A slot is one token at one of its chosen experts. The shares of a layer are not negative and sum to 1.
    Layers without a choice of experts are left out.

    Example:
        A selector that prefers samples whose tokens use the experts evenly:

        >>> from dataflex import ExpertLoads, Needs, Selector, SelectorParams
        >>> class Even(Selector[SelectorParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(ExpertLoads(),))
        ...     def score(self, ctx, candidates):
        ...         return -ctx.probe.measure(ExpertLoads(), candidates).max(axis=1)
    """

    quantity: ClassVar[str] = "last hidden state"

    def run(self, run: MeasurementRun) -> ScoreArray:
        """Return the shares.

        Raises:
            ComponentError: if the model has no experts, or no experts whose routing can be read.
        """
        from dataflex.probe.routing import class_name, expert_shares, stacked_experts

        experts = stacked_experts(run.model)
        layers: list[ScoreArray] = []
        if experts:

            def shares(batch: MeasuredBatch) -> Tensor:
                return expert_shares(run.model, experts, batch.inputs, batch.mask)

            values = run.each(shares)
            ends = np.cumsum(list(experts.values()))
            # A module of stacked matrices that is never called with chosen experts has only zeros: it does not route.
            layers = [part for part in np.split(values, ends[:-1], axis=1) if part.any() or not len(part)]
        if not layers:
            raise ComponentError(
                f"{class_name(run.model)} shows no routing of tokens to experts. mix: moe_balance needs a "
                "mixture-of-experts model whose layers stack their experts as Transformers does (Mixtral, Qwen2-MoE, "
                "Qwen3-MoE, OLMoE and others)."
            )
        return np.concatenate(layers, axis=1)
