"""Construction of a trainer's probe from its arguments and its model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.data.pool import Pool
from dataflex.probe.checkpointing import recomputed_layers
from dataflex.probe.checkpoints import saved_moments
from dataflex.probe.model import ModelProbe, Tokens
from dataflex.probe.moments import read_moments
from dataflex.probe.stage_references import StageReferences
from dataflex.record.identity import FOLDER

if TYPE_CHECKING:
    from dataflex.trainer.mixin import DynamicTrainerMixin

_PROBE_MICRO_BATCHES = 4
_REFERENCE_FILES = "reference"
"""Folder of the values of the stage's reference model, inside the run record."""
_LOSS_SETTINGS = (
    "stage",
    "pref_loss",
    "pref_beta",
    "pref_ftx",
    "pref_bco_weight",
    "dpo_label_smoothing",
    "simpo_gamma",
    "ld_alpha",
    "kto_chosen_weight",
    "kto_rejected_weight",
    # Keys of TRL.
    "beta",
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "reference_free",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "use_weighting",
    "max_length",
    "truncation_mode",
)
"""Keys that shape the loss of a preference stage."""
_REFERENCE_SETTINGS = (
    "ref_model",
    "ref_model_adapters",
    "ref_model_quantization_bit",
    "model_name_or_path",
    "adapter_name_or_path",
    "quantization_bit",
    "pref_loss",
    "bf16",
    "fp16",
)
"""LLaMA-Factory's keys that name the reference model of a preference stage, and how it computes log probabilities."""


def make_probe(trainer: DynamicTrainerMixin, pool: Pool) -> ModelProbe:
    """Return the probe that measures samples of a pool on the model in training."""
    args, stage_loss = trainer.args, trainer.stage_loss
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
    micro_batches = _PROBE_MICRO_BATCHES
    if stage_loss is not None:
        # The loss of a stage needs all logits of a batch, as a training step does. The length of a pair is the sum over
        # its two rows, but the rows are padded to one width. So a batch may take twice the tokens of its limit.
        micro_batches, micro_batch = 1, micro_batch // (stage_loss.rows if sharded else 1)
    return ModelProbe(
        pool=pool,
        model=trainer.raw_model,
        collate=trainer.data_collator,
        autocast=trainer.accelerator.autocast,
        device=args.device,
        batch_tokens=given or micro_batches * micro_batch,
        gradient_batch_tokens=given or (min(cutoff, micro_batch) if cautious else micro_batch),
        moments=lambda: read_moments(trainer.optimizer, trainer.raw_model()),
        tokens=_tokens(trainer.processing_class, trainer.stop_tokens),
        sharded=sharded,
        after_backward=partial(_release, trainer),
        saved_moments=lambda folder: saved_moments(folder, trainer.optimizer, trainer.raw_model()),
        plain_collators=trainer.plain_collators,
        stage_loss=stage_loss,
        stage_settings={} if stage_loss is None else _settings(trainer, _LOSS_SETTINGS),
        references=StageReferences(
            # A command that does not train has no record.
            folder=Path(args.output_dir) / FOLDER / _REFERENCE_FILES
            if trainer.dataflex.steps.plan is not None
            else None,
            identity=_settings(trainer, _REFERENCE_SETTINGS),
        ),
        progress=args.process_index == 0 and not args.disable_tqdm,
    )


def _settings(trainer: DynamicTrainerMixin, keys: tuple[str, ...]) -> dict[str, str]:
    """Return LLaMA-Factory's keys with the values that the user has set, as text."""
    given = trainer.dataflex.inputs.config.llamafactory
    return {key: str(given[key]) for key in keys if given.get(key) is not None}


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
