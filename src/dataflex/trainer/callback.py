"""Trainer callback that starts the run, counts its steps and tokens, and writes its summary."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from dataflex.api.context import StepStatistics
from dataflex.trainer import console
from dataflex.trainer.base import warn
from dataflex.trainer.expected_cost import expected_cost
from dataflex.trainer.statistics import check_step

if TYPE_CHECKING:
    from dataflex.trainer.mixin import DynamicTrainerMixin


class DynamicCallback(TrainerCallback):
    """Connects the Trainer's events to the run."""

    def __init__(self, trainer: DynamicTrainerMixin) -> None:
        self.trainer = trainer
        self._statistics = StepStatistics(0, np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the run and restore the state of its checkpoint."""
        self.trainer.start(Path(args.output_dir), state.max_steps)
        run = self.trainer.started
        resumed, has_budget = run.inputs.resume is not None, run.inputs.budget.is_set
        if resumed:
            self._take_patience_back(state)
        if has_budget or resumed:
            # `eval_steps: 0.1` and similar keys are shares of the run's length. The Trainer has computed them from
            # `max_steps`, which is only an upper bound under a budget, or restored the earlier values of a checkpoint.
            state.compute_steps(args, run.steps.expected)
        if has_budget:
            state.max_steps = max(state.global_step + 1, run.steps.expected)
        rounds = run.rounds
        expected = None if rounds is None else expected_cost(self.trainer.dataflex, rounds.pool, rounds.probe)
        if expected is not None and args.process_index == 0:
            console.say(f"dataflex: {expected}")

    def _take_patience_back(self, state: TrainerState) -> None:
        """Restore the early-stopping counter from the checkpoint; otherwise the Trainer restarts it at 0."""
        stored = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and isinstance(stored, dict):
                callback.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start timing the step."""
        self.trainer.dataflex.clock.begin_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Gather the step's statistics and count its tokens; end the run if its budget is spent.

        The Trainer fires this event before it updates the learning rate. A schedule that follows a budget therefore
        sees the tokens of this step.
        """
        run, step = self.trainer.dataflex, state.global_step + 1
        clock = run.clock
        accumulator, rounds = self.trainer.step_loss.accumulator, self.trainer.started.rounds
        if accumulator.sample_losses is None or rounds is None:
            self._statistics, totals = accumulator.finish(step)
        else:
            trained = rounds.samples_of(state.global_step)
            self._statistics, totals = accumulator.finish(step, trained, rounds.pool.lengths[trained])
        check_step(run.data.domains, self._statistics, totals)
        weights = self.trainer.started.token_weights
        if weights is not None and totals.weights is not None:
            weights.add(totals.weights)
        clock.count_tokens(totals.tokens)
        if clock.budget.is_set:
            # `max_steps` is an estimate of the run's length, so the progress bar shows it. The Trainer stops at the
            # step that equals it, then evaluates and saves as at any regular end.
            share = clock.progress
            state.max_steps = step if share >= 1 else max(step + 1, math.ceil(step / max(share, 1e-9)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Pass the step's statistics to the components, and trigger the actions that are due at the end of an epoch.

        An epoch is one pass over the pool. The Trainer sees a single epoch, so `state.epoch` and the flags of the
        strategy `epoch` are set here.
        """
        run = self.trainer.started
        run.clock.end_step()
        run.end_of_step(self._statistics)
        loss = self.trainer.step_loss.loss
        weighs = loss.domain_loss
        if weighs is not None and loss.active:
            run.recorder.loss_weights(state.global_step, weighs.used)
            if weighs.follows:
                weighs.learn(self._statistics)
        pool, batch = run.data.pool, run.steps.global_batch_size
        if pool is None:
            return
        trained = state.global_step * batch
        state.epoch = trained / pool.size
        if trained // pool.size > (trained - batch) // pool.size:
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the summary and print the cost of the decisions."""
        run = self.trainer.started
        self.trainer.check_weights()
        known = len(run.recorder.notes)  # the notes so far have been shown already
        summary = run.finish(state.global_step)
        for note in run.recorder.notes[known:]:
            warn(note)
        if run.clock.budget.is_set and run.clock.progress < 1:
            warn(f"training ended after only {100 * run.clock.progress:.1f} % of its budget of tokens or seconds.")
        if args.process_index == 0:
            console.say(
                f"dataflex: training {summary.train_seconds:.1f} s, decisions {summary.decision_seconds:.1f} s "
                f"({100 * summary.overhead_fraction:.1f} %), {summary.rounds} rounds, {summary.tokens} tokens"
            )
            if summary.overhead_limit is not None:
                console.say(f"dataflex: decisions are {summary.overhead_limit.text}.")
