"""Measurements a component may ask for on the model in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dataflex.api.measurement import Measurement, ResultT
from dataflex.data.sampling import IndexArray

if TYPE_CHECKING:
    from dataflex.data.samples import Samples


@dataclass(frozen=True)
class GradientSettings:
    """What is made of the gradient of a sample's loss.

    Attributes:
        preconditioner: ``none`` (SGD), ``adam`` (the running optimizer's own update direction, bias-corrected) or
            ``adam_less`` (LESS's code: epsilon 1e-8 inside the root, no correction).
        projection: the random linear map to ``dim`` numbers; ``identity`` keeps all of them.
        dim: length of a feature, k.
        seed: of the map; features are comparable only under one seed.
        reduction: gradient of the token-mean or of the token-summed loss.
        normalize: scale every feature to length 1.
        unsupported: what to do with trainable parameters whose kind has no per-sample rule.
        store: folder to keep features in; none: they are used and dropped.
    """

    preconditioner: Literal["none", "adam", "adam_less"] = "none"
    projection: Literal["count", "rademacher", "kronecker", "identity"] = "count"
    dim: int = 8192
    seed: int = 0
    reduction: Literal["mean", "sum"] = "mean"
    normalize: bool = True
    unsupported: Literal["error", "ignore"] = "error"
    store: str | None = None


class Probe(Protocol):
    """The model in training, for components: all processes make the same calls in the same order."""

    def measure(
        self,
        measurement: Measurement[ResultT],
        indices: IndexArray,
        samples: Samples | Sequence[Mapping[str, Any]] | None = None,
    ) -> ResultT:
        """Return what a measurement gives for samples, in the order of ``indices``; the same on every process.

        Args:
            measurement: what is measured, such as ``Losses()`` or ``Embeddings(layer=-1, pooling="last")``.
            indices: numbers of the samples, (n,).
            samples: what they are numbers of: a pool (as ``ctx.validation``), or a list of rows as the training
                collator takes them (generated samples, say); None: the run's pool.
        """
        ...

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        ...

    def checkpoint(self, folder: str) -> AbstractContextManager[None]:
        """Measure with the weights (and moments) of a stored checkpoint for a while."""
        ...

    def learning_rates(self, folders: list[str]) -> list[float]:
        """Return the mean learning rate of each stored checkpoint's stretch of its run, scaled to sum 1."""
        ...


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are sampled from the model in training."""

    samples: int = 4
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    backend: Literal["hf", "vllm"] = "hf"
