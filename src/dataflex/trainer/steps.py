"""Number of optimizer steps and rounds of a run, decided from its inputs and its data before training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex import distributed
from dataflex.api.schedule import Schedule
from dataflex.config.checks.files import is_finished
from dataflex.config.loading import DataFlexConfig
from dataflex.data.pool import Pool, some
from dataflex.errors import ConfigError, Problem
from dataflex.planning.planner import epoch_limits
from dataflex.planning.run_plan import DataOutline, RunPlan, plan_of, problems_of, trainer_keys
from dataflex.trainer.inputs import RunData, RunInputs
from dataflex.trainer.resume import Resume, nothing_left

if TYPE_CHECKING:
    from transformers import TrainingArguments

_MOST_TIMES_EXPECTED = 1000
"""Upper bound of the steps of a run that a budget ends, as a multiple of the expected steps."""


@dataclass(frozen=True)
class RunSteps:
    """The steps of a run.

    Attributes:
        schedule: the rounds. Of a run that only weights samples, it is provisional until the Trainer has counted its
            steps.
        global_batch_size: number of samples of one optimizer step.
        expected: number of steps that the run is expected to take; without a budget, the exact number.
        plan: description of the run in words; None if it does not train.
        max_steps: the value that ``args.max_steps`` must have; None if LLaMA-Factory counts the same steps without it.
    """

    schedule: Schedule
    global_batch_size: int
    expected: int
    plan: RunPlan | None = None
    max_steps: int | None = None

    @classmethod
    def none(cls, settings: DataFlexConfig) -> RunSteps:
        """Return the steps of a run that does not train."""
        return cls(Schedule(settings.warmup_steps, settings.update_steps or 1, settings.updates, 1), 1, 1)

    def notes(self) -> list[str]:
        """Return notes on configured actions that will not happen."""
        return [] if self.plan is None else self.plan.notes()

    def lines(self) -> list[str]:
        """Return the first lines that a run prints: its plan, and the notes."""
        plan = [] if self.plan is None else ["plan:", *self.plan.lines()]
        return [*plan, *(f"note: {note}" for note in self.notes())]

    def set_in(self, args: TrainingArguments, plans_data: bool) -> None:
        """Set the number of steps in the Trainer's arguments, before the Trainer makes its schedules from it.

        Args:
            args: arguments of the Trainer.
            plans_data: whether DataFlex draws the samples.
        """
        if self.max_steps is not None:
            args.max_steps = self.max_steps
        if plans_data:
            # At a resume the Trainer must not skip batches: the stream of rounds already starts at the resumed step.
            args.ignore_data_skip = True

    def counted(self, inputs: RunInputs, total: int) -> RunSteps:
        """Return the steps of a run that only weights samples, after the Trainer has counted ``total`` steps."""
        settings = inputs.settings
        if inputs.plans_data:
            return self
        length = settings.update_steps
        schedule = Schedule(settings.warmup_steps, length or 1, settings.updates if length else -1, total)
        return replace(self, schedule=schedule, expected=self.expected if inputs.budget.is_set else total)


def decide_steps(inputs: RunInputs, data: RunData, args: TrainingArguments) -> RunSteps:
    """Return the steps of a run.

    Raises:
        ConfigError: if the rounds do not fit the pool, or nothing is left to train.
    """
    keys, settings, budget = trainer_keys(args), inputs.settings, inputs.budget
    if inputs.resume is not None and inputs.plans_data and settings.update_steps is None:
        # Keep the checkpoint's length of a round. With another total, another length might be chosen.
        settings = settings.model_copy(update={"update_steps": inputs.resume.marker.config["dataflex.update_steps"]})
    samples = data.samples
    by_tokens = settings.train_tokens is not None and samples is not None
    known = DataOutline(
        samples=None if samples is None else samples.size,
        domains=data.sizes,
        validation={key: found.size for key, found in data.validation.items()},
        mean_length=float(samples.lengths.mean()) if by_tokens and samples is not None else None,
    )
    plan = plan_of(settings, inputs.components, keys, inputs.needs, known)
    if plan.run is None:  # LLaMA-Factory counts the steps of this run
        return replace(RunSteps.none(settings), global_batch_size=keys.global_batch_size, plan=plan)
    expected = plan.run.schedule.total_steps
    total = expected * _MOST_TIMES_EXPECTED if budget.is_set else expected
    schedule = replace(plan.run.schedule, total_steps=total)
    in_cycles = settings.updates > 0 and inputs.settings.update_steps is not None
    counts = inputs.plans_data or budget.is_set or settings.train_steps is not None or in_cycles
    found = RunSteps(schedule, keys.global_batch_size, expected, plan, total if counts else None)
    problems = problems_of(inputs.settings, inputs.components, plan.run)
    if inputs.resume is not None:
        problems += distributed.on_main(partial(_nothing_left, inputs, inputs.resume, total))
    if problems:
        raise ConfigError(problems=problems)
    if data.pool is not None and inputs.plans_data:
        _check_epochs(inputs, data.pool, found)
    return found


def _nothing_left(inputs: RunInputs, resume: Resume, total: int) -> list[Problem]:
    """Return a problem if the checkpoint leaves no step to train."""
    if not inputs.budget.is_set:
        problem = nothing_left(resume, total, inputs.config)
        return [] if problem is None else [problem]
    output = Path(str(inputs.config.llamafactory["output_dir"]))
    if not (inputs.budget.is_spent(resume.state) and is_finished(inputs.config, output)):
        return []
    return [
        Problem(
            "resume_from_checkpoint",
            f"{resume.folder} has spent the whole budget of the run. Raise dataflex.train_tokens or "
            "dataflex.train_seconds, or name an earlier checkpoint.",
        )
    ]


def _check_epochs(inputs: RunInputs, pool: Pool, found: RunSteps) -> None:
    """Check that ``max_epochs_per_domain`` leaves enough samples for the run."""
    limits = epoch_limits(inputs.components.mix, pool)
    steps, batch = found.schedule.total_steps, found.global_batch_size
    if limits is None or inputs.budget.is_set or steps * batch <= limits.sum():
        return
    raise ConfigError(
        f"dataflex.mix.max_epochs_per_domain: this limit allows {limits.sum()} samples, enough "
        f"for {limits.sum() // batch} steps, and this run's {steps} steps need {steps * batch}. Raise the limit, or "
        "train less (train_steps, max_steps, num_train_epochs)."
    )


def small_domains(inputs: RunInputs, pool: Pool, global_batch_size: int) -> str | None:
    """Return a warning if a mixer may repeat the samples of domains that are smaller than a step's batch; else None."""
    sizes = zip(pool.domains, pool.domain_sizes, strict=True)
    small = [f"{name!r} has {size}" for name, size in sizes if size < global_batch_size]
    if inputs.components.mix is None or not small:
        return None
    return (
        f"mix: a step trains on {global_batch_size} samples, and {some(small)}: if their share is large, "
        "the same samples are repeated within a few steps."
    )
