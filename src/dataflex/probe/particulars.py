"""Checks of a model's behaviour on two short samples.

Each measurement that uses the head checks whether the head may be applied in chunks. If a model changes its logits
after the head in a way that its configuration does not describe, later measurements use the model's own logits.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex import distributed
from dataflex.data.rules import top_k
from dataflex.data.samples import Samples
from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.probe.batches import inputs_of
from dataflex.probe.head import chunked_forward, first_counted, full_forward

if TYPE_CHECKING:
    from dataflex.probe.model import ModelProbe

logger = logging.getLogger(__name__)

COMPARED_SAMPLES = 2
"""Number of samples whose losses and gradients are compared with the model's own."""
_COMPARED_TOKENS = 256
"""Number of tokens of each sample whose logits are compared; all logits of a long sample may not fit into memory."""
_LOOKED_AT = 64
"""Number of shortest samples among which the compared samples are searched."""
_AGREEMENT = 2e-3
"""Largest relative and absolute difference of losses that counts as equal."""
_AGREEMENT_LOW_PRECISION = 2e-2
"""The same in 16 bits."""


def look_at_head(probe: ModelProbe, samples: Samples, indices: IndexArray) -> None:
    """Find out whether the chunked head gives the model's own losses; leave it open if no sample has a loss.

    Every measurement checks again while the answer is yes, because a cap on the logits may matter only later in
    training.
    """
    if probe.chunked_head is False or not indices.size:
        return
    found = distributed.on_each(partial(_heads_agree, probe, samples, indices))
    if None in found:
        return
    probe.chunked_head = all(found)
    if not probe.chunked_head:
        logger.info("The model changes its logits after the head, so losses are computed from its own logits.")


def _heads_agree(probe: ModelProbe, samples: Samples, indices: IndexArray) -> bool | None:
    """Return whether the chunked head gives the model's own losses; None if no sample has a loss."""
    model = probe.model()
    inputs, labels = inputs_of(probe.token_batch(samples, short_samples(samples, indices)), probe.device)
    return head_agrees(model, inputs, labels, probe.device)


def head_agrees(model: torch.nn.Module, inputs: dict[str, Any], labels: Tensor, device: torch.device) -> bool | None:
    """Return whether the chunked head gives a model's own losses; None if no token of the samples is trained on.

    Args:
        model: the model; its forward runs twice.
        inputs: inputs of the model.
        labels: shifted labels, (B, T).
        device: device of the model.
    """
    labels = first_counted(labels, _COMPARED_TOKENS)
    chunked, plain = chunked_forward(model, inputs, labels), full_forward(model, inputs, labels)
    tolerance = _AGREEMENT_LOW_PRECISION if is_low_precision(model, device) else _AGREEMENT
    scored = ~torch.isnan(plain)
    if not scored.any():
        return None
    return torch.allclose(chunked[scored], plain[scored], rtol=tolerance, atol=tolerance)


def short_samples(samples: Samples, indices: IndexArray) -> IndexArray:
    """Return a few short samples, first those with a token to train on."""
    lengths = samples.lengths[indices]
    places = top_k(-lengths, _LOOKED_AT)
    shortest = indices[places[np.argsort(lengths[places], kind="stable")]]
    trained = [any(label != IGNORE_INDEX for label in _labels(row)[1:]) for row in samples.rows(shortest)]
    return shortest[np.argsort(~np.array(trained), kind="stable")[:COMPARED_SAMPLES]]


def is_low_precision(model: torch.nn.Module, device: torch.device) -> bool:
    """Return whether a model computes in 16 bits."""
    full = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return torch.is_autocast_enabled(device.type) or not full


def _labels(row: dict[str, Any]) -> list[int]:
    """Return the labels of a sample, or of the chosen response of a pair.

    A sample without labels gives its tokens, from which a collator makes the labels.
    """
    found: list[int] = next(row[name] for name in ("labels", "chosen_labels", "input_ids") if name in row)
    return found
