"""A run, independent of any trainer: loaded when its data is there, and started when training begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.api.component import made_with, state_of, take_back
from dataflex.api.context import StepContext, StepStatistics
from dataflex.api.selector import overhead_limit
from dataflex.config.changes import snapshot
from dataflex.data.pool import Pool
from dataflex.embedding.service import EmbeddingService
from dataflex.planning.overhead import LimitedScoring
from dataflex.planning.planner import Arrangement, Planner, Readings
from dataflex.record.checkpoint import STATE_VERSION, check_state
from dataflex.record.schema import OverheadLimit, Summary
from dataflex.trainer.clock import Clock
from dataflex.trainer.inputs import RunData, RunInputs
from dataflex.trainer.planned import PlannedRounds
from dataflex.trainer.recording import Recorder
from dataflex.trainer.statistics import MeanLosses
from dataflex.trainer.steps import RunSteps
from dataflex.trainer.weight_statistics import WeightTotals

if TYPE_CHECKING:
    from dataflex.api.component import State
    from dataflex.api.reference import Reference
    from dataflex.probe.model import ModelProbe


@dataclass(frozen=True)
class LoadedModel:
    """The objects that measure samples once the model is loaded.

    Attributes:
        probe: the probe of the run's model.
        references: reference losses for the components that need them, by configuration key.
        embeddings: gives embeddings to the components that need them.
    """

    probe: ModelProbe
    references: Mapping[str, Reference]
    embeddings: EmbeddingService


@dataclass(frozen=True)
class LoadedRun:
    """A run whose data is loaded.

    Attributes:
        inputs: inputs of the run.
        data: samples of the run.
        steps: number of steps and rounds of the run.
        clock: clock of the run.
    """

    inputs: RunInputs
    data: RunData
    steps: RunSteps
    clock: Clock

    @classmethod
    def of(cls, inputs: RunInputs, data: RunData, steps: RunSteps) -> LoadedRun:
        """Return the run before its first step."""
        return cls(inputs, data, steps, Clock(inputs.budget))

    def start(
        self,
        output_dir: Path,
        num_steps: int,
        arrangement: Arrangement,
        model: LoadedModel | None,
        learning_rate: Callable[[], float],
    ) -> StartedRun:
        """Return the run as training begins, with the state of its checkpoint restored and its record begun.

        Args:
            output_dir: LLaMA-Factory's output folder.
            num_steps: number of steps that the Trainer has counted.
            arrangement: order of the samples in a plan without an ``order`` component.
            model: None if nothing is measured, as in a run that streams its data.
            learning_rate: returns the optimizer's current learning rate.

        Raises:
            CheckpointError: if the checkpoint was written by a run that does not match this one.
        """
        run = replace(self, steps=self.steps.counted(self.inputs, num_steps))
        for _, component in run.inputs.components.items():  # a bad state must not fail only at the first checkpoint
            check_state(component.state_dict(), f"{component.family} {component.name!r}")
        planned = None
        recorder = Recorder(run.inputs, run.data, run.clock, run.steps.notes())
        if run.data.pool is not None and model is not None:
            planner = run.make_planner(run.data.pool, arrangement, learning_rate, model.references, model.embeddings)
            planned = PlannedRounds(run.inputs.components, run.data.pool, model.probe, planner, run.clock, recorder)
        started = StartedRun(run, planned, recorder, learning_rate)
        if run.inputs.resume is not None:
            started.load_state_dict(run.inputs.resume.state)
        # After the state: the record continues behind the restored round, and the notes of the restoring go into it.
        recorder.start(output_dir, planned)
        return started

    def make_planner(
        self,
        pool: Pool,
        arrangement: Arrangement,
        learning_rate: Callable[[], float],
        references: Mapping[str, Reference],
        embeddings: EmbeddingService | None = None,
    ) -> Planner:
        """Return the planner of the run."""
        components, schedule = self.inputs.components, self.steps.schedule
        limit = None
        share = overhead_limit(components.select[-1].component) if components.select else None
        if share is not None:
            clock, seed = self.clock, self.inputs.settings.seed
            limit = LimitedScoring(pool, share, seed, schedule, lambda: clock.spent)
        return Planner(
            pool,
            components,
            schedule,
            seed=self.inputs.settings.seed,
            global_batch_size=self.steps.global_batch_size,
            arrangement=arrangement,
            limit=limit,
            readings=Readings(self.data.validation, references, learning_rate, self.steps.expected, embeddings),
        )


class StartedRun:
    """A run in training: it decides, collects the statistics of the steps, and has a state for checkpoints.

    Args:
        run: the loaded run.
        rounds: rounds of a run that plans its data; None if LLaMA-Factory draws the samples.
        recorder: writes the run record.
        learning_rate: returns the optimizer's current learning rate.
    """

    def __init__(
        self,
        run: LoadedRun,
        rounds: PlannedRounds | None,
        recorder: Recorder,
        learning_rate: Callable[[], float],
    ) -> None:
        self.inputs, self.data, self.steps, self.clock = run.inputs, run.data, run.steps, run.clock
        self.rounds, self.recorder, self._learning_rate = rounds, recorder, learning_rate
        self.mean_losses = MeanLosses()
        """Mean losses of the steps since the last log. A resume resets them, as it does the Trainer's own mean."""
        self.token_weights = WeightTotals(self.data.domains) if self.inputs.components.weight else None
        """Statistics of the token weights since the last log, if the run has a weighter."""
        self._tokens = np.zeros(len(self.data.domains), np.int64)
        self._samples = np.zeros(len(self.data.domains), np.int64)

    @property
    def planned(self) -> PlannedRounds:
        """The rounds of a run that plans its data.

        Raises:
            RuntimeError: if LLaMA-Factory draws the samples.
        """
        if self.rounds is None:
            raise RuntimeError("LLaMA-Factory draws the samples of this run, so it has no rounds")
        return self.rounds

    @cached_property
    def snapshot(self) -> dict[str, Any]:
        """The settings in force, for a checkpoint."""
        found = snapshot(self.inputs.config)
        # The length of the rounds may have been chosen for this run. A resume must use the same length.
        length = {"dataflex.update_steps": self.steps.schedule.update_steps}
        return found | length if self.inputs.plans_data else found

    @property
    def domain_tokens(self) -> NDArray[np.int64]:
        """Number of tokens of each domain trained on so far that count in the loss, shape (K,)."""
        return self._tokens

    @property
    def domain_samples(self) -> NDArray[np.int64]:
        """Number of samples of each domain trained on so far, shape (K,)."""
        return self._samples

    def step_context(
        self, step: int, tokens: NDArray[np.int64], losses: NDArray[np.float64], excess: NDArray[np.float64]
    ) -> StepContext:
        """Return the context from which a mixer decides the loss weights of step number ``step`` (from 0)."""
        rounds = self.planned
        return StepContext(
            pool=rounds.pool,
            probe=rounds.probe,
            step=step,
            total_steps=max(self.steps.expected, step + 1),
            learning_rate=self._learning_rate(),
            indices=rounds.samples_of(step),
            tokens=tokens,
            losses=losses,
            excess=excess,
            validation_pool=self.data.validation.get("mix"),
        )

    def end_of_step(self, statistics: StepStatistics) -> None:
        """Pass an optimizer step's statistics to the components."""
        self._tokens = self._tokens + statistics.tokens
        self._samples = self._samples + statistics.samples
        plan = None if self.rounds is None else self.rounds.plan
        if plan is not None:
            statistics = replace(statistics, proportions=plan.proportions, warmup=plan.slot.update is None)
        self.mean_losses.add(statistics)
        for _, component in self.inputs.components.items():
            component.on_step(statistics)

    def finish(self, step: int) -> Summary:
        """Write the summary and return it.

        Args:
            step: number of optimizer steps done.
        """
        if self.token_weights is not None:
            self.recorder.token_weights(self.token_weights.take(step))
        rounds = self.rounds
        chain = None if rounds is None else rounds.planner.chain
        scoring = None if chain is None else chain.limit
        limit = None if scoring is None else OverheadLimit(**scoring.closing(self.clock.spent))
        made = 0 if rounds is None or rounds.plan is None else rounds.plan.slot.number + 1
        return self.recorder.finish(step, made, limit)

    def state_dict(self, step: int) -> State:
        """Return everything the run needs to resume exactly; called by all processes together."""
        return {
            "version": STATE_VERSION,
            "run": self.recorder.identity,
            "step": step,
            "batch": self.steps.global_batch_size,
            "processes": distributed.world_size(),
            **distributed.on_main(self.data.fingerprints),
            **({"plan": None, "planner": None} if self.rounds is None else self.rounds.state_dict()),
            "methods": self.inputs.methods,
            "components": {key: state_of(component) for key, component in self.inputs.components.items()},
            "made_with": {key: made_with(component) for key, component in self.inputs.components.items()},
            **self.clock.state_dict(),
            "domain_tokens": self._tokens,
            "domain_samples": self._samples,
            **({} if self.token_weights is None else {"token_weights": self.token_weights.state_dict()}),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            CheckpointError: if the run's total number of steps gives the checkpoint's round another length.
        """
        for key, component in self.inputs.components.items():
            if state["methods"].get(key) != component.name:  # another method starts without a state
                continue
            changed = take_back(component, state["components"][key], state["made_with"][key])
            if changed:
                self.recorder.note(
                    f"{key} {component.name}: its state up to step {state['step']} was computed with another "
                    f"{' and '.join(changed)}. It is discarded and computed again."
                )
        self.clock.load_state_dict(state)
        self._tokens, self._samples = state["domain_tokens"], state["domain_samples"]
        if self.token_weights is not None and "token_weights" in state:
            self.token_weights.load_state_dict(state["token_weights"])
        if self.rounds is not None:
            self.rounds.load_state_dict(state)
