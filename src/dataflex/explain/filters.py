"""What each selector of a list did, from a run's record: when it decided, and what the filters said of samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.record.reader import RunRecord
from dataflex.record.schema import Filtering, Round


@dataclass(frozen=True)
class Filtered:
    """What a filter said of a sample when it decided."""

    round: int
    """In which it decided."""
    until: int
    """The last round on record in which that stands."""
    key: str
    method: str
    score: float | None
    rank: int | None
    """Among the candidates of its group, 1 the best."""
    candidates: int
    kept: bool
    """Whether it left the sample for the next selector."""


@dataclass(frozen=True)
class SelectorPart:
    """The part that a selector of a list has in a round."""

    key: str
    method: str
    decided: bool
    """Whether it decided in this round; if not, an earlier result stands."""
    decided_in: int | None
    """The round whose result stands; None if that is not on record."""
    candidates: int | None
    """Samples that came to it; None if it was not asked, since the result of a later selector stands."""
    left: int | None
    """Samples that a filter left; of the last selector, samples in the plan."""


@dataclass(frozen=True)
class TimesDecided:
    """In how many of the rounds that have a selector it decided."""

    key: str
    method: str
    decided: int
    rounds: int


def filtered_samples(run: RunRecord, wanted: NDArray[np.int64]) -> dict[int, list[Filtered]]:
    """Return what the filters said of some samples, by index, in the order they decided; one table is read at a time.

    Args:
        run: the record.
        wanted: pool indices.
    """
    found: dict[int, list[Filtered]] = {int(index): [] for index in wanted}
    standing: dict[tuple[str, str], dict[int, int]] = {}
    """By key of a filter and group: index of a sample to the place in its list of what stands."""
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
    """Return what a filter said of some samples in a round in which it decided, by group; all it decided about."""
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
    """Return the part of each selector in a round; empty if there is one selector that decides every time."""
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
    """Return how often each selector decided; empty if there is one selector that decides every time."""
    found: dict[tuple[str, str], list[bool]] = {}
    for each in run.rounds:
        for key, method in _selectors(each):
            found.setdefault((key, method), []).append(key not in each.standing)
    listed = [TimesDecided(*name, sum(decided), len(decided)) for name, decided in found.items()]
    is_plain = all(each.key == "select" and each.decided == each.rounds for each in listed)
    return [] if is_plain else listed


def _selectors(each: Round) -> list[tuple[str, str]]:
    """Return key and method of the selectors of a round."""
    methods = each.components.get("select")
    if methods is None:
        return []
    if each.filters:
        last = f"select.{len(each.filters)}", methods.split(", ")[-1]
        return [*((one.key, one.method) for one in each.filters), last]
    return [("select", methods)]


def _decided_in(run: RunRecord, each: Round, key: str, method: str) -> int | None:
    """Return the number of the last round up to one in which a selector decided; None if none is on record."""
    for earlier in reversed(run.rounds):
        if earlier.round <= each.round and (key, method) in _selectors(earlier) and key not in earlier.standing:
            return earlier.round
    return None
