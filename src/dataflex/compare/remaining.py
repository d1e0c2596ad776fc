"""Estimate of the time that the rest of a comparison takes, from the runs that are complete."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

from dataflex.compare.result import Result
from dataflex.trainer.console import duration


def known_seconds(results: Iterable[tuple[str, Result | None]], jobs: int) -> dict[str, list[float]]:
    """Return the seconds of the complete runs of each variant that were made on this machine, ``jobs`` at a time.

    Args:
        results: variant and result of each run. The result is None if the run is not complete.
        jobs: number of runs at a time.
    """
    found: dict[str, list[float]] = {}
    for variant, result in results:
        if result is not None and result.seconds is not None and result.runs_at_once == jobs:
            found.setdefault(variant, []).append(result.seconds)
    return found


def time_left(
    known: Mapping[str, Sequence[float]],
    at_work: Sequence[tuple[str, float]],
    waiting: Sequence[str],
    jobs: int,
) -> tuple[float, float] | None:
    """Return the shortest and the longest time in seconds that the rest is expected to take.

    A run is expected to take as long as the measured runs of its variant, or, if there are none, as any measured run.

    Args:
        known: variant -> seconds of its runs that were made from beginning to end, as many at a time.
        at_work: variant of each running run, and the seconds since its start.
        waiting: variant of each run that has not started, in order.
        jobs: number of runs at a time, >= 1.

    Returns:
        Seconds (low, high), or None if no run is measured.
    """
    everything = [seconds for found in known.values() for seconds in found]
    if not everything:
        return None
    low, high = (
        _last_end(
            [max(0.0, pick(known.get(variant) or everything) - elapsed) for variant, elapsed in at_work],
            [pick(known.get(variant) or everything) for variant in waiting],
            jobs,
        )
        for pick in (min, max)
    )
    return low, high


def _last_end(at_work: Sequence[float], waiting: Sequence[float], jobs: int) -> float:
    """Return the seconds until the last run ends, if each waiting run starts at the first free slot."""
    ends = [*at_work, *[0.0] * (jobs - len(at_work))]
    heapq.heapify(ends)
    for seconds in waiting:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def as_text(left: tuple[float, float] | None) -> str:
    """Return ``", about 3.0 min left"`` or a range. Empty if the time is unknown or nothing is left."""
    if left is None or left[1] <= 0:
        return ""
    low, high = left
    if high <= 1.25 * low:
        return f", about {duration((low + high) / 2)} left"
    return f", about {duration(low)} to {duration(high)} left"
