"""Weights of a step's samples together: like the validation samples, and unlike each other (DataFlex 1.1.0).

With z_i the embeddings of the n samples of a step (:mod:`~dataflex.weighters.base_anchors`), u the mean of the anchors'
at length 1, s_i = <u, z_i> and S_ij = <z_i, z_j>, the weights solve

    max over w in the simplex of  s'w - (beta / 2) w'S w + tau H(w),    H the entropy

which is concave. Its solution is the one fixed point of w = T(w), T(w) = softmax((s - beta S w) / tau), sought from
uniform weights by w <- (1 - d) w + d T(w). The loss is weighed with n w_i, mean 1.

The damping d: with D = T(w) - w, a step from w to w + d D raises the objective by at least

    (d / 2) (2 tau - d (tau + beta)) |D|_1^2

since T maximises it with its quadratic part made linear at w, and the entropy is strongly concave. So it converges for
every d < 2 / (1 + beta / tau). Undamped, d = 1 as in the earlier release, it oscillates if beta / tau is large. The
default is d = 2 / (2 + beta / tau), with which the error near the solution shrinks to beta / (2 tau + beta) of itself
in an iteration, or less.

Kin to "Filter-then-Weight" (arXiv 2604.00001).
Cost: no further forward of the step's samples without gradient accumulation, one forward of them with it; one gather of
n vectors; n^2 H operations. Every ``anchor_every`` steps one forward of the anchors and of the samples of the centre.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dataflex import RunOutline, StepBatch, register
from dataflex.weighters.base_anchors import AnchoredWeighter, AnchorParams

if TYPE_CHECKING:
    from torch import Tensor

_CLOSE = 1e-7
"""Iterations end when no weight (of mean 1) changes by more."""


class JointUpdateAwareParams(AnchorParams):
    """Parameters of the weights of a step's samples together."""

    earlier: ClassVar = {
        "beta": 0.1,
        "tau": 0.05,
        "iterations": 5,
        "damping": 1.0,
        "anchors": 1,
        "center_samples": 0,
        "pooling": "last",
    }

    beta: float = Field(0.5, ge=0, description="How much samples that are alike are turned down.")
    tau: float = Field(0.5, gt=0, description="Larger is nearer to uniform.")
    mode: Literal["full", "align_only", "diverse_only"] = Field(
        "full", description="Both parts, likeness to the anchors alone, or unlikeness to each other alone."
    )
    iterations: int = Field(200, ge=1, description="Iterations at most; they end early when nothing changes any more.")
    damping: float | None = Field(
        None, gt=0, le=1, description="Share of the new weights in an iteration; none: 2 / (2 + beta / tau)."
    )


@register("weighter", "joint_update_aware")
class JointUpdateAwareWeighter(AnchoredWeighter[JointUpdateAwareParams]):
    """Weights the samples of a step by what they add together."""

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that a step has one sample."""
        if run.global_batch_size == 1:
            return (
                "a step trains on one sample, whose weight among its like is always 1; raise "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        return None

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the samples, mean 1."""
        import torch

        params = self.params
        vectors, mean = self.compared(batch)
        likeness = vectors @ torch.nn.functional.normalize(mean, dim=0)
        if params.mode == "diverse_only":
            likeness = torch.zeros_like(likeness)
        beta = 0.0 if params.mode == "align_only" else params.beta
        damping = 2 / (2 + beta / params.tau) if params.damping is None else params.damping
        # On the processor: a few numbers, and on a device every iteration would wait to be told whether it is the last.
        both = torch.cat([likeness.unsqueeze(1), vectors @ vectors.T], dim=1).cpu()
        return joint_weights(both[:, 0], both[:, 1:], beta, params.tau, params.iterations, damping)


def joint_weights(likeness: Tensor, alike: Tensor, beta: float, tau: float, iterations: int, damping: float) -> Tensor:
    """Return n times the weights of the module's text, (n,).

    Args:
        likeness: s, (n,).
        alike: S, (n, n).
        beta: factor of the quadratic part.
        tau: factor of the entropy.
        iterations: at most.
        damping: d.
    """
    count = likeness.numel()
    weights = likeness.new_full((count,), 1 / count)
    for _ in range(iterations):
        target = ((likeness - beta * (alike @ weights)) / tau).softmax(0)
        change = damping * (target - weights)
        weights = weights + change
        if bool(change.abs().max() * count <= _CLOSE):
            break
    return weights * count
