"""Losses of the samples or tokens of a step, gathered with the step's single reduction over the processes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex import distributed
from dataflex.data.token_loss import IGNORE_INDEX, sample_means
from dataflex.errors import ComponentError

Kept = Literal["samples", "tokens"]


class SampleLosses:
    """Stores the losses of the samples of a step's micro-batches on the device.

    Args:
        kept: "samples" stores the mean loss of each sample; "tokens" also stores the loss of each token.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self._sums: list[Tensor] = []
        """Summed token losses of each micro-batch, (B,) each."""
        self._counts: list[Tensor] = []
        """Number of counted tokens of each sample of each micro-batch, (B,) each."""
        self._tokens: list[Tensor] = []
        """Token losses of each micro-batch, (B, T) each, NaN at positions that do not count."""

    def add(self, sums: Tensor, counts: Tensor, per_token: Tensor, labels: Tensor) -> None:
        """Add a micro-batch.

        Args:
            sums: summed token losses of each sample, (B,).
            counts: number of tokens of each sample that count in the loss, (B,).
            per_token: token losses, (B, T).
            labels: shifted labels, (B, T).
        """
        self._sums.append(sums)
        self._counts.append(counts)
        if self.kept == "tokens":
            self._tokens.append(torch.where(labels == IGNORE_INDEX, torch.nan, per_token))

    def packed(self, columns: int, like: Tensor) -> Tensor:
        """Return this process's part of the reduction, flat, with zeros at the positions of the other processes.

        The sum over all processes then holds the values of every process, so the step needs no separate gather.

        Args:
            columns: number of tokens of the step's longest sample.
            like: a tensor with the type and the device of the reduction.
        """
        rows = [sample_means(sums, counts).unsqueeze(1) for sums, counts in zip(self._sums, self._counts, strict=True)]
        if self.kept == "tokens":
            wide = [
                torch.nn.functional.pad(each, (0, columns - each.shape[1]), value=torch.nan) for each in self._tokens
            ]
            rows = [torch.cat(parts, dim=1) for parts in zip(rows, wide, strict=True)]
        own = torch.stack(rows).to(like)  # (micro-batches, B, values of a sample); a plan's micro-batches are full
        everyone = torch.zeros(
            own.shape[0], distributed.world_size(), *own.shape[1:], dtype=like.dtype, device=like.device
        )
        everyone[:, distributed.rank()] = own
        for each in (self._sums, self._counts, self._tokens):
            each.clear()
        return everyone.flatten()

    def unpacked(
        self, values: NDArray[np.float64], samples: int, tokens: int, step: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the mean losses of the samples, (n,), and the losses of their tokens, (n, T).

        Both are in the order of the plan. A token loss is NaN at positions that are not trained on. The shape is (n, 0)
        if token losses are not stored.

        Args:
            values: sum of the parts that all processes packed.
            samples: number of samples of the step, n.
            tokens: number of tokens of the step that count in the loss, for a check.
            step: number of the step, for messages.

        Raises:
            ComponentError: if a trained token lies behind the end of its sample, as in a batch padded on the left.
        """
        table = values.reshape(samples, -1).astype(np.float32)
        found = table[:, 1:]
        if self.kept == "tokens" and int((~np.isnan(found)).sum()) != tokens:
            raise ComponentError(
                f"step {step}: found the losses of {int((~np.isnan(found)).sum())} tokens, but {tokens} tokens are "
                'trained on. A component with step_losses: "tokens" needs batches that are padded on the right.'
            )
        return table[:, 0], found
