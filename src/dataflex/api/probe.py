"""Measurements a component may ask for on the model in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from dataflex.api.measurement import Measurement, ResultT
from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray

if TYPE_CHECKING:
    from dataflex.data.pool import Pool
    from dataflex.data.samples import Samples
    from dataflex.probe.store import FeatureStore


@dataclass(frozen=True)
class GradientSettings:
    """What is made of the gradient of a sample's loss.

    Attributes:
        preconditioner: ``none`` (SGD), ``adam`` (the running optimizer's own direction, bias-corrected) or
            ``adam_less`` (LESS's code: epsilon 1e-8 inside the root, no correction).
        sketch: the random linear map to ``dim`` numbers; ``identity`` keeps all of them.
        dim: length of a feature, k.
        seed: of the map; features are comparable only under one seed.
        reduction: gradient of the token-mean or of the token-summed loss.
        normalize: scale every feature to length 1.
        unsupported: what to do with trainable parameters whose kind has no per-sample rule.
        store: folder to keep features in; none: they are used and dropped.
    """

    preconditioner: Literal["none", "adam", "adam_less"] = "none"
    sketch: Literal["count", "rademacher", "kronecker", "identity"] = "count"
    dim: int = 8192
    seed: int = 0
    reduction: Literal["mean", "sum"] = "mean"
    normalize: bool = True
    unsupported: Literal["error", "ignore"] = "error"
    store: str | None = None


class _OfGradients(Measurement):
    """What the probe's methods on gradients measure."""

    forwards: ClassVar[float] = 3.0


@dataclass(frozen=True)
class GradientFeatures(_OfGradients):
    """Projected gradients, or their inner products with others."""

    settings: GradientSettings = GradientSettings()


@dataclass(frozen=True)
class GradientNorms(_OfGradients):
    """Lengths of gradients."""

    settings: GradientSettings = GradientSettings()


class Probe(Protocol):
    """Model-dependent measurements, on all ranks together: every rank makes the same calls in the same order.

    Indices are of the run's pool, or of ``pool`` where one is given (a validation set, generated samples).
    """

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

    def losses(self, indices: IndexArray, pool: Pool | None = None) -> ScoreArray:
        """Return the token-mean loss of each sample, shape (n,), float32; NaN where no token is trained on."""
        ...

    def error_norms(self, indices: IndexArray) -> ScoreArray:
        """Return each sample's token mean of ||softmax - one-hot||_2, shape (n,), float32; NaN as for losses."""
        ...

    def embeddings(self, indices: IndexArray) -> ScoreArray:
        """Return mean-pooled hidden states of the last layer scaled to length 1, shape (n, hidden), float32."""
        ...

    def expert_loads(self, indices: IndexArray) -> ScoreArray:
        """Return how each sample's tokens are routed in a mixture of experts, shape (n, layers * experts), float32.

        For every layer the share of the sample's routed places (tokens x experts per token) that went to each expert:
        non-negative, sum 1 in each layer.
        """
        ...

    def gradient_norms(self, indices: IndexArray, settings: GradientSettings) -> ScoreArray:
        """Return the exact length of each sample's direction, before any sketch, shape (n,), float32."""
        ...

    def gradients(self, indices: IndexArray, settings: GradientSettings, pool: Pool | None = None) -> ScoreArray:
        """Return the features of a few samples, shape (n, k), float32; zero where no token is trained on."""
        ...

    def similarities(self, indices: IndexArray, settings: GradientSettings, targets: ScoreArray) -> ScoreArray:
        """Return the inner products of each sample's feature with ``targets`` (S, k), shape (n, S), float32.

        Features are made, used and dropped block by block, so their number does not matter. NaN where no token of the
        sample is trained on.
        """
        ...

    def extract(self, indices: IndexArray, settings: GradientSettings) -> FeatureStore:
        """Return the features of samples kept in ``settings.store``, making those that are not there yet."""
        ...

    def products(
        self, groups: list[IndexArray], settings: GradientSettings, targets: IndexArray, target_pool: Pool
    ) -> list[ScoreArray]:
        """Return the exact inner products of directions within each group, without a sketch.

        Each group is one forward and backward of its samples and the samples ``targets`` of ``target_pool``. Returns
        per group (b, b + m): of its samples with its samples, then with the targets; NaN for a sample or target without
        a token that is trained on.
        """
        ...

    def generate(self, prompts: list[list[int]], settings: GenerationSettings, seed: int) -> list[list[list[int]]]:
        """Return ``settings.samples`` responses (token ids, prompt left out) of the model to each prompt."""
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
