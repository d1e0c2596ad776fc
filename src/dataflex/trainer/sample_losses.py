"""Losses of the samples or tokens of a step, joined with its one reduction over the processes."""

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
    """Keeps what the micro-batches of a step showed of their samples, on the device.

    Args:
        kept: the mean of every sample, or also the loss of every token.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def add(self, sums: Tensor, counts: Tensor, per_token: Tensor, labels: Tensor) -> None:
        """Add a micro-batch.

        Args:
            sums: of the token losses of each sample, (B,).
            counts: of the tokens, (B,).
            per_token: token losses, (B, T).
            labels: shifted, (B, T).
        """
        self._sums.append(sums)
        self._counts.append(counts)
        if self.kept == "tokens":
            self._tokens.append(torch.where(labels == IGNORE_INDEX, torch.nan, per_token))

    def packed(self, columns: int, like: Tensor) -> Tensor:
        """Return this process's part, to be added to those of the others: flat, 0 where theirs are.

        Args:
            columns: tokens of the longest sample of the step.
            like: has the type and the device of what is reduced.
        """
        rows = [sample_means(sums, counts).unsqueeze(1) for sums, counts in zip(self._sums, self._counts, strict=True)]
        if self.kept == "tokens":
            wide = [
                torch.nn.functional.pad(each, (0, columns - each.shape[1]), value=torch.nan) for each in self._tokens
            ]
            rows = [torch.cat(parts, dim=1) for parts in zip(rows, wide, strict=True)]
        own = torch.stack(rows).to(like)  # (micro-batches, B, values of a sample): all are of one size in a plan
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
        """Return the means of the samples, (n,), in the order of the plan, and the losses of their tokens, (n, T).

        Those of tokens are NaN where none is trained on, and (n, 0) if they are not kept.

        Args:
            values: the sum of what every process packed.
            samples: of the step, n.
            tokens: of the step that count, for a check.
            step: its number, for messages.

        Raises:
            ComponentError: if a trained token lies behind the end of its sample, as in a batch padded at the left.
        """
        table = values.reshape(samples, -1).astype(np.float32)
        found = table[:, 1:]
        if self.kept == "tokens" and int((~np.isnan(found)).sum()) != tokens:
            raise ComponentError(
                f"step {step}: the losses of {int((~np.isnan(found)).sum())} tokens are where {tokens} are trained on; "
                'samples must be padded at the right for step_losses: "tokens".'
            )
        return table[:, 0], found
