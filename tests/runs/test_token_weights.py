"""Whole runs with weights of tokens: gradients by hand, plain runs, resumes, other process counts, and the record.

All trainings happen in two starts, one of two processes and one of one process (see runner.py).
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import composed_loss
import numpy as np
import pytest
import seen_runs
import span_runs
import ss_token_runs
import torch
from transformers import AutoModelForCausalLM

import tiny
from dataflex.cli import main
from dataflex.record.reader import read_run

pytestmark = pytest.mark.launch

PLUGIN = str(Path(__file__).with_name("step_indices.py"))
STEP_OF_8 = {1: {"per_device_train_batch_size": 4}, 2: {"per_device_train_batch_size": 2}}
"""Keys of a step of 8 samples with two micro-batches, by the number of processes."""
SHARE = 0.29
PLAIN = {
    "rho1": {"method": "rho1", "share": 1},
    "rho1-sample": {"method": "rho1", "share": 1, "scope": "sample"},
    "focal": {"method": "focal", "gamma": 0},
    "evolving": {"method": "token_cleaning", "mode": "self_evolving", "parts": 3, "share": 1},
}
"""Weighters whose weights are all 1."""


def add_resumed(workshop: Any, name: str, weight: dict[str, Any], processes: int) -> None:
    """Add a run of 8 steps over 48 samples with dropout, the same run killed at step 5, and its end from step 3."""
    run = {"dropout": True, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    run |= {**STEP_OF_8[processes], "disable_shuffling": True, "dataflex": {"weight": weight}}
    workshop.add(f"{name}-whole-{processes}", **run)
    workshop.add(f"{name}-cut-{processes}", stop_at=5, **run)
    workshop.add(f"{name}-resumed-{processes}", into=f"{name}-cut-{processes}", **run)


EVOLVING = {"method": "token_cleaning", "mode": "self_evolving", "parts": 3, "share": 0.5}
"""Parts of 16 samples, which are two steps each."""


@pytest.fixture(scope="module")
def runs(workshop: Any) -> Any:
    reference = tiny.make_model(workshop.root.parent / "token-reference", seed=1)
    by_reference = {"share": SHARE, "reference_model": str(reference)}
    cleaning = {"method": "token_cleaning", **by_reference}
    models = workshop.root.parent / "ss_token-models"
    ss_token_runs.make_models(models, workshop.model)
    span_runs.add_data(workshop.data)
    for processes in (2, 1):
        shared = {**STEP_OF_8[processes], "gradient_accumulation_steps": 2, "max_steps": 4}
        whole = {"per_device_train_batch_size": 48 // processes, "max_steps": 1, "max_grad_norm": 0.0}
        whole |= {"finetuning_type": "full", "learning_rate": 0.0}
        for method in ("rho1", "token_cleaning"):
            weight = {"method": method, **by_reference}
            workshop.add(f"{method}-hand-{processes}", keep=0, **whole, dataflex={"weight": weight})
        for scope in ("batch", "sample"):
            weight = {"method": "rho1", "scope": scope, **by_reference}
            workshop.add(f"rho1-{scope}-{processes}", **shared, dataflex={"weight": weight})
        add_resumed(workshop, "evolving", EVOLVING, processes)
        section = {"weight": {"method": "test_step_indices", "file": str(workshop.root / f"indices-{processes}")}}
        workshop.add(f"indices-of-{processes}", **shared, dataflex={"plugins": [PLUGIN], **section})
        if processes == 1:
            add_resumed(workshop, "fixed", cleaning, 1)
            table = {**cleaning, "reference_losses": str(workshop.root / "cleaning-table")}
            workshop.add("fixed-table", **shared, dataflex={"weight": table})
            workshop.add("fixed-model", **shared, dataflex={"weight": cleaning})
        else:
            workshop.add("plain", plain=True, disable_shuffling=True, **shared)
            for name, weight in PLAIN.items():
                given = {"reference_model": str(reference)} if weight["method"] == "rho1" else {}
                workshop.add(
                    f"plain-{name}", disable_shuffling=True, **shared, dataflex={"weight": {**weight, **given}}
                )
        span_runs.add_runs(workshop, processes)
        ss_token_runs.add_runs(workshop, models, processes)
        seen_runs.add_runs(workshop, processes)
        workshop.start(processes)
    return workshop


def gradient_by_hand(folder: Path, processes: int, model: Path) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean loss of the tokens of the largest excess, from the samples of the step."""
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    frozen = AutoModelForCausalLM.from_pretrained(folder.parent.parent / "token-reference", dtype=torch.float32)
    losses, excess = [], []
    for batch in (batch for part in composed_loss.kept(folder, processes) for batch in part["batches"]):
        for row in range(len(batch["input_ids"])):
            real = batch["attention_mask"][row] != 0
            ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
            losses.append(composed_loss.token_losses(trained, ids, labels))
            with torch.no_grad():
                excess.append(losses[-1].detach() - composed_loss.token_losses(frozen, ids, labels))
    assert len(losses) == 48
    order = torch.cat(excess).argsort(descending=True)
    kept = order[: int(Fraction(str(SHARE)) * order.numel())]
    torch.cat(losses)[kept].mean().backward()
    return {name: value.grad for name, value in trained.named_parameters()}


@pytest.mark.parametrize("method", ["rho1", "token_cleaning"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_of_the_whole_data_trains_on_the_mean_over_the_kept_tokens(
    runs: Any, method: str, processes: int
) -> None:
    """The base of token_cleaning is the model of this first step, so its scores are the excess losses of rho1."""
    folder = runs.root / f"{method}-hand-{processes}"
    expected = gradient_by_hand(folder, processes, runs.model)
    for part in composed_loss.kept(folder, processes):
        assert composed_loss.distance(part["gradients"], expected) < 1e-6


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_rho1_trains_alike_on_one_process_and_on_two(runs: Any, scope: str) -> None:
    one, two = (runs.trace(f"rho1-{scope}-{processes}") for processes in (1, 2))
    assert len(one["losses"]) == 4
    assert one["losses"] == pytest.approx(two["losses"], rel=2e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_weights_that_are_all_one_train_as_without_a_weighter(runs: Any, name: str) -> None:
    plain, weighed = runs.trace("plain"), runs.trace(f"plain-{name}")
    assert weighed["weights"] == plain["weights"]
    assert weighed["losses"] == plain["losses"]


@pytest.mark.parametrize(("name", "processes"), [("evolving", 1), ("evolving", 2), ("fixed", 1)])
def test_a_resumed_run_cleans_the_same_tokens(runs: Any, name: str, processes: int) -> None:
    whole, resumed = (runs.trace(f"{name}-{part}-{processes}") for part in ("whole", "cut"))
    assert min(step for step, _ in resumed["micro_batches"]) == 3
    assert resumed["weights"] == whole["weights"]
    assert resumed["losses"] == whole["losses"]


def test_a_table_of_the_reference_gives_the_same_tokens(runs: Any) -> None:
    assert runs.trace("fixed-table")["losses"] == runs.trace("fixed-model")["losses"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_indices_of_a_step_are_known_before_it(runs: Any, processes: int) -> None:
    seen = [(runs.root / f"indices-{processes}-{rank}").read_text() for rank in range(processes)]
    assert len(set(seen)) == 1
    steps = [json.loads(line) for line in seen[0].splitlines()]
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    ranks = [runs.trace(f"indices-of-{processes}", rank)["micro_batches"] for rank in range(processes)]
    for step, indices in steps:
        dealt = [[part for number, part in batches if number == step] for batches in ranks]
        assert indices == [index for turn in zip(*dealt, strict=True) for part in turn for index in part]
        assert len(set(indices)) == 8


@pytest.mark.parametrize("name", span_runs.GRADIENTS)
def test_the_gradient_is_that_of_the_weighted_spans(name: str, runs: Any) -> None:
    processes, _ = span_runs.GRADIENTS[name]
    runs.trace(name)
    expected = span_runs.gradient_by_hand(runs.root / name, processes, runs.model)
    for part in composed_loss.kept(runs.root / name, processes):
        assert composed_loss.distance(part["gradients"], expected) < 1e-6
    plain = span_runs.gradient_by_hand(runs.root / name, processes, runs.model, weighted=False)
    assert composed_loss.distance(plain, expected) > 1e-2


def test_a_resumed_run_continues_with_the_same_weights_of_spans(runs: Any) -> None:
    assert runs.trace("span-cut")["weights"] == runs.trace("span-whole")["weights"]
    record = json.loads((runs.root / "span-whole" / "dataflex" / "environment.json").read_text())
    assert "column token weights" in json.dumps(record)


@pytest.mark.parametrize("kind", ss_token_runs.KINDS)
def test_the_gradient_of_ss_token_is_that_of_the_kept_tokens(runs: Any, kind: str) -> None:
    folder = runs.root / f"ss_token-{kind}"
    runs.trace(folder.name)
    models = runs.root.parent / "ss_token-models"
    model, history = models / "model", models / "history"
    (kept,) = composed_loss.kept(folder, 1)
    expected = ss_token_runs.gradient_by_hand(folder, model, history, kind)
    assert composed_loss.distance(kept["gradients"], expected) < 1e-5  # the matrix is a softmax in float32
    predictors = ss_token_runs.gradient_by_hand(folder, model, history, kind, own_row=False)
    assert composed_loss.distance(predictors, expected) > 1e-2


@pytest.mark.parametrize("mode", ss_token_runs.SPREAD)
def test_weights_of_tokens_do_not_depend_on_processes(runs: Any, mode: str) -> None:
    one, other, plain = (runs.trace(f"ss_token-{name}")["losses"] for name in ("one", mode, "uniform"))
    assert len(one) == 4
    np.testing.assert_allclose(other, one, rtol=1e-4)
    np.testing.assert_allclose(one[0], plain[0], rtol=1e-4)  # the warm-up
    assert abs(one[1] - plain[1]) > 0.01


def test_a_model_that_cannot_be_read_ends_the_run_in_its_first_step(runs: Any) -> None:
    found = json.loads((runs.root / "ss_token-bloom" / "trace-0.json").read_text())
    assert "cannot be read in BloomBlock" in found["error"]
    assert [step for step, _ in found["micro_batches"]] == [0]  # a step of the warm-up


@pytest.mark.parametrize("name", ["seen-1", "seen-2"])
def test_the_statistics_are_those_of_the_planned_samples(runs: Any, name: str) -> None:
    runs.trace(name)
    run = runs.root / name
    record, texts = read_run(run), seen_runs.loaded(run)
    plan = [index for each in record.rounds for index in record.plan_indices(each.round).tolist()]
    assert [(line.step, line.steps) for line in record.token_weights] == [(4, 3), (7, 3)]
    for line, steps in zip(record.token_weights, ([2, 3, 4], [5, 6, 7]), strict=True):
        effective = 0.0
        by_domain: dict[str, list[float]] = {"alpha": [], "beta": []}
        for step in steps:
            weights = []
            for index in plan[8 * (step - 1) : 8 * step]:
                by_domain["alpha" if index < 48 else "beta"] += seen_runs.tokens_of(texts, index)
                weights += seen_runs.tokens_of(texts, index)
            effective += sum(weights) ** 2 / sum(weight**2 for weight in weights)
        assert line.effective_tokens == pytest.approx(effective, rel=1e-9)
        for domain, weights in by_domain.items():
            assert line.tokens[domain] == len(weights)
            assert line.counting[domain] == sum(weight > 0 for weight in weights)
            assert line.sums[domain] == pytest.approx(sum(weights), rel=1e-9)
            assert line.squares[domain] == pytest.approx(sum(weight**2 for weight in weights), rel=1e-9)
            bins = [0] * 14
            for weight in weights:
                bins[{0: 0, 0.5: 6, 1: 7, 1.5: 8}[weight]] += 1
            assert line.bins[domain] == bins


def test_a_resumed_run_has_the_record_of_an_uninterrupted_one(runs: Any) -> None:
    for name in seen_runs.FILES:
        whole, resumed = (runs.root / run / "dataflex" / name for run in ("seen-1", "seen-cut"))
        assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("name", ["seen-1", "seen-2", "seen-alone"])
def test_the_tokens_on_record_are_those_of_trained_samples(runs: Any, name: str, capsys: Any) -> None:
    runs.trace(name)
    run = runs.root / name
    record, texts = read_run(run), seen_runs.loaded(run)
    plan = [index for each in record.rounds for index in record.plan_indices(each.round).tolist()]
    (line,) = record.token_samples  # only one step is logged; step 7 ends the run
    assert line.step == 4
    assert len(line.samples) == (2 if name == "seen-2" else 4)  # of the first micro-batch of the main process
    if plan:
        assert [sample.index for sample in line.samples] == plan[24 : 24 + len(line.samples)]
    for sample in line.samples:
        assert sample.weights == seen_runs.tokens_of(texts, sample.index)
        assert all(loss > 0 for loss in sample.losses)
        assert sample.tokens == len(sample.losses) == len(texts.trained_tokens(sample.index))
    index = line.samples[0].index
    assert main(["explain", str(run), "--tokens", "--index", str(index), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tokens"]
    assert found["steps"] == [{"step": 4, "losses": line.samples[0].losses, "weights": line.samples[0].weights}]
    assert found["tokens"] == [texts.decode([token]) for token in texts.trained_tokens(index)]


def test_the_log_has_the_statistics(runs: Any) -> None:
    run = runs.root / "seen-1"
    (logged,) = [
        entry for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]
    line = read_run(run).token_weights[0]
    assert logged["dataflex/counting_share"] == line.counting_share
    assert logged["dataflex/effective_tokens"] == line.effective_tokens / 3
    assert logged["dataflex/weight_mean"] == line.mean


def test_a_run_without_a_weighter_has_no_such_files(runs: Any) -> None:
    run = runs.root / "seen-none"
    assert not [name for name in seen_runs.FILES if (run / "dataflex" / name).exists()]
    assert "counting_share" not in (run / "trainer_state.json").read_text()
