"""Joint weights of a step's samples: similar to the validation samples, and unlike each other (DataFlex 1.1.0).

z_i are the embeddings of the n samples of a step (:mod:`~dataflex.weighters.base_anchors`), and u is the mean of the
anchors' embeddings, scaled to length 1. With s_i = <u, z_i> and S_ij = <z_i, z_j>, the weights solve

    max over w in the simplex of  s'w - (beta / 2) w'S w + tau H(w),    H the entropy.

The problem is concave. Its solution is the only fixed point of w = T(w), T(w) = softmax((s - beta S w) / tau). From
uniform weights it is found by the iteration w <- (1 - d) w + d T(w). The loss is multiplied by n w_i, mean 1.

The damping d: with D = T(w) - w, a step from w to w + d D raises the objective by at least

    (d / 2) (2 tau - d (tau + beta)) |D|_1^2

because T(w) maximises the objective with its quadratic part linearised at w, and the entropy is strongly concave. So
the iteration converges for every d < 2 / (1 + beta / tau). Without damping, d = 1 as in the earlier release, it
oscillates if beta / tau is large. The default is d = 2 / (2 + beta / tau). Near the solution each iteration then
shrinks the error to at most beta / (2 tau + beta) of its size.

Related method: "Filter-then-Weight" (arXiv 2604.00001).
Cost: without gradient accumulation no further forward pass over the step's samples, with it one. One gather of n
vectors, and n^2 H operations. Every ``anchor_every`` steps one forward pass over the anchors and the samples of the
centre.
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
    """Parameters of the joint weights of a step's samples."""

    earlier: ClassVar = {
        "beta": 0.1,
        "tau": 0.05,
        "iterations": 5,
        "damping": 1.0,
        "anchors": 1,
        "center_samples": 0,
        "pooling": "last",
    }

    beta: float = Field(0.5, ge=0, description="Penalty on the weights of samples that are similar to each other.")
    tau: float = Field(0.5, gt=0, description="Weight of the entropy; larger values make the weights more uniform.")
    mode: Literal["full", "align_only", "diverse_only"] = Field(
        "full",
        description="full: both parts; align_only: similarity to the anchors alone; diverse_only: dissimilarity to "
        "each other alone.",
    )
    iterations: int = Field(
        200, ge=1, description="Largest number of iterations; they end early when no weight changes by more than 1e-7."
    )
    damping: float | None = Field(
        None,
        gt=0,
        le=1,
        description="d, the share of the new weights in each iteration. If null, 2 / (2 + beta / tau).",
    )


@register("weighter", "joint_update_aware")
class JointUpdateAwareWeighter(AnchoredWeighter[JointUpdateAwareParams]):
    """Weights the samples of a step jointly, by what they add to each other."""

    reads_losses = False

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if a step has a single sample."""
        if run.global_batch_size == 1:
            return (
                "a step trains on one sample, whose weight in the step is always 1; raise "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        return None

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the samples, mean 1, shape (n,)."""
        import torch

        params = self.params
        vectors, mean = self.compared(batch)
        likeness = vectors @ torch.nn.functional.normalize(mean, dim=0)
        if params.mode == "diverse_only":
            likeness = torch.zeros_like(likeness)
        beta = 0.0 if params.mode == "align_only" else params.beta
        damping = 2 / (2 + beta / params.tau) if params.damping is None else params.damping
        # The iteration runs on the CPU: the tensors are small, and on an accelerator the test for the end of the
        # iteration would wait for the device each time.
        both = torch.cat([likeness.unsqueeze(1), vectors @ vectors.T], dim=1).cpu()
        return joint_weights(both[:, 0], both[:, 1:], beta, params.tau, params.iterations, damping)


def joint_weights(likeness: Tensor, alike: Tensor, beta: float, tau: float, iterations: int, damping: float) -> Tensor:
    """Return n times the weights w of the module's docstring, shape (n,).

    Args:
        likeness: s, shape (n,).
        alike: S, shape (n, n).
        beta: factor of the quadratic part.
        tau: factor of the entropy.
        iterations: largest number of iterations.
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
