"""The leaderboard's command: runs that tables have in common, kept results, the time limit, and what is missing."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.errors import ConfigError, Problem

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks" / "leaderboard"))

import boards  # noqa: E402
import run  # noqa: E402

BOARD = boards.read(ROOT / "benchmarks" / "leaderboard" / "board.yaml")


def work(folder: Path, tier: str = "large", **options: Any) -> run.Work:
    given = {"tier": tier, "work": folder, "kept": None, "jobs": None, "time_limit": None, "peer": None, "only": ["A"]}
    return run.Work(BOARD, BOARD.tiers[tier], argparse.Namespace(**{**given, **options}))


def complete(folder: Path, table: str, key: str) -> None:
    place = folder / table / "runs" / "random" / f"seed-1-{key}"
    place.mkdir(parents=True)
    for name in run.KEPT_FILES:
        (place / name).write_text(json.dumps({"key": key}))


def test_only_tables_with_an_equal_run_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    for place, name, key in (
        (tmp_path / "large", "g-a-vs-random", "same"),
        (tmp_path / "large", "g-a-orders", "other"),  # of a method that reads the target
        (tmp_path / "large", "h-a-vs-random", "same"),  # of another model
        (kept, "g-b-vs-random", "same"),
        (kept, "g-b-vs-full", "of an earlier version"),
    ):
        complete(place, name, key)
    (tmp_path / "large" / "g-c-vs-random").mkdir()  # no run is complete yet
    monkeypatch.setattr(run, "load", lambda file: SimpleNamespace(runs=[SimpleNamespace(key="same")]))
    called: list[list[str]] = []
    here = work(tmp_path, kept=kept)
    monkeypatch.setattr(here, "_call", lambda name, command, **more: called.append(command))
    here._compare(boards.Table("g-b-vs-random", "A", "", (), {}, "g"))
    merged = [called[0][at + 1] for at, word in enumerate(called[0]) if word == "--merge"]
    assert merged == [str(tmp_path / "large" / "g-a-vs-random"), str(kept / "g-b-vs-random")]


def test_kept_results_are_what_another_machine_needs(tmp_path: Path) -> None:
    here, kept, there = tmp_path / "here", tmp_path / "kept", tmp_path / "there"
    files = {
        "costs.json": "{}",
        "notes.json": json.dumps({"seconds": {"doremi": 12.5}}),
        "doremi.done": "settings",
        "mixtures/doremi/proxy/dataflex/domain_weights.json": "[0.5, 0.5]",
        "mixtures/regmix/losses.csv": "a,b",
        "chance-model/mmlu.json": "{}",
    }
    for name, text in {**files, "embeddings-g-t-near.done": "not kept", "g-vs-random.log": "not kept"}.items():
        run.write_atomically(_made(here / "large" / name), text.encode())
    first = work(here, kept=kept)
    first._share(first.folder, kept, replace=True)
    assert {str(file.relative_to(kept)): file.read_text() for file in kept.rglob("*") if file.is_file()} == files
    second = work(there, kept=kept)
    second._restore()
    assert {str(file.relative_to(second.folder)) for file in second.folder.rglob("*") if file.is_file()} == set(files)
    assert second.seconds == {"doremi": 12.5}
    (second.folder / "costs.json").write_text('{"more": 1}')
    second._restore()  # own results stay, and are kept at the end
    second._share(second.folder, kept, replace=True)
    assert (kept / "costs.json").read_text() == '{"more": 1}'


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def test_a_command_ends_at_the_limit(tmp_path: Path) -> None:
    sleeping = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert run._waited(sleeping, tmp_path / "log", 1.5) == run.LIMIT_REACHED
    assert run._waited([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 60.0) == 3
    assert "begun" in (tmp_path / "log").read_text()


def test_sigterm_is_handed_on_to_the_command(tmp_path: Path) -> None:
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)
    assert run._waited([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", None) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    names = [table["name"] for table in ({"name": "smollm2_lora-clean-gsm8k-vs-random"},)]
    here = work(tmp_path, "small")
    costs = {"parts": {"losses": {}}, "skipped": {"features": "no peer"}}
    missing = list(here._missing_parts([{"name": name} for name in names], costs))
    assert "smollm2_lora-clean-gsm8k-vs-random" not in missing
    assert {"smollm2_lora-clean-gsm8k-vs-full", "mixtures-vs-by_size", "less_full", "doremi"} <= set(missing)
    assert not {"losses", "features"} & set(missing)
    assert not any(part.startswith("less") for part in work(tmp_path, "large")._parts())


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("45s", 45), ("2h", 7200), ("12.5", 12.5)])
def test_times(text: str, seconds: float) -> None:
    assert run.seconds_of(text) == seconds
    with pytest.raises(argparse.ArgumentTypeError, match="must be a time above 0"):
        run.seconds_of(f"{text}x")


def test_a_problem_of_a_variant_is_named_as_the_board_has_it(tmp_path: Path) -> None:
    here = work(tmp_path, board=Path("board.yaml"))
    problems = [
        Problem("variants.loss_high.dataflex.select.focus", "must be high."),
        Problem("variants.near-sort.dataflex.order.by", "is\n unknown."),
        Problem("variants.odm.dataflex.mix.method", "is unknown."),
        Problem("base.template", "is unknown."),
    ]
    assert list(here._said(ConfigError(problems=problems, source="g.yaml"))) == [
        "board.yaml: methods.large_tier.loss_high: select.focus: must be high.",
        "board.yaml: orders.sort: order.by: is unknown.",
        "board.yaml: mixers.every_tier.odm: mix.method: is unknown.",
        "g.yaml: base.template: is unknown.",
    ]


def test_a_lesser_result_does_not_replace_the_committed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    committed = tmp_path / "benchmarks" / "results" / "leaderboard" / "small.json"
    (tmp_path / "docs").mkdir()
    here = work(tmp_path / "work", "small", results=None)
    here.folder.mkdir(parents=True)
    here._write_results()  # nothing is committed yet
    assert json.loads(committed.read_text())["tables"] == []
    assert (tmp_path / "docs" / "results.md").is_file()
    fuller = (ROOT / "benchmarks" / "results" / "leaderboard" / "small.json").read_bytes()
    committed.write_bytes(fuller)
    (tmp_path / "docs" / "results.md").unlink()
    capsys.readouterr()
    here._write_results()
    said = capsys.readouterr().out
    assert committed.read_bytes() == fuller
    assert not (tmp_path / "docs" / "results.md").exists()
    assert said.count("\n") == 1
    assert "the new result lacks the table mixtures-vs-by_size; " in said
    assert "the costs of losses" in said
    assert {file.name for file in here.folder.iterdir()} == {"result.json", "results.md", "results.html"}
    assert json.loads((here.folder / "result.json").read_text())["tables"] == []


def test_all_missing_files_are_named(tmp_path: Path) -> None:
    here = work(tmp_path, "small", data=tmp_path / "data", only=["A", "B", "C"])
    missing = here._missing_files()
    assert len(missing) == 21
    said = here._said_of(missing)
    assert said.startswith(f"--data: there is no folder {tmp_path / 'data'}.")
    assert all(f"\n  {file}\n" in said for file in missing)
