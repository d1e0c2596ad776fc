"""The plan of a run: its steps, rounds and decisions, what they cost, and whether anything would be decided at all.

``check`` makes it from the rows of the data files, ``train`` from the pool, before the model is loaded; both print the
same block. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dataflex.components import Components
from dataflex.errors import Problem
from dataflex.schedule import RunOutline, Schedule, default_update_steps

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dataflex.config import DataFlexConfig

_SECTION = "dataflex"
_FORWARDS_OF_TRAINING = 3
"""Forward passes a sample that is trained on counts as: one, and a backward of about two."""


@dataclass(frozen=True)
class TrainerKeys:
    """What the plan needs of LLaMA-Factory's keys, defaults filled in."""

    max_steps: int = -1
    epochs: float = 3.0
    per_device: int = 8
    accumulation: int = 1
    processes: int = 1
    eval_strategy: str = "no"
    eval_steps: float = 500
    evaluates_at_end: bool = False
    save_strategy: str = "steps"
    save_steps: float = 500

    @property
    def global_batch_size(self) -> int:
        """Samples of an optimizer step."""
        return self.per_device * self.accumulation * self.processes


def trainer_keys(args: TrainingArguments) -> TrainerKeys:
    """Return LLaMA-Factory's keys as its own parsing has them."""
    return TrainerKeys(
        max_steps=args.max_steps,
        epochs=args.num_train_epochs,
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
    )


def schedule_of(
    settings: DataFlexConfig,
    components: Components,
    keys: TrainerKeys,
    *,
    num_samples: int | None,
    domains: int,
    mean_length: float | None = None,
) -> Schedule | None:
    """Return the rounds of a run, their total that expected where a budget ends it; None where it is not known.

    Args:
        settings: the section.
        components: of the run.
        keys: LLaMA-Factory's.
        num_samples: of the training data; None: not known.
        domains: number of domains.
        mean_length: mean tokens of a sample, which ``train_tokens`` needs.
    """
    batch, length, planned = keys.global_batch_size, settings.update_steps, components.plans_data
    in_cycles = settings.updates > 0 and (planned or length is not None)
    steps: int | None = None
    if settings.train_tokens is not None:
        if mean_length is None:
            return None
        steps = max(1, math.ceil(settings.train_tokens / batch / mean_length))
    elif settings.train_steps is not None:
        steps = settings.train_steps
    elif keys.max_steps > 0:
        steps = keys.max_steps
    elif not in_cycles:
        if num_samples is None:
            return None
        passes = max(1, math.ceil(keys.epochs * num_samples / batch))
        steps = passes if planned else trainer_steps(keys, num_samples)
    if planned and length is None:
        if num_samples is None:
            return None
        length = default_update_steps(
            rounds=max(component.wanted_rounds(domains) for _, component in components.items()),
            num_samples=num_samples,
            global_batch_size=batch,
            run_steps=None if steps is None else max(1, steps - settings.warmup_steps),
        )
    updates = -1 if length is None else settings.updates
    if steps is None:
        assert length is not None
        steps = max(1, math.ceil(keys.epochs * (settings.warmup_steps + length * updates)))
    return Schedule(settings.warmup_steps, length or 1, updates, steps)


def trainer_steps(keys: TrainerKeys, num_samples: int) -> int:
    """Return the steps the Trainer takes for its ``num_train_epochs``, whose last step of an epoch may be short."""
    batches = math.ceil(num_samples / (keys.per_device * keys.processes))
    return math.ceil(keys.epochs * max(1, math.ceil(batches / keys.accumulation)))


def problems_of(settings: DataFlexConfig, components: Components, run: RunOutline) -> list[Problem]:
    """Return why nothing would ever be decided, or a selector would have nothing to choose from."""
    found = []
    names = [f"{key} {component.name}" for key, component in components.items()]
    if names and not run.decisions and settings.train_seconds is None:
        found.append(
            Problem(
                f"{_SECTION}.warmup_steps",
                f"the run has {run.total_steps} steps and all of them are warm-up ({settings.warmup_steps}): "
                f"{', '.join(names)} would never decide anything. Set it below {run.total_steps}, or train longer "
                "(train_steps, max_steps, num_train_epochs).",
            )
        )
    selector, pool = components.select, run.pool_size
    if selector is None or selector.may_exceed_pool or components.mix is not None or pool is None or not run.decisions:
        return found
    if run.round_samples >= pool:
        most = (pool - 1) // run.global_batch_size
        start = "a round" if settings.update_steps is None else f"a round of {run.schedule.update_steps} steps"
        problem = f"{start} needs {run.round_samples} samples, and the pool has {pool}: selector {selector.name!r} "
        if most:
            key, remedy = f"{_SECTION}.update_steps", f"would have nothing to choose. Use at most {most}."
        else:
            key = "per_device_train_batch_size"
            remedy = (
                f"would have nothing to choose even in a round of one step. A step trains on {run.global_batch_size} "
                "samples (per device x gradient_accumulation_steps x processes); lower that, or add data."
            )
        found.append(Problem(key, problem + remedy))
    return found


def notes_of(
    settings: DataFlexConfig, components: Components, run: RunOutline, validation: Mapping[str, int]
) -> list[str]:
    """Return what will not happen in the run although it was asked for, one sentence or two for each.

    Args:
        settings: the section.
        components: of the run.
        run: what is known of it.
        validation: number of validation samples by configuration key, as far as known.
    """
    notes = list(_without_effect(settings, components))
    for key, component in components.items():
        reason = component.cannot_act(replace(run, validation=validation.get(key, 0)))
        if reason is not None:
            notes.append(f"{key} {component.name}: {reason}.")
    if components.items() and settings.train_seconds is not None and not run.decisions:
        notes.append(
            f"{_SECTION}.warmup_steps: by num_train_epochs the run is expected to have {run.total_steps} steps, all of "
            "them warm-up; whether anything is decided depends on how many more train_seconds allows."
        )
    selector = components.select
    pool = run.pool_size
    by_domain = selector is not None and selector.chooses and components.mix is not None
    if selector is not None and by_domain and pool is not None and run.round_samples >= pool:
        notes.append(
            f"select {selector.name}: a round takes {run.round_samples} samples and the pool has {pool}: "
            "a domain whose share is a multiple of its size is taken whole and nothing is chosen from it. Shorten "
            "update_steps."
        )
    return notes


def _without_effect(settings: DataFlexConfig, components: Components) -> Iterator[str]:
    """Keys of rounds that were set where nothing has rounds."""
    given = settings.model_fields_set
    if not components.items():
        unused: list[str] = [key for key in ("warmup_steps", "probe_batch_tokens") if key in given]
        unused += [key for key in ("update_steps", "updates") if key in given and not _in_cycles(settings)]
        if unused:
            yield f"{', '.join(unused)}: without select, mix, order and weight nothing is decided, so it has no effect."
    elif not components.plans_data and not _in_cycles(settings):
        unused = [key for key in ("update_steps", "updates") if getattr(settings, key) not in (None, -1)]
        if unused:
            yield (
                f"{_SECTION}.{unused[0]}: with weight alone there are no rounds; it counts only together with "
                f"{'updates' if unused[0] == 'update_steps' else 'update_steps'}, where warm-up steps come again in "
                "every cycle."
            )


def _in_cycles(settings: DataFlexConfig) -> bool:
    return settings.updates > 0 and settings.update_steps is not None
