"""Construction of a trainer's probe from its arguments and its model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from dataflex.data.pool import Pool
from dataflex.probe.checkpointing import recomputed_layers
from dataflex.probe.checkpoints import saved_moments
from dataflex.probe.model import ModelProbe, Tokens
from dataflex.probe.moments import read_moments

if TYPE_CHECKING:
    from dataflex.trainer.mixin import DynamicTrainerMixin

_PROBE_MICRO_BATCHES = 4


def make_probe(trainer: DynamicTrainerMixin, pool: Pool) -> ModelProbe:
    """Return the probe that measures samples of a pool on the model in training."""
    args = trainer.args
    cutoff = int(pool.lengths.max())
    micro_batch = args.per_device_train_batch_size * cutoff
    given = trainer.dataflex.inputs.settings.probe_batch_tokens
    sharded = trainer.is_fsdp_enabled or trainer.zero_stage() == 3
    # The probe recomputes the same layers as the training, to save memory. If a model recomputes with its own code, the
    # probe cannot, and stores all activations; the training may have left no memory for them. A process normally
    # halves its batches then. On a sharded model it must not, because the processes would run different numbers of
    # forward passes. So such a model starts with batches of no more tokens than the longest sample has.
    model = trainer.causal_model()
    cautious = sharded and model.is_gradient_checkpointing and not recomputed_layers(model)
    return ModelProbe(
        pool=pool,
        model=trainer.raw_model,
        collate=trainer.data_collator,
        autocast=trainer.accelerator.autocast,
        device=args.device,
        batch_tokens=given or _PROBE_MICRO_BATCHES * micro_batch,
        gradient_batch_tokens=given or (cutoff if cautious else micro_batch),
        moments=lambda: read_moments(trainer.optimizer, trainer.raw_model()),
        tokens=_tokens(trainer.processing_class, trainer.stop_tokens),
        sharded=sharded,
        after_backward=partial(_release, trainer),
        saved_moments=lambda folder: saved_moments(folder, trainer.optimizer, trainer.raw_model()),
        plain_collators=trainer.plain_collators,
        progress=args.process_index == 0 and not args.disable_tqdm,
    )


def _release(trainer: DynamicTrainerMixin) -> None:
    """Make ZeRO-3 release the parameters of layers whose backward pass did not run to its end."""
    if trainer.zero_stage() == 3:
        trainer.model_wrapped.optimizer.parameter_offload.release_backward_leftovers()


def _tokens(processing_class: Any, stops: list[int] | None) -> Tokens:
    """Return the parts of a tokenizer, or of a processor's tokenizer, that generation needs.

    Args:
        processing_class: the tokenizer or processor.
        stops: tokens that end a response. None means the tokenizer's end-of-sequence token.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return Tokens(
        pad=int(tokenizer.pad_token_id),
        eos=tuple(dict.fromkeys(map(int, [tokenizer.eos_token_id] if stops is None else stops))),
        decode=partial(tokenizer.decode, skip_special_tokens=True),
    )
