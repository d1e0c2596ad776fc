"""The state of a run that a decision, or the loss weights of a step, may depend on."""

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
"""Gives the embeddings of all samples of a pool; None: of the run's."""


@dataclass(frozen=True)
class StepStatistics:
    """What the optimizer step just made showed, over the whole global batch (all micro-batches, all ranks)."""

    step: int
    """Optimizer steps done, this one included."""
    losses: NDArray[np.float64]
    """Token-mean training loss of each domain, unweighted, shape (K,); NaN where the batch had none of it."""
    tokens: NDArray[np.int64]
    """Tokens that count in the loss, of each domain, shape (K,)."""
    samples: NDArray[np.int64]
    """Samples of each domain, shape (K,)."""
    proportions: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """The domain shares of the plan the step was trained on, shape (K,); empty where nothing is planned."""
    warmup: bool = False
    """Whether the step was trained in a warm-up round."""
    excess: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Token mean of max(loss - reference loss, 0) of each domain, shape (K,), NaN as for losses; 0 where nothing was
    compared with a reference."""
    indices: IndexArray = field(default_factory=lambda: np.empty(0, np.int64))
    """The samples of the step in the order of the plan, shape (n,); empty if no component asks for ``step_losses`` of
    samples or tokens."""
    sample_losses: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    """Their token-mean losses, shape (n,); NaN without a trained token."""
    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Their tokens, shape (n,)."""
    token_losses: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """The losses of their tokens, shape (n, T): column t is that of predicting token t + 1; NaN where none is trained
    on. (n, 0) if no component asks for ``step_losses`` of tokens."""


@dataclass(frozen=True)
class StepContext:
    """What the loss weights of one optimizer step may depend on; the same on every rank."""

    pool: Pool
    probe: Probe
    step: int
    """Optimizer steps done before this one."""
    total_steps: int
    """Optimizer steps the run is expected to take."""
    learning_rate: float
    indices: IndexArray
    """Samples of the step's global batch (all micro-batches, all ranks), shape (B,)."""
    tokens: NDArray[np.int64]
    """Tokens of the step that count in the loss, of each domain, shape (K,)."""
    losses: NDArray[np.float64]
    """Token-mean loss of each domain over them, unweighted, shape (K,); NaN where the step has none of it. Empty for
    mixers that weigh by ``probe``."""
    excess: NDArray[np.float64]
    """Token mean of max(loss - reference loss, 0) of each domain, shape (K,); NaN as for losses. Empty for mixers that
    do not weigh by ``excess``."""
    validation_pool: Pool | None = None
    """The validation samples, if the mixer asked for them; read them as :attr:`validation`."""

    @property
    def validation(self) -> Pool:
        """The validation samples, one domain for each sub-task.

        Raises:
            ComponentError: if the mixer did not ask for any.
        """
        return _asked_for(self.validation_pool)


def _asked_for(validation: Pool | None) -> Pool:
    if validation is None:
        raise ComponentError(
            "ctx.validation is read by a component that asked for no validation samples; return "
            "Needs(validation=self.params) from its needs()."
        )
    return validation


def _embeddings_asked_for(source: SourceT | None) -> SourceT:
    if source is None:
        raise ComponentError(
            "embeddings are read by a component that asked for none; return Needs(embeddings=self.params) from its "
            "needs(), whose parameters extend dataflex.EmbeddingParams."
        )
    return source


@dataclass(frozen=True)
class TokenLosses:
    """The losses of the tokens of ``n`` samples; column t is the loss of predicting token t + 1.

    Attributes:
        losses: shape (n, T), detached; 0 where no token is trained on.
        trained: which of them count in the loss, shape (n, T), bool.
        reference: losses of the reference at the same places, shape (n, T), 0 where no token is trained on; None for a
            weighter that asks for no reference.
    """

    losses: Tensor
    trained: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class StepStart:
    """What a weighter may measure before the forwards of an optimizer step; the same on every rank.

    Attributes:
        step: optimizer steps done so far.
        total_steps: optimizer steps the run is expected to take.
        rng: keyed by (seed, component, step): the same numbers on every rank and after a resume.
        pool: the training samples; None in a stream.
        probe: measures on the model in training; None in a stream.
        validation_pool: the validation samples, if the weighter asked for them; read them as :attr:`validation`.
    """

    step: int
    total_steps: int
    rng: np.random.Generator
    pool: Pool | None = None
    probe: Probe | None = None
    validation_pool: Pool | None = None

    @property
    def validation(self) -> Pool:
        """The validation samples, one domain for each sub-task.

        Raises:
            ComponentError: if the weighter did not ask for any.
        """
        return _asked_for(self.validation_pool)


@dataclass(frozen=True)
class StepBatch:
    """The samples of one optimizer step whose loss a weighter scales.

    They are those of the whole global batch (all micro-batches, all ranks), the same on every rank, in the order of the
    plan; of an elementwise weighter any part of it. Samples without a token that is trained on are left out: there is
    nothing to scale.

    Attributes:
        losses: token-mean loss of each sample, shape (n,), float32, detached, finite.
        step: optimizer steps done so far.
        total_steps: optimizer steps the run is expected to take.
        pool: the training samples; None in a stream.
        probe: measures on the model in training; None in a stream. Every rank must make the same calls, so not for
            elementwise weighters.
        places: where the samples are in the pool, shape (n,), on the device of ``losses``; None in a stream.
        tokens: the losses of their tokens; None if the weighter asks for none.
        validation_pool: the validation samples, if the weighter asked for them; read them as :attr:`validation`.
        embedding_source: gives embeddings, if the weighter asked for them; call :meth:`embeddings`.
        pooled: their hidden states, reduced to one vector each; None if the weighter asks for none.
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

    @property
    def validation(self) -> Pool:
        """The validation samples, one domain for each sub-task.

        Raises:
            ComponentError: if the weighter did not ask for any.
        """
        return _asked_for(self.validation_pool)

    def embeddings(self, samples: Pool | None = None) -> EmbeddingArray:
        """Return unit-length embeddings, one row for each sample; zeros for a sample without text.

        Those of the model in training are measured as it is before the step, once for all weighters that ask for the
        same. A weighter that needs those of validation samples only now and then keeps them itself.

        Args:
            samples: all samples of :attr:`validation`, in their order; None: those of the step, (n, H).

        Raises:
            ComponentError: if the weighter did not ask for any.
        """
        source = _embeddings_asked_for(self.embedding_source)
        return source(self.indices if samples is None else np.arange(samples.size), samples)

    @property
    def progress(self) -> float:
        """How much of the run is done, in [0, 1)."""
        return self.step / self.total_steps

    @cached_property
    def indices(self) -> IndexArray:
        """The samples' indices in the pool, shape (n,). Copied from the device when first read.

        Raises:
            ComponentError: in a stream, whose samples have none.
        """
        if self.places is None:
            raise ComponentError("batch.indices: the samples of a stream have no index; set streaming: false.")
        indices: IndexArray = self.places.cpu().numpy()
        return indices

    @property
    def domains(self) -> NDArray[np.int64]:
        """The samples' domains, shape (n,); all 0 if nothing is selected, mixed or ordered."""
        return self._pool.domain_ids(self.indices)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """The samples' tokens, shape (n,)."""
        return self._pool.lengths[self.indices]

    @property
    def token_losses(self) -> Tensor:
        """The losses of the tokens, shape (n, T); 0 where none is trained on."""
        return self._asked("token_losses").losses

    @property
    def trained(self) -> Tensor:
        """Which tokens count in the loss, shape (n, T), bool."""
        return self._asked("trained").trained

    @property
    def reference_losses(self) -> Tensor:
        """The losses of the reference at the same tokens, shape (n, T); 0 where none is trained on."""
        if self.tokens is None or self.tokens.reference is None:
            raise ComponentError(
                "batch.reference_losses is read by a weighter that asked for no reference; return "
                "Needs(reference=self.params) from its needs()."
            )
        return self.tokens.reference

    @property
    def step_embeddings(self) -> Tensor:
        """What is made of the samples' hidden states in the step's own forward, shape (n, H), float32, detached."""
        if self.pooled is None:
            raise ComponentError(
                "batch.step_embeddings is read by a weighter that asked for none; return "
                "Needs(step_embeddings=Embeddings()) from its needs()."
            )
        return self.pooled

    @property
    def _pool(self) -> Pool:
        if self.pool is None:
            raise ComponentError("batch.pool: a stream has none; set streaming: false.")
        return self.pool

    def _asked(self, name: str) -> TokenLosses:
        if self.tokens is None:
            raise ComponentError(
                f"batch.{name} is read by a weighter that asked for no losses of tokens; return "
                'Needs(step_losses="tokens") from its needs().'
            )
        return self.tokens


@dataclass(frozen=True)
class RoundContext:
    """What a decision may depend on."""

    pool: Pool
    probe: Probe
    rng: np.random.Generator
    """Keyed by (seed, component, round): the same numbers on every rank and after a resume."""
    round: int
    """Number of the round being planned, from 0."""
    update: int
    """Number of the decision, from 0; warm-up rounds have none (0 there)."""
    num_updates: int
    """Decisions in the whole run."""
    start_step: int
    """Optimizer steps done so far."""
    steps: int
    """Optimizer steps the plan is for."""
    size: int
    """Samples the plan is for: ``steps`` times the global batch size."""
    total_steps: int
    """Optimizer steps of the whole run."""
    validation_pool: Pool | None = None
    """The validation samples, if the component asked for them; read them as :attr:`validation`."""
    candidates: IndexArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """All samples a selector may choose from in this decision, of all groups, ascending; of other families none."""
    reference_losses: Reference | None = None
    """The reference, if the component asked for one; read it as :attr:`reference`."""
    learning_rate: float = 0.0
    """The optimizer's, at the first step of the round."""
    embedding_source: EmbeddingSource | None = None
    """Gives embeddings, if the component asked for them; call :meth:`embeddings`."""
    undecided: list[str] = field(default_factory=list)
    """Why nothing was decided, as :meth:`not_decided` was told."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of the decision, as :meth:`note` was told."""

    @property
    def validation(self) -> Pool:
        """The validation samples, one domain for each sub-task.

        Raises:
            ComponentError: if the component did not ask for any.
        """
        return _asked_for(self.validation_pool)

    @property
    def reference(self) -> Reference:
        """The frozen reference: its losses of samples and of their tokens.

        Raises:
            ComponentError: if the component did not ask for one.
        """
        if self.reference_losses is None:
            raise ComponentError(
                "ctx.reference is read by a component that asked for no reference; return "
                "Needs(reference=self.params) from its needs()."
            )
        return self.reference_losses

    def embeddings(self, samples: Pool | None = None) -> EmbeddingArray:
        """Return unit-length embeddings of all samples, one row for each, shape (N, H); zeros for one without text.

        The same on every process. Those of the model in training are float32 and measured once in a decision for all
        components that ask for the same. Those of an encoder are a read-only memory map of float16, made once and kept
        on disk.

        Args:
            samples: :attr:`validation`; None: the run's pool.

        Raises:
            ComponentError: if the component did not ask for any.
        """
        return _embeddings_asked_for(self.embedding_source)(samples)

    def not_decided(self, why: str) -> None:
        """Put on record that this decision does not follow from what the component is for, and why.

        As in a first decision that has nothing to go by yet. The round's line then does not name it as having acted. A
        selector can also say so of each group, in :attr:`Selection.undecided`.
        """
        self.undecided.append(why)

    def note(self, text: str) -> None:
        """Tell the user something about this decision: it is warned of now, and is in the run's summary."""
        self.notes.append(text)
