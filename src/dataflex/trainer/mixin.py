"""The trainer: a mixin over LLaMA-Factory's trainer of the stage.

The training loop is the Hugging Face Trainer's. Overridden are the training loader, the loss of a training step, the
log, the checkpoint and the start of training; a callback hears the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, rotate_checkpoints

from dataflex import distributed
from dataflex.data.plan import Arrangement
from dataflex.influence import FeatureParams
from dataflex.probe.checkpoints import saved_moments
from dataflex.probe.features import make_sketch
from dataflex.probe.losses import full_forward
from dataflex.probe.mode import probe_mode
from dataflex.probe.model import ModelProbe, Tokens
from dataflex.probe.moments import read_moments
from dataflex.token_loss import shifted
from dataflex.trainer import checkpoint
from dataflex.trainer.loss import WeightedLoss, loss_function
from dataflex.trainer.rounds import INDEX_KEY, RoundStream
from dataflex.trainer.run import DynamicRun
from dataflex.trainer.statistics import StepAccumulator

if TYPE_CHECKING:
    from llamafactory.hparams import FinetuningArguments

_PROBE_MICRO_BATCHES = 4


class Finished(Exception):
    """There is nothing left to do, and nothing was trained."""


class DynamicTrainerMixin(Trainer):
    """Trains the rounds of a :class:`DynamicRun`; goes before LLaMA-Factory's trainer class in the bases."""

    finetuning_args: FinetuningArguments

    def __init__(self, *, dataflex: DynamicRun, args: TrainingArguments, **kwargs: Any) -> None:
        self.dataflex = dataflex
        self._resumed_state: dict[str, Any] | None = None
        self.stop_tokens: list[int] | None = (kwargs.get("gen_kwargs") or {}).get("eos_token_id")
        """What LLaMA-Factory's own generation stops at; None in a stage that generates nothing."""
        if args.do_train and dataflex.instead is None:
            dataflex.set_steps(args)
        super().__init__(args=args, **kwargs)
        self.step_accumulator = StepAccumulator(dataflex.offsets, args.device)
        self.step_loss = WeightedLoss(
            weighter=dataflex.components.weight,
            samples_per_step=self._samples_per_step(),
            observe=self.step_accumulator.add,
        )
        self.add_callback(DynamicCallback(self))

    def _samples_per_step(self) -> int:
        """Return the samples that ``normalization: sample`` divides by, given what the Trainer multiplies by."""
        size = self.dataflex.global_batch_size
        return size if self.args.average_tokens_across_devices else size // self.args.world_size

    @property
    def own_loss(self) -> bool:
        """Whether training steps use our loss function; LLaMA-Factory's special losses keep their own path."""
        return self.compute_loss_func is None and self.label_smoother is None

    def raw_model(self) -> torch.nn.Module:
        """Return the module whose forward may be run between steps without touching the wrapper's state."""
        if self.is_fsdp_enabled:
            return self.model_wrapped
        return self.accelerator.unwrap_model(self.model_wrapped)

    def causal_model(self) -> torch.nn.Module:
        """Return the Hugging Face model itself, under any adapter."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if _is_peft(model) else model

    def get_train_dataloader(self) -> Any:
        """Return the rounds, or LLaMA-Factory's own loader where only weights are decided."""
        return RoundStream(self) if self.dataflex.plans_data else super().get_train_dataloader()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, resuming from the last complete checkpoint where a resume is asked for."""
        run = self.dataflex
        if run.instead is not None:
            self._only_look(run.instead)
        explicit = run.config.llamafactory.get("resume_from_checkpoint") not in (None, False)
        folder, state = distributed.on_main(partial(_load_state, resume_from_checkpoint, explicit, self.args))
        run.probe = self._make_probe() if run.pool is not None else None
        self._check_features()
        run.learning_rate = lambda: float(self.lr_scheduler.get_last_lr()[0])
        self._resumed_state = state
        return super().train(resume_from_checkpoint=folder, **kwargs)

    def _only_look(self, instead: Callable[[DynamicRun], None]) -> NoReturn:
        """Do ``instead`` on the model as it was loaded, with the moments saved beside it, and leave."""
        run = self.dataflex
        self.create_optimizer()  # for the order of its parameters
        given = self.finetuning_saved_folder()
        run.probe = self._make_probe()
        run.probe.moments = lambda: saved_moments(given, self.optimizer, self.raw_model())
        instead(run)
        raise Finished

    def finetuning_saved_folder(self) -> Path:
        """Return the folder the trained weights came from: the adapter's, or the model's."""
        given = self.dataflex.config.llamafactory
        adapters = given.get("adapter_name_or_path")
        last = adapters.split(",")[-1].strip() if isinstance(adapters, str) else (adapters or [None])[-1]
        return Path(str(last or given["model_name_or_path"]))

    def _make_probe(self) -> ModelProbe:
        run = self.dataflex
        assert run.pool is not None
        cutoff = int(run.pool.lengths.max())
        micro_batch = self.args.per_device_train_batch_size * cutoff
        given = run.settings.probe_batch_tokens
        sharded = self.is_fsdp_enabled or self._zero_stage() == 3
        # The probe keeps all activations, which a training that checkpoints them may have no memory for; and where the
        # model is sharded, no process may halve its batches on its own.
        cautious = sharded and self.causal_model().is_gradient_checkpointing
        return ModelProbe(
            pool=run.pool,
            model=self.raw_model,
            collate=self.data_collator,
            autocast=self.accelerator.autocast,
            device=self.args.device,
            batch_tokens=given or _PROBE_MICRO_BATCHES * micro_batch,
            gradient_batch_tokens=given or (cutoff if cautious else micro_batch),
            moments=lambda: read_moments(self.optimizer, self.raw_model()),
            tokens=_tokens(self.processing_class, self.stop_tokens),
            sharded=sharded,
            after_backward=self._release,
            saved_moments=lambda folder: saved_moments(folder, self.optimizer, self.raw_model()),
            progress=self.args.process_index == 0 and not self.args.disable_tqdm,
        )

    def _check_features(self) -> None:
        """Have a sketch that does not go with the model show before the first step."""
        selector, probe = self.dataflex.components.select, self.dataflex.probe
        if probe is not None and selector is not None and isinstance(selector.params, FeatureParams):
            make_sketch(selector.params.settings(), probe.parameter_sizes(), probe.device)

    def _zero_stage(self) -> int:
        return int(self.accelerator.state.deepspeed_plugin.zero_stage) if self.is_deepspeed_enabled else 0

    def _release(self) -> None:
        """Have ZeRO-3 let go of the parameters of layers whose backward was not run to its end."""
        if self._zero_stage() == 3:
            self.model_wrapped.optimizer.parameter_offload.release_backward_leftovers()

    def arrangement(self) -> Arrangement:
        """Return what the user's keys say about the order of samples."""
        strategy = self.args.train_sampling_strategy
        if self.finetuning_args.disable_shuffling or strategy == "sequential":
            return "sequential"
        return "group_by_length" if strategy == "group_by_length" else "shuffle"

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of the next optimizer step, and decide their weights where that takes all of them."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        loss, schedule = self.step_loss, self.dataflex.schedule
        loss.step = self.state.global_step
        loss.active = schedule.slot_at(min(loss.step, schedule.total_steps - 1)).update is not None
        loss.decided.clear()
        if loss.active and loss.weighter is not None and not loss.weighter.elementwise and len(samples) > 1:
            began = time.perf_counter()
            sizes = [batch["labels"].size(0) for batch in samples]
            loss.decided.extend(loss.decide(loss.weighter, self._losses_of(samples)).split(sizes))
            self.dataflex.decision_seconds += time.perf_counter() - began
        return samples, num_items

    def _losses_of(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        """Return this process's token-mean losses of several micro-batches, (n,), without a trace of the forwards."""
        model, parts = self.raw_model(), []
        with probe_mode(model), self.accelerator.autocast():
            for batch in samples:
                inputs = {key: value for key, value in self._prepare_inputs(batch).items() if key != INDEX_KEY}
                targets = shifted(inputs.pop("labels"))
                parts.append(full_forward(model, inputs, targets))
        return torch.cat(parts)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute a training step's loss with weights and statistics; evaluation stays as it is."""
        indices = inputs.pop(INDEX_KEY, None)
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.step_accumulator.add_tokens(inputs)
        if not self.own_loss:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.step_accumulator.indices = indices
        with loss_function(self.causal_model(), self.step_loss):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the round and the domains to a training log."""
        if "loss" in logs:
            logs.update(self._dataflex_logs())
        super().log(logs, *args, **kwargs)

    def _dataflex_logs(self) -> dict[str, float]:
        run, logs = self.dataflex, {}
        if run.statistics is not None and self.own_loss:
            for name, loss in zip(run.domains, run.statistics.losses.tolist(), strict=True):
                if loss == loss:  # a domain the batch had none of is NaN
                    logs[f"dataflex/loss/{name}"] = loss
        if run.plan is not None:
            logs["dataflex/round"] = run.plan.slot.number
            for name, share in zip(run.domains, run.plan.proportions.tolist(), strict=True):
                logs[f"dataflex/proportion/{name}"] = share
            logs["dataflex/decision_seconds"] = run.decision_seconds
        if self.step_loss.last_weights is not None:
            logs["dataflex/weight_min"] = self.step_loss.last_weights.min().item()
            logs["dataflex/weight_max"] = self.step_loss.last_weights.max().item()
        return logs

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint whose last file is the marker; only then delete older ones."""
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        main = self.args.process_index == 0
        if main:
            checkpoint.unmark(folder)
        distributed.barrier()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        state = self.dataflex.state_dict(self.state.global_step)
        distributed.barrier()
        if main:
            checkpoint.write_state(folder, state)
            checkpoint.mark_complete(folder)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        distributed.barrier()


def _tokens(processing_class: Any, stops: list[int] | None) -> Tokens:
    """Return what generation needs of a tokenizer, or of a processor's.

    Args:
        processing_class: the tokenizer or processor.
        stops: tokens that end a response; None: the tokenizer's end-of-sequence token.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return Tokens(
        pad=int(tokenizer.pad_token_id),
        eos=tuple(dict.fromkeys(map(int, [tokenizer.eos_token_id] if stops is None else stops))),
        decode=partial(tokenizer.decode, skip_special_tokens=True),
    )


def _is_peft(model: torch.nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _load_state(
    requested: str | bool | None, explicit: bool, args: TrainingArguments
) -> tuple[str | None, dict[str, Any] | None]:
    """Return the checkpoint to resume from and its state."""
    folder, left = checkpoint.resolve(requested, explicit, Path(args.output_dir))
    for line in left:
        _warn(line)
    return (None, None) if folder is None else (str(folder), checkpoint.read_state(folder))


def _warn(line: str) -> None:
    from llamafactory.extras import logging

    logging.get_logger(__name__).warning_rank0(line)


class DynamicCallback(TrainerCallback):
    """Hears the Trainer's events for the run."""

    def __init__(self, trainer: DynamicTrainerMixin) -> None:
        self.trainer = trainer
        self._began = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make the planner and take back a checkpoint's state."""
        run = self.trainer.dataflex
        run.prepare(args, state.max_steps, self.trainer.arrangement(), self.trainer._resumed_state)
        self.trainer._resumed_state = None
        expected = run.expected_cost()
        if expected is not None and args.process_index == 0:
            tqdm.write(f"dataflex: {expected}")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the step's clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Gather the step's statistics, and keep the epoch count and epoch-wise actions right."""
        trainer, run = self.trainer, self.trainer.dataflex
        statistics, tokens = trainer.step_accumulator.finish(state.global_step)
        run.train_seconds += time.perf_counter() - self._began
        run.end_of_step(statistics, tokens)
        if run.pool is None:
            return
        trained = state.global_step * run.global_batch_size
        state.epoch = trained / run.pool.size
        if trained // run.pool.size > (trained - run.global_batch_size) // run.pool.size:
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the summary and say what the decisions cost."""
        summary = self.trainer.dataflex.finish()
        if args.process_index == 0:
            print(
                f"dataflex: training {summary['train_seconds']:.1f} s, decisions {summary['decision_seconds']:.1f} s "
                f"({100 * summary['overhead_fraction']:.1f} %), {summary['rounds']} rounds, {summary['tokens']} tokens"
            )
