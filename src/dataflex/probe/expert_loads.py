"""How each sample's tokens are routed in a mixture of experts."""

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
    """The share of each sample's routed places that went to each expert, shape (n, layers * experts).

    A place is one token at one of the experts it is sent to. The shares of a layer are not negative and sum to 1.
    Layers without a choice of experts are left out.

    Example:
        A mixer that measures the mean expert loads of the first samples of each domain:

        >>> from dataflex import Mixer, MixerParams, Needs
        >>> class Balance(Mixer[MixerParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(ExpertLoads(),))
        ...     def mix(self, ctx):
        ...         firsts = [np.arange(start, start + 8) for start in ctx.pool.offsets[:-1]]
        ...         loads = [ctx.probe.measure(ExpertLoads(), first).mean(axis=0) for first in firsts]
        ...         return 1 / np.max(loads, axis=1)
    """

    quantity: ClassVar[str] = "last hidden state"

    def run(self, run: MeasurementRun) -> ScoreArray:
        """Return the shares.

        Raises:
            ComponentError: if the model has no experts, or none whose routing can be read.
        """
        from dataflex.probe.routing import class_name, expert_shares, stacked_experts

        experts = stacked_experts(run.model)
        layers: list[ScoreArray] = []
        if experts:

            def shares(batch: MeasuredBatch) -> Tensor:
                return expert_shares(run.model, experts, batch.inputs, batch.mask)

            values = run.each(shares)
            ends = np.cumsum(list(experts.values()))
            layers = [part for part in np.split(values, ends[:-1], axis=1) if part.any() or not len(part)]
        if not layers:
            raise ComponentError(
                f"{class_name(run.model)} shows no routing of tokens to experts. mix: moe_balance needs a "
                "mixture-of-experts model whose layers stack their experts as Transformers does (Mixtral, Qwen2-MoE, "
                "Qwen3-MoE, OLMoE and others)."
            )
        return np.concatenate(layers, axis=1)
