"""What the run does at the Trainer's events."""

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
    """Hears the Trainer's events for the run."""

    def __init__(self, trainer: DynamicTrainerMixin) -> None:
        self.trainer = trainer
        self._statistics = StepStatistics(0, np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the run, and take back a checkpoint's state."""
        self.trainer.start(Path(args.output_dir), state.max_steps)
        run = self.trainer.started
        resumed, has_budget = run.inputs.resume is not None, run.inputs.budget.is_set
        if resumed:
            self._take_patience_back(state)
        if has_budget or resumed:
            # eval_steps: 0.1 and the like are shares of the run; and the state of a checkpoint has the earlier ones.
            state.compute_steps(args, run.steps.expected)
        if has_budget:
            state.max_steps = max(state.global_step + 1, run.steps.expected)
        rounds = run.rounds
        expected = None if rounds is None else expected_cost(self.trainer.dataflex, rounds.pool, rounds.probe)
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
        self.trainer.dataflex.clock.begin_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step's tokens before the learning rate is set anew; where a budget is spent, end the run."""
        run, step = self.trainer.dataflex, state.global_step + 1
        clock = run.clock
        accumulator, rounds = self.trainer.step_loss.accumulator, self.trainer.started.rounds
        if accumulator.sample_losses is None or rounds is None:
            self._statistics, totals = accumulator.finish(step)
        else:
            trained = rounds.samples_of(state.global_step)
            self._statistics, totals = accumulator.finish(step, trained, rounds.pool.lengths[trained])
        check_step(run.data.domains, self._statistics, totals)
        clock.count_tokens(totals.tokens)
        if clock.budget.is_set:
            share = clock.progress
            state.max_steps = step if share >= 1 else max(step + 1, math.ceil(step / max(share, 1e-9)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Hand on the step's statistics, and keep the epoch count and epoch-wise actions right."""
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
        """Write the summary and say what the decisions cost."""
        run = self.trainer.started
        self.trainer.check_weights()
        told = len(run.recorder.notes)
        summary = run.finish(state.global_step)
        for note in run.recorder.notes[told:]:
            warn(note)
        if run.clock.budget.is_set and run.clock.progress < 1:
            warn(f"training ended after {100 * run.clock.progress:.1f} % of its budget of tokens or seconds.")
        if args.process_index == 0:
            console.say(
                f"dataflex: training {summary.train_seconds:.1f} s, decisions {summary.decision_seconds:.1f} s "
                f"({100 * summary.overhead_fraction:.1f} %), {summary.rounds} rounds, {summary.tokens} tokens"
            )
            if summary.overhead_limit is not None:
                console.say(f"dataflex: decisions are {summary.overhead_limit.text}.")
