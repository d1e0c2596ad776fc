"""Rounds as functions of the step, against a loop that walks through a run step by step."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import pytest

from dataflex.schedule import Schedule, steps_per_pass, total_steps


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


def test_the_papers_schedule() -> None:
    schedule = Schedule(100, 50, 30, 1600)
    assert schedule.num_updates == 30
    assert schedule.rounds_per_cycle == 31
    assert astuple(schedule.slot_at(99)) == (0, 0, 100, None)
    assert astuple(schedule.slot_at(100)) == (1, 100, 50, 0)
    assert astuple(schedule.slot_at(1599)) == (30, 1550, 50, 29)


def test_steps_per_pass_rounds_up() -> None:
    assert [steps_per_pass(count, 8) for count in (1, 7, 8, 9, 16, 17)] == [1, 1, 1, 2, 2, 3]


BASE = {
    "train_steps": None,
    "max_steps": -1,
    "epochs": 3.0,
    "warmup_steps": 10,
    "update_steps": 20,
    "updates": 2,
    "num_samples": 1000,
    "global_batch_size": 16,
}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 3 * (10 + 2 * 20)),
        ({"epochs": 1.0}, 50),
        ({"epochs": 0.5}, 25),
        ({"epochs": 0.49}, 25),  # 24.5 steps
        ({"train_steps": 7}, 7),
        ({"train_steps": 7, "max_steps": 9}, 7),
        ({"max_steps": 9}, 9),
        ({"max_steps": 0}, 150),  # not set
        ({"updates": -1, "epochs": 1.0}, 63),  # 62.5 steps of 16 samples
        ({"updates": -1, "epochs": 2.0}, 125),  # two passes are whole steps
        ({"updates": -1, "epochs": 0.001}, 1),
        ({"warmup_steps": 0, "updates": 1, "update_steps": 1, "epochs": 0.001}, 1),
    ],
)
def test_total_steps(changes: dict[str, float | None], expected: int) -> None:
    assert total_steps(**{**BASE, **changes}) == expected
