"""Decisions of a list of selectors, from a run's record: the rounds of each, and the filters' results for samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.record.reader import RunRecord
from dataflex.record.schema import Filtering, Round


@dataclass(frozen=True)
class Filtered:
    """A filter's decision about a sample."""

    round: int
    """Number of the round in which the filter decided."""
    until: int
    """Number of the last round on record in which the decision holds."""
    key: str
    method: str
    score: float | None
    rank: int | None
    """Rank among the candidates of the sample's group, 1 is the best."""
    candidates: int
    kept: bool
    """Whether the filter left the sample for the next selector."""


@dataclass(frozen=True)
class SelectorPart:
    """A selector of a list in one round."""

    key: str
    method: str
    decided: bool
    """Whether the selector decided in this round. If not, an earlier result holds."""
    decided_in: int | None
    """Number of the round whose result holds; None if that round is not on record."""
    candidates: int | None
    """Number of samples that the selector received; None if a later selector's result holds and it was not called."""
    left: int | None
    """Number of samples that a filter left; for the last selector the number of samples in the plan."""


@dataclass(frozen=True)
class TimesDecided:
    """Number of rounds in which a selector decided, and number of rounds that have the selector."""

    key: str
    method: str
    decided: int
    rounds: int


def filtered_samples(run: RunRecord, wanted: NDArray[np.int64]) -> dict[int, list[Filtered]]:
    """Return the filters' decisions about some samples by index, in their order. Reads one table at a time.

    Args:
        run: the record.
        wanted: pool indices of the samples.
    """
    found: dict[int, list[Filtered]] = {int(index): [] for index in wanted}
    standing: dict[tuple[str, str], dict[int, int]] = {}
    """(key of a filter, group) -> index of a sample -> position in ``found[index]`` of the decision that holds."""
    for each in run.rounds if wanted.size else ():
        if each.warmup:
            continue
        keys = {one.key for one in each.filters}
        standing = {name: places for name, places in standing.items() if name[0] in keys}
        for one, table in run.filtered(each):
            for group, said in _said(run, each, one, table, wanted).items():
                standing[one.key, group] = {index: len(found[index]) for index in said}
                for index, filtered in said.items():
                    found[index].append(filtered)
        for places in standing.values():
            for index, place in places.items():
                found[index][place] = replace(found[index][place], until=each.round)
    return found


def _said(
    run: RunRecord, each: Round, one: Filtering, table: Round, wanted: NDArray[np.int64]
) -> dict[str, dict[int, Filtered]]:
    """Return a filter's decisions about some samples in a round in which it decided.

    Returns:
        Group -> index of a sample -> decision. All groups about which the filter decided are in the result, also those
        without any of the samples.
    """
    indices = run.filters.indices(table)
    ids, names = run.filters.labels(table)
    found: dict[str, dict[int, Filtered]] = {each.group_of(names[i], one.candidates): {} for i in np.unique(ids)}
    positions = np.flatnonzero(np.isin(indices, wanted))
    if not positions.size:
        return found
    scores, ranks = run.filters.numbers(table, "score"), run.filters.numbers(table, "rank")
    for position in map(int, positions):
        group = each.group_of(names[ids[position]], one.candidates)
        found[group][int(indices[position])] = Filtered(
            round=each.round,
            until=each.round,
            key=one.key,
            method=one.method,
            score=None if scores is None or not np.isfinite(scores[position]) else float(scores[position]),
            rank=None if ranks is None or not np.isfinite(ranks[position]) else int(ranks[position]),
            candidates=one.candidates[group],
            kept=position < one.number_kept,
        )
    return found


def parts_of_round(run: RunRecord, each: Round) -> list[SelectorPart]:
    """Return the part of each selector in a round; empty if the run has one selector that decides in every round."""
    parts: list[SelectorPart] = []
    if not times_decided(run):
        return parts
    for key, method in _selectors(each):
        one = next((one for one in each.filters if one.key == key), None)
        counts = one.candidates if one is not None else each.filters[-1].kept if each.filters else {}
        left = each.size if one is None else sum(one.kept.values()) if one.kept else None
        parts.append(
            SelectorPart(
                key=key,
                method=method,
                decided=key not in each.standing,
                decided_in=_decided_in(run, each, key, method),
                candidates=sum(counts.values()) if counts else None,
                left=left,
            )
        )
    return parts


def times_decided(run: RunRecord) -> list[TimesDecided]:
    """Return how often each selector decided; empty if the run has one selector that decides in every round."""
    found: dict[tuple[str, str], list[bool]] = {}
    for each in run.rounds:
        for key, method in _selectors(each):
            found.setdefault((key, method), []).append(key not in each.standing)
    listed = [TimesDecided(*name, sum(decided), len(decided)) for name, decided in found.items()]
    is_plain = all(each.key == "select" and each.decided == each.rounds for each in listed)
    return [] if is_plain else listed


def _selectors(each: Round) -> list[tuple[str, str]]:
    """Return (key, method) of each selector of a round."""
    methods = each.components.get("select")
    if methods is None:
        return []
    if each.filters:
        last = f"select.{len(each.filters)}", methods.split(", ")[-1]
        return [*((one.key, one.method) for one in each.filters), last]
    return [("select", methods)]


def _decided_in(run: RunRecord, each: Round, key: str, method: str) -> int | None:
    """Return the last round, ``each`` or earlier, in which a selector decided; None if none is on record."""
    for earlier in reversed(run.rounds):
        if earlier.round <= each.round and (key, method) in _selectors(earlier) and key not in earlier.standing:
            return earlier.round
    return None
