"""Selectors against what stands beside them: parameters that their way of deciding leaves no use for, and chains."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from dataflex.api.components import Entry
from dataflex.api.selector import Selector, SelectorParams, chooses_sets, overhead_limit, overrides
from dataflex.config.loading import SECTION, RunConfig
from dataflex.errors import Problem


def problems_of_chains(config: RunConfig) -> Iterator[Problem]:
    """Return what selectors are told and cannot do."""
    entries = config.build_components().select
    for entry in entries:
        yield from _of_rule(entry)
        yield from _of_limit(entry, entries)
    last = entries[-1] if entries else None
    if last is not None and last.every > 1 and chooses_sets(type(last.component)):
        yield Problem(
            f"{SECTION}.{last.key}.every",
            f"{last.component.name} gives no scores from which the rounds between could be chosen; it decides for "
            "every round. Remove it.",
        )
    for entry in entries if len(entries) > 1 else ():
        if overrides(type(entry.component), "select"):
            yield Problem(
                f"{SECTION}.{entry.key}.method",
                f"{entry.component.name} draws from passes over the data itself and cannot stand in a list of "
                "selectors; name it alone, or take another one.",
            )
    for entry in entries[:-1]:
        if entry.component.may_repeat:
            yield Problem(
                f"{SECTION}.{entry.key}",
                f"{entry.component.name} may take a sample several times, and a filter keeps or drops it; let it draw "
                "without replacement, or put it last.",
            )
    for entry, following in pairwise(entries):
        if entry.every < following.every:
            yield Problem(
                f"{SECTION}.{entry.key}.every",
                f"{entry.every} is below that of {following.key} ({following.every}), between whose decisions what "
                f"{entry.component.name} leaves is not looked at. Set it to {following.every} or more.",
            )


def _of_rule(entry: Entry[Selector]) -> Iterator[Problem]:
    """Parameters of the rule, of a selector that does not go by it."""
    selector = entry.component
    params = selector.rule_params
    if params is None or not chooses_sets(type(selector)):
        return
    if params.within == "domain" and overrides(type(selector), "select"):
        yield Problem(
            f"{SECTION}.{entry.key}.within",
            f"{selector.name} draws from passes over the data itself; its samples are not compared. Remove it.",
        )
    for name in ("rule", "temperature"):
        if getattr(params, name) != SelectorParams.model_fields[name].default:
            yield Problem(
                f"{SECTION}.{entry.key}.{name}",
                f"{selector.name} chooses samples together, in its own choose(), and not by a rule; remove it.",
            )


def _of_limit(entry: Entry[Selector], entries: tuple[Entry[Selector], ...]) -> Iterator[Problem]:
    """``max_overhead`` of a selector that cannot score a part of the candidates, or of one that others follow."""
    selector = entry.component
    if overhead_limit(selector) is None:
        return
    key = f"{SECTION}.{entry.key}.max_overhead"
    if chooses_sets(type(selector)):
        yield Problem(
            key,
            f"{selector.name} chooses samples together, in its own choose(); there are no scores of single samples of "
            "which fewer could be made. Remove it.",
        )
    elif selector.partial_scores is not None:
        yield Problem(key, f"{selector.partial_scores}.")
    elif entry is not entries[-1]:
        yield Problem(
            key,
            f"it limits the time of all decisions, those of every selector included; set it for the last one "
            f"({entries[-1].key}), which then scores as many samples as the others leave time for.",
        )
