"""The loss probe: token-mean losses of any samples, at about the price of the bare forward.

Batches are sorted by length and cut under a token budget, the same ones on any number of processes; each process runs
its share, and all run the same number of forwards (a repeated batch is thrown away), because under ZeRO-3 and FSDP a
forward is collective. The language-model head runs inside the model's own forward on the positions that count, in
chunks, so that the (tokens x vocabulary) logits never exist at once. Two samples of every call are compared with the
model's own logits; a model that changes its logits after the head is probed through them from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataflex import distributed
from dataflex.data.pool import Pool
from dataflex.data.sampling import IndexArray
from dataflex.probe.cost import Cost
from dataflex.probe.mode import probe_mode
from dataflex.selection import ScoreArray
from dataflex.token_loss import IGNORE_INDEX, sample_means, shifted, token_losses

logger = logging.getLogger(__name__)

_HEAD_CHUNK = 1024
"""Positions the head is applied to at a time."""
_COMPARED_SAMPLES = 2
"""Samples of every call whose losses are also taken from the model's own logits."""
_LOOKED_AT = 64
"""Samples among which those are looked for."""
_AGREEMENT = 2e-3
_AGREEMENT_LOW_PRECISION = 2e-2


@dataclass
class ModelProbe:
    """Measurements on the model in training.

    Attributes:
        pool: the samples.
        model: returns the module to run (the raw one; the wrapper's own forward belongs to training).
        collate: the training collator, on rows of the pool.
        autocast: the training precision.
        device: where the model lives.
        batch_tokens: tokens, padding counted, of one forward.
        progress: whether to show a progress bar.
    """

    pool: Pool
    model: Callable[[], torch.nn.Module]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    batch_tokens: int
    progress: bool = False
    cost: Cost = field(default_factory=Cost)
    _chunked_head: bool | None = None

    def losses(self, indices: IndexArray) -> ScoreArray:
        """Return the token-mean loss of each sample, shape (n,), float32; NaN where no token is trained on."""
        lengths = self.pool.lengths[indices]
        batches = length_batches(lengths, self.batch_tokens)
        mine, useful = share_of(batches, distributed.rank(), distributed.world_size())
        values = torch.zeros(indices.size, dtype=torch.float32, device=self.device)
        model = self.model()
        with probe_mode(model), self.autocast():
            if mine and self._chunked_head is not False:
                self._chunked_head = self._head_agrees(model, self._labelled(indices))
            bar = tqdm(mine, desc="Scoring", unit="batch", disable=not self.progress, leave=False)
            for number, batch in enumerate(bar):
                losses = self._batch_losses(model, indices[batch])
                if number < useful:
                    values[torch.from_numpy(batch).to(self.device)] = losses
        result = distributed.all_reduce_sum(values).cpu().numpy()
        self.cost.samples += indices.size
        self.cost.tokens += int(lengths.sum())
        return result

    def _batch_losses(self, model: torch.nn.Module, indices: IndexArray) -> Tensor:
        inputs, targets = self._collated(indices)
        if self._chunked_head:
            return chunked_forward(model, inputs, targets)
        return full_forward(model, inputs, targets)

    def _collated(self, indices: IndexArray) -> tuple[dict[str, Any], Tensor]:
        """Return a batch's model inputs on the device, and its shifted labels (B, T)."""
        inputs = {key: _to(value, self.device) for key, value in self.collate(self.pool.rows(indices)).items()}
        return inputs, shifted(inputs.pop("labels"))

    def _labelled(self, indices: IndexArray) -> IndexArray:
        """Return a few short samples with a token to train on, or just short ones where there are none near."""
        shortest = indices[np.argsort(self.pool.lengths[indices], kind="stable")[:_LOOKED_AT]]
        trained = [any(label != IGNORE_INDEX for label in _labels(row)[1:]) for row in self.pool.rows(shortest)]
        return shortest[np.argsort(~np.array(trained), kind="stable")[:_COMPARED_SAMPLES]]

    def _head_agrees(self, model: torch.nn.Module, indices: IndexArray) -> bool | None:
        """Return whether the chunked head gives the model's own losses; None where no sample has a loss."""
        inputs, targets = self._collated(indices)
        chunked = chunked_forward(model, inputs, targets)
        plain = full_forward(model, inputs, targets)
        full_precision = next(model.parameters()).dtype in (torch.float32, torch.float64)
        low = torch.is_autocast_enabled(self.device.type) or not full_precision
        tolerance = _AGREEMENT_LOW_PRECISION if low else _AGREEMENT
        scored = ~torch.isnan(plain)
        agrees = torch.allclose(chunked[scored], plain[scored], rtol=tolerance, atol=tolerance)
        agrees = distributed.everywhere(agrees, self.device)
        if distributed.everywhere(not scored.any(), self.device):
            return None
        if not agrees:
            logger.info("The model changes its logits after the head: losses are taken from its full logits.")
        return agrees


def _labels(row: dict[str, Any]) -> list[int]:
    """Return the labels of a sample; a collator of plain text makes them from its tokens."""
    return row["labels"] if "labels" in row else row["input_ids"]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def full_forward(model: torch.nn.Module, inputs: dict[str, Any], targets: Tensor) -> Tensor:
    """Return per-sample token-mean losses (B,) from the model's own logits."""
    losses = token_losses(model(**inputs, use_cache=False).logits, targets)
    return sample_means(losses.sum(1), (targets != IGNORE_INDEX).sum(1))


def chunked_forward(model: torch.nn.Module, inputs: dict[str, Any], targets: Tensor) -> Tensor:
    """Return per-sample token-mean losses (B,), applying the head only where a token counts, in chunks."""
    rows, columns = torch.nonzero(targets != IGNORE_INDEX, as_tuple=True)
    labels = targets[rows, columns]
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    head = model.get_output_embeddings()

    def run(apply: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        for begin in range(0, rows.numel(), _HEAD_CHUNK):
            part = slice(begin, begin + _HEAD_CHUNK)
            logits = apply(hidden[rows[part], columns[part]]).float()
            losses[rows[part], columns[part]] = torch.nn.functional.cross_entropy(
                logits, labels[part], reduction="none"
            )
        return hidden[..., :1]

    with replaced_forward(head, run):
        model(**inputs, use_cache=False)
    return sample_means(losses.sum(1), (targets != IGNORE_INDEX).sum(1))


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


def length_batches(lengths: np.ndarray, batch_tokens: int) -> list[IndexArray]:
    """Return positions in batches of similar length, longest first, each at most ``batch_tokens`` with padding.

    A sample longer than the budget is a batch of its own. The batches depend on nothing but the arguments.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches, begin = [], 0
    while begin < order.size:
        width = max(1, int(lengths[order[begin]]))
        count = max(1, batch_tokens // width)
        batches.append(order[begin : begin + count])
        begin += count
    return batches


def share_of(batches: list[IndexArray], rank: int, world_size: int) -> tuple[list[IndexArray], int]:
    """Return the batches of one process and how many of them count; all processes get the same number.

    Batches of neighbouring lengths are dealt out in turn, which balances tokens.
    """
    mine = batches[rank::world_size]
    useful = len(mine)
    most = -(-len(batches) // world_size)
    return mine + batches[:1] * (most - useful), useful
