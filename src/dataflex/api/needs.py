"""The needs of a component, and the settings of the run that it may read before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from dataflex.api.given_weights import GivenWeightParams
    from dataflex.api.measurement import Measurement
    from dataflex.api.params import EmbeddingParams, ValidationParams
    from dataflex.api.reference import ReferenceParams
    from dataflex.probe.embeddings import HiddenStates


class RunView(Protocol):
    """The settings of a run that a component may read before anything is loaded.

    Example:
        A selector that does not support sharded weights:

        >>> from dataflex import RunView, Selector, SelectorParams
        >>> class Local(Selector[SelectorParams]):
        ...     def problems(self, run: RunView):
        ...         if run.sharded_by is not None:
        ...             yield "method", f"local needs the whole model on each process; do not use {run.sharded_by}."
    """

    @property
    def llamafactory(self) -> Mapping[str, Any]:
        """LLaMA-Factory's own keys with the values that the user has set."""
        ...

    @property
    def deepspeed(self) -> Mapping[str, Any] | None:
        """DeepSpeed's configuration. None without DeepSpeed; empty if the configuration cannot be read."""
        ...

    @property
    def zero_stage(self) -> int:
        """ZeRO stage in DeepSpeed's configuration, 0 to 3; 0 without DeepSpeed."""
        ...

    @property
    def sharded_by(self) -> Literal["fsdp", "ZeRO-3"] | None:
        """The method that shards the weights of the model over the processes, or None."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Number of optimizer steps before the first decision."""
        ...

    @property
    def offline(self) -> bool:
        """Whether the pool is only scored and not trained on."""
        ...


@dataclass(frozen=True)
class Needs:
    """The needs of a component in a run.

    The framework provides the needs, counts their cost and checks that they are available.

    Attributes:
        measurements: the measurements that the component makes with ``ctx.probe``, of training and validation samples.
        validation: selects the samples of ``ctx.validation``, one domain for each sub-task. None means that the
            component needs no validation samples.
        reference: the frozen model, or the table of its token losses, for comparison. None means that the component
            needs no reference.
        columns: the columns of the raw data that the component reads with ``ctx.pool.column(name)``.
        step_losses: the losses of every training step that ``on_step`` receives, without an extra forward pass:
            nothing, the means of the domains, also the means of the samples, or also the losses of the tokens. A
            weighter always receives the losses of the samples, and with ``tokens`` the losses of the tokens too.
        embeddings: the embeddings that the component reads with ``ctx.embeddings()`` (in a weighter,
            ``batch.embeddings()``), of training and validation samples. None means that the component needs no
            embeddings.
        step_embeddings: how the hidden states of the step's own forward pass are reduced to one vector per sample. A
            weighter reads the vectors as ``batch.step_embeddings``. None means that the weighter needs no vectors.
        given_weights: the weights of tokens that the data gives. A weighter reads them as ``batch.given_weights``. None
            means that the weighter needs no such weights.
        prompt_attention: whether a weighter reads ``batch.prompt_attention``, the attention of each token to its prompt
            in the last layer, from the step's own forward pass. It then also receives the losses of the tokens.
        token_losses: whether the component needs stages in which each token has a loss, so that the loss of a sample is
            a mean over its tokens. If so, stages dpo, rm and kto are refused.
        step_margins: whether a weighter reads ``batch.margins``, the reward margins of the pairs of a step. Only stages
            dpo and rm have them.

    Example:
        >>> from dataflex import Losses, Needs, ValidationParams
        >>> validation = ValidationParams(validation=["gsm8k"])
        >>> needs = Needs(measurements=(Losses(),), validation=validation, columns=("quality",))
        >>> needs.step_losses
        'nothing'
    """

    measurements: tuple[Measurement[Any], ...] = ()
    validation: ValidationParams | None = None
    reference: ReferenceParams | None = None
    columns: tuple[str, ...] = ()
    step_losses: Literal["nothing", "domains", "samples", "tokens"] = "nothing"
    embeddings: EmbeddingParams | None = None
    step_embeddings: HiddenStates | None = None
    given_weights: GivenWeightParams | None = None
    prompt_attention: bool = False
    token_losses: bool = False
    step_margins: bool = False
