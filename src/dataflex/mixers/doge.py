"""DoGE: domain weights in the loss by gradient alignment. Domains whose gradient helps other domains weigh more.

With g_i the gradient of domain i's mean token loss in a step, eta the learning rate and w the weights in the loss,

    W_i = <g_i, sum over j != i of g_j>     (target: others),   or   <g_i, g_target>     (target: validation),
    w_i <- w_i exp(eta W_i / mu), scaled to sum 1;     result: the mean of w over all steps.

The default ``variant: official`` follows the published code. Each gradient is clipped to the norm ``max_grad_norm``. W
is divided by the mean norm of the g_i (plus 1e-6) and clipped to [0, 5]. ``variant: paper`` is the printed formula. If
all gradients have norm 1 and W is in [0, 5], the two variants differ only by the 1e-6.

With all domains as targets, the published code intends to leave <g_i, g_i> out of W_i, as the formula does. The sets of
tensors that it compares are never equal, however, so <g_i, g_i> stays in. Here <g_i, g_i> is left out.

The g_i are sums of per-sample gradients over the step's samples. They are projected to ``proj_dim`` values each, with
another projection in every step, so that K whole gradients are never held in memory. The inner products of the
projections are unbiased with a standard deviation of about |g_i| |g_j| / sqrt(proj_dim), so their errors average out
over the steps. A domain without a trained token in the step has the gain W_i = 0 and is left out of the sums and the
mean. The published code uses the domain's last gradient instead.

Source: Fan et al., DoGE: Domain Reweighting with Generalization Estimation (ICML 2024, arXiv 2310.15393); code
Olivia-fsm/DoGE. Here the gradients are computed without dropout.
Cost: one more forward and backward pass of every step's samples, and one of the validation samples drawn for the step.
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
"""Upper bound of W in the official code. The lower bound is 0."""

Matrix = NDArray[np.float64]


class DogeParams(LossWeightParams, ValidationParams):
    """Parameters of DoGE."""

    target: Literal["others", "validation"] = Field(
        "others",
        description="Gradient that W compares a domain with: that of the other domains, or of validation samples.",
    )
    mu: float = Field(0.05, gt=0, description="Divisor of the gains: a smaller mu moves the weights faster.")
    reweight_eps: float = Field(
        0.0, ge=0, le=1, description="c, the share of equal weights mixed in: every weight is at least c / K."
    )
    variant: Literal["official", "paper"] = Field(
        "official",
        description="official: clip gradients, divide W by their mean norm, clip W to [0, 5]. paper: plain W.",
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="With variant: official, the norm that gradients are clipped to. 0: no clipping."
    )
    validation_size: int = Field(8, ge=1, description="Validation samples of each sub-task drawn for each step.")
    validation_seed: int = Field(0, ge=0, description="Seed of the draw of validation samples.")
    projection: Literal["count", "rademacher", "kronecker", "identity"] = Field(
        "count", description="Random linear map that shortens gradients. identity: no map (for tests)."
    )
    proj_dim: int = Field(
        8192, ge=1, description="Length of a projected gradient, at most the number of trainable parameters."
    )
    projection_seed: int = Field(0, ge=0, description="Seed of the projections; every step has another projection.")
    unsupported_parameters: Literal["error", "ignore"] = Field(
        "error", description="Trainable parameters without a per-sample gradient rule: raise an error, or ignore them."
    )

    @model_validator(mode="after")
    def _validation_is_used(self) -> Self:
        given = [name for name in ("validation", "subtask_column") if getattr(self, name) is not None]
        if self.target == "others" and given:
            raise ValueError(
                f"{given[0]} is used with target: validation only; set target: validation or remove {given[0]}"
            )
        if self.variant == "paper" and "max_grad_norm" in self.model_fields_set:
            raise ValueError("max_grad_norm is used with variant: official only; remove it, or use variant: official")
        return self

    def settings(self, reduction: Literal["mean", "sum"], step: int) -> GradientSettings:
        """Return the settings of a step's gradient measurement: plain gradients of any norm, one projection for all."""
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
    """Weighs the domains in the loss by the alignment of their gradients."""

    def needs(self, run: RunView) -> Needs:
        """Ask for gradients, and for validation samples if they are the target."""
        return Needs(
            measurements=(GradientFeatures(self.params.settings("sum", 0)),),
            validation=self.params if self.params.target == "validation" else None,
        )

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the samples of all decided steps, plus the validation samples drawn for each."""
        drawn = self.params.validation_size if self.params.target == "validation" else 0
        return float(run.decided_steps * (run.global_batch_size + min(drawn, run.validation)))

    def updated(self, weights: NDArray[np.float64], ctx: StepContext) -> NDArray[np.float64]:
        """Return the weights after one exponentiated-gradient step. A learning rate of 0 leaves them unchanged."""
        gains = np.zeros_like(weights)
        present = np.flatnonzero(ctx.tokens)
        if present.size:
            gradients = self._domain_gradients(ctx, present)
            targets = self._validation_gradients(ctx) if self.params.target == "validation" else None
            aligned = alignments(gradients, targets, self.params.variant, self.params.max_grad_norm)
            gains[present] = ctx.learning_rate * aligned / self.params.mu
        return exponentiated_update(weights, gains, self.params.reweight_eps)

    def _domain_gradients(self, ctx: StepContext, present: NDArray[np.int64]) -> Matrix:
        """Return the projected gradients of the mean losses of the P domains ``present`` in the step, (P, k)."""
        features = ctx.probe.measure(GradientFeatures(self.params.settings("sum", ctx.step)), ctx.indices)
        owners = ctx.pool.domain_ids(ctx.indices)
        return np.stack(
            [features[owners == domain].sum(axis=0, dtype=np.float64) / ctx.tokens[domain] for domain in present]
        )

    def _validation_gradients(self, ctx: StepContext) -> Matrix:
        """Return the mean projected gradient of a few validation samples of each sub-task, (S, k).

        The samples are drawn for this step.

        Raises:
            ComponentError: if a sub-task has no sample with a trained token.
        """
        rng = derive_rng(self.params.validation_seed, "doge", ctx.step)
        drawn = []
        held = ctx.validation
        for name, low, high in zip(held.domains, held.offsets, held.offsets[1:], strict=False):  # M + 1 offsets
            usable = low + np.flatnonzero(held.trained[low:high])
            if not usable.size:
                raise ComponentError(
                    f"no validation sample of {name!r} has a token that is trained on. Check its template "
                    "and cutoff_len."
                )
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
        gradients: gradients of the domains, (K, k).
        targets: gradients of the sub-tasks, (S, k); the inner products with all of them are summed. None means that the
            other domains are the targets.
        variant: as in the parameters.
        max_grad_norm: norm that ``official`` clips gradients to. 0 means no clipping.
    """
    if variant == "official" and max_grad_norm:
        gradients = _cut(gradients, max_grad_norm)
        targets = None if targets is None else _cut(targets, max_grad_norm)
    products = gradients @ (gradients if targets is None else targets).T
    if targets is None:
        # The formula sums over j != i.
        np.fill_diagonal(products, 0.0)
    sums: NDArray[np.float64] = products.sum(axis=1)
    if variant == "paper":
        return sums
    mean_length = np.linalg.norm(gradients, axis=1).mean()
    return np.clip(sums / (mean_length + 1e-6), 0.0, HIGHEST)


def _cut(gradients: Matrix, length: float) -> Matrix:
    """Return the gradients, scaled down to the norm ``length`` if they are longer."""
    lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients * np.minimum(1.0, length / np.maximum(lengths, np.finfo(np.float64).tiny))
