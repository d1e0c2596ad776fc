"""What a component asks of its run, and what it may read of it before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from dataflex.api.measurement import Measurement
    from dataflex.api.params import EmbeddingParams, ValidationParams
    from dataflex.api.reference import ReferenceParams
    from dataflex.probe.embeddings import HiddenStates


class RunView(Protocol):
    """What a component may read of its run before anything is loaded."""

    @property
    def llamafactory(self) -> Mapping[str, Any]:
        """LLaMA-Factory's own keys, as they are given."""
        ...

    @property
    def deepspeed(self) -> Mapping[str, Any] | None:
        """DeepSpeed's configuration; None without DeepSpeed, empty if it cannot be read."""
        ...

    @property
    def zero_stage(self) -> int:
        """Stage of ZeRO in DeepSpeed's configuration, 0 to 3; 0 without one."""
        ...

    @property
    def sharded_by(self) -> Literal["fsdp", "ZeRO-3"] | None:
        """Which of the two spreads the weights of the model over the processes, if any."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps before the first decision."""
        ...

    @property
    def offline(self) -> bool:
        """Whether the pool is only scored, not trained on."""
        ...


@dataclass(frozen=True)
class Needs:
    """What a component asks of the run. The framework provides it, counts its cost, and checks that it can be had.

    Attributes:
        measurements: what it measures with ``ctx.probe``, of training and of validation samples alike.
        validation: which samples are in ``ctx.validation``, one domain for each sub-task; None: it wants none.
        reference: the frozen model, or the table of its token losses, it compares with; None: it wants none.
        columns: columns of the raw data it reads with ``ctx.pool.column(name)``.
        step_losses: what ``on_step`` is told of the losses of every training step, without a further forward: nothing,
            the means of the domains, those of the samples too, or the losses of the tokens too. A weighter is
            always shown the losses of the samples, and with ``tokens`` those of the tokens, too.
        embeddings: which embeddings it reads with ``ctx.embeddings()`` (a weighter: ``batch.embeddings()``), of
            training and of validation samples; None: it wants none.
        step_embeddings: what a weighter is shown of the hidden states of the step's own forward, reduced to a vector
            for each sample, as ``batch.step_embeddings``; None: nothing.
    """

    measurements: tuple[Measurement[Any], ...] = ()
    validation: ValidationParams | None = None
    reference: ReferenceParams | None = None
    columns: tuple[str, ...] = ()
    step_losses: Literal["nothing", "domains", "samples", "tokens"] = "nothing"
    embeddings: EmbeddingParams | None = None
    step_embeddings: HiddenStates | None = None
