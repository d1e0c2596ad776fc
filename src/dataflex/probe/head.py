"""Per-sample means of a function of each token's logits, at about the price of the bare forward.

The language-model head runs inside the model's own forward on the positions that count, in chunks, so that the
(tokens x vocabulary) logits never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex.data.sums import row_sums
from dataflex.data.token_loss import IGNORE_INDEX, sample_means

HEAD_CHUNK = 1024
"""Positions the head is applied to at a time."""

Statistic = Callable[[Tensor, Tensor], Tensor]
"""From logits (n, V), float32, and labels (n,) to one number per position, (n,)."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of every position."""
    return F.cross_entropy(logits, labels, reduction="none")


def error_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ||softmax(logits) - one-hot(label)||_2 of every position (EL2N, Paul et al. 2021), in [0, sqrt(2)]."""
    scale = torch.logsumexp(logits, -1)
    squares = torch.exp(torch.logsumexp(2 * logits, -1) - 2 * scale)
    picked = torch.exp(logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - scale)
    return (squares - 2 * picked + 1).clamp(min=0).sqrt()


def full_forward(
    model: torch.nn.Module, inputs: dict[str, Any], labels: Tensor, statistic: Statistic = cross_entropy
) -> Tensor:
    """Return per-sample token means (B,) from the model's own logits; NaN where no token counts."""
    rows, columns = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
    logits = model(**inputs, use_cache=False).logits[rows, columns].float()
    return _means(statistic(logits, labels[rows, columns]), rows, columns, labels)


def chunked_forward(
    model: torch.nn.Module, inputs: dict[str, Any], labels: Tensor, statistic: Statistic = cross_entropy
) -> Tensor:
    """Return per-sample token means (B,), applying the head only where a token counts, in chunks."""
    rows, columns = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
    counted = labels[rows, columns]
    values = torch.zeros(rows.numel(), dtype=torch.float32, device=labels.device)

    def run(apply: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        for begin in range(0, rows.numel(), HEAD_CHUNK):
            part = slice(begin, begin + HEAD_CHUNK)
            values[part] = statistic(apply(hidden[rows[part], columns[part]]).float(), counted[part])
        return hidden[..., :1]

    with replaced_forward(model.get_output_embeddings(), run):
        model(**inputs, use_cache=False)
    return _means(values, rows, columns, labels)


def _means(values: Tensor, rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
    """Return means over each sample's positions, (B,)."""
    counts = (labels != IGNORE_INDEX).sum(1)
    return sample_means(row_sums(values, rows, columns, labels.shape), counts)


@contextmanager
def replaced_forward(
    module: torch.nn.Module, replacement: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> Iterator[None]:
    """Call ``replacement(original_forward, x)`` in place of ``module.forward(x)``; the module's hooks still run."""
    original = module.forward
    own = "forward" in module.__dict__
    module.forward = lambda x: replacement(original, x)
    try:
        yield
    finally:
        if own:
            module.forward = original
        else:
            del module.forward
