"""Runs with the methods for preference pairs: scores and weights by hand, one process and two, killed and resumed.

All trainings happen in two starts, one of one process and one of two (see runner.py).
"""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pairs_by_hand
import pytest
import torch
from composed_loss import distance, kept
from transformers import AutoModelForCausalLM

import pairs
import tiny
from dataflex.selectors.base_difficulties import read_difficulties
from records import plan_table

pytestmark = pytest.mark.launch

FULL = {**pairs.DPO, "finetuning_type": "full", "max_grad_norm": 0.0}
COLUMNS = {"method": "external_margin", "chosen": "good", "rejected": "bad"}
BOUNDS = [[-1, 1], [-2, 2], [-0.5, 0.5]]


def add_data(folder: Path) -> None:
    """Write the pairs with columns of rewards and of a difficulty, which follow from their margin."""
    pairs.make_pairs(folder)
    entry = {"columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}, "ranking": True}
    for name in ("first", "second"):
        rows = tiny.rows_of(folder, name)
        more = [{"good": row["margin"] + 0.3, "bad": 0.3, "hard": 1 - row["margin"]} for row in rows]
        tiny.add_data(folder, name, [{**row, **each} for row, each in zip(rows, more, strict=True)], **entry)


def add_flipped(folder: Path) -> None:
    """Write pairs of which two in five have swapped responses."""
    rng = random.Random("flipped")
    rows = []
    for number in range(60):
        good, bad = (f"{tiny.sentence(rng, 2, 6)} {word}" for word in ("cat", "dog"))
        flipped = number % 5 < 2
        row = {"instruction": tiny.sentence(rng), "chosen": bad if flipped else good}
        rows.append({**row, "rejected": good if flipped else bad})
    entry = {"columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}, "ranking": True}
    tiny.add_data(folder, "flipped", rows, **entry)


FLIPPED = {
    "small": {"method": "dpo_gap", "prefer": "small"},
    "large": {"method": "dpo_gap", "prefer": "large"},
    "easy": {"method": "hard_pairs"},
}
"""Name of a run on pairs of which some are flipped -> its selector."""


def add_both(workshop: Any, reference: Path, processes: int) -> None:
    """Add the runs that are made on one process and on two."""
    batch = {"per_device_train_batch_size": 4 // processes // 2, "gradient_accumulation_steps": 2}
    still = {**FULL, **batch, "ref_model": str(reference), "learning_rate": 0.0, "max_steps": 4}
    for prefer in ("small", "large"):
        select = {"method": "dpo_gap", "prefer": prefer}
        workshop.add(f"gap-{prefer}-{processes}", keep=1, **still, dataflex={"update_steps": 2, "select": select})
    weight = {"method": "beta_dpo", "ratio": 0.25}
    workshop.add(f"beta-{processes}", keep=1, **still, dataflex={"weight": weight})
    folder = workshop.root / f"held-out-{processes}"
    select = {"method": "half", "half": "second", "folder": str(folder)}
    resumable = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "learning_rate": 0.01}
    several = {"weight": weight, "select": select, "update_steps": 2}
    run = {**still, **resumable, "dataflex": several}
    workshop.add(f"half-whole-{processes}", **run)
    several = {**several, "select": {**select, "folder": str(workshop.root / f"held-out-cut-{processes}")}}
    workshop.add(f"half-cut-{processes}", stop_at=5, **{**run, "dataflex": several})
    workshop.add(f"half-resumed-{processes}", into=f"half-cut-{processes}", **{**run, "dataflex": several})


@pytest.fixture(scope="module")
def reference(workshop: Any) -> Path:
    return tiny.make_model(workshop.root / "other-model", seed=5)


@pytest.fixture(scope="module")
def runs(workshop: Any, reference: Path) -> Any:
    add_data(workshop.data)
    add_flipped(workshop.data)
    add_both(workshop, reference, 2)
    workshop.start(2)
    add_both(workshop, reference, 1)
    run = {**pairs.DPO, "per_device_train_batch_size": 4, "max_steps": 4}
    workshop.add(
        "margin", **run, dataflex={"update_steps": 2, "select": {"method": "external_margin", "margin": "margin"}}
    )
    workshop.add("rewards", **run, dataflex={"update_steps": 2, "select": {**COLUMNS, "prefer": "small"}})
    select = {**COLUMNS, "margin": "margin", "implicit": True, "bounds": BOUNDS}
    still = {
        **FULL,
        "ref_model": str(reference),
        "learning_rate": 0.0,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
    }
    workshop.add("combined", **still, dataflex={"update_steps": 2, "select": select})
    easy = {"select": {"method": "hard_pairs", "column": "hard"}}
    easy["order"] = {"method": "sort", "by": "selection", "descending": True}
    workshop.add("easy", **{**run, "max_steps": -1, "num_train_epochs": 0.5}, dataflex=easy)
    table = [str(workshop.root / f"held-out-{number}" / "difficulties.parquet") for number in (1, 2)]
    filtered = [{"method": "hard_pairs", "keep": 0.5}, {"method": "random"}]
    workshop.add("losses", **run, dataflex={"warmup_steps": 1, "update_steps": 3, "select": filtered})
    workshop.add("incomplete", **run, dataflex={"select": {"method": "hard_pairs", "difficulties": table}})
    workshop.add(
        "reward-model",
        **{**pairs.RM, **run, "stage": "rm"},
        dataflex={"update_steps": 2, "select": {"method": "dpo_gap"}, "weight": {"method": "beta_dpo"}},
    )
    run = {**pairs.DPO, "dataset": "flipped", "per_device_train_batch_size": 8, "max_steps": 18}
    run |= {"learning_rate": 0.002, "lr_scheduler_type": "constant"}
    for name, select in FLIPPED.items():
        section = {"warmup_steps": 15, "update_steps": 3, "select": select}
        workshop.add(f"flipped-{name}", **run, dataflex=section)
    workshop.start(1)
    return workshop


def scores_of(runs: Any, name: str) -> dict[int, float]:
    """Return the recorded score of every pair that a run chose."""
    runs.trace(name)
    found: dict[int, float] = {}
    for line in runs.rounds(name):
        table = plan_table(runs.root / name, line["round"])
        found |= dict(zip(table.column("index").to_pylist(), table.column("score").to_pylist(), strict=True))
    return found


def columns(runs: Any, name: str) -> np.ndarray[Any, Any]:
    """Return a column of all pairs in the order of the pool."""
    return np.array([row[name] for part in ("first", "second") for row in tiny.rows_of(runs.data, part)])


def margins_by_hand(runs: Any, reference: Path, name: str, processes: int) -> dict[int, float]:
    """Return the margins of the pairs of a kept step, one pair at a time in float64."""
    found = {}
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (runs.model, reference)]
    with torch.no_grad():
        for part in kept(runs.root / name, processes):
            for batch in part["batches"]:
                losses = pairs_by_hand.pair_losses("dpo", models[0], models[1], batch)
                for place, loss in zip(batch["dataflex_index"].tolist(), losses, strict=True):
                    found[place] = -float(torch.log(torch.expm1(loss)))
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_gaps_are_those_of_one_pair_at_a_time(runs: Any, reference: Path, processes: int) -> None:
    small, large = (scores_of(runs, f"gap-{prefer}-{processes}") for prefer in ("small", "large"))
    assert len(small) == len(large) == 8  # both rounds choose the same pairs
    assert max(-score for score in small.values()) < min(large.values())
    by_hand = margins_by_hand(runs, reference, f"gap-small-{processes}", processes)
    assert len(by_hand) == 4
    for place, margin in by_hand.items():
        assert -small[place] == pytest.approx(margin, abs=1e-5)


def test_margins_of_the_data_decide(runs: Any) -> None:
    margins = columns(runs, "margin")
    largest, smallest = np.argsort(-margins)[:8], np.argsort(margins)[:8]
    assert set(scores_of(runs, "margin")) == set(largest.tolist())
    rewards = scores_of(runs, "rewards")
    assert set(rewards) == set(smallest.tolist())
    np.testing.assert_allclose(list(rewards.values()), -margins[list(rewards)], atol=1e-6)


def test_margins_of_the_data_and_of_the_model_are_combined(runs: Any) -> None:
    gaps = {place: -score for place, score in scores_of(runs, "gap-small-1").items()} | scores_of(runs, "gap-large-1")
    margins, found = columns(runs, "margin"), scores_of(runs, "combined")
    common = [place for place in found if place in gaps]
    for place in common:
        sources = [(margins[place] + 1) / 2, (margins[place] + 2) / 4, np.clip(gaps[place] + 0.5, 0, 1)]
        odds = np.prod([each / max(1 - each, 1e-12) for each in sources])
        assert found[place] == pytest.approx(odds / (1 + odds), abs=1e-4)
    assert len(found) == 8


def test_the_easiest_pairs_are_trained_in_one_pass_from_easy_to_hard(runs: Any) -> None:
    seen = [place for _, batch in runs.trace("easy")["micro_batches"] for place in batch]
    hard = columns(runs, "hard")
    assert len(seen) == len(set(seen)) == 32
    np.testing.assert_allclose(hard[seen], np.sort(hard)[:32])


def test_losses_of_the_model_leave_out_hard_pairs(runs: Any) -> None:
    assert runs.trace("losses")["losses"]
    (filtered,) = runs.rounds("losses")[1]["filters"]
    assert filtered["kept"] == {"pool": 32}
    table = plan_table(runs.root / "losses", 1)
    assert table.num_rows == 12


def test_tables_that_lack_pairs_are_refused_before_the_training(runs: Any) -> None:
    error = json.loads((runs.root / "incomplete" / "trace-0.json").read_text())["error"]
    assert "dataflex.select.difficulties: 32 of the 64 pairs are in no table" in error


def test_a_reward_model_has_gaps(runs: Any) -> None:
    trace = runs.trace("reward-model")
    assert len(trace["losses"]) == 4
    assert len(scores_of(runs, "reward-model")) > 4


@pytest.mark.parametrize("processes", [1, 2])
def test_the_gradient_is_the_mean_over_the_pairs_that_are_kept(runs: Any, reference: Path, processes: int) -> None:
    name = f"beta-{processes}"
    runs.trace(name)
    found = kept(runs.root / name, processes)
    model, frozen = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (runs.model, reference)
    )
    losses = [
        loss
        for part in found
        for batch in part["batches"]
        for loss in pairs_by_hand.pair_losses("dpo", model, frozen, batch)
    ]
    assert len(losses) == 4
    distances = []
    for chosen in combinations(losses, 3):
        model.zero_grad()
        (sum(chosen) / 3).backward(retain_graph=True)
        wanted = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
        distances.append(distance({key: found[0]["gradients"][key] for key in wanted}, wanted))
    assert sorted(distances)[0] < 1e-5 < sorted(distances)[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_half_is_trained_and_the_other_half_measured(runs: Any, processes: int) -> None:
    trace = runs.trace(f"half-whole-{processes}")
    trained = {place for _, batch in trace["micro_batches"] for place in batch}
    table = read_difficulties(runs.root / f"held-out-{processes}" / "difficulties.parquet")
    offsets = {"first": 0, "second": 40}
    places = zip(table.column("dataset").to_pylist(), table.column("row").to_pylist(), strict=True)
    measured = {offsets[name] + row for name, row in places}
    assert len(measured) == 32
    assert not trained & measured
    values = table.column("difficulty").to_numpy()
    assert values.std() > 0
    again = read_difficulties(runs.root / f"held-out-cut-{processes}" / "difficulties.parquet")
    assert again.equals(table)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_exactly(runs: Any, processes: int) -> None:
    whole, resumed = (runs.trace(f"half-{kind}-{processes}") for kind in ("whole", "cut"))
    assert resumed["error"] is None
    assert resumed["weights"] == whole["weights"]
    assert runs.plan_digests(f"half-cut-{processes}") == runs.plan_digests(f"half-whole-{processes}")


def test_two_processes_equal_one(runs: Any) -> None:
    for name in ("gap-small", "gap-large", "half-whole"):
        assert runs.plan_digests(f"{name}-2") == runs.plan_digests(f"{name}-1"), name
    np.testing.assert_allclose(runs.trace("half-whole-2")["losses"], runs.trace("half-whole-1")["losses"], rtol=1e-4)
    one, two = (
        read_difficulties(runs.root / f"held-out-{number}" / "difficulties.parquet").column("difficulty").to_numpy()
        for number in (1, 2)
    )
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_pairs_with_swapped_responses_have_small_gaps_and_high_losses(runs: Any) -> None:
    chosen = {}
    for name in FLIPPED:
        runs.trace(f"flipped-{name}")
        chosen[name] = set(plan_table(runs.root / f"flipped-{name}", 1).column("index").to_pylist())
    shares = {name: float(np.mean([place % 5 < 2 for place in places])) for name, places in chosen.items()}
    assert shares["large"] < 0.3 < 0.4 < 0.55 < shares["small"], shares  # 0.4 of all pairs are flipped
    assert chosen["easy"] == chosen["large"]  # the sigmoid loss of a pair falls with its gap
