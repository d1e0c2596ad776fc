"""Domain weights in the loss by gradient alignment: domains whose gradient helps the others weigh more.

With g_i the gradient of domain i's mean token loss in a step, eta the learning rate and w the weights in the loss,

    W_i = <g_i, sum over j != i of g_j>     (target: others),   or   <g_i, g_target>     (target: validation),
    w_i <- w_i exp(eta W_i / mu), scaled to sum 1;     result: the mean of w over all steps.

The default ``variant: official`` follows the published code: each gradient is cut to length ``max_grad_norm``, W is
divided by the mean length of the g_i (plus 1e-6), and kept in [0, 5]. ``variant: paper`` is the printed formula. With
gradients of length 1 and W in [0, 5] both are the same but for the 1e-6.

The code with all domains as targets means to leave <g_i, g_i> out of W_i, as the formula does; but the sets of tensors
it compares are never equal, so that it keeps it in. Here it is left out.

The g_i are sums of per-sample gradients of the step's own samples, projected to ``proj_dim`` numbers each, in every
step by another map. Their inner products are unbiased with a standard deviation of about |g_i| |g_j| / sqrt(proj_dim),
so that their errors average out over the steps, and no matrix of K whole gradients is held. A domain the step has
nothing of gets no gain, W_i = 0, and takes no part in the sums and the mean; the code goes on with the gradient it had
last.

Source: Fan et al., DoGE: Domain Reweighting with Generalization Estimation (ICML 2024, arXiv 2310.15393); code
Olivia-fsm/DoGE. The gradients here are taken without dropout.
Cost: one more forward and backward of every step's samples, and of the validation samples.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dataflex import (
    ComponentError,
    GradientFeatures,
    GradientSettings,
    Measurement,
    Needs,
    RunOutline,
    RunView,
    StepContext,
    ValidationParams,
    derive_rng,
    key_of,
    register,
)
from dataflex.mixers.base_loss_weights import LossWeightMixer, LossWeightParams, exponentiated_update

HIGHEST = 5.0
"""Largest W in the official code; the smallest is 0."""

Matrix = NDArray[np.float64]


class DogeParams(LossWeightParams, ValidationParams):
    """Parameters of DoGE."""

    target: Literal["others", "validation"] = Field(
        "others", description="What a domain's gradient is to agree with: the other domains', or validation samples'."
    )
    mu: float = Field(0.05, gt=0, description="Divides the gains: smaller moves the weights faster.")
    reweight_eps: float = Field(
        0.0, ge=0, le=1, description="c, the share of equal weights mixed in; every weight is at least c / K."
    )
    variant: Literal["official", "paper"] = Field(
        "official",
        description="official: gradients cut, W over their mean length, in [0, 5]; paper: W as it is.",
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Length that longer gradients are cut to with variant: official; 0: they are not cut."
    )
    validation_size: int = Field(8, ge=1, description="Validation samples of each sub-task drawn for each step.")
    validation_seed: int = Field(0, ge=0, description="Seed of that draw.")
    projection: Literal["count", "rademacher", "kronecker", "identity"] = Field(
        "count", description="Random linear map of the gradients; identity keeps every number (for tests)."
    )
    proj_dim: int = Field(8192, ge=1, description="Length of a projection; at most the number of trainable parameters.")
    projection_seed: int = Field(0, ge=0, description="Seed of the maps; every step has one of its own.")
    unsupported_parameters: Literal["error", "ignore"] = Field(
        "error", description="What to do with trainable parameters that have no per-sample rule."
    )

    @model_validator(mode="after")
    def _validation_is_used(self) -> Self:
        given = [name for name in ("validation", "subtask_column") if getattr(self, name) is not None]
        if self.target == "others" and given:
            raise ValueError(f"{given[0]} is used with target: validation only")
        if self.variant == "paper" and "max_grad_norm" in self.model_fields_set:
            raise ValueError("max_grad_norm is used with variant: official only")
        return self

    def settings(self, reduction: Literal["mean", "sum"], step: int) -> GradientSettings:
        """Return what the probe is asked for in a step: plain gradients at their own length, all by one map."""
        return GradientSettings(
            projection=self.projection,
            dim=self.proj_dim,
            seed=key_of(self.projection_seed, "doge", step) % 2**31,
            reduction=reduction,
            normalize=False,
            unsupported=self.unsupported_parameters,
        )


@register("mixer", "doge")
class DogeMixer(LossWeightMixer[DogeParams]):
    """Weighs domains by how their gradients agree."""

    def needs(self, run: RunView) -> Needs:
        """Return gradients, and validation samples if they are the target."""
        return Needs(
            measurements=(GradientFeatures(self.params.settings("sum", 0)),),
            validation=self.params if self.params.target == "validation" else None,
        )

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return every step's samples, and the validation samples drawn for it."""
        drawn = self.params.validation_size if self.params.target == "validation" else 0
        return float(run.decided_steps * (run.global_batch_size + min(drawn, run.validation)))

    def updated(self, weights: NDArray[np.float64], ctx: StepContext) -> NDArray[np.float64]:
        """Return the weights after one exponentiated-gradient step; unchanged at a learning rate of 0."""
        gains = np.zeros_like(weights)
        present = np.flatnonzero(ctx.tokens)
        if present.size:
            gradients = self._domain_gradients(ctx, present)
            targets = self._validation_gradients(ctx) if self.params.target == "validation" else None
            aligned = alignments(gradients, targets, self.params.variant, self.params.max_grad_norm)
            gains[present] = ctx.learning_rate * aligned / self.params.mu
        return exponentiated_update(weights, gains, self.params.reweight_eps)

    def _domain_gradients(self, ctx: StepContext, present: NDArray[np.int64]) -> Matrix:
        """Return the projected gradients of the mean losses of the domains ``present`` (P,) in the step, (P, k)."""
        features = ctx.probe.measure(GradientFeatures(self.params.settings("sum", ctx.step)), ctx.indices)
        owners = ctx.pool.domain_ids(ctx.indices)
        return np.stack(
            [features[owners == domain].sum(axis=0, dtype=np.float64) / ctx.tokens[domain] for domain in present]
        )

    def _validation_gradients(self, ctx: StepContext) -> Matrix:
        """Return the mean projected gradient of a few fresh validation samples of each sub-task, (S, k).

        Raises:
            ComponentError: if a sub-task has no sample with a trained token.
        """
        rng = derive_rng(self.params.validation_seed, "doge", ctx.step)
        drawn = []
        held = ctx.validation
        for name, low, high in zip(held.domains, held.offsets, held.offsets[1:], strict=False):
            usable = low + np.flatnonzero(held.trained[low:high])
            if not usable.size:
                raise ComponentError(f"no validation sample of {name!r} has a token that is trained on.")
            count = min(self.params.validation_size, usable.size)
            drawn.append(np.sort(rng.choice(usable, count, replace=False)))
        features = ctx.probe.measure(
            GradientFeatures(self.params.settings("mean", ctx.step)), np.concatenate(drawn), held
        )
        parts = np.split(features, np.cumsum([part.size for part in drawn])[:-1])
        return np.stack([part.mean(axis=0, dtype=np.float64) for part in parts])


def alignments(
    gradients: Matrix, targets: Matrix | None, variant: Literal["official", "paper"], max_grad_norm: float
) -> NDArray[np.float64]:
    """Return W of each domain, (K,).

    Args:
        gradients: of the domains, (K, k).
        targets: of the sub-tasks, (S, k), whose inner products are summed; none: the other domains are the targets.
        variant: as in the parameters.
        max_grad_norm: length that ``official`` cuts gradients to; 0: none.
    """
    if variant == "official" and max_grad_norm:
        gradients = _cut(gradients, max_grad_norm)
        targets = None if targets is None else _cut(targets, max_grad_norm)
    products = gradients @ (gradients if targets is None else targets).T
    if targets is None:
        np.fill_diagonal(products, 0.0)
    sums: NDArray[np.float64] = products.sum(axis=1)
    if variant == "paper":
        return sums
    mean_length = np.linalg.norm(gradients, axis=1).mean()
    return np.clip(sums / (mean_length + 1e-6), 0.0, HIGHEST)


def _cut(gradients: Matrix, length: float) -> Matrix:
    """Return gradients of that length at most."""
    lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients * np.minimum(1.0, length / np.maximum(lengths, np.finfo(np.float64).tiny))
