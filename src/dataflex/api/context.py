"""The state of a run that a decision or the loss weights of a step may depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataflex.api.probe import Probe
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError

if TYPE_CHECKING:
    from torch import Tensor

    from dataflex.api.reference import Reference
    from dataflex.data.pool import Pool


EmbeddingArray = NDArray[np.floating[Any]]
"""Embeddings of samples, shape (n, H): float32, or a read-only memory map of float16."""

SourceT = TypeVar("SourceT")

EmbeddingSource = Callable[["Pool | None"], EmbeddingArray]
"""Function that returns the embeddings of all samples of a pool. None selects the pool of the run."""


@dataclass(frozen=True)
class StepStatistics:
    """Losses and counts of the last optimizer step, over the whole global batch (all micro-batches, all ranks).

    Example:
        >>> import numpy as np
        >>> from dataflex import StepStatistics
        >>> statistics = StepStatistics(
        ...     step=1, losses=np.array([2.0, 1.0]), tokens=np.array([30, 10]), samples=np.array([3, 1])
        ... )
        >>> float(np.average(statistics.losses, weights=statistics.tokens))
        1.75
    """

    step: int
    """Number of completed optimizer steps, including this step."""
    losses: NDArray[np.float64]
    """Unweighted token-mean training loss of each domain, shape (K,). NaN for a domain without samples in the batch."""
    tokens: NDArray[np.int64]
    """Number of tokens of each domain that count in the loss, shape (K,)."""
    samples: NDArray[np.int64]
    """Number of samples of each domain, shape (K,)."""
    proportions: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Domain shares of the plan that the step was trained on, shape (K,). Empty if nothing is planned."""
    warmup: bool = False
    """Whether the step belongs to a warm-up round."""
    excess: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Token mean of max(loss - reference loss, 0) of each domain, shape (K,). NaN as for ``losses``; 0 if no loss was
    compared with a reference."""
    indices: IndexArray = field(default_factory=lambda: np.empty(0, np.int64))
    """Pool indices of the samples of the step in the order of the plan, shape (n,). Empty if no component needs
    ``step_losses`` of samples or tokens."""
    sample_losses: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    """Token-mean loss of each sample, shape (n,). NaN for a sample without a trained token."""
    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Number of tokens of each sample, shape (n,)."""
    token_losses: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """Losses of the tokens of each sample, shape (n, T). Column t is the loss of predicting token t + 1, and NaN at
    positions that are not trained on. Shape (n, 0) if no component needs ``step_losses`` of tokens."""


@dataclass(frozen=True)
class StepContext:
    """The data that the loss weights of one optimizer step may depend on. It is the same on every rank.

    Example:
        A mixer that weighs each of two domains in proportion to its loss:

        >>> import numpy as np
        >>> from dataflex import Mixer, Needs, StepContext
        >>> class ByLoss(Mixer):
        ...     weighs_loss = True
        ...     loss_weights = np.ones(2)
        ...     def needs(self, run):
        ...         return Needs(step_losses="domains")
        ...     def mix(self, ctx):
        ...         return self.initial(ctx)
        ...     def update_weights(self, ctx: StepContext):
        ...         self.loss_weights = np.nan_to_num(ctx.losses, nan=1.0)
    """

    pool: Pool
    """The training samples."""
    probe: Probe
    """Measures on the model in training."""
    step: int
    """Number of completed optimizer steps before this step."""
    total_steps: int
    """Expected number of optimizer steps of the run."""
    learning_rate: float
    """The learning rate of the optimizer in this step."""
    indices: IndexArray
    """Pool indices of the samples in the global batch of the step (all micro-batches, all ranks), shape (B,)."""
    tokens: NDArray[np.int64]
    """Number of tokens of each domain in the step that count in the loss, shape (K,)."""
    losses: NDArray[np.float64]
    """Unweighted token-mean loss of each domain over these tokens, shape (K,). NaN for a domain without samples in the
    step. Empty for a mixer that needs no ``step_losses``."""
    excess: NDArray[np.float64]
    """Token mean of max(loss - reference loss, 0) of each domain, shape (K,). NaN as for ``losses``. Empty for a mixer
    that needs no reference."""
    validation_pool: Pool | None = None
    """The validation samples, if the mixer needs them. Read them as :attr:`validation`."""

    @property
    def validation(self) -> Pool:
        """The validation samples, one domain for each sub-task.

        Raises:
            ComponentError: if the needs of the mixer name no validation samples.
        """
        return _asked_for(self.validation_pool)


def _asked_for(validation: Pool | None) -> Pool:
    if validation is None:
        raise ComponentError(
            "ctx.validation is read by a component whose needs() name no validation samples; return "
            "Needs(validation=self.params) from its needs()."
        )
    return validation


def _reference_asked_for(reference: Reference | None, name: str) -> Reference:
    if reference is None:
        raise ComponentError(
            f"{name}.reference is read by a component whose needs() name no reference; return "
            "Needs(reference=self.params) from its needs()."
        )
    return reference


def _embeddings_asked_for(source: SourceT | None) -> SourceT:
    if source is None:
        raise ComponentError(
            "embeddings are read by a component whose needs() name none; return Needs(embeddings=self.params) from its "
            "needs(), whose parameters extend dataflex.EmbeddingParams."
        )
    return source


@dataclass(frozen=True)
class TokenLosses:
    """The token losses of ``n`` samples. Column t is the loss of predicting token t + 1.

    Attributes:
        losses: shape (n, T), detached; 0 for a token that is not trained on.
        trained: whether each token counts in the loss, shape (n, T), bool.
        reference: losses of the reference at the same positions, shape (n, T); 0 for a token that is not trained on.
            None for a weighter that needs no reference.
        prompt_attention: attention of the tokens to their prompts, shape (n, T). None for a weighter that does not need
            it.

    Example:
        >>> import torch
        >>> from dataflex import TokenLosses
        >>> tokens = TokenLosses(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[True, True, False]]))
        >>> tokens.losses.sum(1) / tokens.trained.sum(1)
        tensor([2.])
    """

    losses: Tensor
    trained: Tensor
    reference: Tensor | None = None
    prompt_attention: Tensor | None = None


@dataclass(frozen=True)
class StepStart:
    """The data that a weighter may measure before the forward passes of a step. It is the same on every rank.

    Attributes:
        step: number of completed optimizer steps.
        total_steps: expected number of optimizer steps of the run.
        rng: generator keyed by (seed, component, step): the same random values on every rank and after a resume.
        pool: the training samples; None in a stream.
        probe: measures on the model in training; None in a stream.
        validation_pool: the validation samples, if the weighter needs them. Read them as :attr:`validation`.
        reference_losses: the reference, if the weighter needs one. Read it as :attr:`reference`.
        index_source: function that returns the pool indices of the step's samples. Read them as :attr:`indices`.

    Example:
        A weighter that measures the mean validation loss every 100 steps:

        >>> import numpy as np
        >>> from dataflex import Losses, Needs, StepStart, ValidationParams, Weighter, WeighterParams
        >>> class TargetParams(WeighterParams, ValidationParams):
        ...     pass
        >>> class Targeted(Weighter[TargetParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(Losses(),), validation=self.params)
        ...     def begin_step(self, start: StepStart):
        ...         if start.step % 100 == 0:
        ...             samples = start.validation
        ...             self.target = start.probe.measure(Losses(), np.arange(samples.size), samples).mean()
    """

    step: int
    total_steps: int
    rng: np.random.Generator
    pool: Pool | None = None
    probe: Probe | None = None
    validation_pool: Pool | None = None
    reference_losses: Reference | None = None
    index_source: Callable[[], IndexArray] | None = None

    @property
    def validation(self) -> Pool:
        """The validation samples, one domain for each sub-task.

        Raises:
            ComponentError: if the needs of the weighter name no validation samples.
        """
        return _asked_for(self.validation_pool)

    @property
    def reference(self) -> Reference:
        """The frozen reference, which gives losses of samples and of their tokens.

        Raises:
            ComponentError: if the needs of the weighter name no reference.
        """
        return _reference_asked_for(self.reference_losses, "start")

    @cached_property
    def indices(self) -> IndexArray:
        """Pool indices of the samples of the step (all micro-batches, all ranks) in the order of the plan, shape (n,).

        They are gathered from the processes on first access. So every process must read them, or none.

        Raises:
            ComponentError: in a stream, because the samples of a stream have no index.
        """
        if self.index_source is None:
            raise ComponentError("start.indices: the samples of a stream have no index; set streaming: false.")
        return self.index_source()


@dataclass(frozen=True)
class StepBatch:
    """The samples of one optimizer step whose loss a weighter scales.

    The batch holds the samples of the whole global batch (all micro-batches, all ranks) in the order of the plan, and
    is the same on every rank. An elementwise weighter may receive any part of the global batch. Samples without a
    trained token are left out because they have no loss to scale.

    Attributes:
        losses: token-mean loss of each sample, shape (n,), float32, detached, finite.
        step: number of completed optimizer steps.
        total_steps: expected number of optimizer steps of the run.
        pool: the training samples; None in a stream.
        probe: measures on the model in training; None in a stream. Elementwise weighters must not use the probe,
            because every rank must make the same calls.
        places: pool indices of the samples, shape (n,), on the device of ``losses``; None in a stream.
        tokens: the token losses of the samples; None if the weighter does not need them.
        validation_pool: the validation samples, if the weighter needs them. Read them as :attr:`validation`.
        embedding_source: function that returns embeddings, if the weighter needs them. Call :meth:`embeddings`.
        pooled: hidden states of the samples, reduced to one vector each; None if the weighter does not need them.
        given: weights of tokens that the data gives, (n, T); None if the weighter does not need them.
        margins: reward of the chosen minus reward of the rejected response of each pair, (n,), as the trainer of the
            stage computes it; None if the weighter does not need them.

    Example:
        >>> import torch
        >>> from dataflex import StepBatch
        >>> batch = StepBatch(torch.tensor([2.0, 4.0, 3.0]), step=10, total_steps=40)
        >>> 1 + batch.progress * (batch.losses > batch.losses.median())
        tensor([1.0000, 1.2500, 1.0000])
    """

    losses: Tensor
    step: int = 0
    total_steps: int = 1
    pool: Pool | None = None
    probe: Probe | None = None
    places: Tensor | None = None
    tokens: TokenLosses | None = None
    validation_pool: Pool | None = None
    embedding_source: Callable[[IndexArray, Pool | None], EmbeddingArray] | None = None
    pooled: Tensor | None = None
    given: Tensor | None = None
    margins: Tensor | None = None

    @property
    def validation(self) -> Pool:
        """The validation samples, one domain for each sub-task.

        Raises:
            ComponentError: if the needs of the weighter name no validation samples.
        """
        return _asked_for(self.validation_pool)

    def embeddings(self, samples: Pool | None = None) -> EmbeddingArray:
        """Return unit-length embeddings, one row for each sample. A sample without text has a row of zeros.

        Embeddings of the model in training are computed with the weights before the step, once for all weighters that
        need the same embeddings. A weighter that needs embeddings of validation samples in few steps only has to cache
        them.

        Args:
            samples: :attr:`validation`, to get the embeddings of all validation samples in their order. None means the
                samples of the step, (n, H).

        Raises:
            ComponentError: if the needs of the weighter name no embeddings.
        """
        source = _embeddings_asked_for(self.embedding_source)
        return source(self.indices if samples is None else np.arange(samples.size), samples)

    @property
    def progress(self) -> float:
        """The completed part of the run, in [0, 1)."""
        return self.step / self.total_steps

    @cached_property
    def indices(self) -> IndexArray:
        """Pool indices of the samples, shape (n,). They are copied from the device on first access.

        Raises:
            ComponentError: in a stream, because the samples of a stream have no index.
        """
        if self.places is None:
            raise ComponentError("batch.indices: the samples of a stream have no index; set streaming: false.")
        indices: IndexArray = self.places.cpu().numpy()
        return indices

    @property
    def domains(self) -> NDArray[np.int64]:
        """Domain of each sample, shape (n,). All are 0 if no component selects, mixes or orders."""
        return self._pool.domain_ids(self.indices)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of each sample, shape (n,)."""
        return self._pool.lengths[self.indices]

    @property
    def token_losses(self) -> Tensor:
        """Token losses of the samples, shape (n, T); 0 for a token that is not trained on."""
        return self._asked("token_losses").losses

    @property
    def trained(self) -> Tensor:
        """Whether each token counts in the loss, shape (n, T), bool."""
        return self._asked("trained").trained

    @property
    def reference_losses(self) -> Tensor:
        """Losses of the reference at the same tokens, shape (n, T); 0 for a token that is not trained on."""
        if self.tokens is None or self.tokens.reference is None:
            raise ComponentError(
                "batch.reference_losses is read by a weighter whose needs() name no reference; return "
                "Needs(reference=self.params) from its needs()."
            )
        return self.tokens.reference

    @property
    def prompt_attention(self) -> Tensor:
        """Attention of the tokens to their prompts in the last layer, shape (n, T), float32, detached, in [0, 1].

        The prompt of a token consists of all earlier tokens of the sample that are not trained on. The probabilities
        are those of the token's own row, as mean over the heads, and summed over the prompt. As in
        :attr:`token_losses`, column t belongs to token t + 1. It is 0 for a token that is not trained on.
        """
        if self.tokens is None or self.tokens.prompt_attention is None:
            raise ComponentError(
                "batch.prompt_attention is read by a weighter whose needs() do not name it; return "
                "Needs(prompt_attention=True) from its needs()."
            )
        return self.tokens.prompt_attention

    @property
    def step_embeddings(self) -> Tensor:
        """Hidden states of the step's forward pass, reduced to a vector per sample, shape (n, H), float32, detached."""
        if self.pooled is None:
            raise ComponentError(
                "batch.step_embeddings is read by a weighter whose needs() name none; return "
                "Needs(step_embeddings=Embeddings()) from its needs()."
            )
        return self.pooled

    @property
    def given_weights(self) -> Tensor:
        """Weights of the tokens that the data gives, shape (n, T); 1 for a token that is not trained on."""
        if self.given is None:
            raise ComponentError(
                "batch.given_weights is read by a weighter whose needs() name none; return "
                "Needs(given_weights=self.params) from its needs(), whose parameters extend dataflex.GivenWeightParams."
            )
        return self.given

    @property
    def _pool(self) -> Pool:
        if self.pool is None:
            raise ComponentError("batch.pool: a stream has no pool; set streaming: false.")
        return self.pool

    def _asked(self, name: str) -> TokenLosses:
        if self.tokens is None:
            raise ComponentError(
                f"batch.{name} is read by a weighter whose needs() name no token losses; return "
                'Needs(step_losses="tokens") from its needs().'
            )
        return self.tokens


@dataclass(frozen=True)
class RoundContext:
    """The data that a decision may depend on.

    Example:
        A selector that draws random scores in its first decision, and then prefers samples with a high loss:

        >>> from dataflex import Losses, Needs, RoundContext, Selector, SelectorParams
        >>> class Hard(Selector[SelectorParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(Losses(),))
        ...     def score(self, ctx: RoundContext, candidates):
        ...         if ctx.update == 0:
        ...             return ctx.rng.random(candidates.size)
        ...         return ctx.probe.measure(Losses(), candidates)
    """

    pool: Pool
    """The training samples."""
    probe: Probe
    """Measures on the model in training."""
    rng: np.random.Generator
    """Generator keyed by (seed, component, round): the same random values on every rank and after a resume."""
    round: int
    """Number of the planned round, from 0."""
    update: int
    """Number of the decision, from 0. It is 0 in warm-up rounds, which have no decision."""
    num_updates: int
    """Number of decisions in the whole run."""
    start_step: int
    """Number of completed optimizer steps."""
    steps: int
    """Number of optimizer steps in the plan."""
    size: int
    """Number of samples in the plan: ``steps`` times the global batch size."""
    total_steps: int
    """Number of optimizer steps of the whole run."""
    validation_pool: Pool | None = None
    """The validation samples, if the component needs them. Read them as :attr:`validation`."""
    candidates: IndexArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """All samples that a selector may choose from in this decision, over all groups, ascending. Empty for other
    families."""
    reference_losses: Reference | None = None
    """The reference, if the component needs it. Read it as :attr:`reference`."""
    learning_rate: float = 0.0
    """The learning rate of the optimizer at the first step of the round."""
    embedding_source: EmbeddingSource | None = None
    """Function that returns embeddings, if the component needs them. Call :meth:`embeddings`."""
    undecided: list[str] = field(default_factory=list)
    """The reasons that were passed to :meth:`not_decided`."""
    notes: list[str] = field(default_factory=list)
    """The messages that were passed to :meth:`note`."""

    @property
    def validation(self) -> Pool:
        """The validation samples, one domain for each sub-task.

        Raises:
            ComponentError: if the needs of the component name no validation samples.
        """
        return _asked_for(self.validation_pool)

    @property
    def reference(self) -> Reference:
        """The frozen reference, which gives losses of samples and of their tokens.

        Raises:
            ComponentError: if the needs of the component name no reference.
        """
        return _reference_asked_for(self.reference_losses, "ctx")

    def embeddings(self, samples: Pool | None = None) -> EmbeddingArray:
        """Return unit-length embeddings of all samples, shape (N, H). A sample without text has a row of zeros.

        The embeddings are the same on every process. Embeddings of the model in training are float32. They are measured
        once per decision for all components that need the same embeddings. Embeddings of an encoder are a read-only
        memory map of float16. They are computed once and stored on disk.

        Args:
            samples: :attr:`validation`. None means the pool of the run.

        Raises:
            ComponentError: if the needs of the component name no embeddings.
        """
        return _embeddings_asked_for(self.embedding_source)(samples)

    def not_decided(self, why: str) -> None:
        """Record that this decision does not follow the method of the component, and why.

        An example is a first decision that has no measurements to use. The line of the round then does not list the
        component as active. A selector can also report this for each group, in :attr:`Selection.undecided`.
        """
        self.undecided.append(why)

    def note(self, text: str) -> None:
        """Report a message about this decision to the user: as a warning, and in the summary of the run."""
        self.notes.append(text)
