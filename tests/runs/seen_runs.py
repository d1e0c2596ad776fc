"""Runs whose token weights follow from the place of a token, with the weights of a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataflex.explain.samples import Texts, load_texts
from dataflex.record.reader import read_run

PLUGIN = str(Path(__file__).with_name("token_pattern.py"))
FILES = ("token_weights.jsonl", "token_samples.jsonl")


def pattern(processes: int) -> dict[str, Any]:
    """A run of 8 steps of 8 samples with logs at 4 and 7 and checkpoints at 3 and 6, whose first step is a warm-up."""
    section = {"warmup_steps": 1, "update_steps": 3, "plugins": [PLUGIN]}
    section |= {"order": {"method": "shuffle"}, "weight": {"method": "test_pattern"}}
    run = {"dataset": "alpha,beta", "dataflex": section, "gradient_accumulation_steps": 2}
    steps = {"logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
    return {**run, **steps, "per_device_train_batch_size": 4 // processes, "max_steps": 7}


def add_runs(workshop: Any, processes: int) -> None:
    """Add the runs of a number of processes."""
    workshop.add(f"seen-{processes}", **pattern(processes))
    if processes == 2:
        return
    workshop.add("seen-cut", stop_at=6, **pattern(1))
    workshop.add("seen-resumed", into="seen-cut", **pattern(1))
    plain, alone = pattern(1), pattern(1)
    del plain["dataflex"]["weight"], alone["dataflex"]["order"]
    workshop.add("seen-none", **plain)
    workshop.add("seen-alone", **alone)


def tokens_of(texts: Texts, index: int) -> list[float]:
    """Return the weights of a sample's trained tokens."""
    labels = texts.pool.dataset[index]["labels"]
    return [(index + column) % 4 / 2 for column, label in enumerate(labels[1:]) if label != -100]


def loaded(run: Path) -> Texts:
    texts = load_texts(read_run(run), full=False)
    assert isinstance(texts, Texts)
    return texts
