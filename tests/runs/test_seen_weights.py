"""Token weights of whole runs: on record as the weighter gave them, also after a resume and on two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataflex.cli import main
from dataflex.explain.samples import Texts, load_texts
from dataflex.record.reader import read_run

pytestmark = pytest.mark.launch

PLUGIN = str(Path(__file__).with_name("token_pattern.py"))
FILES = ("token_weights.jsonl", "token_samples.jsonl")


def pattern(processes: int) -> dict[str, Any]:
    """A run of 8 steps of 8 samples with logs at 4 and 7 and checkpoints at 3 and 6, whose first step is a warm-up."""
    section = {"warmup_steps": 1, "update_steps": 3, "plugins": [PLUGIN]}
    section |= {"order": {"method": "shuffle"}, "weight": {"method": "test_pattern"}}
    run = {"dataset": "alpha,beta", "dataflex": section, "gradient_accumulation_steps": 2}
    steps = {"logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
    return {**run, **steps, "per_device_train_batch_size": 4 // processes, "max_steps": 7}


@pytest.fixture(scope="module")
def runs(workshop: Any) -> Any:
    workshop.add("seen-2", **pattern(2))
    workshop.start(2)
    workshop.add("seen-1", **pattern(1))
    workshop.add("seen-cut", stop_at=6, **pattern(1))
    workshop.add("seen-resumed", into="seen-cut", **pattern(1))
    plain = pattern(1)
    del plain["dataflex"]["weight"]
    workshop.add("seen-none", **plain)
    alone = pattern(1)
    del alone["dataflex"]["order"]
    workshop.add("seen-alone", **alone)
    workshop.start(1)
    for name in ("seen-1", "seen-2", "seen-cut", "seen-none", "seen-alone"):
        workshop.trace(name)
    return workshop


def tokens_of(texts: Texts, index: int) -> list[float]:
    """Return the weights of a sample's trained tokens."""
    labels = texts.pool.dataset[index]["labels"]
    return [(index + column) % 4 / 2 for column, label in enumerate(labels[1:]) if label != -100]


def loaded(run: Path) -> Texts:
    texts = load_texts(read_run(run), full=False)
    assert isinstance(texts, Texts)
    return texts


@pytest.mark.parametrize("name", ["seen-1", "seen-2"])
def test_the_statistics_are_those_of_the_planned_samples(runs: Any, name: str) -> None:
    run = runs.root / name
    record, texts = read_run(run), loaded(run)
    plan = [index for each in record.rounds for index in record.plan_indices(each.round).tolist()]
    assert [(line.step, line.steps) for line in record.token_weights] == [(4, 3), (7, 3)]
    for line, steps in zip(record.token_weights, ([2, 3, 4], [5, 6, 7]), strict=True):
        effective = 0.0
        by_domain: dict[str, list[float]] = {"alpha": [], "beta": []}
        for step in steps:
            weights = []
            for index in plan[8 * (step - 1) : 8 * step]:
                by_domain["alpha" if index < 48 else "beta"] += tokens_of(texts, index)
                weights += tokens_of(texts, index)
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
    for name in FILES:
        whole, resumed = (runs.root / run / "dataflex" / name for run in ("seen-1", "seen-cut"))
        assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("name", ["seen-1", "seen-2", "seen-alone"])
def test_the_tokens_on_record_are_those_of_trained_samples(runs: Any, name: str, capsys: Any) -> None:
    run = runs.root / name
    record, texts = read_run(run), loaded(run)
    plan = [index for each in record.rounds for index in record.plan_indices(each.round).tolist()]
    (line,) = record.token_samples  # only one step is logged; step 7 ends the run
    assert line.step == 4
    assert len(line.samples) == (2 if name == "seen-2" else 4)  # of the first micro-batch of the main process
    if plan:
        assert [sample.index for sample in line.samples] == plan[24 : 24 + len(line.samples)]
    for sample in line.samples:
        assert sample.weights == tokens_of(texts, sample.index)
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
    assert not [name for name in FILES if (run / "dataflex" / name).exists()]
    assert "counting_share" not in (run / "trainer_state.json").read_text()
