"""The plan of a run: its steps, rounds, decisions and their cost, and whether anything is decided at all.

``check`` makes the plan from the rows of the data files. ``train`` makes it from the pool, before the model is loaded.
Both print the same lines. Nothing in this module imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dataflex.api.component import Component
from dataflex.api.components import Components, Entry, family_key
from dataflex.api.needs import Needs
from dataflex.api.schedule import RunOutline, Schedule, default_update_steps
from dataflex.api.selector import Selector, compares_in_domains, overhead_limit
from dataflex.api.weighter import Weighter
from dataflex.data.sampling import exactly
from dataflex.embedding.of_model import measurements_of
from dataflex.errors import Problem

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dataflex.config.loading import DataFlexConfig

_SECTION = "dataflex"
_FORWARDS_OF_TRAINING = 3
"""Cost of training on one sample, in forward passes: one forward pass, and a backward pass that costs about two."""


@dataclass(frozen=True)
class TrainerKeys:
    """LLaMA-Factory's keys that the plan depends on, with defaults filled in, and whether the loss is fused."""

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
    fused_loss: bool = False

    @property
    def global_batch_size(self) -> int:
        """Samples of an optimizer step."""
        return self.per_device * self.accumulation * self.processes


def trainer_keys(args: TrainingArguments) -> TrainerKeys:
    """Return the keys from LLaMA-Factory's parsed training arguments."""
    return TrainerKeys(
        max_steps=args.max_steps,
        epochs=args.num_train_epochs,
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        eval_strategy=str(args.eval_strategy.value),
        eval_steps=args.eval_steps or args.logging_steps,
        # Without do_train a script runs the Trainer, and then nothing evaluates at the end by itself.
        evaluates_at_end=bool(args.do_eval and args.do_train),
        save_strategy=str(args.save_strategy.value),
        save_steps=args.save_steps,
    )


def total_steps(
    settings: DataFlexConfig,
    components: Components,
    keys: TrainerKeys,
    *,
    num_samples: int | None,
    update_steps: int | None,
    mean_length: float | None = None,
) -> int | None:
    """Return the optimizer steps of a run, or the expected steps if a budget ends it. None means unknown.

    Args:
        settings: the ``dataflex`` section.
        components: components of the run.
        keys: LLaMA-Factory's keys.
        num_samples: number of training samples. None means unknown.
        update_steps: length of a round. None means unknown, or that there are no rounds.
        mean_length: mean tokens of a sample, which ``train_tokens`` needs.
    """
    batch = keys.global_batch_size
    if settings.train_tokens is not None:
        return None if mean_length is None else max(1, math.ceil(settings.train_tokens / batch / mean_length))
    if settings.train_steps is not None:
        return settings.train_steps
    if keys.max_steps > 0:
        return keys.max_steps
    if _in_cycles(settings, components):
        if update_steps is None:
            return None
        return max(1, math.ceil(exactly(keys.epochs) * (settings.warmup_steps + update_steps * settings.updates)))
    if num_samples is None:
        return None
    if components.plans_data:
        return max(1, math.ceil(exactly(keys.epochs) * num_samples / batch))
    return trainer_steps(keys, num_samples)


def schedule_of(
    settings: DataFlexConfig,
    components: Components,
    keys: TrainerKeys,
    *,
    num_samples: int | None,
    domains: int,
    mean_length: float | None = None,
) -> Schedule | None:
    """Return the rounds of a run. None means unknown. For the arguments see :func:`total_steps`."""
    length = settings.update_steps
    total = total_steps(
        settings, components, keys, num_samples=num_samples, update_steps=length, mean_length=mean_length
    )
    if components.plans_data and length is None:
        in_cycles = total is None and _in_cycles(settings, components)
        if num_samples is None or (total is None and not in_cycles):
            return None
        # The default length of a round depends on the steps of the run. With cycles it is the other way round: the
        # steps follow from the length, so the length is computed first, without the steps.
        length = default_update_steps(
            rounds=max(component.wanted_rounds(domains) for _, component in components.items()),
            num_samples=num_samples,
            global_batch_size=keys.global_batch_size,
            run_steps=None if total is None else max(1, total - settings.warmup_steps),
        )
        if in_cycles:
            total = total_steps(settings, components, keys, num_samples=num_samples, update_steps=length)
    if total is None:
        return None
    return Schedule(settings.warmup_steps, length or 1, -1 if length is None else settings.updates, total)


def _in_cycles(settings: DataFlexConfig, components: Components) -> bool:
    """Return whether training is divided into cycles.

    With ``weight`` alone this needs both ``updates`` and ``update_steps``.
    """
    return settings.updates > 0 and (components.plans_data or settings.update_steps is not None)


def trainer_steps(keys: TrainerKeys, num_samples: int) -> int:
    """Return the steps that the Trainer takes for its ``num_train_epochs``.

    The last step of an epoch may have fewer samples than the others.
    """
    batches = math.ceil(num_samples / (keys.per_device * keys.processes))
    return math.ceil(keys.epochs * max(1, math.ceil(batches / keys.accumulation)))


def problems_of_warmup(settings: DataFlexConfig, components: Components, total: int) -> list[Problem]:
    """Return a problem if all steps of the run are warm-up."""
    names = [f"{key} {component.name}" for key, component in components.items()]
    if not names or settings.warmup_steps < total or settings.train_seconds is not None:
        return []
    steps = f"the run has {_count(total, 'step')}, all of them warm-up ({settings.warmup_steps})"
    remedy = f"Set it below {total}, or train longer" if total > 1 else "Set it to 0, or train longer"
    length = "train_tokens" if settings.train_tokens is not None else "train_steps, max_steps, num_train_epochs"
    return [
        Problem(
            f"{_SECTION}.warmup_steps",
            f"{steps}, so {', '.join(names)} would never decide anything. {remedy} ({length}).",
        )
    ]


def problems_of(settings: DataFlexConfig, components: Components, run: RunOutline) -> list[Problem]:
    """Return why nothing would ever be decided, or why a selector would have nothing to choose from."""
    found = problems_of_warmup(settings, components, run.total_steps)
    entries = {entry.key: entry for entry in components.select}
    for key, component in components.items() if run.decisions else ():
        unfit = component.unfit(outline_of(entries[key], components, run) if key in entries else run)
        found += [] if unfit is None else [Problem(f"{_SECTION}.{key}.{unfit[0]}", unfit[1])]
    pool = run.pool_size
    if not components.select or components.mix is not None or pool is None or not run.decisions:
        return found
    selector = components.select[-1].component
    if selector.may_exceed_pool:
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
                "samples (per device x gradient_accumulation_steps x processes); lower this number, or add data."
            )
        found.append(Problem(key, problem + remedy))
        return found
    return found + _problems_of_filters(components, pool, run.round_samples)


def _problems_of_filters(components: Components, pool: int, wanted: int) -> list[Problem]:
    """Return the filter that keeps too few samples for a round, or that is to keep more samples than reach it."""
    came = pool
    for entry in components.select[:-1]:
        key, name = f"{_SECTION}.{entry.key}.keep", entry.component.name
        assert entry.keep is not None
        if entry.keep >= came:
            return [Problem(key, f"{entry.keep:g} samples are to be left, and {came} come to {name}. Lower keep.")]
        came = entry.kept_of(came)
        if came <= wanted:
            return [
                Problem(
                    key,
                    f"{name} leaves {came} samples, and a round takes {wanted}: {components.select[-1].component.name} "
                    "would have nothing to choose. Raise keep, or lower dataflex.update_steps.",
                )
            ]
    return []


def outline_of(entry: Entry[Selector], components: Components, run: RunOutline) -> RunOutline:
    """Return the outline of a run for one selector of a chain: the samples that reach it, and how often it decides."""
    size = run.pool_size
    for before in components.select[: components.select.index(entry)]:
        size = None if size is None else before.kept_of(size)
    return replace(run, pool_size=size, every=entry.every)


def notes_of(
    settings: DataFlexConfig, components: Components, run: RunOutline, validation: Mapping[str, int]
) -> list[str]:
    """Return why requested decisions will not happen in the run, one or two sentences for each.

    Args:
        settings: the ``dataflex`` section.
        components: components of the run.
        run: outline of the run.
        validation: number of validation samples by configuration key, as far as known.
    """
    notes = list(_without_effect(settings, components))
    for key, component in components.items():
        entry = next((each for each in components.select if each.key == key), None)
        outline = run if entry is None else outline_of(entry, components, run)
        reason = component.cannot_act(replace(outline, validation=validation.get(key, 0)))
        if reason is not None:
            notes.append(f"{key} {component.name}: {reason}.")
    if components.items() and settings.train_seconds is not None and not run.decisions:
        notes.append(
            f"{_SECTION}.warmup_steps: num_train_epochs gives {run.total_steps} expected steps, all of them warm-up; "
            "anything is decided only if train_seconds allows more steps."
        )
    for entry in components.select:
        if compares_in_domains(entry.component) and (components.mix is not None or run.domains == 1):
            why = (
                "the mixer decides how many samples each domain gives, and"
                if components.mix
                else "there is one domain:"
            )
            notes.append(
                f"{entry.key} {entry.component.name}: within: domain changes nothing; {why} samples are compared with "
                "those of their own domain anyway."
            )
    pool = run.pool_size
    by_domain = components.mix is not None and any(entry.component.chooses for entry in components.select)
    if by_domain and pool is not None and run.round_samples >= pool:
        last = components.select[-1]
        notes.append(
            f"{last.key} {last.component.name}: a round takes {run.round_samples} samples and the pool has {pool}: "
            "if a domain's part of the round is a multiple of its size, all its samples are taken and nothing is "
            "chosen. Lower dataflex.update_steps."
        )
    return notes


def _without_effect(settings: DataFlexConfig, components: Components) -> Iterator[str]:
    """Yield the keys of rounds that are set although the run has no rounds."""
    given = settings.model_fields_set
    if not components.items():
        unused: list[str] = [key for key in ("warmup_steps", "probe_batch_tokens") if key in given]
        unused += [key for key in ("update_steps", "updates") if key in given and not _in_cycles(settings, components)]
        if unused:
            yield f"{', '.join(unused)}: without select, mix, order and weight nothing is decided, so it has no effect."
    elif not components.plans_data and not _in_cycles(settings, components):
        unused = [key for key in ("update_steps", "updates") if getattr(settings, key) not in (None, -1)]
        if unused:
            yield (
                f"{_SECTION}.{unused[0]}: no effect, because with weight alone there are no rounds; set "
                f"{'updates' if unused[0] == 'update_steps' else 'update_steps'} as well if the warm-up steps are to "
                "repeat in every cycle."
            )


@dataclass(frozen=True)
class DataOutline:
    """Known numbers of a run's samples.

    Attributes:
        samples: number of training samples. None means unknown.
        domains: number of samples of each domain. None means unknown.
        validation: number of validation samples by configuration key, as far as known.
        mean_length: mean tokens of a training sample. None means unknown.
        unknown: why ``samples`` is None.
        about: whether samples were counted before preprocessing, which may drop some.
    """

    samples: int | None
    domains: Mapping[str, int] | None
    validation: Mapping[str, int] = field(default_factory=dict)
    mean_length: float | None = None
    unknown: str = ""
    about: bool = False


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run, and its text.

    Attributes:
        settings: the ``dataflex`` section.
        components: components of the run.
        keys: LLaMA-Factory's keys.
        total: optimizer steps of the run. None means unknown.
        run: outline that components check themselves against. None if the length of the run or of its rounds is
            unknown.
        needs: the needs of the components, by configuration key.
        data: known numbers of the samples.
    """

    settings: DataFlexConfig
    components: Components
    keys: TrainerKeys
    total: int | None
    run: RunOutline | None
    needs: Mapping[str, Needs]
    data: DataOutline

    def notes(self) -> list[str]:
        """Return why requested decisions will not happen in the run."""
        if self.run is None:
            return list(_without_effect(self.settings, self.components))
        components = self.components
        if self.data.domains is None:  # the notes of a mixer depend on the number of domains
            components = replace(components, mix=None)
        return notes_of(self.settings, components, self.run, self.data.validation)

    def lines(self) -> list[str]:
        """Return the plan as text lines, one or more for each subject."""
        rows = [("data", self._data()), ("steps", self._steps()), *self._rounds(), *self._embeddings(), *self._events()]
        if self.keys.fused_loss:
            rows.append(("loss", "computed in chunks of tokens, without all logits of a micro-batch"))
        if self.run is not None:
            rows += self._cost(self.run)
        width = max(len(name) for name, _ in rows)
        return [f"  {name:<{width}}  {text}" for name, text in rows]

    def _data(self) -> str:
        if self.data.samples is None:
            return f"samples not known before the data is loaded: {self.data.unknown}"
        text = f"{'about ' if self.data.about else ''}{_count(self.data.samples, 'sample')}"
        if self.data.domains is None or len(self.data.domains) < 2:
            return text
        shown = [f"{name} {size:,}" for name, size in list(self.data.domains.items())[:_NAMED]]
        more = f", and {len(self.data.domains) - _NAMED} more" if len(self.data.domains) > _NAMED else ""
        return f"{text} in {len(self.data.domains)} domains: {', '.join(shown)}{more}"

    def _steps(self) -> str:
        """Return the line on the number of steps: its size, passes over the data, and what ends the training."""
        keys, settings = self.keys, self.settings
        batch = (
            f"{_count(keys.global_batch_size, 'sample')} ({keys.per_device} per device x {keys.accumulation} "
            f"accumulated x {_count(keys.processes, 'process', 'es')})"
        )
        until = ""
        if settings.train_tokens is not None:
            until = f"; training ends when {settings.train_tokens:,} tokens are trained on"
        elif settings.train_seconds is not None:
            until = f"; training ends after {settings.train_seconds:g} s of training and decisions"
        if self.total is None:
            return f"not known before the data is loaded, each of {batch}{until}"
        about = "about " if until or (self.data.about and self._counts_samples()) else ""
        text = f"{about}{self.total:,}, each of {batch}"
        if self.data.samples:
            passes = _number(self._passes(self.total))
            text += (
                f": {'about ' if self.data.about else ''}{passes} {'pass' if passes == '1' else 'passes'} over the data"
            )
        if self._counts_cycles() and self.run is not None:
            cycle = self.run.schedule.cycle_steps
            text += (
                f". num_train_epochs counts cycles here: {keys.epochs:g} x {cycle} steps (updates: "
                f"{settings.updates}); under updates: -1 it counts passes"
            )
        return text + until

    def _passes(self, steps: int) -> float:
        """Return the passes over the data in a number of steps.

        Without a plan, the Trainer draws the passes, in which the last step of a pass may have fewer samples.
        """
        assert self.data.samples
        if self.components.plans_data:
            return steps * self.keys.global_batch_size / self.data.samples
        return steps / trainer_steps(replace(self.keys, epochs=1), self.data.samples)

    def _counts_samples(self) -> bool:
        """Whether the number of steps follows from the number of samples."""
        return not self._counts_cycles() and self.settings.train_steps is None and self.keys.max_steps <= 0

    def _counts_cycles(self) -> bool:
        """Whether the number of steps follows from the number of cycles."""
        given = self.settings.train_steps or self.settings.train_tokens or self.keys.max_steps > 0
        return _in_cycles(self.settings, self.components) and not given

    def _rounds(self) -> Iterator[tuple[str, str]]:
        """Yield the lines on the warm-up, the rounds and the decisions."""
        if not self.components.items():
            return
        run, settings = self.run, self.settings
        if settings.warmup_steps:
            again = " at the start of every cycle" if _in_cycles(settings, self.components) else ""
            yield "warm-up", f"{_count(settings.warmup_steps, 'step')}{again}: a uniform draw, nothing is decided"
        named = {key: f"{key} {component.name}{self._place(key)}" for key, component in self.components.items()}
        weighing = ", ".join(text for key, text in named.items() if family_key(key) == "weight")
        acting = ", ".join(text for key, text in named.items() if family_key(key) != "weight" or run is None)
        if run is None:
            yield "decisions", acting
            return
        schedule = run.schedule
        if not self.components.plans_data:
            yield "decisions", f"in every step after warm-up, {run.decided_steps:,}: {weighing}"
            return
        share = ""
        if run.pool_size:
            share = f", {'about ' if self.data.about else ''}{_percent(run.round_samples / run.pool_size)} of the pool"
        length = min(schedule.update_steps, run.decided_steps)
        default = "" if self.settings.update_steps is not None else " (the default of update_steps)"
        each = "each " if schedule.num_rounds > 1 else ""
        yield (
            "rounds",
            f"{schedule.num_rounds:,}, {each}of {_count(length, 'step')}{default} and "
            f"{_count(run.round_samples, 'sample')}{share}",
        )
        yield "decisions", f"{run.decisions:,}: {acting}"
        if weighing:
            yield "weights", f"in every step after warm-up, {run.decided_steps:,}: {weighing}"
        if self.components.order is not None:
            is_mixed = self.components.mix is not None
            yield from (("order", text) for text in self.components.order.outline(run, is_mixed))

    def _place(self, key: str) -> str:
        """Return the text on ``keep`` and ``every`` of a component in a chain. Empty if there is nothing to say."""
        entries: list[Entry[Any]] = [*self.components.select, *self.components.weight]
        for entry in entries:
            if entry.key == key:
                kept = "" if entry.keep is None else f"keeps {_percent(entry.keep) if entry.keep < 1 else entry.keep}"
                unit = "decision" if key.startswith("select") else "step"
                often = "" if entry.every == 1 else f"one {unit} in {entry.every}"
                said = ", ".join(part for part in (kept, often) if part)
                return f" ({said})" if said else ""
        return ""

    def _embeddings(self) -> Iterator[tuple[str, str]]:
        """Yield a line for each component with an encoder's embeddings, which need no pass of the model in training."""
        for key, needs in self.needs.items():
            if needs.embeddings is None or needs.embeddings.encoder is None:
                continue
            samples = "the samples" if self.data.samples is None else _count(self.data.samples, "sample")
            held = self.data.validation.get(key, 0)
            samples += f" and {_count(held, 'validation sample')}" if held else ""
            folder = needs.embeddings.embedding_folder or "embeddings in the output_dir"
            name = needs.embeddings.encoder
            yield "embeddings", f"{key}: of {samples} by {name}, made once before the model is loaded, kept in {folder}"

    def _events(self) -> Iterator[tuple[str, str]]:
        """Yield the lines on the text beside preferences, evaluations and checkpoints."""
        keys = self.keys
        if (ptx := self.settings.ptx) is not None:
            yield (
                "text",
                f"{', '.join(ptx.dataset)} (stage {ptx.stage}) in every step, its loss times {ptx.coefficient:g}",
            )
        during = self._times(keys.eval_strategy, keys.eval_steps)
        at_end = ", and one at the end" if keys.evaluates_at_end else ""
        if keys.eval_strategy == "no":
            yield "evaluations", "one, at the end" if keys.evaluates_at_end else "none"
        else:
            yield "evaluations", f"{during} during training{at_end}"
        saved = self._times(keys.save_strategy, keys.save_steps, last=True)
        yield "checkpoints", "none but the model at the end" if keys.save_strategy == "no" else saved

    def _times(self, strategy: str, every: float, last: bool = False) -> str:
        """Return how often an event happens.

        Args:
            strategy: ``steps``, ``epoch`` or another strategy of the Trainer.
            every: steps between two events, or a share of the run if below 1.
            last: whether the event also happens at the last step.
        """
        total = self.total
        if strategy == "steps" and total is None:
            return f"every {every:.0%} of the run" if every < 1 else f"every {_count(int(every), 'step')}"
        if strategy == "steps" and total is not None:
            steps = max(1, math.ceil(total * every) if every < 1 else int(every))
            if last and steps >= total:
                return "one, at the last step"
            times = total // steps + (last and total % steps > 0)
            return f"{times:,} (every {_count(steps, 'step')})"
        if strategy == "epoch":
            if not self.data.samples or total is None:
                return "after every pass over the data"
            return f"{math.ceil(self._passes(total)):,} (after every pass over the data)"
        return f"by save_strategy: {strategy}"

    def _cost(self, run: RunOutline) -> Iterator[tuple[str, str]]:
        """Yield the cost of each component's measurements, relative to the computation of training."""
        training, before = _FORWARDS_OF_TRAINING * run.total_steps * run.global_batch_size, 0.0
        for key, component in self.components.items():
            entry = next((each for each in self.components.select if each.key == key), None)
            outline = run if entry is None else outline_of(entry, self.components, run)
            outline = replace(outline, validation=self.data.validation.get(key, 0))
            forwards = expected_forwards(component, self.needs[key], outline)
            if not forwards:
                continue
            ratio = forwards / training
            limit = overhead_limit(component) if isinstance(component, Selector) else None
            text = f"{key} {component.name}: {_number(ratio)} times the work of training"
            text += "" if limit is None else " if all candidates were scored"
            yield "cost", f"{text} ({forwards:,.0f} forward passes of a sample; a training step has 3 for each)"
            if limit is not None:
                text = f"max_overhead: decisions may take {limit:g} times the time of training"
                if before > limit:
                    text += f", and the selectors before {key}, which have no limit, take about {_number(before)}"
                yield "limit", text
            before += ratio if entry is not None else 0.0


def expected_forwards(component: Component, needs: Needs, run: RunOutline) -> float:
    """Return the computation of a component in the whole run, in forward passes of one sample.

    A forward and backward pass counts as three. So does training on a sample.

    Args:
        component: the component.
        needs: needs of the component.
        run: outline of the run, with the number of the component's own validation samples.
    """
    steps = float(run.decided_steps * run.global_batch_size)
    forwards = sum(each.forwards * component.measured_samples(each, run) for each in measurements_of(needs))
    if needs.reference is not None:
        passes = component.reference_passes - (needs.reference.reference_losses is not None)
        # These need the reference losses of a sample only once in a run.
        once = component.family in ("selector", "order")
        once |= isinstance(component, Weighter) and not component.step_reference
        pool = run.pool_size or sum((run.sizes or {}).values())
        forwards += passes * (float(pool) if once else steps)
    if component.decides_within_step and run.accumulation > 1:
        forwards += steps
    return forwards


_NAMED = 8


def plan_of(
    settings: DataFlexConfig,
    components: Components,
    keys: TrainerKeys,
    needs: Mapping[str, Needs],
    data: DataOutline,
) -> RunPlan:
    """Return the plan of a run. The arguments are described at :class:`RunPlan`."""
    count = _UNKNOWN_DOMAINS if data.domains is None else len(data.domains)
    schedule = schedule_of(
        settings, components, keys, num_samples=data.samples, domains=count, mean_length=data.mean_length
    )
    run = None
    if schedule is None:
        total = total_steps(
            settings,
            components,
            keys,
            num_samples=data.samples,
            update_steps=settings.update_steps,
            mean_length=data.mean_length,
        )
    else:
        total = schedule.total_steps
        pool = data.samples if components.plans_data else None
        sizes = data.domains if data.domains and all(data.domains.values()) else None
        run = RunOutline(schedule, keys.global_batch_size, pool, count, keys.accumulation, sizes=sizes)
    return RunPlan(settings, components, keys, total, run, needs, data)


_UNKNOWN_DOMAINS = 2
"""Assumed number of domains if the number is unknown."""


def _count(number: int, unit: str, plural: str = "s") -> str:
    return f"{number:,} {unit}{'' if number == 1 else plural}"


def _number(value: float) -> str:
    """Return a value of 1 or more with at most one decimal, and a smaller one with two significant digits."""
    return f"{value:.2g}" if value < 1 else f"{round(value, 1):,g}" if value < 1e5 else f"{value:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
