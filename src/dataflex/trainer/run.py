"""A run apart from any trainer: loaded, when its data is there, and started, when training begins."""

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

if TYPE_CHECKING:
    from dataflex.api.component import State
    from dataflex.api.reference import Reference
    from dataflex.probe.model import ModelProbe


@dataclass(frozen=True)
class LoadedModel:
    """What measures the samples when the model is there.

    Attributes:
        probe: on the model of the run.
        references: what the components that asked for a reference read of it, by configuration key.
        embeddings: gives embeddings to the components that asked for some.
    """

    probe: ModelProbe
    references: Mapping[str, Reference]
    embeddings: EmbeddingService


@dataclass(frozen=True)
class LoadedRun:
    """A run whose data is loaded.

    Attributes:
        inputs: what it is given.
        data: its samples.
        steps: how long it trains, in which rounds.
        clock: how far it is.
    """

    inputs: RunInputs
    data: RunData
    steps: RunSteps
    clock: Clock

    @classmethod
    def of(cls, inputs: RunInputs, data: RunData, steps: RunSteps) -> LoadedRun:
        """Return the run, at its beginning."""
        return cls(inputs, data, steps, Clock(inputs.budget))

    def start(
        self,
        output_dir: Path,
        num_steps: int,
        arrangement: Arrangement,
        model: LoadedModel | None,
        learning_rate: Callable[[], float],
    ) -> StartedRun:
        """Return the run as training begins: its checkpoint's state taken back, its record begun.

        Args:
            output_dir: LLaMA-Factory's.
            num_steps: those the Trainer has counted.
            arrangement: what orders a plan without an ``order`` component.
            model: None if nothing is measured, as in a stream.
            learning_rate: returns the optimizer's present one.

        Raises:
            CheckpointError: if the checkpoint was written by a run that does not match this one.
        """
        run = replace(self, steps=self.steps.counted(self.inputs, num_steps))
        for _, component in run.inputs.components.items():  # rather now than at the first checkpoint
            check_state(component.state_dict(), f"{component.family} {component.name!r}")
        planned = None
        recorder = Recorder(run.inputs, run.data, run.clock, run.steps.notes())
        if run.data.pool is not None and model is not None:
            planner = run.make_planner(run.data.pool, arrangement, learning_rate, model.references, model.embeddings)
            planned = PlannedRounds(run.inputs.components, run.data.pool, model.probe, planner, run.clock, recorder)
        started = StartedRun(run, planned, recorder, learning_rate)
        if run.inputs.resume is not None:
            started.load_state_dict(run.inputs.resume.state)
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
        """Return what makes the plans."""
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
    """A run in training: what it decides, what its steps have shown, and its state for a checkpoint.

    Args:
        run: as it was loaded.
        rounds: of a run that plans its data; None if LLaMA-Factory draws the samples.
        recorder: writes its record.
        learning_rate: returns the optimizer's present one.
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
        """Of the steps since the last log. The Trainer's own mean begins anew at a resume, and so does this."""
        self._tokens = np.zeros(len(self.data.domains), np.int64)
        self._samples = np.zeros(len(self.data.domains), np.int64)

    @property
    def planned(self) -> PlannedRounds:
        """The rounds of a run that plans its data.

        Raises:
            RuntimeError: for another run.
        """
        if self.rounds is None:
            raise RuntimeError("the samples of this run are LLaMA-Factory's, so there are no rounds")
        return self.rounds

    @cached_property
    def snapshot(self) -> dict[str, Any]:
        """The settings in force, for a checkpoint."""
        found = snapshot(self.inputs.config)
        length = {"dataflex.update_steps": self.steps.schedule.update_steps}
        return found | length if self.inputs.plans_data else found

    @property
    def domain_tokens(self) -> NDArray[np.int64]:
        """Tokens of each domain trained on so far that count in the loss, shape (K,)."""
        return self._tokens

    @property
    def domain_samples(self) -> NDArray[np.int64]:
        """Samples of each domain trained on so far, shape (K,)."""
        return self._samples

    def step_context(
        self, step: int, tokens: NDArray[np.int64], losses: NDArray[np.float64], excess: NDArray[np.float64]
    ) -> StepContext:
        """Return what the loss weights of step number ``step`` (from 0) may depend on."""
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
        """Hand an optimizer step's statistics to the components."""
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
            step: optimizer steps done.
        """
        rounds = self.rounds
        chain = None if rounds is None else rounds.planner.chain
        scoring = None if chain is None else chain.limit
        limit = None if scoring is None else OverheadLimit(**scoring.closing(self.clock.spent))
        made = 0 if rounds is None or rounds.plan is None else rounds.plan.slot.number + 1
        return self.recorder.finish(step, made, limit)

    def state_dict(self, step: int) -> State:
        """Return everything the run needs to go on exactly; on all processes together."""
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
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            CheckpointError: if the run's total cuts the checkpoint's round otherwise.
        """
        for key, component in self.inputs.components.items():
            if state["methods"].get(key) != component.name:  # another method begins with what it sees from here on
                continue
            changed = take_back(component, state["components"][key], state["made_with"][key])
            if changed:
                self.recorder.note(
                    f"{key} {component.name}: what it had made by step {state['step']} was made with another "
                    f"{' and '.join(changed)}, so it is made anew."
                )
        self.clock.load_state_dict(state)
        self._tokens, self._samples = state["domain_tokens"], state["domain_samples"]
        if self.rounds is not None:
            self.rounds.load_state_dict(state)
