"""Runs in the preference stages: losses, weights, what the probe measures, the methods for pairs, and added text.

All trainings happen in two starts, one of one process and one of two (see runner.py).
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pairs_by_hand
import preference_method_runs
import preference_probe_runs
import preference_runs
import ptx_runs
import pytest
import torch
from composed_loss import distance, kept
from preference_method_runs import columns, scores_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pairs
import tiny
from dataflex.probe.gradients import canonical
from dataflex.selectors.base_difficulties import read_difficulties
from records import plan_table

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def reference(workshop: Any) -> Path:
    return tiny.make_model(workshop.root / "reference", seed=5)


@pytest.fixture(scope="module")
def model(workshop: Any) -> Path:
    """The model of most runs, whose head of rewards has no dropout, so that one process and two train the same."""
    folder = tiny.make_model(workshop.root / "without_dropout")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "summary_dropout_prob": 0.0}))
    return folder


@pytest.fixture(scope="module")
def runs(workshop: Any, model: Path, reference: Path) -> Any:
    pairs.make_pairs(workshop.data)
    preference_method_runs.add_flipped(workshop.data)
    for processes in (2, 1):  # a run of one process reads tables of both
        preference_runs.add_runs(workshop, model, reference, processes)
        preference_probe_runs.add_runs(workshop, model, reference, processes)
        preference_method_runs.add_runs(workshop, reference, processes)
        ptx_runs.add_runs(workshop, model, reference, processes)
        workshop.start(processes)
    return workshop


@pytest.mark.parametrize(("name", "accumulation", "processes"), preference_runs.COMPARED)
def test_weight_1_is_llamafactorys_own_run(runs: Any, name: str, accumulation: int, processes: int) -> None:
    plain, weighed = (runs.trace(f"{name}-{kind}-{accumulation}-{processes}") for kind in ("lf", "ones"))
    assert len(plain["losses"]) == 3
    np.testing.assert_allclose(weighed["losses"], plain["losses"], rtol=1e-6)
    assert weighed["micro_batches"]  # the run was DataFlex's


@pytest.mark.parametrize(("stage", "accumulation", "processes"), preference_runs.COMPOSED)
def test_the_gradient_of_a_weighed_step_equals_one_pair_at_a_time(
    runs: Any, model: Path, reference: Path, stage: str, accumulation: int, processes: int
) -> None:
    name = f"{stage}-composed-{accumulation}-{processes}"
    runs.trace(name)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    prefix = ""
    if stage == "rm":
        head = load_file(runs.root / name / "value_head.safetensors")
        of_head = {key.removeprefix("v_head.summary."): value.double() for key, value in head.items()}
        trained, prefix = pairs_by_hand.Reward(trained, of_head), "v_head."
    wanted = pairs_by_hand.gradient_by_hand(stage, runs.root / name, processes, trained, reference)
    wanted = {f"{prefix}{key}" if key.startswith("summary") else key: value for key, value in wanted.items()}
    found = kept(runs.root / name, processes)[0]["gradients"]
    found = {key: value for key, value in found.items() if key in wanted}
    # LLaMA-Factory rounds logits to float32, and the loss of kto has the smallest differences between samples.
    assert distance(found, wanted) < (3e-5 if stage == "kto" else 1e-5)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_log_probabilities_of_the_reference_may_be_computed_before_training(runs: Any, name: str) -> None:
    before, plain = (runs.trace(run)["losses"] for run in (f"{name}-kept", f"{name}-lf-4-1"))
    np.testing.assert_allclose(before, plain, rtol=1e-5)


@pytest.mark.parametrize("name", preference_runs.SECTIONS)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(runs: Any, name: str) -> None:
    whole, resumed = runs.trace(f"{name}-whole"), runs.trace(f"{name}-cut")
    assert resumed["micro_batches"][0][0] == 3
    assert runs.plan_digests(f"{name}-cut") == runs.plan_digests(f"{name}-whole")
    assert resumed["losses"] == whole["losses"]
    assert resumed["weights"] == whole["weights"] is not None


@pytest.mark.parametrize(("name", "kind"), preference_runs.SPREAD)
def test_two_processes_and_zero_3_give_the_run_of_one_process(runs: Any, name: str, kind: str) -> None:
    one, two = runs.trace(f"{name}-whole"), runs.trace(f"{name}-{kind}")
    runs.trace(f"{name}-{kind}", 1)
    rounds, steps = (4, 7) if kind == "two" else (3, 5)
    plans = runs.plan_digests(f"{name}-{kind}")
    assert len(plans) == rounds
    assert plans == runs.plan_digests(f"{name}-whole")[:rounds]
    np.testing.assert_allclose(two["losses"], one["losses"][:steps], rtol=1e-4)


# What the probe measures.


@pytest.mark.parametrize("kind", preference_probe_runs.KINDS)
def test_values_equal_one_sample_at_a_time(runs: Any, kind: str, model: Path, reference: Path) -> None:
    found = preference_probe_runs.measured(runs, kind, "one")
    trained = preference_probe_runs.model_of(runs, kind, model)
    frozen = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float64) if kind == "dpo-full" else None
    parameters = dict(trained.named_parameters())
    prefix = "v_head." if kind.startswith("rm") else ""
    wanted = [parameters[canonical(name).removeprefix(prefix)] for name in found["names"]]
    for number, row in enumerate(found["rows"]):
        loss, margin = preference_probe_runs.losses_by_hand(kind, trained, frozen, row)
        assert float(found["losses"][number]) == pytest.approx(float(loss.detach()), rel=1e-5)
        if margin is not None:
            assert float(found["margins"][number]) == pytest.approx(float(margin), rel=1e-4, abs=1e-5)
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients, strict=True)]
        expected = torch.cat([each.flatten() for each in filled])
        assert expected.norm() > 1e-3
        assert (found["gradients"][number] - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize(("kind", "mode"), preference_probe_runs.SPREAD)
def test_one_process_and_two_measure_the_same(runs: Any, kind: str, mode: str) -> None:
    one, two = (preference_probe_runs.measured(runs, kind, each) for each in ("one", mode))
    assert one["rows"] == two["rows"]
    assert one["names"] == two["names"]
    for name in ("losses", "margins", "gradients", "embeddings"):
        if name in one:
            assert (two[name] - one[name]).norm() <= 1e-3 * one[name].norm(), name


@pytest.mark.parametrize("kind", ["dpo", "rm", "kto"])
def test_the_values_of_the_reference_are_in_the_record(runs: Any, kind: str) -> None:
    folder = preference_probe_runs.folder_of(runs, kind) / "dataflex" / "reference"
    files = list(folder.iterdir()) if folder.is_dir() else []
    assert len(files) == (kind != "rm")
    for file in files:
        with np.load(file) as stored:
            assert stored["values"].shape == (64, 2)
            assert np.isfinite(stored["values"]).all()


# Methods for pairs.


@pytest.mark.parametrize("processes", [1, 2])
def test_gaps_are_those_of_one_pair_at_a_time(runs: Any, reference: Path, processes: int) -> None:
    small = scores_of(runs, f"gap-small-{processes}")
    assert len(small) == 8  # both rounds choose the same pairs
    by_hand = preference_method_runs.margins_by_hand(runs, reference, f"gap-small-{processes}", processes)
    assert len(by_hand) == 4
    for place, margin in by_hand.items():
        assert -small[place] == pytest.approx(margin, abs=1e-5)


def test_the_pairs_of_the_smallest_and_of_the_largest_gaps_are_chosen(runs: Any) -> None:
    small, large = (scores_of(runs, f"gap-{prefer}-1") for prefer in ("small", "large"))
    assert len(small) == len(large) == 8
    assert max(-score for score in small.values()) < min(large.values())


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
    assert common
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
    trained, frozen = preference_method_runs.models_of(runs, reference)
    losses = [
        loss
        for part in found
        for batch in part["batches"]
        for loss in pairs_by_hand.pair_losses("dpo", trained, frozen, batch)
    ]
    assert len(losses) == 4
    distances = []
    for chosen in combinations(losses, 3):
        trained.zero_grad()
        (sum(chosen) / 3).backward(retain_graph=True)
        wanted = {key: each.grad for key, each in trained.named_parameters() if each.grad is not None}
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
    assert table.column("difficulty").to_numpy().std() > 0


def test_a_killed_run_with_a_held_out_half_resumes_exactly(runs: Any) -> None:
    whole, resumed = runs.trace("half-whole-2"), runs.trace("half-cut")
    assert resumed["error"] is None
    assert resumed["weights"] == whole["weights"]
    assert runs.plan_digests("half-cut") == runs.plan_digests("half-whole-2")
    table, again = (
        read_difficulties(runs.root / folder / "difficulties.parquet") for folder in ("held-out-2", "held-out-cut")
    )
    assert again.equals(table)


def test_two_processes_equal_one(runs: Any) -> None:
    for name in ("gap-small", "half-whole"):
        assert runs.plan_digests(f"{name}-2") == runs.plan_digests(f"{name}-1"), name
    np.testing.assert_allclose(runs.trace("half-whole-2")["losses"], runs.trace("half-whole-1")["losses"], rtol=1e-4)
    one, two = (
        read_difficulties(runs.root / f"held-out-{number}" / "difficulties.parquet").column("difficulty").to_numpy()
        for number in (1, 2)
    )
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_pairs_with_swapped_responses_have_small_gaps_and_high_losses(runs: Any) -> None:
    chosen = {}
    for name in preference_method_runs.FLIPPED:
        runs.trace(f"flipped-{name}")
        chosen[name] = set(plan_table(runs.root / f"flipped-{name}", 1).column("index").to_pylist())
    shares = {name: float(np.mean([place % 5 < 2 for place in places])) for name, places in chosen.items()}
    assert shares["large"] < 0.3 < 0.4 < 0.55 < shares["small"], shares  # 0.4 of all pairs are flipped
    assert chosen["easy"] == chosen["large"]  # the sigmoid loss of a pair falls with its gap


# Text that is trained on beside the pairs.


@pytest.mark.parametrize("case", ptx_runs.COMPARED)
def test_the_gradient_is_the_sum_of_both(runs: Any, case: str) -> None:
    stage, name = case.split("-")
    for run in (f"ptx-{case}", f"ptx-{case}-without"):
        runs.trace(run)
    both, alone = (kept(runs.root / f"ptx-{case}{end}", 1)[0]["gradients"] for end in ("", "-without"))
    prefix = "pretrained_model." if stage == "rm" else ""
    gradient = ptx_runs.text_gradient(runs, stage, name)
    wanted = {f"{prefix}{key}": ptx_runs.COEFFICIENT * value for key, value in gradient.items()}
    found = {key: both[key] - alone[key] if key in alone else both[key] for key in wanted}
    assert distance(found, wanted) < 2e-5
    assert set(both) >= set(alone)
    for key in set(both) - set(wanted):  # the head of rewards reads no text
        torch.testing.assert_close(both[key], alone[key])


def test_processes_and_accumulation_share_the_same_text(runs: Any) -> None:
    rows = {}
    for name in ("one", "accumulated", "two"):
        batches = ptx_runs.batches_of(runs, "dpo", name)
        rows[name] = sorted(tuple(row) for batch in batches for row in batch["input_ids"].tolist())
        gradients = [part["gradients"] for part in kept(runs.root / f"ptx-dpo-{name}", ptx_runs.FORMS[name][0])]
        assert all(distance(each, gradients[0]) < 1e-12 for each in gradients)
    assert len(rows["one"]) == 4
    assert rows["one"] == rows["accumulated"] == rows["two"]


def test_the_sft_text_has_its_own_batch_size(runs: Any) -> None:
    [batch] = ptx_runs.batches_of(runs, "kto", "one")
    assert batch["input_ids"].shape[0] == 3
    assert (batch["labels"] == -100).any()  # of the prompts


def test_processes_and_zero_train_the_same_model(runs: Any) -> None:
    weights = {}
    for name in ptx_runs.FORMS:
        trace = runs.trace(f"ptx-trained-{name}")
        weights[name] = load_file(runs.root / f"ptx-trained-{name}" / "model.safetensors")
        if name.startswith("zero"):
            assert f"stage {name[-1]}" in trace["wrapper"]
    before = load_file(runs.model / "model.safetensors")
    moved = {key: value - before[key] for key, value in weights["one"].items()}
    for name in ptx_runs.FORMS:
        assert distance({key: value - before[key] for key, value in weights[name].items()}, moved) < 1e-3


def test_the_loss_of_the_text_is_logged_beside_the_preference_loss(runs: Any) -> None:
    losses = {}
    for name in ("one", "accumulated", "two", "zero3"):
        history = runs.trace(f"ptx-trained-{name}")["history"]
        losses[name] = [entry["dataflex/ptx_loss"] for entry in history if "loss" in entry]
        assert len(losses[name]) == 4
        assert losses[name] == pytest.approx(losses["one"], rel=1e-4)
    assert 3 < losses["one"][0] < 8  # the random model knows nothing about some 130 words
    assert losses["one"][-1] < losses["one"][0]
    first = runs.trace("ptx-trained-one")["history"][0]["loss"]
    assert first == pytest.approx(runs.trace("ptx-dpo-one-without")["losses"][0], rel=1e-4)


def test_a_run_with_text_resumes_exactly(runs: Any) -> None:
    whole, resumed = runs.trace("ptx-whole"), runs.trace("ptx-cut")
    assert resumed["micro_batches"][0][0] == 4
    assert resumed["weights"] == whole["weights"]
    texts = [
        [entry["dataflex/ptx_loss"] for entry in each["history"] if "loss" in entry and entry["step"] > 4]
        for each in (whole, resumed)
    ]
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]


def test_other_text_is_refused_at_a_resume(runs: Any) -> None:
    said = json.loads((runs.root / "ptx-other" / "trace-0.json").read_text())["error"]
    assert "dataflex.ptx.dataset" in said


def test_text_without_methods_is_trained_on(runs: Any) -> None:
    assert all("dataflex/ptx_loss" in entry for entry in runs.trace("ptx-alone")["history"] if "loss" in entry)
