"""Per-sample means of a function of each token's logits, at about the cost of a forward pass without the head.

The language-model head runs inside the model's own forward, in chunks and only on the positions that count (the
positions with a label). So the (tokens x vocabulary) logits never exist at once. If the configuration describes the
model's operations after the head, the chunks go through the same operations. Two samples show whether the result is
right (see ``particulars.py``). If it is not, the logits that count go through the rest of the model's forward together,
because that runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex.data.sums import row_sums
from dataflex.data.token_loss import IGNORE_INDEX, sample_means

HEAD_CHUNK = 1024
"""Positions in a chunk of the head."""

Statistic = Callable[[Tensor, Tensor], Tensor]
"""Function of logits (n, V), float32 (float64 for a float64 model), and labels (n,) -> one value per position, (n,)."""


def language_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model that computes logits. In a model with a value head (TRL), it is one of the two parts."""
    inner = getattr(model, "pretrained_model", None)
    return inner if isinstance(inner, torch.nn.Module) else model


def head_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return the language-model head of a model."""
    head: torch.nn.Module = language_model(model).get_output_embeddings()
    return head


def logits_of(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the logits of a model's own forward pass, (B, T, V). A model with a value head returns a tuple."""
    output = model(**inputs, use_cache=False)
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


def wide(values: Tensor) -> Tensor:
    """Return float64 values unchanged and all others as float32."""
    return values if values.dtype == torch.float64 else values.float()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of every position."""
    return F.cross_entropy(logits, labels, reduction="none")


def error_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ||softmax(logits) - one-hot(label)||_2 of every position (EL2N, Paul et al. 2021), in [0, sqrt(2)]."""
    scale = torch.logsumexp(logits, -1)
    squares = torch.exp(torch.logsumexp(2 * logits, -1) - 2 * scale)
    picked = torch.exp(logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - scale)
    return (squares - 2 * picked + 1).clamp(min=0).sqrt()  # |p - e|^2 = |p|^2 - 2 p_label + 1; rounding may go below 0


def full_forward(
    model: torch.nn.Module, inputs: dict[str, Any], labels: Tensor, statistic: Statistic = cross_entropy
) -> Tensor:
    """Return per-sample token means (B,) from the model's own logits; NaN for a sample in which no token counts."""
    rows, columns, values = full_values(model, inputs, labels, statistic)
    return _means(values, rows, columns, labels)


def chunked_forward(
    model: torch.nn.Module, inputs: dict[str, Any], labels: Tensor, statistic: Statistic = cross_entropy
) -> Tensor:
    """Return per-sample token means (B,), with the head applied in chunks and only to positions that count."""
    rows, columns, values = chunked_values(model, inputs, labels, statistic)
    return _means(values, rows, columns, labels)


def full_values(
    model: torch.nn.Module, inputs: dict[str, Any], labels: Tensor, statistic: Statistic = cross_entropy
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows, columns and values of the positions that count, each (n,), from the model's own logits."""
    rows, columns = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
    logits = wide(counted_logits(model, inputs, rows, columns))
    return rows, columns, statistic(logits, labels[rows, columns])


def chunked_values(
    model: torch.nn.Module, inputs: dict[str, Any], labels: Tensor, statistic: Statistic = cross_entropy
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as :func:`full_values`, with the head applied in chunks."""
    rows, columns = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
    counted = labels[rows, columns]
    finish, values = behind_head(model), [torch.zeros(0, device=labels.device)]

    def run(apply: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        for begin in range(0, rows.numel(), HEAD_CHUNK):
            part = slice(begin, begin + HEAD_CHUNK)
            values.append(statistic(wide(finish(apply(hidden[rows[part], columns[part]]))), counted[part]))
        return hidden[..., :1]  # stands for the logits in the rest of the forward; the result is discarded

    with replaced_forward(head_of(model), run):
        model(**inputs, use_cache=False)
    return rows, columns, torch.cat(values)


def counted_logits(model: torch.nn.Module, inputs: dict[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
    """Return the model's own logits at some positions only, (n, V), including all operations after the head.

    Args:
        model: the model; its forward runs once.
        inputs: inputs of the model, B samples of T tokens.
        rows: row of each position, (n,), below B.
        columns: column of each position, (n,), below T.
    """
    picked = False

    def run(apply: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        nonlocal picked
        picked = hidden.dim() == 3  # otherwise the head gets all positions, and the logits are selected at the end
        return apply(hidden[rows, columns].unsqueeze(0) if picked else hidden)

    with replaced_forward(head_of(model), run):
        logits = logits_of(model, inputs)
    return logits[0] if picked else logits[rows, columns]


@dataclass(frozen=True)
class AfterHead:
    """The operations of a model on its logits after the head, as far as the configuration describes them.

    Attributes:
        factor: number that the logits are multiplied with (Cohere: ``logit_scale``).
        divisor: number that the logits are divided by (Granite: ``logits_scaling``).
        cap: bound of the logits, reached through tanh (Gemma 2: ``final_logit_softcapping``).
    """

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the logits after these operations."""
        if self.factor is not None:
            logits = logits * self.factor
        if self.divisor is not None:
            logits = logits / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slopes(self, values: Tensor) -> Tensor | float:
        """Return the derivative by the head's output from ``values``, the logits after these operations.

        It is a number if it is the same for every logit.
        """
        slope = (1.0 if self.factor is None else self.factor) / (1.0 if self.divisor is None else self.divisor)
        return slope if self.cap is None else (1 - (values / self.cap) ** 2) * slope


def behind_head(model: torch.nn.Module) -> AfterHead:
    """Return the operations of a model on its logits after the head, as far as the configuration describes them."""
    config = model.config.get_text_config()
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    return AfterHead(*(_number(getattr(config, name, None)) for name in names))


def slope_behind_head(model: torch.nn.Module) -> float:
    """Return the derivative of :func:`behind_head` at 0."""
    return float(behind_head(model).slopes(torch.zeros(())))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and value else None


def first_counted(labels: Tensor, most: int) -> Tensor:
    """Return labels (B, T) in which only the first ``most`` counted positions of each sample still count."""
    counted = labels != IGNORE_INDEX
    return labels.masked_fill(counted.cumsum(1) > most, IGNORE_INDEX)


def _means(values: Tensor, rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
    """Return the means over each sample's positions, (B,)."""
    counts = (labels != IGNORE_INDEX).sum(1)
    return sample_means(row_sums(values, rows, columns, labels.shape), counts)


@contextmanager
def replaced_forward(
    module: torch.nn.Module, replacement: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> Iterator[None]:
    """Call ``replacement(original_forward, x)`` instead of ``module.forward(x)`` while the context is open.

    The module's hooks still run, so that ZeRO-3 and FSDP gather the module's parameters.
    """
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
