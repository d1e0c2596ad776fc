"""Text for the terminal: lines above a progress bar, and the wording of decisions, logs and times.

Nothing here imports torch, because the command line uses it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager

from tqdm import tqdm

from dataflex.api.schedule import RoundSlot
from dataflex.record.trainer_log import MEANS

_LISTED = 6
"""Largest number of names that are listed one by one. Of more names the largest are listed, and the others counted."""

_OF_SETS = {name: re.compile(rf"eval_(?:(.+)_)?{name}") for name in ("loss", "accuracy", "margin")}
"""Metrics of the evaluation sets that are shown."""
_NOT_SHOWN = re.compile(
    r"eval_(?:.+_)?(?:runtime|samples_per_second|steps_per_second|perplexity|bits_per_byte|preparation_time)"
    r"|eval_rewards/(?:chosen|rejected|accuracies)|eval_(?:logps|logits)/.+"
)


_DETAIL = re.compile(r"dataflex/.*|eval_.+_(?:perplexity|bits_per_byte|margin)")


def say(text: str) -> None:
    """Print a line on standard output, above any progress bar."""
    tqdm.write(text)


def above_bars() -> AbstractContextManager[None]:
    """Print the output of others in the block, such as a logger's, above any progress bar."""
    return tqdm.external_write_mode(file=sys.stdout)


def end_bars() -> None:
    """Close every progress bar, so that the next line starts at the left margin."""
    for bar in list(tqdm._instances):  # tqdm has no public list of them
        bar.close()


def duration(seconds: float) -> str:
    """Return a time in the unit a person would use: seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 6000:
        return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"
    return f"{seconds / 3600:.1f} h"


def largest(values: Mapping[str, float], form: str = "{}") -> str:
    """Return names with their values. Of more than six, list the five largest and count the others."""
    shown = list(values)
    if len(values) > _LISTED:
        shown = sorted(values, key=lambda name: -values[name])[: _LISTED - 1]
    texts = [f"{name} {form.format(values[name])}" for name in shown]
    return ", ".join(texts) + (f" and {len(values) - len(shown)} more" if len(shown) < len(values) else "")


def decision(
    slot: RoundSlot,
    planned: Mapping[str, int],
    pool_size: int,
    seconds: float,
    *,
    scored: int | None = None,
    loss_weights: Mapping[str, float] | None = None,
    undecided: Mapping[str, str] | None = None,
) -> str:
    """Return the line about a round that has just been decided.

    Args:
        slot: the round and its optimizer steps.
        planned: number of samples of each domain in the plan.
        pool_size: number of samples in the pool.
        seconds: seconds that the decision took.
        scored: number of scored samples, if ``max_overhead`` limits them.
        loss_weights: weight of each domain's loss, if a mixer weights the loss.
        undecided: reasons why a method decided nothing, by method.
    """
    first, last = slot.start_step + 1, slot.start_step + slot.steps
    steps = f"steps {first}-{last}" if last > first else f"step {first}"
    parts = [f"{sum(planned.values())} of {pool_size}" + (f": {largest(planned)}" if len(planned) > 1 else " samples")]
    if loss_weights is not None:
        parts.append(f"loss weights at its start {largest(loss_weights, '{:.3g}')}")
    if scored is not None:
        parts.append(f"{scored} scored within max_overhead")
    parts += [f"not decided by {who}: {why}" for who, why in (undecided or {}).items()]
    parts.append(f"{seconds:.1f} s")
    warmup = " (warm-up)" if slot.update is None else ""
    return f"round {slot.number}{warmup}, {steps}: {'; '.join(parts)}"


def log(logs: Mapping[str, object], step: int, total_steps: int | None) -> str | None:
    """Return the line about a log of the Trainer; None if it holds nothing to show.

    Args:
        logs: all logged values.
        step: number of optimizer steps done.
        total_steps: number of steps of the run; None if it is not known.
    """
    of = f"step {step}" if total_steps is None else f"step {step} of {total_steps}"
    numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
    if "loss" in numbers:
        named = {"loss": ("loss", ".4g"), "learning_rate": ("learning rate", ".3g"), "epoch": ("epoch", ".2f")}
        shown = [f"{name} {numbers[key]:{form}}" for key, (name, form) in named.items() if key in numbers]
        return f"{of}: {', '.join(shown)}"
    found = _evaluation(numbers)
    return None if not found else f"{of}: evaluation {found}"


def _evaluation(numbers: Mapping[str, float]) -> str:
    """Return the metrics of an evaluation in short: losses, accuracies, margins, and others, such as of responses."""
    of_sets = {name: _of_sets(numbers, name) for name in _OF_SETS}
    others = {
        key.removeprefix("eval_"): value
        for key, value in numbers.items()
        if key.startswith("eval_")
        and not any(each.fullmatch(key) for each in _OF_SETS.values())
        and not _NOT_SHOWN.fullmatch(key)
    }
    if of_sets["margin"]:
        others.pop("rewards/margins", None)  # LLaMA-Factory's mean over batches
    return "; ".join(filter(None, [*of_sets.values(), largest(others, "{:.4g}")]))


def _of_sets(numbers: Mapping[str, float], metric: str) -> str:
    """Return a metric over all evaluation sets and of each of them; an empty text if there is none."""
    values = {match[1] or "": numbers[key] for key in numbers if (match := _OF_SETS[metric].fullmatch(key))}
    means = {name: values.pop(name) for name in MEANS if name in values}
    whole = values.pop("", means.get(MEANS[0]))
    parts = [] if whole is None else [f"{metric} {whole:.4g}"]
    if len(values) > 1 or (values and whole is None):
        parts.append(("" if parts else f"{metric} ") + largest(values, "{:.4g}"))
    return ": ".join(parts)


def without_details(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics without DataFlex's progress values, and of each evaluation set the loss and accuracy alone."""
    return {key: value for key, value in metrics.items() if not _DETAIL.fullmatch(key)}
