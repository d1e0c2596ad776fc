"""One dynamic run: its pool, its rounds, its components and its record, apart from any trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.api.component import made_with, state_of, take_back
from dataflex.api.context import StepContext, StepStatistics
from dataflex.api.measurement import Measurement
from dataflex.api.probe import GradientFeatures, GradientNorms
from dataflex.api.schedule import RoundSlot, RunOutline, Schedule
from dataflex.api.selector import overhead_limit
from dataflex.config.changes import snapshot
from dataflex.config.checks.files import is_finished
from dataflex.config.loading import DataFlexConfig, RunConfig
from dataflex.data.pool import Pool, some
from dataflex.data.sampling import IndexArray
from dataflex.errors import CheckpointError, ConfigError, DivergenceError, Problem
from dataflex.planning.overhead import LimitedScoring, Spent
from dataflex.planning.planner import Arrangement, Plan, Planner, epoch_limits
from dataflex.planning.run_plan import RunPlan, plan_of, problems_of, trainer_keys
from dataflex.record.checkpoint import STATE_VERSION, check_state
from dataflex.record.configuration import recorded
from dataflex.record.environment import differences, environment, repeated_start
from dataflex.record.schema import (
    FROM_HERE,
    NO_EFFECT,
    Change,
    Cost,
    DomainMeasures,
    DomainWeights,
    Evaluation,
    Measures,
    OverheadLimit,
    Summary,
)
from dataflex.record.writer import RunWriter
from dataflex.trainer import console
from dataflex.trainer.evaluation import TOKEN_WEIGHTED, UNWEIGHTED
from dataflex.trainer.resume import Resume, nothing_left
from dataflex.trainer.statistics import MeanLosses

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dataflex.api.component import State
    from dataflex.api.params import ValidationParams
    from dataflex.api.reference import Reference
    from dataflex.probe.model import ModelProbe
    from dataflex.trainer.evaluation import Numbers


logger = logging.getLogger(__name__)

_CALIBRATION_SAMPLES = 8
_MOST_TIMES_EXPECTED = 1000
"""A run that a budget ends takes at most so many times the expected steps."""


class DynamicRun:
    """The decisions of one run and what they are made from.

    The integration fills in the pool, the trainer the probe; :meth:`plan_for` is what training calls.

    Args:
        config: the loaded configuration, with a ``dataflex:`` section.
    """

    def __init__(self, config: RunConfig) -> None:
        if config.dataflex is None:
            raise ValueError("a DynamicRun needs a dataflex: section")
        self.config = config
        self.settings: DataFlexConfig = config.dataflex
        self.components = config.build_components()
        self.names = self.components.names()
        """The methods of each family that decides."""
        self.methods = {key: component.name for key, component in self.components.items()}
        """The method of each component, by configuration key."""
        self.needs = self.components.needs(config)
        """What the components ask of the run, by configuration key."""
        self.pool: Pool | None = None
        self.references: Mapping[str, Reference] = {}
        """What the components that asked for a reference read of it at decisions, by configuration key."""
        self.validation: dict[str, Pool] = {}
        """The validation samples of the components that asked for some, by configuration key."""
        self.identity = ""
        """The run's, from when training begins."""
        self.resume: Resume | None = None
        """What the run goes on from."""
        self.when_loaded: Callable[[DynamicRun], None] | None = None
        """What is called when everything is loaded; nothing is then trained."""
        self.planner: Planner | None = None
        self.probe: ModelProbe | None = None
        self.learning_rate: Callable[[], float] = lambda: 0.0
        self.writer: RunWriter | None = None
        self.schedule = Schedule(self.settings.warmup_steps, self.settings.update_steps or 1, self.settings.updates, 1)
        self.run_plan: RunPlan | None = None
        """What the run will do; None while not known."""
        self.notes: list[str] = []
        """What the user should know of this run, for the terminal and the record."""
        self.global_batch_size = 1
        self.plan: Plan | None = None
        self.mean_losses = MeanLosses()
        """Of the steps since the last log. The Trainer's own mean begins anew at a resume, and so does this."""
        self.train_seconds = 0.0
        self.decision_seconds = 0.0
        self._decision_began = 0.0
        self.tokens = 0
        self._domain_tokens = self._domain_samples = np.zeros(0, np.int64)
        self.evaluation: Pool | None = None
        """The evaluation samples, one domain for each data set."""
        self.whole: Pool | None = None
        """The training samples, as one domain, if LLaMA-Factory draws them; None in a stream."""
        self.evaluate_seconds = 0.0
        self.evaluation_began: float | None = None
        """When the running evaluation began; None where none is running."""
        self._last_evaluation: Evaluation | None = None
        self._finished_at: int | None = None
        self._saved: list[str] = []
        """What LLaMA-Factory has written since training ended, in order."""
        self.progress = 0.0
        """Share of the budget of tokens or seconds that is spent; 0 without one."""
        self._budget_steps: int | None = None

    @property
    def plans_data(self) -> bool:
        """Whether the data path is ours; with ``weight`` alone it stays LLaMA-Factory's."""
        return self.components.plans_data

    @property
    def wanted_validation(self) -> dict[str, ValidationParams]:
        """What components want to be told about validation samples, by configuration key."""
        return {key: needs.validation for key, needs in self.needs.items() if needs.validation is not None}

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains statistics are kept for."""
        return self.pool.domains if self.pool is not None else ("all",)

    @property
    def offsets(self) -> np.ndarray:
        """First pool index of each domain and the end, shape (K + 1,)."""
        return self.pool.offsets if self.pool is not None else np.array([0, 1])

    def set_steps(self, args: TrainingArguments) -> None:
        """Fix the run's total steps in ``args.max_steps``, before the trainer makes its schedules from it.

        Raises:
            ConfigError: if the rounds do not fit the pool.
        """
        keys = trainer_keys(args)
        self.global_batch_size = keys.global_batch_size
        settings = self.settings
        if self.resume is not None and self.plans_data and settings.update_steps is None:
            # The rounds of the checkpoint, whatever would be chosen now, for another total perhaps.
            settings = settings.model_copy(update={"update_steps": self.resume.marker.config["dataflex.update_steps"]})
        samples = None if self.samples is None else self.samples.size
        sizes = self.pool.domain_sizes.tolist() if self.pool is not None else [samples or 0]
        self.run_plan = plan_of(
            settings,
            self.components,
            keys,
            needs=self.needs,
            num_samples=samples,
            domains=dict(zip(self.domains, sizes, strict=True)),
            mean_length=self._mean_length(),
        )
        if self.run_plan.run is None:  # LLaMA-Factory counts
            assert not self.has_budget
            return
        found = self.run_plan.run.schedule
        total = found.total_steps
        if self.has_budget:
            self._budget_steps, total = total, total * _MOST_TIMES_EXPECTED
        in_cycles = settings.updates > 0 and self.settings.update_steps is not None
        if self.plans_data or self.has_budget or settings.train_steps is not None or in_cycles:
            args.max_steps = total  # else LLaMA-Factory's own count is the same
        self.schedule = replace(found, total_steps=total)
        problems = problems_of(self.settings, self.components, self.run_plan.run)
        if self.resume is not None:
            problems += distributed.on_main(partial(self._nothing_left, self.resume))
        if problems:
            raise ConfigError(problems=problems)
        if not self.plans_data:
            return
        self._check_epochs()
        # The Trainer must not skip batches on its own when it resumes: the stream starts where the run stopped.
        args.ignore_data_skip = True

    def _nothing_left(self, resume: Resume) -> list[Problem]:
        """Return that the checkpoint is of the run's last step or a later one, where that is so."""
        if not self.has_budget:
            problem = nothing_left(resume, self.schedule.total_steps, self.config)
            return [] if problem is None else [problem]
        output = Path(str(self.config.llamafactory["output_dir"]))
        if not (self.is_spent(resume.state) and is_finished(self.config, output)):
            return []
        return [Problem("resume_from_checkpoint", f"{resume.folder} has spent the whole budget; give it more.")]

    def _mean_length(self) -> float | None:
        """Return the mean tokens of a sample, where the run ends by a number of tokens."""
        if self.settings.train_tokens is None:
            return None
        return None if self.samples is None else float(self.samples.lengths.mean())

    @property
    def samples(self) -> Pool | None:
        """The training samples, whoever draws them; None while they are not loaded, and in a stream."""
        return self.pool if self.pool is not None else self.whole

    @property
    def _column_fingerprints(self) -> dict[str, str]:
        """Those of the raw columns that are kept with the training samples."""
        return {} if self.samples is None else self.samples.column_fingerprints

    def opening(self) -> list[str]:
        """Return the lines a run opens with: its plan, and what will not happen although it was asked for."""
        if self.run_plan is None:
            return []
        sizes = {key: samples.size for key, samples in self.validation.items()}
        self.run_plan = replace(self.run_plan, validation=sizes)
        self.notes += self.run_plan.notes()
        return ["plan:", *self.run_plan.lines(), *(f"note: {note}" for note in self.notes)]

    @property
    def has_budget(self) -> bool:
        """Whether a number of tokens or seconds ends the run, not a number of steps."""
        return self.settings.train_tokens is not None or self.settings.train_seconds is not None

    @property
    def expected_steps(self) -> int:
        """Steps the run is expected to take; without a budget, those it takes."""
        return self.schedule.total_steps if self._budget_steps is None else self._budget_steps

    def spent(self, tokens: int, seconds: float) -> float:
        """Return the share of the budget that is spent, from 0; 1 and more: the run ends."""
        if self.settings.train_tokens is not None:
            return tokens / self.settings.train_tokens
        return seconds / self.settings.train_seconds if self.settings.train_seconds is not None else 0.0

    def is_spent(self, state: State) -> bool:
        """Return whether nothing is left of the budget in a checkpoint's state."""
        return self.spent(int(state["tokens"]), float(state["train_seconds"]) + float(state["decision_seconds"])) >= 1

    def _check_epochs(self) -> None:
        """Refuse a run for which ``max_epochs_per_domain`` leaves too few samples."""
        assert self.pool is not None
        limits = epoch_limits(self.components.mix, self.pool)
        steps, batch = self.schedule.total_steps, self.global_batch_size
        if limits is None or self.has_budget or steps * batch <= limits.sum():
            return
        raise ConfigError(
            f"dataflex.mix.max_epochs_per_domain: so many passes over every domain are {limits.sum()} samples, enough "
            f"for {limits.sum() // batch} steps, and this run's {steps} steps need {steps * batch}. Raise it, or train "
            "less (train_steps, max_steps, num_train_epochs)."
        )

    def small_domains(self) -> str | None:
        """Return which domains have fewer samples than an optimizer step trains on, where a mixer may repeat them."""
        assert self.pool is not None
        sizes = zip(self.pool.domains, self.pool.domain_sizes, strict=True)
        small = [f"{name!r} has {size}" for name, size in sizes if size < self.global_batch_size]
        if self.components.mix is None or not small:
            return None
        return (
            f"mix: a step trains on {self.global_batch_size} samples, and {some(small)}: where their share is large, "
            "the same samples come again within a few steps."
        )

    def prepare(self, args: TrainingArguments, num_steps: int, arrangement: Arrangement) -> None:
        """Make the planner, take back a checkpoint's state, and start the record. Called when training begins.

        Raises:
            CheckpointError: if the checkpoint was written by a run that does not match this one.
        """
        if not self.plans_data:
            length = self.settings.update_steps
            updates = self.settings.updates if length else -1
            self.schedule = Schedule(self.settings.warmup_steps, length or 1, updates, num_steps)
        if self.pool is not None:
            self.planner = Planner(
                self.pool,
                self.components,
                self.schedule,
                seed=self.settings.seed,
                global_batch_size=self.global_batch_size,
                arrangement=arrangement,
                validation=self.validation,
                references=self.references,
                learning_rate=self.learning_rate,
                limit=self._limit(),
                expected_steps=self.expected_steps,
            )
        for _, component in self.components.items():  # rather now than at the first checkpoint
            check_state(component.state_dict(), f"{component.family} {component.name!r}")
        if self.resume is not None:
            self.load_state_dict(self.resume.state)
        self.identity = distributed.on_main(partial(self._start_record, Path(args.output_dir)))

    def expected_cost(self) -> str | None:
        """Return what the selection is expected to cost, after measuring a few samples; None where nothing is to say.

        A training step is taken for a forward and backward of its samples, or for three forwards.
        """
        pool, probe = self.pool, self.probe
        if not self.components.select or pool is None or probe is None:
            return None
        entry = self.components.select[-1]
        selector, measurements = entry.component, self.needs[entry.key].measurements
        if not measurements:
            return None
        if overhead_limit(selector) is not None:
            return None
        began = time.perf_counter()
        by_length = np.argsort(pool.lengths, kind="stable")
        some = by_length[np.linspace(0, pool.size - 1, min(pool.size, _CALIBRATION_SAMPLES)).astype(np.int64)]
        seconds = [_seconds_of(each, probe, some) for each in measurements]
        self.decision_seconds += time.perf_counter() - began
        others = self.validation[entry.key].size if entry.key in self.validation else 0
        expected = replace(self.schedule, total_steps=self.expected_steps)
        outline = RunOutline(expected, self.global_batch_size, pool.size, len(self.domains), validation=others)
        counts = [selector.measured_samples(each, outline) for each in measurements]
        total = sum(sample * count for sample, count in zip(seconds, counts, strict=True))
        forward = seconds[0] / measurements[0].forwards
        training = 3 * forward * self.expected_steps * self.global_batch_size
        scored, passes = selector.scored_samples(pool.size), selector.expected_passes(expected.num_updates)
        often = "once" if passes == 1 else f"{passes} times"
        samples = f"{scored} samples" + (f" and {others} validation samples" if others else "")
        return (
            f"select {selector.name}: scoring {samples}, {often} in this run, is expected to take "
            f"{console.duration(total)}, {total / training:.2g} times the training itself (after {some.size} samples)."
        )

    def _limit(self) -> LimitedScoring | None:
        """Return what limits the cost of the last selector's scores, if its ``max_overhead`` asks for it."""
        share = overhead_limit(self.components.select[-1].component) if self.components.select else None
        if share is None:
            return None
        assert self.pool is not None
        return LimitedScoring(self.pool, share, self.settings.seed, self.schedule, self._spent_so_far)

    def _spent_so_far(self) -> Spent:
        running = time.perf_counter() - self._decision_began
        return Spent(self.train_seconds, self.decision_seconds + running)

    def _start_record(self, output_dir: Path) -> str:
        """Begin the record, or go on with it, and return the run's identity."""
        self.writer = writer = RunWriter(output_dir)
        kept = recorded(self.config)  # first: the configuration may lie in the record that is now set aside
        repeated = None if self.resume is not None else repeated_start(self.config)
        resume, kept_rounds, step = self.resume, None, 0
        if resume is None:
            identity = writer.open_new()
        else:
            step = resume.marker.step
            kept_rounds = 0 if self.plan is None else self.plan.slot.number + 1
            identity = (
                writer.open_resumed(step)
                if resume.is_own
                else writer.open_continued(resume.folder, resume.marker.run, step)
            )
            lines = [
                Change(
                    resumed_at=step,
                    step=resume.holds_from(change),
                    key=change.key,
                    before=change.before,
                    now=change.now,
                    effect=NO_EFFECT if change.effect == "kept" else FROM_HERE,
                )
                for change in resume.changes
            ]
            writer.changes(step, lines)
        start = environment(self.config, kept, distributed.world_size(), step)
        start["fingerprints"] = {
            **({} if self.samples is None else {"dataset": self.samples.fingerprint}),
            **({} if self.evaluation is None else {"eval_dataset": self.evaluation.fingerprint}),
            **{f"dataflex.{key}.validation": samples.fingerprint for key, samples in self.validation.items()},
            **{f"column {name}": digest for name, digest in self._column_fingerprints.items()},
        }
        if repeated is not None and (other := differences(repeated, start)):
            print(f"dataflex: warning: this run does not repeat the one on record: {'; '.join(other)}")
        pool = self.pool
        self._last_evaluation = writer.begin(
            kept.configuration,
            kept_rounds,
            step,
            domains=None if pool is None else dict(zip(pool.domains, pool.domain_sizes.tolist(), strict=True)),
            methods=self.names,
            plugins=kept.plugins,
            start=start,
        )
        if self.plan is not None and self.pool is not None:
            self._record_round_of_checkpoint(writer, self.plan, self.pool)
        return identity

    def _record_round_of_checkpoint(self, writer: RunWriter, plan: Plan, pool: Pool) -> None:
        """Record the round a checkpoint lies in, if its own record was not there to be taken along."""
        if self.planner is not None and not writer.has_round(plan.slot.number):
            writer.round(replace(plan, epochs=self.planner.epochs), pool, Cost())

    @cached_property
    def snapshot(self) -> dict[str, Any]:
        """Return the settings in force, for a checkpoint."""
        found = snapshot(self.config)
        return found | {"dataflex.update_steps": self.schedule.update_steps} if self.plans_data else found

    def plan_for(self, step: int) -> Plan:
        """Return the plan of the round in which optimizer step ``step`` (from 0) is trained, made at most once."""
        slot = self.schedule.slot_at(step)
        if self.plan is None or self.plan.slot != slot:
            self.plan = self._decide(slot)
        return self.plan

    def _decide(self, slot: RoundSlot) -> Plan:
        assert self.planner is not None
        assert self.pool is not None
        assert self.probe is not None
        self._decision_began = time.perf_counter()
        before = replace(self.probe.cost)
        try:
            plan = self.planner.plan(slot, self.probe)
        except DivergenceError as error:
            where = f"in the decision of round {slot.number}, after step {slot.start_step}"
            raise DivergenceError(f"{where}, {error.what}") from error
        distributed.require_equal(plan.sha256, f"the plan of round {slot.number}")
        seconds = time.perf_counter() - self._decision_began
        self.decision_seconds += seconds
        cost = Cost(seconds, self.probe.cost.samples - before.samples, self.probe.cost.tokens - before.tokens)
        if self.writer is not None:
            self.writer.round(plan, self.pool, cost)
        if distributed.rank() == 0:
            console.say(self._line_of(plan, seconds))
        return plan

    def _line_of(self, plan: Plan, seconds: float) -> str:
        """Return what is said about a round that has just been decided."""
        assert self.pool is not None
        slot, mixer = plan.slot, self.components.mix
        weights = None
        if mixer is not None and mixer.weighs_loss and slot.update is not None:
            weights = dict(zip(self.domains, mixer.loss_weights.tolist(), strict=True))
        return console.decision(
            slot,
            dict(zip(self.domains, self.pool.domain_counts(plan.indices).tolist(), strict=True)),
            self.pool.size,
            seconds,
            scored=None if plan.budget is None else plan.budget["scored"],
            loss_weights=weights,
            undecided={f"{key} {self.names[key]}": why for key, why in plan.undecided.items()},
        )

    @property
    def domain_tokens(self) -> NDArray[np.int64]:
        """Tokens of each domain trained on so far that count in the loss, shape (K,)."""
        return self._domain_tokens if self._domain_tokens.size else np.zeros(len(self.domains), np.int64)

    @property
    def domain_samples(self) -> NDArray[np.int64]:
        """Samples of each domain trained on so far, shape (K,)."""
        return self._domain_samples if self._domain_samples.size else np.zeros(len(self.domains), np.int64)

    def samples_of(self, step: int) -> IndexArray:
        """Return the samples of step number ``step`` (from 0) in the order of the plan, shape (n,)."""
        plan = self.plan_for(step)
        begin = (step - plan.slot.start_step) * self.global_batch_size
        return plan.indices[begin : begin + self.global_batch_size]

    def step_context(
        self, step: int, tokens: NDArray[np.int64], losses: NDArray[np.float64], excess: NDArray[np.float64]
    ) -> StepContext:
        """Return what the loss weights of step number ``step`` (from 0) may depend on."""
        assert self.pool is not None
        assert self.probe is not None
        return StepContext(
            pool=self.pool,
            probe=self.probe,
            step=step,
            total_steps=max(self.expected_steps, step + 1),
            learning_rate=self.learning_rate(),
            indices=self.samples_of(step),
            tokens=tokens,
            losses=losses,
            excess=excess,
            validation_pool=self.validation.get("mix"),
        )

    def record_loss_weights(self, step: int, weights: NDArray[np.float64]) -> None:
        """Put the weights of the domains in a step's loss on record.

        Args:
            step: optimizer steps done, that one included.
            weights: shape (K,).
        """
        if self.writer is not None:
            self.writer.loss_weights(step, self.domains, weights)

    def end_of_step(self, statistics: StepStatistics) -> None:
        """Hand an optimizer step's statistics to the components."""
        self._domain_tokens = self.domain_tokens + statistics.tokens
        self._domain_samples = self.domain_samples + statistics.samples
        if self.plan is not None:
            warmup = self.plan.slot.update is None
            statistics = replace(statistics, proportions=self.plan.proportions, warmup=warmup)
        self.mean_losses.add(statistics)
        for _, component in self.components.items():
            component.on_step(statistics)

    def progress_logs(self) -> dict[str, float]:
        """Return how far the run is, for a log: tokens trained on, and seconds of each kind so far."""
        return {f"dataflex/{key}": value for key, value in self._so_far().items()}

    def _so_far(self) -> dict[str, Any]:
        running = 0.0 if self.evaluation_began is None else time.perf_counter() - self.evaluation_began
        return {
            "tokens": self.tokens,
            "train_seconds": round(self.train_seconds, 3),
            "decision_seconds": round(self.decision_seconds, 3),
            "evaluate_seconds": round(self.evaluate_seconds + running, 3),
        }

    def end_of_evaluation(self) -> None:
        """Count the seconds of the evaluation that has just ended."""
        assert self.evaluation_began is not None
        self.evaluate_seconds += time.perf_counter() - self.evaluation_began
        self.evaluation_began = None

    def record_evaluation(self, step: int, domains: dict[str, Numbers], groups: dict[str, Numbers]) -> None:
        """Put the numbers of an evaluation on record; called on the main process."""
        if self.writer is None or self.evaluation is None:
            return
        line = Evaluation(
            step=step,
            **self._so_far(),
            fingerprint=self.evaluation.fingerprint,
            domains={name: DomainMeasures(**numbers) for name, numbers in domains.items()},
            token_weighted=Measures(**groups[TOKEN_WEIGHTED]),
            unweighted=Measures(**groups[UNWEIGHTED]),
        )
        self.writer.evaluation(line)
        self._last_evaluation = line
        if self._finished_at is not None:
            self.finish(self._finished_at)

    def note_saved(self, name: str) -> None:
        """Put on record that the model, or the results of ``train``, ``eval`` or ``predict``, have been written."""
        if self._finished_at is not None and name not in self._saved:
            self._saved.append(name)
            self.finish(self._finished_at)

    def finish(self, step: int) -> Summary:
        """Write the summary and return it.

        Args:
            step: optimizer steps done.
        """
        if self._finished_at is None and self.names and step <= self.settings.warmup_steps:
            self.notes.append(
                f"the run ended at step {step}, inside its warm-up of {self.settings.warmup_steps}: "
                f"{', '.join(f'{key} {name}' for key, name in self.names.items())} decided nothing."
            )
        self._finished_at = step
        overhead = self.decision_seconds / self.train_seconds if self.train_seconds else 0.0
        chain = None if self.planner is None else self.planner.chain
        scoring = None if chain is None else chain.limit
        limit = None if scoring is None else scoring.closing(Spent(self.train_seconds, self.decision_seconds))
        summary = Summary(
            **self._so_far(),
            overhead_fraction=round(overhead, 6),
            rounds=0 if self.plan is None else self.plan.slot.number + 1,
            steps=step,
            saved=list(self._saved),
            evaluation=self._last_evaluation,
            notes=list(self.notes),
            overhead_limit=None if limit is None else OverheadLimit(**limit),
        )
        if self.writer is not None:
            self.writer.summary(summary)
            found = None if self.components.mix is None else self.components.mix.result(self.domains)
            if found is not None:
                self.writer.domain_weights(DomainWeights(**found))
        return summary

    def state_dict(self, step: int) -> State:
        """Return everything the run needs to go on exactly."""
        return {
            "version": STATE_VERSION,
            "run": self.identity,
            "step": step,
            "batch": self.global_batch_size,
            "processes": distributed.world_size(),
            "pool_fingerprint": None if self.samples is None else self.samples.fingerprint,
            "evaluation_fingerprint": None if self.evaluation is None else self.evaluation.fingerprint,
            "column_fingerprints": self._column_fingerprints,
            "validation_fingerprints": {key: samples.fingerprint for key, samples in self.validation.items()},
            "plan": self._plan_state(),
            "planner": self.planner.state_dict() if self.planner is not None else None,
            "methods": self.methods,
            "components": {key: state_of(component) for key, component in self.components.items()},
            "made_with": {key: made_with(component) for key, component in self.components.items()},
            "train_seconds": self.train_seconds,
            "decision_seconds": self.decision_seconds,
            "tokens": self.tokens,
            "domain_tokens": self.domain_tokens,
            "domain_samples": self.domain_samples,
            "evaluate_seconds": self.evaluate_seconds,
        }

    def check_processes(self, state: State, args: TrainingArguments) -> str | None:
        """Refuse a checkpoint that does not go with the processes, and return what else is to be said of them.

        Raises:
            CheckpointError: if the global batch size is another, or the number of processes under DeepSpeed.
        """
        now = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if state["batch"] != now:
            raise CheckpointError(
                f"the checkpoint of step {state['step']} was written with a global batch size (per device x "
                f"accumulation x processes) of {state['batch']}, this run has {now}. Use the same one, or another "
                "output_dir for a new run."
            )
        then, now = state["processes"], args.world_size
        if then == now:
            return None
        if args.deepspeed:
            raise CheckpointError(
                f"the checkpoint of step {state['step']} has DeepSpeed's optimizer in parts for {then} processes, this "
                f"run has {now}. Start as many again."
            )
        return (
            f"{now} processes go on with what {then} had begun: decisions are the same, the random streams of dropout "
            "begin anew."
        )

    def check_data(self, state: State) -> None:
        """Refuse a checkpoint that was written for other training or validation samples, before a model is loaded.

        Raises:
            CheckpointError: naming what differs.
        """
        now = None if self.samples is None else self.samples.fingerprint
        if state["pool_fingerprint"] != now:
            raise CheckpointError(
                f"dataset: the checkpoint of step {state['step']} was written for other training data (fingerprint "
                f"{str(state['pool_fingerprint'])[:12]}, this run's data has {str(now)[:12]}): the files, or what is "
                "made of them, have changed since."
            )
        before = state["column_fingerprints"]
        for name, digest in self._column_fingerprints.items():
            if before.get(name, digest) != digest:
                raise CheckpointError(
                    f"the checkpoint of step {state['step']} was written with other values in the raw column {name!r} "
                    f"(fingerprint {before[name][:12]}, this run's has {digest[:12]}). Put them back, or begin a new "
                    "run."
                )
        for key, samples in self.validation.items():
            then = state["validation_fingerprints"].get(key)
            if then != samples.fingerprint and state["methods"].get(key) == self.methods[key]:
                raise CheckpointError(
                    f"the checkpoint of step {state['step']} was written with another validation set of dataflex.{key} "
                    f"(fingerprint {str(then)[:12]}, this run's has {samples.fingerprint[:12]})."
                )

    def says_of_evaluation(self, state: State) -> str | None:
        """Return a line if a checkpoint's run was evaluated on other samples."""
        then, now = state["evaluation_fingerprint"], None if self.evaluation is None else self.evaluation.fingerprint
        if then is None or now is None or then == now:
            return None
        return f"the evaluation data is not that of before step {state['step']}; do not compare across it."

    def _plan_state(self) -> State | None:
        if self.plan is None:
            return None
        slot = self.plan.slot
        state: State = {
            "number": slot.number,
            "start_step": slot.start_step,
            "steps": slot.steps,
            "update": slot.update,
            "indices": self.plan.indices,
            "proportions": self.plan.proportions,
            "unscored": self.plan.unscored,
        }
        return state if self.plan.scores is None else {**state, "scores": self.plan.scores}

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            CheckpointError: if the run's total cuts the checkpoint's round otherwise.
        """
        if self.planner is not None:
            self.planner.load_state_dict(state["planner"])
        for key, component in self.components.items():
            if state["methods"].get(key) != component.name:  # another method begins with what it sees from here on
                continue
            changed = take_back(component, state["components"][key], state["made_with"][key])
            if changed:
                self.notes.append(
                    f"{key} {component.name}: what it had made by step {state['step']} was made with another "
                    f"{' and '.join(changed)}, so it is made anew."
                )
                if distributed.rank() == 0:
                    logger.warning(self.notes[-1])
        self.train_seconds = float(state["train_seconds"])
        self.decision_seconds = float(state["decision_seconds"])
        self.tokens = int(state["tokens"])
        self._domain_tokens, self._domain_samples = state["domain_tokens"], state["domain_samples"]
        self.evaluate_seconds = float(state["evaluate_seconds"])
        self.progress = self.spent(self.tokens, self.train_seconds + self.decision_seconds)
        stored = state["plan"]
        if stored is not None:
            slot = RoundSlot(stored["number"], stored["start_step"], stored["steps"], stored["update"])
            inside = state["step"] < slot.start_step + slot.steps
            fits = slot.start_step < self.schedule.total_steps and slot == self.schedule.slot_at(slot.start_step)
            if inside and not fits:
                raise CheckpointError(
                    f"the checkpoint of step {state['step']} is inside a round of {slot.steps} steps that this run's "
                    f"total of {self.schedule.total_steps} steps would cut differently. Keep the total, or resume from "
                    "a checkpoint at a round's end."
                )
            self.plan = Plan(
                slot, stored["indices"], stored.get("scores"), stored["proportions"], int(stored["unscored"])
            )


def _seconds_of(measurement: Measurement[Any], probe: ModelProbe, samples: IndexArray) -> float:
    """Return the seconds that measuring one of a few samples takes."""
    measure = partial(probe.measure, measurement)
    if isinstance(measurement, GradientFeatures | GradientNorms):  # moments there are only after a step
        measure = partial(probe.gradient_norms, settings=replace(measurement.settings, preconditioner="none"))
    measure(samples[:2])  # the first run also pays what is paid once; of one sample a probe cannot tell all of that
    began = time.perf_counter()
    measure(samples)
    return (time.perf_counter() - began) / samples.size
