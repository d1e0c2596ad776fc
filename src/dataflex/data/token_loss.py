"""Token cross entropy under the Hugging Face shift convention, shared by training and probing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex.data.pool import IGNORE_INDEX as IGNORE_INDEX


def shifted(labels: Tensor) -> Tensor:
    """Return the label that the model predicts at each position: (B, T) -> (B, T). The last column is ignored."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of every position, (B, T), float32 (float64 for float64 logits); 0 at ignored positions.

    Args:
        logits: (B, T, V).
        labels: already shifted, (B, T).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = wide.view(-1, logits.size(-1))
    labels = labels.to(logits.device)
    losses = F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view(labels.shape)


def sample_means(sums: Tensor, counts: Tensor) -> Tensor:
    """Return ``sums / counts``, all of shape (B,).

    The result is NaN if nothing was counted, and infinity if something was counted and the mean is not finite. The two
    cases are never mixed.
    """
    means = sums / counts.clamp(min=1)
    return torch.where(counts > 0, torch.where(torch.isfinite(means), means, torch.inf), torch.nan)
