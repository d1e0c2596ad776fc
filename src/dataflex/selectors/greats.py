"""GREATS: from a larger batch of candidates, the samples that together would reduce the validation loss most.

For candidates z and the mean gradient g_val of a few validation samples, a step of learning rate eta on z, after the
set S, is worth to second order, with the Hessian replaced by the identity,

    U(z | S) = eta <g_z, g_val> - eta^2 sum over z' in S of <g_z, g_z'>.

Samples are chosen greedily, each time the candidate of largest U. All inner products are exact. They come from one
forward and backward pass of the candidates and the validation samples together. If it is cheaper, no gradient is formed
(the "ghost" inner product).

With ``update_steps: 1`` every optimizer step is filtered, as in the paper. Longer rounds filter all their steps at the
start of the round, with the model of that time. Candidates come from the running pass over the pool, so a rejected
candidate returns in the next pass.

Source: Wang et al., GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration (NeurIPS 2024),
equation 5 and algorithm 1. As in its code, there are twice as many candidates as chosen samples.
Cost: per step a forward and backward pass of ``candidate_factor`` times the batch and of the validation samples.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    ComponentError,
    GradientNorms,
    GradientProducts,
    GradientSettings,
    Group,
    IndexArray,
    Measurement,
    Needs,
    RoundContext,
    RunOutline,
    RunView,
    ScoreArray,
    Selection,
    Selector,
    exactly,
    register,
)
from dataflex.selectors.base_gradients import ValidationParams


class GreatsParams(ValidationParams):
    """Parameters of GREATS."""

    candidate_factor: float = Field(2.0, gt=1, description="Number of candidates for each chosen sample.")
    group_size: int = Field(
        8, ge=1, description="Number of samples chosen together; their candidates share one forward and backward pass."
    )
    validation_size: int = Field(2, ge=1, description="Number of validation samples drawn for each round.")
    learning_rate: float | None = Field(
        None, gt=0, description="eta in the formula. If null, the optimizer's learning rate at the start of the round."
    )
    unsupported_parameters: Literal["error", "ignore"] = Field(
        "error",
        description="Trainable parameters of a kind without a rule for per-sample gradients: error ends the run, "
        "ignore leaves them out.",
    )


@register("selector", "greats")
class GreatsSelector(Selector[GreatsParams]):
    """Chooses greedily from every group of candidates."""

    may_exceed_pool: ClassVar[bool] = True

    def needs(self, run: RunView) -> Needs:
        """Return the gradients of candidates and validation samples."""
        return Needs(
            measurements=(GradientNorms(GradientSettings(unsupported=self.params.unsupported_parameters)),),
            validation=self.params,
        )

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the candidates of all groups, plus the validation samples once per group."""
        samples = run.decided_steps * run.global_batch_size
        groups = samples / self.params.group_size
        targets = min(self.params.validation_size, run.validation)
        return samples * self.params.candidate_factor + groups * targets

    def select(self, ctx: RoundContext, group: Group) -> Selection:
        """Return ``group.budget`` samples, chosen group by group from the candidates of each group."""
        size = self.params.group_size
        wanted = [min(size, group.budget - begin) for begin in range(0, group.budget, size)]
        trained = ctx.pool.trained
        if not trained[group.start : group.stop].any():
            raise ComponentError(f"no sample of {group.name} has a token that is trained on. Check the data.")
        unscored, groups = 0, []
        for count in wanted:
            candidates, skipped = _draw(group, math.ceil(count * exactly(self.params.candidate_factor)), trained)
            groups.append(candidates)
            unscored += skipped
        usable = np.flatnonzero(ctx.validation.trained)
        if not usable.size:
            raise ComponentError("no validation sample has a token that is trained on. Check the validation data.")
        number = min(self.params.validation_size, usable.size)
        targets = np.sort(ctx.rng.choice(usable, number, replace=False))
        settings = GradientSettings(unsupported=self.params.unsupported_parameters)
        sizes = tuple(candidates.size for candidates in groups)
        measurement = GradientProducts(settings, sizes, ctx.validation, targets)
        products = ctx.probe.measure(measurement, np.concatenate(groups))
        eta = self.params.learning_rate or ctx.learning_rate
        chosen, gains = [], []
        for candidates, matrix, count in zip(groups, products, wanted, strict=True):
            picks, values = greedy(matrix, count, eta)
            chosen.append(candidates[picks])
            gains.append(values)
        return Selection(np.concatenate(chosen), np.concatenate(gains), unscored, shuffled=True)


def _draw(group: Group, count: int, trained: NDArray[np.bool_]) -> tuple[IndexArray, int]:
    """Return the next ``count`` samples with a trained token, and the number of samples skipped for lack of one."""
    found = [np.empty(0, dtype=np.int64)]
    drawn = 0
    while (missing := count - sum(part.size for part in found)) > 0:
        part = group.draw(missing)
        drawn += part.size
        found.append(part[trained[part]])
    return np.concatenate(found), drawn - count


def greedy(products: ScoreArray, count: int, eta: float) -> tuple[IndexArray, ScoreArray]:
    """Return the positions of ``count`` candidates in the order chosen, and U of each at the time it was chosen.

    Args:
        products: inner products of b candidates with each other and with m validation samples, shape (b, b + m).
        count: number of candidates to choose.
        eta: learning rate. At 0 (the first step of a warm-up) candidates are ranked as for a vanishing step.
    """
    number = products.shape[0]
    matrix = products.astype(np.float64)
    step = eta or np.finfo(np.float32).tiny
    gain = step * matrix[:, number:].mean(axis=1)
    left = np.ones(number, dtype=bool)
    picks, values = [], []
    for _ in range(count):
        best = int(np.argmax(np.where(left, gain, -np.inf)))
        picks.append(best)
        values.append(gain[best])
        left[best] = False
        gain = gain - step**2 * matrix[:, best]
    return np.array(picks, dtype=np.int64), np.array(values, dtype=np.float32)
