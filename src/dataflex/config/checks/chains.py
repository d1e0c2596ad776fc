"""Checks of selectors: parameters without effect on the way a selector chooses, and chains of several selectors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from dataflex.api.components import Entry
from dataflex.api.selector import Selector, SelectorParams, chooses_sets, overhead_limit, overrides
from dataflex.config.loading import SECTION, RunConfig
from dataflex.errors import Problem


def problems_of_chains(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of selectors: settings that they cannot follow, and chains that cannot work."""
    entries = config.build_components().select
    for entry in entries:
        yield from _of_rule(entry)
        yield from _of_limit(entry, entries)
    last = entries[-1] if entries else None
    if last is not None and last.every > 1 and chooses_sets(type(last.component)):
        yield Problem(
            f"{SECTION}.{last.key}.every",
            f"{last.component.name} gives no scores, so it has to decide in every round; remove "
            f"{SECTION}.{last.key}.every.",
        )
    for entry in entries if len(entries) > 1 else ():
        if overrides(type(entry.component), "select"):
            yield Problem(
                f"{SECTION}.{entry.key}.method",
                f"{entry.component.name} draws its samples in passes over the data and cannot be in a list of "
                "selectors; use it alone, or use another method here.",
            )
    for entry in entries[:-1]:
        if entry.component.may_repeat:
            yield Problem(
                f"{SECTION}.{entry.key}",
                f"{entry.component.name} may choose a sample several times, but a filter can only keep or drop it; set "
                "it to draw without replacement, or make it the last selector.",
            )
    for entry, following in pairwise(entries):
        if entry.every < following.every:
            yield Problem(
                f"{SECTION}.{entry.key}.every",
                f"{entry.every} is less than every of {following.key} ({following.every}). {following.key} would "
                f"ignore the decisions of {entry.component.name} in between; set every to {following.every} or more.",
            )


def _of_rule(entry: Entry[Selector]) -> Iterator[Problem]:
    """Yield the parameters of the selection rule that are set for a selector that does not use the rule."""
    selector = entry.component
    params = selector.rule_params
    if params is None or not chooses_sets(type(selector)):
        return
    if params.within == "domain" and overrides(type(selector), "select"):
        yield Problem(
            f"{SECTION}.{entry.key}.within",
            f"{selector.name} draws its samples in passes over the data and does not compare them; remove within.",
        )
    for name in ("rule", "temperature"):
        if getattr(params, name) != SelectorParams.model_fields[name].default:
            yield Problem(
                f"{SECTION}.{entry.key}.{name}",
                f"{selector.name} chooses a set of samples with its own choose() and uses no rule; remove {name}.",
            )


def _of_limit(entry: Entry[Selector], entries: tuple[Entry[Selector], ...]) -> Iterator[Problem]:
    """Yield a problem if ``max_overhead`` is set for a selector that cannot follow it or is not the last one."""
    selector = entry.component
    if overhead_limit(selector) is None:
        return
    key = f"{SECTION}.{entry.key}.max_overhead"
    if chooses_sets(type(selector)):
        yield Problem(
            key,
            f"{selector.name} chooses a set of samples with its own choose(), so it cannot score fewer of them; remove "
            "max_overhead.",
        )
    elif selector.partial_scores is not None:
        yield Problem(key, f"{selector.partial_scores}.")
    elif entry is not entries[-1]:
        yield Problem(
            key,
            "limits the time of all decisions, of every selector together. Set it for the last selector "
            f"({entries[-1].key}), which then scores as many samples as the remaining time allows.",
        )
