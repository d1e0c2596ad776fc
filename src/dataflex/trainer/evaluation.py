"""Metrics of every evaluation set, from the Trainer's own evaluation forward passes.

If tokens have losses, they are loss, perplexity and bits per byte. Tokens and bytes are those of the labels that count
in the loss. In a preference stage a sample has one loss, and the metrics are the loss, and the accuracy and the margin
of pairs. A sample counts once, however it is batched and distributed over processes. Sums are computed in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
from dataflex.probe.stage_loss import StageLosses

TOKEN_WEIGHTED, UNWEIGHTED = "token_weighted", "unweighted"
OF_TOKENS, OF_PAIRS = ("loss", "perplexity", "bits_per_byte"), ("accuracy", "margin")
METRICS = (*OF_TOKENS, *OF_PAIRS)

NO_TOKENS = {"perplexity": math.nan, "bits_per_byte": None}
"""Metrics that do not exist if a sample has one loss."""

Numbers = dict[str, Any]


class DomainEvaluation(ABC):
    """Measures one pass over the evaluation samples, batch by batch.

    Args:
        sets: the evaluation samples; each evaluation set is one domain.
        device: device of the model.
    """

    def __init__(self, sets: Pool, device: torch.device) -> None:
        self.sets, self._device = sets, device
        self.clear()

    def clear(self) -> None:
        """Start a new pass."""
        # Weight, loss sum and a third value of each sample; -inf for a sample that this process has not seen. The mean
        # loss is the sum of the loss sums over the sum of the weights.
        self._seen = np.full((self.sets.size, 3), -math.inf)

    @abstractmethod
    def _numbers(self, seen: NDArray[np.float64]) -> Numbers:
        """Return the metrics of a set, without its standard error and its size.

        Args:
            seen: the values of its samples, (n, 3).
        """

    def finish(self) -> dict[str, Numbers] | None:
        """Return the metrics of each evaluation set that any process has seen, and start a new pass.

        Returns:
            None if no sample was seen. Otherwise a dictionary from evaluation set to loss, loss_stderr
            (:func:`loss_stderr`), samples and the metrics of the subclass.
        """
        seen = torch.from_numpy(self._seen).to(self._device, sum_dtype(self._device))
        # The maximum over processes picks the values of a sample from any process that saw it: the others hold -inf.
        everyone = distributed.all_gather(seen).view(-1, *seen.shape).amax(0).cpu().double().numpy()
        self.clear()
        found = {}
        for name, begin, end in zip(self.sets.domains, self.sets.offsets[:-1], self.sets.offsets[1:], strict=True):
            part = everyone[begin:end]
            part = part[part[:, 0] >= 0]
            if part.size:
                error = loss_stderr(part[:, 1], part[:, 0])
                found[name] = {**self._numbers(part), "loss_stderr": error, "samples": len(part)}
        return found or None


class TokenEvaluation(DomainEvaluation):
    """Measures samples whose tokens have losses.

    The metrics of a set are loss (mean over its tokens, in nats), perplexity, bits_per_byte (None without bytes),
    tokens and bytes. The loss of a set without a counted token is NaN.

    Args:
        sets: the evaluation samples; each evaluation set is one domain.
        decode: converts token ids to text without special tokens.
        device: device of the model.
    """

    def __init__(self, sets: Pool, decode: Callable[[list[int]], str], device: torch.device) -> None:
        super().__init__(sets, device)
        self._decode = decode
        self._bytes = np.full(sets.size, -1, dtype=np.int64)
        """Bytes of each sample's counted text; -1 if this process has not computed them."""

    def add(self, indices: NDArray[np.int64], logits: Tensor, input_ids: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            indices: index of each sample in :attr:`sets`, (B,).
            logits: logits of the model, (B, T, V).
            input_ids: token ids, (B, T).
            labels: labels, not shifted, (B, T).
        """
        expected = shifted(labels)
        # One sample at a time, because the logits are converted to float32: a whole batch would need much memory.
        losses = torch.cat([token_losses(logits[i : i + 1], expected[i : i + 1]) for i in range(len(indices))])
        seen = torch.stack([losses, (expected != IGNORE_INDEX).to(losses)]).cpu()  # one wait for the device
        totals, counts = seen.double().sum(2).numpy()
        unknown = np.flatnonzero(self._bytes[indices] < 0)
        if unknown.size:
            tokens = torch.stack([input_ids, labels]).cpu()
            for row in unknown:
                ids, own = tokens[:, row].tolist()
                self._bytes[indices[row]] = counted_bytes(ids, own, self._decode)
        self._seen[indices] = np.column_stack([counts, totals, self._bytes[indices]])

    def _numbers(self, seen: NDArray[np.float64]) -> Numbers:
        tokens, total, size = seen.sum(0).tolist()
        return numbers(total, tokens, size)


class SampleEvaluation(DomainEvaluation):
    """Measures samples that have one loss each, in a preference stage.

    The metrics of a set are loss (mean over its samples), accuracy (share of the pairs with a margin above 0) and
    margin (mean reward margin of the pairs). The last two are None if samples have no margins. Tokens, bytes,
    perplexity and bits_per_byte do not exist.
    """

    def add(self, indices: NDArray[np.int64], found: StageLosses) -> None:
        """Add a batch.

        Args:
            indices: index of each sample in :attr:`sets`, (B,).
            found: losses and margins of the samples.
        """
        margins = torch.full_like(found.losses, math.nan) if found.margins is None else found.margins
        values = torch.stack([torch.ones_like(found.losses), found.losses, margins], dim=1)
        self._seen[indices] = values.detach().cpu().double().numpy()

    def _numbers(self, seen: NDArray[np.float64]) -> Numbers:
        margins = seen[:, 2]
        has_margins = not np.isnan(margins).any()
        return {
            **NO_TOKENS,
            "loss": float(seen[:, 1].mean()),
            "accuracy": float((margins > 0).mean()) if has_margins else None,
            "margin": float(margins.mean()) if has_margins else None,
            "tokens": None,
            "bytes": None,
        }


def check_evaluation(domains: dict[str, Numbers], step: int) -> None:
    """Check that every evaluation set has a finite loss. Without counted tokens the loss is NaN, which is no error.

    Args:
        domains: metrics, as :meth:`DomainEvaluation.finish` returns them.
        step: number of optimizer steps done.

    Raises:
        DivergenceError: naming the first set whose loss is not finite.
    """
    for name, found in domains.items():
        loss = found["loss"]
        if found["tokens"] != 0 and (loss is None or not math.isfinite(loss)):
            raise DivergenceError(f"the loss of evaluation set {name!r} after step {step} is {loss}")


def numbers(total: float, tokens: float, size: float) -> Numbers:
    """Return the metrics of a text with a loss sum ``total`` in nats, ``tokens`` tokens and ``size`` bytes."""
    loss = total / tokens if tokens else math.nan
    bits = total / math.log(2) / size if size else None
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits,
        "tokens": int(tokens),
        "bytes": int(size),
    }


def loss_stderr(totals: NDArray[np.float64], tokens: NDArray[np.float64]) -> float | None:
    """Return the standard error of the mean loss of a token, over samples drawn at random from a large population.

    The mean loss is a ratio of two sums over samples, sum_i l_i / sum_i n_i = L. Its standard error by linearisation is
    sqrt(s / (s - 1) * sum_i (l_i - L n_i)^2) / sum_i n_i for s samples (W. G. Cochran, Sampling Techniques, 3rd ed.,
    1977, section 6.3). Samples without a counted token are left out.

    Args:
        totals: loss sum l_i of each sample in nats, (s,).
        tokens: counted tokens n_i of each sample, (s,).

    Returns:
        The standard error in nats. None for fewer than two samples with counted tokens, or if a loss is not finite.
    """
    counted = tokens > 0
    totals, tokens = totals[counted], tokens[counted]
    samples = len(tokens)
    if samples < 2 or not np.isfinite(totals).all():
        return None
    rest = totals - totals.sum() / tokens.sum() * tokens
    return math.sqrt(samples / (samples - 1) * float(rest @ rest)) / float(tokens.sum())


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``; infinity if the result is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def means(domains: dict[str, Numbers]) -> dict[str, Numbers]:
    """Return the metrics over all tokens together, and the means of the metrics over the domains.

    If a sample has one loss, it counts as one token.
    The standard errors of the losses take the domains as independent, and the domains' shares of the tokens as fixed.

    Args:
        domains: metrics, as :meth:`DomainEvaluation.finish` returns them. Domains without a counted token are left out.
    """
    known = [each for each in domains.values() if each["tokens"] != 0]
    if known and known[0]["tokens"] is None:
        samples = [each["samples"] for each in known]
        return {TOKEN_WEIGHTED: _mean_of_sets(known, samples), UNWEIGHTED: _mean_of_sets(known, [1] * len(known))}
    tokens = np.array([each["tokens"] for each in known], dtype=np.float64)
    sizes = np.array([each["bytes"] for each in known], dtype=np.float64)
    losses = np.array([each["loss"] for each in known], dtype=np.float64)
    errors = [each["loss_stderr"] for each in known]
    together = numbers(float(losses @ tokens), float(tokens.sum()), float(sizes.sum()))
    loss = float(losses.mean()) if known else math.nan
    bits = [each["bits_per_byte"] for each in known]
    return {
        TOKEN_WEIGHTED: {**{name: together[name] for name in OF_TOKENS}, "loss_stderr": _joint_stderr(errors, tokens)},
        UNWEIGHTED: {
            "loss": loss,
            "loss_stderr": _joint_stderr(errors, np.ones(len(known))),
            "perplexity": perplexity(loss),
            "bits_per_byte": None if None in bits or not bits else float(np.mean(np.array(bits, dtype=np.float64))),
        },
    }


def _mean_of_sets(sets: Sequence[Numbers], weights: Sequence[int]) -> Numbers:
    """Return the weighted means of the metrics of sets whose samples have one loss each."""
    found: Numbers = {
        **NO_TOKENS,
        "loss_stderr": _joint_stderr([each["loss_stderr"] for each in sets], np.array(weights)),
    }
    for metric in ("loss", *OF_PAIRS):
        values = [each[metric] for each in sets]
        found[metric] = None if None in values else float(np.average(values, weights=weights))
    return found


def _joint_stderr(errors: list[float | None], weights: NDArray[Any]) -> float | None:
    """Return the standard error of a weighted mean of independent values. None if the error of a value is unknown."""
    if None in errors or not errors:
        return None
    return float(np.linalg.norm(np.array(errors, dtype=np.float64) * weights) / weights.sum())


def as_logs(groups: dict[str, Numbers], prefix: str) -> dict[str, float]:
    """Return the metrics of every group as ``<prefix>_<group>_<metric>``, the keys that trackers expect.

    Values that are None or not finite are left out.
    """
    return {
        f"{prefix}_{name}_{metric}": value
        for name, group in groups.items()
        for metric in METRICS
        if (value := group.get(metric)) is not None and math.isfinite(value)
    }


def counted_bytes(input_ids: list[int], labels: list[int], decode: Callable[[list[int]], str]) -> int:
    """Return the number of UTF-8 bytes of the text of the labels that count in the loss. Special tokens have no bytes.

    The text of a span of labels is the text that the sample gains by the span. So a tokenizer's treatment of a leading
    space does not change the result. Padding after the last counted label is not read.
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
