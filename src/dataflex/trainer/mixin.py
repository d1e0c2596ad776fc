"""The trainer: a mixin over LLaMA-Factory's trainer of the stage.

The training loop is the Hugging Face Trainer's. The mixin overrides the data loaders, the loss of a training step, the
learning rate schedule if a budget ends the run, the log, the evaluation, the checkpoint and the start of training.
``DynamicCallback`` handles all other events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from dataflex.probe.stage_loss import StageLoss
from dataflex.trainer import terminal
from dataflex.trainer.callback import DynamicCallback
from dataflex.trainer.evaluating import EvaluatingTrainer
from dataflex.trainer.inputs import RunData, RunInputs
from dataflex.trainer.logs import LoggingTrainer
from dataflex.trainer.loss import loss_function
from dataflex.trainer.probing import make_probe
from dataflex.trainer.ptx import Ptx
from dataflex.trainer.rounds import INDEX_KEY, RoundStream
from dataflex.trainer.run import LoadedModel, LoadedRun
from dataflex.trainer.saving import SavingTrainer
from dataflex.trainer.special_losses import special_loss
from dataflex.trainer.step_loss import StepLoss
from dataflex.trainer.steps import RunSteps, decide_steps

OTHER_KERNELS = {"fused_linear_cross_entropy": False, "cross_entropy": False}
"""Settings of Liger that leave out its own loss, which takes no coefficients of tokens."""

WhenLoaded = Callable[[LoadedRun, LoadedModel], None]
"""Called with the loaded run and its model, in a command that loads everything and does not train."""


class NothingTrained(Exception):
    """Raised to leave LLaMA-Factory's workflow without training, after a command has used the loaded data or model."""


class DynamicTrainerMixin(EvaluatingTrainer, LoggingTrainer, SavingTrainer):
    """Trains a run of DataFlex. The mixin precedes LLaMA-Factory's trainer class in the list of base classes.

    Args:
        inputs: inputs of the run.
        data: samples of the run.
        when_loaded: called when everything is loaded; the run then ends without training.
        args: arguments of the Trainer.
        kwargs: further arguments of LLaMA-Factory's trainer.
    """

    make_stage_loss: Callable[[Any], StageLoss] | None = None
    """Makes the loss of a sample from the trainer, in a stage in which a sample has one loss."""
    stop_tokens: list[int] | None = None
    """Tokens that end a response in LLaMA-Factory's own generation; None in a stage without generation."""
    _when_loaded: WhenLoaded | None = None
    plain_collators: tuple[type, ...] = ()
    """Collator classes of the stage that only pad rows of tokens."""

    def __init__(
        self,
        *,
        inputs: RunInputs,
        data: RunData,
        args: TrainingArguments,
        when_loaded: WhenLoaded | None = None,
        **kwargs: Any,
    ) -> None:
        self.load_run(inputs, data, args, trains=args.do_train and when_loaded is None)
        self._when_loaded = when_loaded
        self.stop_tokens = (kwargs.get("gen_kwargs") or {}).get("eos_token_id")
        super().__init__(args=args, **kwargs)
        self.attach_run()

    def load_run(self, inputs: RunInputs, data: RunData, args: TrainingArguments, *, trains: bool) -> None:
        """Load a run, and set the arguments of the Trainer that depend on it, before the Trainer reads them.

        Args:
            inputs: inputs of the run.
            data: samples of the run.
            args: arguments of the Trainer.
            trains: whether the run trains.

        Raises:
            ConfigError: if the rounds do not fit the samples.
        """
        steps = decide_steps(inputs, data, args) if trains else RunSteps.none(inputs.settings)
        if trains:  # before the Trainer makes its schedules from `args`
            steps.set_in(args, inputs.plans_data)
        self.dataflex = LoadedRun.of(inputs, data, steps)
        self._started, self.probe, self.embeddings = None, None, None
        self._evaluated, self._has_logits = {}, True
        self._is_spent = False
        """Whether the checkpoint to resume from has spent the whole budget."""
        # The last step that was evaluated, the last step that was saved and the last round that was logged. -1 is none.
        self._evaluated_at = self._saved_at = self._logged_round = -1
        if inputs.config.fused_loss and args.use_liger_kernel:
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), **OTHER_KERNELS}

    def attach_run(self) -> None:
        """Connect the loaded run with the constructed Trainer."""
        if self.make_stage_loss is not None:
            self.stage_loss = self.make_stage_loss(self)
        self.special_loss = None if self.compute_loss_func is None else special_loss(self.finetuning_args)
        if self.special_loss is not None:
            self.compute_loss_func = None  # its token weights become factors of the loss coefficients
        self.domain_evaluation = self._make_evaluation()
        self.step_loss = StepLoss(self)
        inputs, data = self.dataflex.inputs, self.dataflex.data
        text = inputs.settings.ptx
        self.ptx = None if text is None or data.ptx is None else Ptx(self, text, data.ptx)
        terminal.shorten(self.callback_handler, knows_end=not inputs.budget.is_set)
        # Inserted as the first callback: it sets the run's length in the Trainer's state, and the progress bar and the
        # logs read the length from there.
        self.callback_handler.callbacks.insert(0, DynamicCallback(self))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the learning rate schedule.

        If a budget ends the run, the schedule follows the spent share of the budget.
        """
        clock, expected = self.dataflex.clock, self.dataflex.steps.expected
        if not clock.budget.is_set:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(expected, optimizer)
        follow(scheduler, lambda: clock.progress * expected)
        return scheduler

    def get_train_dataloader(self) -> Any:
        """Return the stream of rounds, or LLaMA-Factory's own loader if the run decides weights alone."""
        # If the checkpoint has spent the budget, `train` sets `max_steps` to the checkpoint's step. A stream of rounds
        # yields no batch from that step on, also in a run whose samples LLaMA-Factory draws.
        planned = self.dataflex.inputs.plans_data or self._is_spent
        return RoundStream(self) if planned else super().get_train_dataloader()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train. The run's inputs name the checkpoint to resume from, if any; ``resume_from_checkpoint`` is ignored."""
        if self._when_loaded is not None:
            self._stop_before_training(self._when_loaded)
        if self.ptx is None and self.dataflex.inputs.settings.ptx is not None:
            raise ConfigError(
                "dataflex.ptx: the text is loaded by LLaMA-Factory, and this trainer was made without it; train with "
                "dataflex-cli train, or remove the key."
            )
        inputs, samples = self.dataflex.inputs, self.dataflex.data.samples
        with distributed.together():
            # Weighters, and components that plan, may measure samples. Streamed data has no pool to measure.
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
        if inputs.budget.is_spent(resume.state):
            # No step is left. Only a `max_steps` that is already reached makes the Trainer end without a step.
            self.args.max_steps = resume.marker.step
            self._is_spent = True
        return super().train(resume_from_checkpoint=str(resume.folder), **kwargs)

    def start(self, output_dir: Path, num_steps: int) -> None:
        """Start the run. The Trainer calls this after it has made its optimizer and counted its steps."""
        references = self.step_loss.references.of_samples()
        model = None
        if self.probe is not None and self.embeddings is not None:
            model = LoadedModel(self.probe, references, self.embeddings)
        with distributed.together():
            self._started = self.dataflex.start(
                output_dir, num_steps, self.arrangement(), model, lambda: float(self.lr_scheduler.get_last_lr()[0])
            )
            if self.probe is not None and self.dataflex.inputs.settings.precompute_ref_log_probs:
                self.probe.keep_references()
        resume = self.dataflex.inputs.resume
        if resume is not None:
            self.load_trainer_state(resume.state.get("trainer", {}))

    def _stop_before_training(self, when_loaded: WhenLoaded) -> NoReturn:
        """Call ``when_loaded`` with the model and the optimizer moments saved beside it, and leave the Trainer."""
        # Saved moments have no names. They are stored in the order of the optimizer's parameters, so the optimizer is
        # needed to assign them.
        self.create_optimizer()
        folder, samples = self.finetuning_saved_folder(), self.dataflex.data.samples
        if samples is None:
            raise ConfigError(
                "streaming: this command needs all samples before training, and with streaming: true they are not "
                "known. Set streaming: false."
            )
        with distributed.together():
            probe = make_probe(self, samples)
            # The optimizer has made no step, so it has no moments itself.
            probe.moments = lambda: saved_moments(folder, self.optimizer, self.raw_model())
            wanted, stored = self.dataflex.inputs.wanted_embeddings, self.dataflex.data.embeddings
            self.probe, self.embeddings = probe, EmbeddingService(wanted, samples, probe, stored)
            self.step_loss.references.make()
            when_loaded(self.dataflex, LoadedModel(probe, self.step_loss.references.of_samples(), self.embeddings))
        raise NothingTrained

    def finetuning_saved_folder(self) -> Path:
        """Return the folder that the trained weights were loaded from: the last adapter if any, else the model."""
        given = self.dataflex.inputs.config.llamafactory
        adapters = given.get("adapter_name_or_path")
        last = adapters.split(",")[-1].strip() if isinstance(adapters, str) else (adapters or [None])[-1]
        return Path(str(last or given["model_name_or_path"]))

    def _check_features(self, probe: ModelProbe) -> None:
        """Build every projection once, so that a projection that does not fit the model is an error before training."""
        for needs in self.dataflex.inputs.needs.values():
            for measurement in needs.measurements:
                if isinstance(measurement, GradientFeatures):
                    make_projection(measurement.settings, probe.parameter_sizes(), probe.device)

    def arrangement(self) -> Arrangement:
        """Return the order of samples that LLaMA-Factory's and the Trainer's keys set."""
        strategy = self.args.train_sampling_strategy
        if self.finetuning_args.disable_shuffling or strategy == "sequential":
            return "sequential"
        return "group_by_length" if strategy == "group_by_length" else "shuffle"

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of the next optimizer step, and decide the weights that depend on all of them."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_loss.begin(samples)
        if self.ptx is not None:
            self.ptx.begin(self.state.global_step, len(samples))
        return samples, num_items

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Make the forward and backward pass of a micro-batch, after those of its text if the run has ``ptx``."""
        if self.ptx is not None:
            self.ptx.add_gradient(model)
        loss: torch.Tensor = super().training_step(model, *args, **kwargs)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a training step with weights and statistics.

        The loss of an evaluation batch is unchanged.
        """
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
        """Return the loss of a training micro-batch, computed with DataFlex's loss function."""
        self.step_loss.prepare(inputs, indices)
        if self.stage_loss is not None:  # the stage's own code calls `mean_of_samples`
            with self.of_step(indices):
                return super().compute_loss(model, inputs, *args, **kwargs)
        loss = self.step_loss.loss
        watching, fusing = self.step_loss.watching(inputs, loss.watched), self.step_loss.fusing(inputs)
        with watching, fusing, loss_function(self.causal_model(), loss):
            return super().compute_loss(model, inputs, *args, **kwargs)

    @contextmanager
    def of_step(self, places: torch.Tensor | None) -> Iterator[None]:
        """Name the samples of the micro-batch whose losses are computed during the block."""
        self.batch_places = places
        try:
            yield
        finally:
            self.batch_places = None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as the Trainer requests, but evaluate and save at most once per step.

        A run is one epoch for the Trainer. So the Trainer calls this method twice at the end of the run: for the last
        step, and for the end of the epoch.
        """
        control, step = self.control, self.state.global_step
        control.should_evaluate &= step != self._evaluated_at
        control.should_save &= step != self._saved_at
        if control.should_evaluate:
            self._evaluated_at = step
        # Here and not when the round begins: a log inside an event would reset the flags that the event has set.
        self.log_round()
        super()._maybe_log_save_evaluate(*args, **kwargs)


def follow(scheduler: Any, position: Callable[[], float]) -> None:
    """Make a learning rate schedule read its position from ``position`` instead of counting its own steps.

    Raises:
        ConfigError: if the schedule is not defined by functions of the step.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise ConfigError(
            f"lr_scheduler_type: {type(scheduler).__name__} cannot follow a budget of tokens or seconds, because its "
            "learning rate is not a function of the step. Use a schedule of that kind, such as cosine or linear."
        )

    # A separate function binds each `rate`. A lambda in the list below would use the last `rate` for all groups.
    def at_position(rate: Callable[[float], float]) -> Callable[[int], float]:
        return lambda _: rate(position())

    scheduler.lr_lambdas = [at_position(rate) for rate in scheduler.lr_lambdas]
