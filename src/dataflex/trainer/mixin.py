"""The trainer: a mixin over LLaMA-Factory's trainer of the stage.

The training loop is the Hugging Face Trainer's. Overridden are the loaders, the loss of a training step, the learning
rate's schedule if a budget ends the run, the log, the evaluation, the checkpoint and the start of training; a callback
hears the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import TrainingArguments

from dataflex import distributed
from dataflex.embedding.service import EmbeddingService
from dataflex.errors import ConfigError
from dataflex.planning.planner import Arrangement
from dataflex.probe.checkpoints import saved_moments
from dataflex.probe.gradient_features import GradientFeatures
from dataflex.probe.model import ModelProbe
from dataflex.probe.projections import make_projection
from dataflex.trainer import terminal
from dataflex.trainer.callback import DynamicCallback
from dataflex.trainer.evaluating import EvaluatingTrainer
from dataflex.trainer.inputs import RunData, RunInputs
from dataflex.trainer.logs import LoggingTrainer
from dataflex.trainer.loss import loss_function
from dataflex.trainer.probing import make_probe
from dataflex.trainer.rounds import INDEX_KEY, RoundStream
from dataflex.trainer.run import LoadedModel, LoadedRun
from dataflex.trainer.saving import SavingTrainer
from dataflex.trainer.stage_losses import BatchLosses, causal_losses
from dataflex.trainer.step_loss import StepLoss
from dataflex.trainer.steps import RunSteps, decide_steps

WhenLoaded = Callable[[LoadedRun, LoadedModel], None]


class NothingTrained(Exception):
    """Everything was loaded and used, and nothing is to be trained."""


class DynamicTrainerMixin(EvaluatingTrainer, LoggingTrainer, SavingTrainer):
    """Trains a run of DataFlex; goes before LLaMA-Factory's trainer class in the bases.

    Args:
        inputs: what the run is given.
        data: its samples.
        when_loaded: what is called when everything is loaded; nothing is then trained.
        args: the Trainer's arguments.
        kwargs: those of LLaMA-Factory's trainer.
    """

    batch_losses: BatchLosses = staticmethod(causal_losses)
    """How the stage computes the losses of a batch."""
    plain_collators: tuple[type, ...] = ()
    """Classes of the stage's collator that do nothing but pad rows of tokens."""

    def __init__(
        self,
        *,
        inputs: RunInputs,
        data: RunData,
        args: TrainingArguments,
        when_loaded: WhenLoaded | None = None,
        **kwargs: Any,
    ) -> None:
        trains = args.do_train and when_loaded is None
        steps = decide_steps(inputs, data, args) if trains else RunSteps.none(inputs.settings)
        if trains:
            steps.set_in(args, inputs.plans_data)
        self.dataflex = LoadedRun.of(inputs, data, steps)
        self._when_loaded = when_loaded
        self._started, self.probe, self.embeddings = None, None, None
        self._evaluated, self._has_logits = {}, True
        self._is_spent = False
        """Whether the checkpoint to go on from has nothing left of the budget."""
        self._evaluated_at = self._saved_at = self._logged_round = -1
        self.stop_tokens: list[int] | None = (kwargs.get("gen_kwargs") or {}).get("eos_token_id")
        """What LLaMA-Factory's own generation stops at; None in a stage that generates nothing."""
        super().__init__(args=args, **kwargs)
        self.domain_evaluation = self._make_evaluation()
        self.step_loss = StepLoss(self)
        terminal.shorten(self.callback_handler, knows_end=not inputs.budget.is_set)
        # First, because the progress bar and the logs take the run's length from the state as we leave it.
        self.callback_handler.callbacks.insert(0, DynamicCallback(self))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule of learning rates; if a budget ends the run, it follows the budget."""
        clock, expected = self.dataflex.clock, self.dataflex.steps.expected
        if not clock.budget.is_set:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(expected, optimizer)
        follow(scheduler, lambda: clock.progress * expected)
        return scheduler

    def get_train_dataloader(self) -> Any:
        """Return the rounds, or LLaMA-Factory's own loader if only weights are decided."""
        planned = self.dataflex.inputs.plans_data or self._is_spent  # a stream of rounds may have none left
        return RoundStream(self) if planned else super().get_train_dataloader()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, from the checkpoint that the run goes on from, if any, whatever is given."""
        if self._when_loaded is not None:
            self._stop_before_training(self._when_loaded)
        inputs, samples = self.dataflex.inputs, self.dataflex.data.samples
        with distributed.together():
            if samples is not None and (inputs.plans_data or inputs.components.weight):
                self.probe = make_probe(self, samples)
                self.embeddings = EmbeddingService(
                    inputs.wanted_embeddings, samples, self.probe, self.dataflex.data.embeddings
                )
                self._check_features(self.probe)
            self.step_loss.references.make()
        resume = inputs.resume
        if resume is None:
            return super().train(**kwargs)
        if inputs.budget.is_spent(resume.state):  # nothing to train: the Trainer has no other way to be told so
            self.args.max_steps = resume.marker.step
            self._is_spent = True
        return super().train(resume_from_checkpoint=str(resume.folder), **kwargs)

    def start(self, output_dir: Path, num_steps: int) -> None:
        """Start the run, when the Trainer has made its optimizer and counted its steps."""
        references = self.step_loss.references.of_samples()
        model = None
        if self.probe is not None and self.embeddings is not None:
            model = LoadedModel(self.probe, references, self.embeddings)
        with distributed.together():
            self._started = self.dataflex.start(
                output_dir, num_steps, self.arrangement(), model, lambda: float(self.lr_scheduler.get_last_lr()[0])
            )

    def _stop_before_training(self, when_loaded: WhenLoaded) -> NoReturn:
        """Call ``when_loaded`` on the model as it was loaded, with the moments saved beside it, and leave."""
        self.create_optimizer()  # for the order of its parameters
        given, samples = self.finetuning_saved_folder(), self.dataflex.data.samples
        if samples is None:
            raise ConfigError("streaming: the samples are not known before training; switch it off.")
        with distributed.together():
            probe = make_probe(self, samples)
            probe.moments = lambda: saved_moments(given, self.optimizer, self.raw_model())
            wanted, stored = self.dataflex.inputs.wanted_embeddings, self.dataflex.data.embeddings
            self.probe, self.embeddings = probe, EmbeddingService(wanted, samples, probe, stored)
            self.step_loss.references.make()
            when_loaded(self.dataflex, LoadedModel(probe, self.step_loss.references.of_samples(), self.embeddings))
        raise NothingTrained

    def finetuning_saved_folder(self) -> Path:
        """Return the folder the trained weights came from: the adapter's, or the model's."""
        given = self.dataflex.inputs.config.llamafactory
        adapters = given.get("adapter_name_or_path")
        last = adapters.split(",")[-1].strip() if isinstance(adapters, str) else (adapters or [None])[-1]
        return Path(str(last or given["model_name_or_path"]))

    def _check_features(self, probe: ModelProbe) -> None:
        """Have a projection that does not go with the model show before the first step."""
        for needs in self.dataflex.inputs.needs.values():
            for measurement in needs.measurements:
                if isinstance(measurement, GradientFeatures):
                    make_projection(measurement.settings, probe.parameter_sizes(), probe.device)

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
        loss = self.step_loss.loss
        with self.step_loss.watching(inputs, loss.pooled), loss_function(self.causal_model(), loss):
            return super().compute_loss(model, inputs, *args, **kwargs)

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
        self.log_round()
        super()._maybe_log_save_evaluate(*args, **kwargs)


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
