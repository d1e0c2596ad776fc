"""Hidden states of a layer, and embeddings of samples pooled from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from dataflex.api.measurement import MeasuredBatch, Measurement, register_measurement
from dataflex.data.pool import IGNORE_INDEX
from dataflex.errors import ComponentError

if TYPE_CHECKING:
    from torch import Tensor

    from dataflex.api.needs import RunView


Pooling = Literal["mean", "weighted_mean", "first", "last"]
"""Ways to pool the hidden states of a sample's tokens into one vector."""

TextPart = Literal["all", "prompt", "response", "image_and_text"]
"""Parts of a sample whose tokens are pooled."""


@dataclass(frozen=True)
class HiddenStates(Measurement):
    """Base of measurements computed from one layer's hidden states at every token. Subclasses define :meth:`reduce`.

    Attributes:
        layer: 0 is the token embeddings, 1 the first layer's output and so on. -1 is the last layer after the final
            normalisation. The numbers are those of Transformers' ``output_hidden_states``.

    Example:
        The length of the sum of each sample's hidden states:

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from dataflex import HiddenStates, register_measurement
        >>> @register_measurement("sum_lengths")
        ... @dataclass(frozen=True)
        ... class SumLengths(HiddenStates):
        ...     def reduce(self, hidden, mask):
        ...         return hidden.masked_fill(~mask[..., None], 0).sum(1).norm(dim=1)
        >>> SumLengths(layer=6).reduce(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[True]]))
        tensor([5.])
    """

    layer: int = -1

    quantity: ClassVar[str] = "hidden state"

    def reduce(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the values of a batch, (B, ...).

        Args:
            hidden: hidden states, (B, T, H), float32. Padding positions hold arbitrary values.
            mask: positions to use, (B, T), bool. Padding may be on either side.
        """
        raise NotImplementedError

    def tokens(self, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the mask of the positions to use, (B, T), bool. The default is all tokens.

        Args:
            mask: False at padding, (B, T), bool.
            labels: the token to be predicted at each position, (B, T); -100 if the position is not trained on.
        """
        return mask

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return :meth:`reduce` of the layer's hidden states."""
        return self.reduce(batch.hidden_states(self.layer).float(), self.tokens(batch.mask, batch.labels))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield an error if the model's folder says that the model has no such layer."""
        problem = layer_problem(Path(str(run.llamafactory.get("model_name_or_path", ""))), self.layer)
        if problem is not None:
            yield "layer", problem


@register_measurement("embeddings")
@dataclass(frozen=True)
class Embeddings(HiddenStates):
    """One vector for each sample: a layer's hidden states pooled over its tokens, shape (n, H).

    Attributes:
        layer: as in :class:`HiddenStates`.
        pooling: ``mean`` of all tokens; ``weighted_mean``, which gives token t of a sample (from 1) weight t (SGPT,
            Muennighoff 2022); the ``first`` or the ``last`` token. The tokens of a packed row count as one sample.
        normalize: scale every vector to length 1.
        text: tokens to pool: ``all``, the ``response`` (the tokens that are trained on) or the ``prompt`` (the
            others). The forward pass is always over the whole sample. A sample without such a token gives zeros.
            With ``image_and_text`` the image tokens and all others are pooled apart, each to a vector of length
            1/sqrt(2), and the two are joined to a vector of 2 H elements (COINCIDE, Lee et al. 2024). The image half
            of a sample without images is zero.

    Example:
        >>> import torch
        >>> from dataflex import Embeddings
        >>> hidden = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [9.0, 9.0]]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> Embeddings(layer=6, pooling="last").reduce(hidden, mask)
        tensor([[0.6000, 0.8000]])
    """

    pooling: Pooling = "mean"
    normalize: bool = True
    text: TextPart = "all"

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return the pooled hidden states, (B, H); (B, 2 H) of image and text apart.

        Raises:
            ComponentError: if images and text are asked for apart, and the model reads no images.
        """
        if self.text != "image_and_text":
            return super().measure(batch)
        import torch
        from torch.nn.functional import normalize

        from dataflex.probe.media import image_token

        token = image_token(batch.model)
        if token is None:
            raise ComponentError(
                "embedding_text: image_and_text is for a model that reads images; this one reads text."
            )
        hidden, images = batch.hidden_states(self.layer).float(), batch.inputs["input_ids"] == token
        parts = (batch.mask & images, batch.mask & ~images)
        halves = [normalize(pooled(hidden, part, self.pooling), dim=-1) for part in parts]
        found = torch.cat(halves, dim=-1) / math.sqrt(2)
        return normalize(found, dim=-1) if self.normalize else found

    def tokens(self, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the mask of the wanted part of every sample, (B, T)."""
        if self.text == "all":
            return mask
        # labels[:, t] is token t + 1, so the mask moves by one. The last label is always ignored, so that token 0 is
        # not trained on.
        trained = (labels != IGNORE_INDEX).roll(1, 1)
        return mask & (trained if self.text == "response" else ~trained)

    def reduce(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the pooled hidden states, (B, H)."""
        import torch

        found = pooled(hidden, mask, self.pooling)
        return torch.nn.functional.normalize(found, dim=-1) if self.normalize else found

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield an error if the model has no such layer, or if prompt and response cannot be told apart."""
        yield from super().problems(run)
        if self.text in ("all", "image_and_text"):
            return
        stage = str(run.llamafactory.get("stage", "sft"))
        trains_on_all = str(run.llamafactory.get("train_on_prompt", False)).lower() in ("1", "true", "yes")
        if stage == "pt" or (stage == "sft" and trains_on_all):
            why = "the stage is pt" if stage == "pt" else "train_on_prompt is set"
            yield (
                "embedding_text",
                f"{self.text!r} goes by which tokens are trained on, and {why}: all are. Use all.",
            )


def layer_problem(folder: Path, layer: int) -> str | None:
    """Return an error if the model in a folder has no such layer; None if it has, or if the folder does not say."""
    try:
        config = json.loads((folder.expanduser() / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        count = next(int(config[name]) for name in _LAYER_COUNTS if name in config)
    except (OSError, ValueError, TypeError, AttributeError, StopIteration):
        return None  # loading the model reports errors of its folder
    return None if -count - 1 <= layer <= count else _no_layer(count, layer)


_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of layers in the config.json of different kinds of models."""


def _no_layer(count: int, layer: int) -> str:
    return (
        f"the model has {count} layers, so its hidden states are numbered 0 (the embeddings) to {count}, or "
        f"{-count - 1} to -1; got {layer}."
    )


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector for each row of hidden states, (B, H); zeros for a row without a token to pool.

    Args:
        hidden: hidden states, (B, T, H). Positions outside the mask hold arbitrary values.
        mask: tokens to pool, (B, T), bool.
        pooling: as in :class:`Embeddings`.
    """
    import torch

    if pooling in ("mean", "weighted_mean"):
        weights = mask if pooling == "mean" else mask * mask.cumsum(1)
        hidden = hidden.masked_fill(~mask.unsqueeze(-1), 0.0)  # a NaN at padding times weight 0 would stay NaN
        return (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
    numbers = mask.cumsum(1)
    wanted = numbers == (1 if pooling == "first" else numbers[:, -1:])
    place = (wanted & mask).int().argmax(1)
    found = hidden[torch.arange(len(hidden), device=hidden.device), place]
    return found.masked_fill(~mask.any(1, keepdim=True), 0.0)
