"""Loss, perplexity and bits per byte of every evaluation data set, from the Trainer's own evaluation forwards.

A sample counts once whatever the batches and the processes are; tokens and bytes are those of the labels that count
in the loss. Sums are made in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex import distributed
from dataflex.data.pool import Pool
from dataflex.data.sums import sum_dtype
from dataflex.data.token_loss import IGNORE_INDEX, shifted, token_losses
from dataflex.errors import DivergenceError

TOKEN_WEIGHTED, UNWEIGHTED = "token_weighted", "unweighted"
METRICS = ("loss", "perplexity", "bits_per_byte")

Numbers = dict[str, Any]


class DomainEvaluation:
    """Measures one pass over evaluation samples, batch by batch.

    Args:
        sets: the evaluation samples, one domain for each data set.
        decode: token ids to text, without special tokens.
        device: where the model runs.
    """

    def __init__(self, sets: Pool, decode: Callable[[list[int]], str], device: torch.device) -> None:
        self.sets, self._decode, self._device = sets, decode, device
        self._bytes = np.full(sets.size, -1, dtype=np.int64)
        """Bytes of each sample's counted text, -1 where not known on this process."""
        self.clear()

    def clear(self) -> None:
        """Start a new pass."""
        # Loss sum, tokens and bytes of each sample this process saw, -1 where it saw none.
        self._seen = np.full((self.sets.size, 3), -1.0)

    def add(self, indices: NDArray[np.int64], logits: Tensor, input_ids: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            indices: number of each sample in :attr:`sets`, (B,).
            logits: (B, T, V).
            input_ids: (B, T).
            labels: (B, T), not shifted.
        """
        expected = shifted(labels)
        # One sample at a time, because the logits are made float32 for it.
        losses = torch.cat([token_losses(logits[i : i + 1], expected[i : i + 1]) for i in range(len(indices))])
        seen = torch.stack([losses, (expected != IGNORE_INDEX).to(losses)]).cpu()  # one wait for the device
        totals, counts = seen.double().sum(2).numpy()
        unknown = np.flatnonzero(self._bytes[indices] < 0)
        if unknown.size:
            tokens = torch.stack([input_ids, labels]).cpu()
            for row in unknown:
                ids, own = tokens[:, row].tolist()
                self._bytes[indices[row]] = counted_bytes(ids, own, self._decode)
        self._seen[indices] = np.column_stack([totals, counts, self._bytes[indices]])

    def finish(self) -> dict[str, Numbers] | None:
        """Return the numbers of each domain seen on any process, and start a new pass; None where nothing was seen.

        Returns:
            Domain to loss (mean over its tokens, nats), perplexity, bits_per_byte (None where there is no byte),
            tokens, bytes and samples. A domain without a counted token has NaN for a loss.
        """
        seen = torch.from_numpy(self._seen).to(self._device, sum_dtype(self._device))
        everyone = distributed.all_gather(seen).view(-1, *seen.shape).amax(0).cpu().double().numpy()
        self.clear()
        found = {}
        for name, begin, end in zip(self.sets.domains, self.sets.offsets[:-1], self.sets.offsets[1:], strict=True):
            part = everyone[begin:end]
            part = part[part[:, 1] >= 0]
            if part.size:
                total, tokens, size = part.sum(0)
                found[name] = {**numbers(total, tokens, size), "samples": len(part)}
        return found or None


def check_evaluation(domains: dict[str, Numbers], step: int) -> None:
    """Check that every evaluation set with a token that counts has a finite loss; one without has NaN.

    Args:
        domains: as :meth:`DomainEvaluation.finish` returns them.
        step: optimizer steps done.

    Raises:
        DivergenceError: naming the first set whose loss is not finite.
    """
    for name, found in domains.items():
        loss = found["loss"]
        if found["tokens"] and (loss is None or not math.isfinite(loss)):
            raise DivergenceError(f"the loss of evaluation set {name!r} after step {step} is {loss}")


def numbers(total: float, tokens: float, size: float) -> Numbers:
    """Return the metrics of a text: from its loss sum in nats, its tokens and its bytes."""
    loss = total / tokens if tokens else math.nan
    bits = total / math.log(2) / size if size else None
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits,
        "tokens": int(tokens),
        "bytes": int(size),
    }


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, infinity where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def means(domains: dict[str, Numbers]) -> dict[str, Numbers]:
    """Return the metrics over all tokens together and their means over the domains.

    Args:
        domains: as :meth:`DomainEvaluation.finish` returns them. Domains without a token are left out.
    """
    known = [each for each in domains.values() if each["tokens"]]
    tokens = np.array([each["tokens"] for each in known], dtype=np.float64)
    sizes = np.array([each["bytes"] for each in known], dtype=np.float64)
    losses = np.array([each["loss"] for each in known], dtype=np.float64)
    together = numbers(float(losses @ tokens), float(tokens.sum()), float(sizes.sum()))
    loss = float(losses.mean()) if known else math.nan
    bits = [each["bits_per_byte"] for each in known]
    return {
        TOKEN_WEIGHTED: {name: together[name] for name in METRICS},
        UNWEIGHTED: {
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": None if None in bits or not bits else float(np.mean(np.array(bits, dtype=np.float64))),
        },
    }


def as_logs(groups: dict[str, Numbers], prefix: str) -> dict[str, float]:
    """Return ``<prefix>_<group>_<metric>`` of every group, as trackers take them; those that are finite numbers."""
    return {
        f"{prefix}_{name}_{metric}": value
        for name, group in groups.items()
        for metric in METRICS
        if (value := group[metric]) is not None and math.isfinite(value)
    }


def counted_bytes(input_ids: list[int], labels: list[int], decode: Callable[[list[int]], str]) -> int:
    """Return the UTF-8 bytes of the text that the labels in the loss stand for; special tokens have none.

    The text of a stretch of labels is what the sample's text gains by it, so that a tokenizer's treatment of a leading
    space does not matter. Padding behind the last counted label is not looked at.
    """
    counted = [position for position in range(1, len(labels)) if labels[position] != IGNORE_INDEX]
    size, position = 0, 0
    while position < len(counted):
        begin = counted[position]
        end = begin + 1
        while position + 1 < len(counted) and counted[position + 1] == end:
            position, end = position + 1, end + 1
        size += len(decode(input_ids[:end]).encode()) - len(decode(input_ids[:begin]).encode())
        position += 1
    return size
