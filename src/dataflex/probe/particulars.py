"""What is particular to a model, found out on two short samples.

At every measurement: whether the head may be applied chunk by chunk (a model that changes its logits behind the head
in a way that its configuration does not tell is probed through its own logits from then on).
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
"""Samples whose losses and gradients are compared with the model's own."""
_COMPARED_TOKENS = 256
"""Tokens of each whose logits are; all logits of a long sample may not fit into the memory."""
_LOOKED_AT = 64
"""Samples among which those are looked for."""
_AGREEMENT = 2e-3
_AGREEMENT_LOW_PRECISION = 2e-2


def look_at_head(probe: ModelProbe, samples: Samples, indices: IndexArray) -> None:
    """Find out whether the chunked head gives the model's own losses; stays open if no sample has one.

    Asked at every measurement while it does: a cap on the logits may matter only later in training.
    """
    if probe.chunked_head is False or not indices.size:
        return
    found = distributed.on_each(partial(_heads_agree, probe, samples, indices))
    if None in found:
        return
    probe.chunked_head = all(found)
    if not probe.chunked_head:
        logger.info("The model changes its logits after the head: losses are taken from its full logits.")


def _heads_agree(probe: ModelProbe, samples: Samples, indices: IndexArray) -> bool | None:
    """Return whether the chunked head gives the model's own losses; None if no sample has one."""
    model = probe.model()
    inputs, labels = inputs_of(probe.collated(samples, short_samples(samples, indices)), probe.device)
    return head_agrees(model, inputs, labels, probe.device)


def head_agrees(model: torch.nn.Module, inputs: dict[str, Any], labels: Tensor, device: torch.device) -> bool | None:
    """Return whether the chunked head gives a model's own losses; None if no token of the samples is trained on.

    Args:
        model: run twice.
        inputs: of the model.
        labels: shifted, (B, T).
        device: the model runs on.
    """
    labels = first_counted(labels, _COMPARED_TOKENS)
    chunked, plain = chunked_forward(model, inputs, labels), full_forward(model, inputs, labels)
    tolerance = _AGREEMENT_LOW_PRECISION if is_low_precision(model, device) else _AGREEMENT
    scored = ~torch.isnan(plain)
    if not scored.any():
        return None
    return torch.allclose(chunked[scored], plain[scored], rtol=tolerance, atol=tolerance)


def short_samples(samples: Samples, indices: IndexArray) -> IndexArray:
    """Return a few short samples with a token to train on, or just short ones where there are none near."""
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
    """Return the labels of a sample; a collator of plain text makes them from its tokens."""
    return row["labels"] if "labels" in row else row["input_ids"]
