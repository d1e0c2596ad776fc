"""The probe, with which components measure samples on the model in training."""

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
    """Settings of gradient features: the preconditioner, projection and scale of the gradient of a sample's loss.

    Attributes:
        preconditioner: ``none`` (SGD), ``adam`` (the running optimizer's own update direction, bias-corrected) or
            ``adam_less`` (the formula in LESS's code: epsilon 1e-8 inside the root, no correction).
        projection: the random linear map to ``dim`` elements. ``identity`` keeps all elements of the gradient.
        dim: length of a feature, k.
        seed: seed of the projection. Features can be compared only under the same seed.
        reduction: use the gradient of the token-mean or of the token-summed loss. It has no effect in stages dpo, rm
            and kto, in which a sample has one loss.
        normalize: whether to scale every feature to length 1.
        unsupported: how to treat trainable parameters of a layer type without a per-sample rule.
        store: folder that stores the features. None means that features are discarded after use.

    Example:
        >>> from dataflex import GradientFeatures, GradientSettings
        >>> settings = GradientSettings(preconditioner="adam", projection="rademacher", dim=1024)
        >>> GradientFeatures(settings).settings.dim
        1024
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
    """The model in training, as components use it. All processes must make the same calls in the same order.

    Example:
        A selector that prefers samples with a high loss:

        >>> from dataflex import Losses, Needs, Probe, Selector, SelectorParams
        >>> class Hard(Selector[SelectorParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(Losses(),))
        ...     def score(self, ctx, candidates):
        ...         probe: Probe = ctx.probe
        ...         return probe.measure(Losses(), candidates)
    """

    def measure(
        self,
        measurement: Measurement[ResultT],
        indices: IndexArray,
        samples: Samples | Sequence[Mapping[str, Any]] | None = None,
    ) -> ResultT:
        """Return the values of a measurement in the order of ``indices``. They are the same on every process.

        Args:
            measurement: the measurement, such as ``Losses()`` or ``Embeddings(layer=-1, pooling="last")``.
            indices: indices into ``samples``, (n,).
            samples: a pool (such as ``ctx.validation``), or a list of rows as the training collator takes them
                (generated samples, for example). None means the pool of the run.
        """
        ...

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids without special tokens."""
        ...

    def checkpoint(self, folder: str) -> AbstractContextManager[None]:
        """Return a context in which the probe uses the weights (and moments) of a stored checkpoint."""
        ...

    def learning_rates(self, folders: list[str]) -> list[float]:
        """Return the mean learning rate of each stored checkpoint's part of its run, scaled to sum 1."""
        ...


@dataclass(frozen=True)
class GenerationSettings:
    """Settings for sampling responses from the model in training.

    Example:
        >>> from dataflex import GenerationSettings, Generations
        >>> Generations(GenerationSettings(samples=8, temperature=0.7)).settings.samples
        8
    """

    samples: int = 4
    """Number of responses to each prompt."""
    max_new_tokens: int = 256
    """Maximum number of tokens of a response."""
    temperature: float = 1.0
    """Temperature of the softmax over the next token."""
    top_p: float = 1.0
    """Smallest total probability of the tokens to sample from. 1.0 means no limit."""
    top_k: int = 0
    """Number of most probable tokens to sample from. 0 means no limit."""
    backend: Literal["hf", "vllm"] = "hf"
