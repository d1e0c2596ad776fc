"""The loss of a stage in which a sample has one loss, and not one for each token, such as a pair of responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class StageLosses:
    """Losses of the samples of a batch.

    Attributes:
        losses: loss of each sample, (B,), differentiable if gradients are enabled.
        margins: reward of the chosen response minus reward of the rejected one, (B,), detached. None if a sample has
            only one response, or if the stage has no rewards.
    """

    losses: Tensor
    margins: Tensor | None = None


class StageLoss(Protocol):
    """Computes one loss for each sample of a batch, with the code of the stage's own trainer.

    A batch is the output of the training collator on the device of the model, with labels. Each sample may have several
    rows of model inputs: in a batch of B samples, row r belongs to sample r mod B. The loss of a sample does not depend
    on the other samples of the batch.
    """

    @property
    def rows(self) -> int:
        """Rows of model inputs of a sample."""
        ...

    @property
    def reference_size(self) -> int:
        """Number of values of a sample that a frozen reference model gives; 0 without such a model."""
        ...

    @property
    def has_margins(self) -> bool:
        """Whether samples have reward margins."""
        ...

    def __call__(
        self, model: torch.nn.Module, batch: Mapping[str, Any], reference: Tensor | None = None
    ) -> StageLosses:
        """Return the losses of a batch.

        Args:
            model: the model in training.
            batch: the batch.
            reference: values of :meth:`reference`, (B, reference_size). None computes them.
        """
        ...

    def reference(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the values of the frozen reference model for a batch, (B, reference_size), without gradients.

        Args:
            model: the model in training. It is the reference without its adapter, if the run has one.
            batch: the batch.
        """
        ...

    def token_batch(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the batch from which measurements read tokens and hidden states, with one row for each sample.

        In a stage of pairs, these are the prompts with the chosen responses.

        Args:
            rows: samples in the format of the training collator.
        """
        ...
