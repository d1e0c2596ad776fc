"""Rounds as functions of the step, compared with a loop over the steps of a run."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import pytest

from dataflex.api.schedule import RunOutline, Schedule, default_update_steps, steps_per_pass


def walk(warmup: int, length: int, updates: int, total: int) -> list[list[int | None]]:
    """Simulate a run; return [round number, first step, steps, decision] of every round."""
    rounds: list[list[int | None]] = []
    step, decision = 0, 0
    phase, left_in_phase, left_in_cycle = "begin", 0, 0
    while step < total:
        if phase == "begin":
            left_in_cycle = updates
            phase, left_in_phase = ("warm-up", warmup) if warmup else ("update", length)
            rounds.append([len(rounds), step, 0, None if phase == "warm-up" else decision])
            decision += phase == "update"
        elif left_in_phase == 0:
            if phase == "update":
                left_in_cycle -= 1
                if left_in_cycle == 0:
                    phase = "begin"
                    continue
            phase, left_in_phase = "update", length
            rounds.append([len(rounds), step, 0, decision])
            decision += 1
        rounds[-1][2] += 1
        left_in_phase -= 1
        step += 1
    return rounds


GRID = [
    *itertools.product((0, 1, 3), (1, 2, 5), (-1, 1, 2, 4), (1, 2, 3, 6, 7, 11, 40)),
    (100, 50, 30, 1600),
    (10, 4, 3, 5),
    (10, 4, 3, 10),
]


@pytest.mark.parametrize("warmup, length, updates, total", GRID)
def test_rounds_equal_a_walk_through_the_run(warmup: int, length: int, updates: int, total: int) -> None:
    schedule = Schedule(warmup, length, updates, total)
    rounds = walk(warmup, length, updates, total)
    for step in range(total):
        expected = next(entry for entry in reversed(rounds) if entry[1] <= step)
        assert list(astuple(schedule.slot_at(step))) == expected, f"step {step}"
    assert schedule.num_updates == sum(entry[3] is not None for entry in rounds)
    assert sum(entry[2] for entry in rounds) == total


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_steps_outside_the_run_are_an_error(step: int) -> None:
    with pytest.raises(ValueError, match="10"):
        Schedule(1, 2, 3, 10).slot_at(step)


def test_the_schedule_of_the_paper_has_its_decision_steps() -> None:
    schedule = Schedule(100, 50, 30, 1600)
    assert schedule.num_updates == 30
    assert schedule.rounds_per_cycle == 31
    assert astuple(schedule.slot_at(99)) == (0, 0, 100, None)
    assert astuple(schedule.slot_at(100)) == (1, 100, 50, 0)
    assert astuple(schedule.slot_at(1599)) == (30, 1550, 50, 29)


def test_steps_per_pass_rounds_up() -> None:
    assert [steps_per_pass(count, 8) for count in (1, 7, 8, 9, 16, 17)] == [1, 1, 1, 2, 2, 3]


def test_the_last_decision_and_number_of_rounds_equal_a_step_by_step_count() -> None:
    for warmup, length, updates, total in GRID:
        schedule, rounds = Schedule(warmup, length, updates, total), walk(warmup, length, updates, total)
        decisions = [entry for entry in rounds if entry[3] is not None]
        assert schedule.last_decision == (decisions[-1][1] if decisions else None)
        assert schedule.num_rounds == len(rounds)
        outline = RunOutline(schedule, 4)
        assert outline.decided_steps == sum(entry[2] for entry in decisions)
        assert outline.decisions == len(decisions)


@pytest.mark.parametrize(
    "rounds, samples, batch, steps, expected",
    [
        (1, 157, 8, 60, 20),  # one pass, rounded up, however long the run is
        (1, 157, 8, 5, 20),
        (4, 160, 8, 60, 5),  # a quarter of the pool's 20 steps
        (4, 157, 8, 60, 4),
        (4, 1600, 8, 10, 2),  # a quarter of the run
        (10, 1600, 8, 55, 5),
        (10, 1600, 8, None, 20),  # the run's length follows from the round's
        (4, 160, 8, 3, 1),
        (4, 9, 8, 60, 1),
    ],
)
def test_without_update_steps_rounds_have_their_default_length(
    rounds: int, samples: int, batch: int, steps: int | None, expected: int
) -> None:
    found = default_update_steps(rounds=rounds, num_samples=samples, global_batch_size=batch, run_steps=steps)
    assert found == expected
    if rounds > 1 and samples >= rounds * batch:
        assert found * batch * rounds <= samples
