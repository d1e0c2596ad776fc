"""The trainer: a mixin over LLaMA-Factory's trainer of the stage.

The training loop is the Hugging Face Trainer's. Overridden are the loaders, the loss of a training step, the learning
rate's schedule where a budget ends the run, the log, the evaluation, the checkpoint and the start of training; a
callback hears the rest.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from dataflex import distributed
from dataflex.api.context import StepStatistics
from dataflex.api.probe import GradientFeatures
from dataflex.errors import ConfigError, DivergenceError
from dataflex.planning.planner import Arrangement
from dataflex.probe.checkpoints import saved_moments
from dataflex.probe.features import make_sketch
from dataflex.probe.model import ModelProbe, Tokens
from dataflex.probe.moments import read_moments
from dataflex.record import checkpoint
from dataflex.trainer import console, terminal
from dataflex.trainer.evaluation import DomainEvaluation, Numbers, as_logs, check_evaluation, means
from dataflex.trainer.loss import loss_function
from dataflex.trainer.rounds import INDEX_KEY, IndexedCollator, IndexedDataset, RoundStream
from dataflex.trainer.run import DynamicRun
from dataflex.trainer.stage_losses import BatchLosses, causal_losses
from dataflex.trainer.statistics import check_step
from dataflex.trainer.step_loss import StepLoss

if TYPE_CHECKING:
    from llamafactory.hparams import FinetuningArguments

_PROBE_MICRO_BATCHES = 4


class NothingTrained(Exception):
    """Everything was loaded and used, and nothing is to be trained."""


class DynamicTrainerMixin(Trainer):
    """Trains the rounds of a :class:`DynamicRun`; goes before LLaMA-Factory's trainer class in the bases."""

    finetuning_args: FinetuningArguments
    data_collator: Any
    batch_losses: BatchLosses = staticmethod(causal_losses)
    """How the stage computes the losses of a batch."""

    def __init__(self, *, dataflex: DynamicRun, args: TrainingArguments, **kwargs: Any) -> None:
        self.dataflex = dataflex
        self._evaluated: dict[str, Numbers] = {}
        self._has_logits = True
        """Whether evaluation gave logits for each sample and token, as far as this process saw."""
        self._is_spent = False
        """Whether the checkpoint to go on from has nothing left of the budget."""
        self._evaluated_at = self._saved_at = -1
        """Steps of the last evaluation and the last checkpoint of training."""
        self._logged_round = -1
        self.stop_tokens: list[int] | None = (kwargs.get("gen_kwargs") or {}).get("eos_token_id")
        """What LLaMA-Factory's own generation stops at; None in a stage that generates nothing."""
        if args.do_train and dataflex.when_loaded is None:
            dataflex.set_steps(args)
        super().__init__(args=args, **kwargs)
        self.domain_evaluation = self._make_evaluation()
        self.step_loss = StepLoss(self)
        terminal.shorten(self.callback_handler, knows_end=not dataflex.has_budget)
        # First, because the progress bar and the logs take the run's length from the state as we leave it.
        self.callback_handler.callbacks.insert(0, DynamicCallback(self))

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

    def _make_evaluation(self) -> DomainEvaluation | None:
        """Return what measures every evaluation set; None where there is none, or where responses are generated."""
        sets = self.dataflex.evaluation
        if sets is None or getattr(self.args, "predict_with_generate", False):
            return None
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return DomainEvaluation(sets, decode, self.args.device)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule of learning rates; where a budget ends the run, it follows the budget."""
        run = self.dataflex
        if not run.has_budget:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(run.expected_steps, optimizer)
        follow(scheduler, lambda: run.progress * run.expected_steps)
        return scheduler

    def get_train_dataloader(self) -> Any:
        """Return the rounds, or LLaMA-Factory's own loader where only weights are decided."""
        planned = self.dataflex.plans_data or self._is_spent  # a stream of rounds may have none left
        return RoundStream(self) if planned else super().get_train_dataloader()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, from the checkpoint that the run goes on from, if any, whatever is given."""
        run = self.dataflex
        if run.when_loaded is not None:
            self._stop_before_training(run.when_loaded)
        run.probe = (
            self._make_probe() if run.pool is not None or (run.whole is not None and run.components.weight) else None
        )
        self._check_features()
        self.step_loss.references.make()
        run.references = self.step_loss.references.of_samples()
        run.learning_rate = lambda: float(self.lr_scheduler.get_last_lr()[0])
        if run.resume is None:
            return super().train(**kwargs)
        if run.is_spent(run.resume.state):  # nothing to train: the Trainer has no other way to be told so
            self.args.max_steps = run.resume.marker.step
            self._is_spent = True
        return super().train(resume_from_checkpoint=str(run.resume.folder), **kwargs)

    def _stop_before_training(self, when_loaded: Callable[[DynamicRun], None]) -> NoReturn:
        """Call ``when_loaded`` on the model as it was loaded, with the moments saved beside it, and leave."""
        run = self.dataflex
        self.create_optimizer()  # for the order of its parameters
        given = self.finetuning_saved_folder()
        run.probe = self._make_probe()
        run.probe.moments = lambda: saved_moments(given, self.optimizer, self.raw_model())
        self.step_loss.references.make()
        run.references = self.step_loss.references.of_samples()
        when_loaded(run)
        raise NothingTrained

    def finetuning_saved_folder(self) -> Path:
        """Return the folder the trained weights came from: the adapter's, or the model's."""
        given = self.dataflex.config.llamafactory
        adapters = given.get("adapter_name_or_path")
        last = adapters.split(",")[-1].strip() if isinstance(adapters, str) else (adapters or [None])[-1]
        return Path(str(last or given["model_name_or_path"]))

    def _make_probe(self) -> ModelProbe:
        run, pool = self.dataflex, self.dataflex.samples
        assert pool is not None
        cutoff = int(pool.lengths.max())
        micro_batch = self.args.per_device_train_batch_size * cutoff
        given = run.settings.probe_batch_tokens
        sharded = self.is_fsdp_enabled or self._zero_stage() == 3
        # The probe keeps all activations, which a training that checkpoints them may have no memory for; and where the
        # model is sharded, no process may halve its batches on its own.
        cautious = sharded and self.causal_model().is_gradient_checkpointing
        return ModelProbe(
            pool=pool,
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
        probe = self.dataflex.probe
        for needs in self.dataflex.needs.values():
            for measurement in needs.measurements:
                if probe is not None and isinstance(measurement, GradientFeatures):
                    make_sketch(measurement.settings, probe.parameter_sizes(), probe.device)

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
        """Fetch the micro-batches of the next optimizer step, and decide the weights that take all of them."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_loss.begin(samples)
        return samples, num_items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute a training step's loss with weights and statistics; evaluation stays as it is."""
        indices = inputs.pop(INDEX_KEY, None)
        if not model.training:
            if indices is None or self.domain_evaluation is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            return self._evaluation_loss(model, inputs, indices, *args, **kwargs)
        self.step_loss.accumulator.add_tokens(inputs)
        if not self.own_loss:
            found = super().compute_loss(model, inputs, *args, **kwargs)
        else:
            found = self._weighted_loss(model, inputs, indices, *args, **kwargs)
        self.step_loss.accumulator.add_loss(found[0] if isinstance(found, tuple) else found)
        return found

    def _weighted_loss(
        self, model: Any, inputs: dict[str, Any], indices: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return a training micro-batch's loss through our loss function."""
        self.step_loss.prepare(inputs, indices)
        with loss_function(self.causal_model(), self.step_loss.loss):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _evaluation_loss(
        self, model: Any, inputs: dict[str, Any], indices: torch.Tensor, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the Trainer's own loss of an evaluation batch, and note the losses of its samples."""
        assert self.domain_evaluation is not None
        given = {key: inputs[key] for key in ("input_ids", "labels")}  # the Trainer may take the labels out
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        logits = outputs.get("logits") if isinstance(outputs, dict) else next(iter(outputs[1:]), None)
        shape = (len(indices), given["labels"].shape[1])
        if isinstance(logits, torch.Tensor) and logits.shape[:2] == shape:
            self.domain_evaluation.add(indices.cpu().numpy(), logits, given["input_ids"], given["labels"])
        else:
            self._has_logits = False
        return (loss, outputs) if return_outputs else loss

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's loader; the batches of an evaluation set have the number of each sample.

        So have those of training, if LLaMA-Factory draws the samples and a weighter may want to know which they are.
        """
        first = self._first_index(dataset) if description == "Evaluation" else None
        if description == "Training" and self.dataflex.whole is not None and self.dataflex.components.weight:
            first = 0
        if first is None:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        collate = self.data_collator
        self.data_collator = IndexedCollator(collate, first)
        try:
            return super()._get_dataloader(IndexedDataset(dataset), description, *args, **kwargs)
        finally:
            self.data_collator = collate

    def _first_index(self, dataset: Any) -> int | None:
        """Return where an evaluation set begins among all; None for another data set."""
        if self.domain_evaluation is None:
            return None
        sets = self.domain_evaluation.sets
        if isinstance(self.eval_dataset, dict):
            found = [name for name, part in self.eval_dataset.items() if part is dataset]
            return int(sets.offsets[sets.domains.index(found[0])]) if found else None
        return 0 if dataset is self.eval_dataset else None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the Trainer's sampler, which may look at the rows."""
        rows = train_dataset.dataset if isinstance(train_dataset, IndexedDataset) else train_dataset
        return super()._get_train_sampler(rows)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return the Trainer's sampler, which may look at the rows."""
        rows = eval_dataset.dataset if isinstance(eval_dataset, IndexedDataset) else eval_dataset
        return super()._get_eval_sampler(rows)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's evaluation, and add the numbers of each evaluation set to its metrics."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.domain_evaluation is None:
            return output
        if not distributed.everywhere(self._has_logits, self.args.device):
            _warn(
                f"{type(self.causal_model()).__name__} gives no logits for each sample and token in evaluation, so "
                "there is no loss of each evaluation set, only the Trainer's eval_loss."
            )
            self.domain_evaluation = None
            self._evaluated = {}
            return output
        found = self.domain_evaluation.finish()
        if found is None:
            return output
        self._evaluated |= found
        prefix = str(kwargs.get("metric_key_prefix", "eval"))
        if isinstance(self.eval_dataset, dict):  # this pass was over one of them, whose name ends the prefix
            prefix = prefix.removesuffix("_" + next(iter(found)))
            output.metrics.update(as_logs(found, prefix))
        else:
            output.metrics.update(as_logs({**found, **means(found)}, prefix))
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the Trainer does, and put the numbers of each evaluation set on record."""
        run = self.dataflex
        if run.evaluation_began is not None:  # one of several data sets, called by the call below
            return super().evaluate(*args, **kwargs)
        run.evaluation_began = time.perf_counter()
        self._evaluated = {}
        try:
            metrics = super().evaluate(*args, **kwargs)
        finally:
            run.end_of_evaluation()
        if not self._evaluated:
            return metrics
        check_evaluation(self._evaluated, self.state.global_step)
        found = means(self._evaluated)
        if isinstance(self.eval_dataset, dict):
            further = as_logs(found, str(kwargs.get("metric_key_prefix", "eval")))
            self.log(dict(further))
            metrics.update(further)
        distributed.on_main(partial(run.record_evaluation, self.state.global_step, self._evaluated, found))
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add how far the run is to every log, and the round and the domains to one of training.

        What is not a finite number of ours or of an evaluation is left out: the state's JSON could not hold it.
        """
        if "loss" in logs:
            logs.update(self._dataflex_logs())
        if "loss" in logs or any(key.startswith("eval_") for key in logs):
            logs.update(self.dataflex.progress_logs())
        ours = [key for key in logs if key.startswith(("dataflex/", "eval_"))]
        taken = {key: logs.pop(key) for key in ours if isinstance(logs[key], float) and not math.isfinite(logs[key])}
        super().log(logs, *args, **kwargs)
        logs.update(taken)

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Print the metrics of the run's end without what the record and the files of results have anyway."""
        super().log_metrics(split, console.without_details(metrics))

    def _dataflex_logs(self) -> dict[str, float]:
        run, logs = self.dataflex, {}
        means = run.mean_losses.take()
        if means.size and self.own_loss:
            for name, loss in zip(run.domains, means.tolist(), strict=True):
                if loss == loss:  # NaN for a domain that no step had any of
                    logs[f"dataflex/loss/{name}"] = loss
        logs.update(self._round_logs())
        if run.pool is not None and run.domain_samples.any():  # LLaMA-Factory's special losses show nothing
            epochs = run.domain_samples / run.pool.domain_sizes
            for name, tokens, passes in zip(run.domains, run.domain_tokens.tolist(), epochs.tolist(), strict=True):
                logs[f"dataflex/domain_tokens/{name}"] = tokens
                logs[f"dataflex/epochs/{name}"] = passes
        loss = self.step_loss.loss
        if loss.domain_loss is not None and loss.active:
            for name, weight in zip(run.domains, loss.domain_loss.used.tolist(), strict=True):
                logs[f"dataflex/loss_weight/{name}"] = weight
        if loss.weights is not None and loss.weights.last is not None:
            logs["dataflex/weight_min"] = loss.weights.last.min().item()
            logs["dataflex/weight_max"] = loss.weights.last.max().item()
        return logs

    def _round_logs(self) -> dict[str, float]:
        run = self.dataflex
        logs: dict[str, float] = {}
        if run.plan is not None:
            logs["dataflex/round"] = run.plan.slot.number
            for name, share in zip(run.domains, run.plan.proportions.tolist(), strict=True):
                logs[f"dataflex/proportion/{name}"] = share
        return logs

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save what is due, a step at most once.

        A run is one epoch for the Trainer, so the end of its last pass is announced twice: by the step, and by the end
        of the epoch.
        """
        control, step = self.control, self.state.global_step
        control.should_evaluate &= step != self._evaluated_at
        control.should_save &= step != self._saved_at
        if control.should_evaluate:
            self._evaluated_at = step
        self._log_round()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _log_round(self) -> None:
        """Log the proportions of a round that has just begun, if the step is not logged anyway.

        Not inside an event: a log takes back the control's ``should_log``, which the same event may have set.
        """
        run, step = self.dataflex, self.state.global_step
        if run.components.mix is None or run.plan is None or run.plan.slot.start_step != step - 1:
            return
        number = run.plan.slot.number
        due = self.control.should_log and step > self._globalstep_last_logged
        if not due and number != self._logged_round and self.args.logging_strategy != IntervalStrategy.NO:
            self.log(self._round_logs())
        self._logged_round = number

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Have the Trainer's samples per second count what a budget really was spent on."""
        run = self.dataflex
        samples = self.state.global_step * run.global_batch_size if run.has_budget else num_train_samples
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, samples, start_time)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if limit == 1 and best is not None and self.args.process_index == 0:
            # As the Trainer does, but for checkpoints of this run alone.
            checkpoint.keep_only(Path(self._get_output_dir(trial=trial)), run.identity, Path(best))
        distributed.barrier()
        return output

    def save_state(self) -> None:
        """Save the Trainer's state, which LLaMA-Factory does after it has saved the model, and put that on record."""
        super().save_state()
        self.dataflex.note_saved("model")

    def save_metrics(self, split: str, *args: Any, **kwargs: Any) -> None:
        """Save results, and put on record which."""
        super().save_metrics(split, *args, **kwargs)
        self.dataflex.note_saved(split)

    def check_weights(self) -> None:
        """Refuse to go on with weights that are not finite, as after a finite loss of a gradient that was not.

        Raises:
            DivergenceError: on every process.
        """
        if not distributed.everywhere(weights_are_finite(self.model), self.args.device):
            raise DivergenceError(f"the trained weights after step {self.state.global_step} are not finite")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint whose last file is the marker; only then delete older ones."""
        self.check_weights()  # before an older checkpoint goes for this one
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        main = self.args.process_index == 0
        if main:
            checkpoint.delete(folder)  # what a killed run wrote of it
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
            checkpoint.mark_complete(
                folder,
                self.dataflex.identity,
                self.state.global_step,
                self.dataflex.snapshot,
                local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", self.args.world_size)),
                has_scaler=self.accelerator.scaler is not None and not self.is_deepspeed_enabled,
            )
            checkpoint.rotate(run_dir, limit, self.dataflex.identity, self.state.best_global_step)
        self._saved_at = self.state.global_step
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


def follow(scheduler: Any, position: Callable[[], float]) -> None:
    """Have a schedule of learning rates read its place from ``position`` in the place of counting its calls.

    Raises:
        ConfigError: if it is not made of functions of the step.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise ConfigError(
            f"lr_scheduler_type: {type(scheduler).__name__} cannot follow a budget of tokens or seconds; use cosine."
        )

    def at_position(rate: Callable[[float], float]) -> Callable[[int], float]:
        return lambda _: rate(position())

    scheduler.lr_lambdas = [at_position(rate) for rate in scheduler.lr_lambdas]


def weights_are_finite(model: torch.nn.Module) -> bool:
    """Return whether this process's part of every trained parameter is finite; one wait for the device."""
    flags = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = getattr(parameter, "ds_tensor", parameter).detach()  # under ZeRO-3 this process's share
            flags.append(torch.isfinite(part.to_local() if isinstance(part, DTensor) else part).all())
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def _warn(line: str) -> None:
    from llamafactory.extras import logging

    with console.above_bars():
        logging.get_logger(__name__).warning_rank0(line)


class DynamicCallback(TrainerCallback):
    """Hears the Trainer's events for the run."""

    def __init__(self, trainer: DynamicTrainerMixin) -> None:
        self.trainer = trainer
        self._began = 0.0
        self._statistics = StepStatistics(0, np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make the planner and take back a checkpoint's state."""
        run = self.trainer.dataflex
        run.prepare(args, state.max_steps, self.trainer.arrangement())
        if run.resume is not None:
            self._take_patience_back(state)
        if run.has_budget or run.resume is not None:
            # eval_steps: 0.1 and the like are shares of the run; and the state of a checkpoint has the earlier ones.
            state.compute_steps(args, run.expected_steps)
        if run.has_budget:
            state.max_steps = max(state.global_step + 1, run.expected_steps)
        expected = run.expected_cost()
        if expected is not None and args.process_index == 0:
            console.say(f"dataflex: {expected}")

    def _take_patience_back(self, state: TrainerState) -> None:
        """Have early stopping count on from the checkpoint; of its own it would begin anew."""
        stored = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and isinstance(stored, dict):
                callback.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the step's clock."""
        self._began = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step's tokens before the learning rate is set anew; where a budget is spent, end the run."""
        run, step = self.trainer.dataflex, state.global_step + 1
        accumulator = self.trainer.step_loss.accumulator
        trained = None if accumulator.sample_losses is None else run.samples_of(state.global_step)
        lengths = None if trained is None or run.pool is None else run.pool.lengths[trained]
        self._statistics, totals = accumulator.finish(step, trained, lengths)
        check_step(run.domains, self._statistics, totals)
        run.tokens += totals.tokens
        if run.has_budget:
            seconds = run.train_seconds + run.decision_seconds + time.perf_counter() - self._began
            run.progress = distributed.on_main(partial(run.spent, run.tokens, seconds))
            state.max_steps = step if run.progress >= 1 else max(step + 1, math.ceil(step / max(run.progress, 1e-9)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Hand on the step's statistics, and keep the epoch count and epoch-wise actions right."""
        run = self.trainer.dataflex
        run.train_seconds += time.perf_counter() - self._began
        run.end_of_step(self._statistics)
        loss = self.trainer.step_loss.loss
        weighs = loss.domain_loss
        if weighs is not None and loss.active:
            run.record_loss_weights(state.global_step, weighs.used)
            if weighs.follows:
                weighs.learn(self._statistics)
        if run.pool is None:
            return
        trained = state.global_step * run.global_batch_size
        state.epoch = trained / run.pool.size
        if trained // run.pool.size > (trained - run.global_batch_size) // run.pool.size:
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the summary and say what the decisions cost."""
        run = self.trainer.dataflex
        self.trainer.check_weights()
        told = len(run.notes)
        summary = run.finish(state.global_step)
        for note in run.notes[told:]:
            _warn(note)
        if run.has_budget and run.progress < 1:
            _warn(f"training ended after {100 * run.progress:.1f} % of its budget of tokens or seconds.")
        if args.process_index == 0:
            console.say(
                f"dataflex: training {summary.train_seconds:.1f} s, decisions {summary.decision_seconds:.1f} s "
                f"({100 * summary.overhead_fraction:.1f} %), {summary.rounds} rounds, {summary.tokens} tokens"
            )
            if summary.overhead_limit is not None:
                console.say(f"dataflex: decisions are {summary.overhead_limit.text}.")
