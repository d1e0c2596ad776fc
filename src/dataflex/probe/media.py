"""Rows of layers that process images: which sample each row belongs to.

The vision tower and the projector of a vision-language model run over the images of a whole batch, one image after the
other. Their rows are images or patches, and a sample may have several images or none. The language model has a fixed
number of tokens for each image, which stand in the sample that the image belongs to. So a sample's share of the image
tokens of a batch is its share of the rows of these layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataflex.data.samples import Samples
from dataflex.data.sampling import IndexArray
from dataflex.probe.head import language_model

_UNDERSTOOD = frozenset(
    (
        *("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "rope_deltas"),
        *("pixel_values", "image_grid_thw"),
    )
)
"""Inputs of models whose image layers have the same number of rows for each image token, in the order of the images.

Models with other inputs cut an image into a number of tiles, or read videos or audio.
"""
_SEEN = 64
"""Number of samples among which two with different numbers of image tokens are searched."""


def media_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that process images, videos or audio; none for a model of text.

    If the language model inside the model is not found, these are all modules.
    """
    inner = language_model(model)
    config = inner.config
    if not any(hasattr(config, name) for name in ("vision_config", "audio_config", "image_token_id")):
        return set()
    text = {*inner.get_decoder().modules(), *inner.get_input_embeddings().modules()}
    head = inner.get_output_embeddings()
    text.update(() if head is None else head.modules())
    outside = {module for module in model.modules() if module not in text and module._parameters}
    return outside or set(model.modules())


def image_token(model: nn.Module) -> int | None:
    """Return the id of the token that stands for a part of an image; None if the configuration names none."""
    found = getattr(language_model(model).config, "image_token_id", None)
    return found if isinstance(found, int) else None


@dataclass(frozen=True)
class MediaRows:
    """Number of image tokens of each sample of a batch.

    Attributes:
        counts: image tokens of each sample, B numbers.
        device: device of the batch.
    """

    counts: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Any]) -> MediaRows | None:
        """Return the image tokens of a batch; None if its inputs do not tell which rows belong to which sample."""
        token = image_token(model)
        if token is None or not inputs.keys() <= _UNDERSTOOD:
            return None
        ids = inputs["input_ids"]
        return cls(tuple((ids == token).sum(1).tolist()), ids.device)

    def samples(self, rows: int) -> Tensor | None:
        """Return the sample of each of ``rows`` rows of a layer, (rows,); None if the samples' shares are not whole."""
        total = sum(self.counts)
        if not total or any(rows * count % total for count in self.counts):
            return None
        shares = torch.tensor([rows * count // total for count in self.counts], device=self.device)
        return torch.repeat_interleave(shares, output_size=rows)


def patches(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the patches of images as rows, (N, L, C * prod(size)).

    Args:
        images: (N, C, ...), with one dimension for each number of ``size``.
        size: size of a patch. Patches do not overlap, and what is left at the end is left out.
    """
    count = len(size)
    for dim, step in enumerate(size):
        images = images.unfold(2 + dim, step, step)
    order = (0, *range(2, 2 + count), 1, *range(2 + count, 2 + 2 * count))
    return images.permute(order).flatten(1 + count).flatten(1, count)


def is_patching(weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> bool:
    """Return whether a convolution is a matrix product over patches that do not overlap. Numbers may be tuples."""
    size = tuple(weight.shape[2:])

    def every(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(size)

    return every(stride) == size and set(every(padding)) <= {0, "valid"} and set(every(dilation)) == {1} and groups == 1


def unlike_samples(samples: Samples, indices: IndexArray, token: int) -> IndexArray:
    """Return the samples with the most and the fewest image tokens among a few, (2,) or fewer.

    Args:
        samples: the samples that ``indices`` refers to.
        indices: samples to choose from, (n,).
        token: the image token.
    """
    order = np.argsort(samples.lengths[indices], kind="stable")
    places = order[np.linspace(0, order.size - 1, min(order.size, _SEEN)).astype(np.int64)]
    counts = np.array(
        [
            np.count_nonzero(np.array(row["input_ids" if "input_ids" in row else "chosen_input_ids"]) == token)
            for row in samples.rows(indices[places])
        ]
    )
    chosen = np.unique([counts.argmin(), counts.argmax()])
    return indices[places[chosen]] if chosen.size > 1 else indices[places[:2]]
