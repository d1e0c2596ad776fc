"""The message and the exit status after Ctrl-C."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dataflex import cli
from dataflex.config.loading import DataFlexConfig, RunConfig
from dataflex.record.identity import write_identity
from dataflex.trainer import stopping
from unit.fakes import RUN, make_checkpoint


def text(folder: Path, **keys: Any) -> str:
    return stopping.of_training(RunConfig({"do_train": True, "output_dir": str(folder), **keys}, DataFlexConfig()))


def save(folder: Path, step: int, complete: bool = True) -> None:
    make_checkpoint(folder / f"checkpoint-{step}", complete)
    write_identity(folder / "dataflex", RUN)


def test_the_last_complete_checkpoint_is_named(tmp_path: Path) -> None:
    nothing = "stopped before the first checkpoint; the same command starts over."
    assert text(tmp_path / "none") == nothing
    save(tmp_path, 90, complete=False)
    assert text(tmp_path) == nothing
    save(tmp_path, 30)
    save(tmp_path, 60)
    assert text(tmp_path) == "stopped; the same command resumes from step 60."
    assert text(tmp_path, resume_from_checkpoint=True) == "stopped; the same command resumes from step 60."


def test_a_command_that_cannot_resume_is_not_recommended(tmp_path: Path) -> None:
    again = "stopped; the same command starts over, because overwrite_output_dir is true"
    assert text(tmp_path, overwrite_output_dir=True) == f"{again}."
    save(tmp_path, 60)
    newest = "with resume_from_checkpoint=true it resumes from step 60."
    assert text(tmp_path, overwrite_output_dir=True) == f"{again}; {newest}"
    assert text(tmp_path, resume_from_checkpoint="runs/checkpoint-5") == (
        f"stopped; the same command resumes from runs/checkpoint-5 again; {newest}"
    )
    assert text(tmp_path, do_train=False) == "stopped."
    plain = RunConfig({"do_train": True, "output_dir": str(tmp_path)}, None)
    assert stopping.of_training(plain) == "stopped."  # LLaMA-Factory's own run, whose checkpoints have no marker


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_any_command_without_a_traceback(
    number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told_to_stop(_: Any) -> int:
        os.kill(os.getpid(), number)
        return 0

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setitem(cli._COMMANDS, "eval", told_to_stop)
    assert cli.main(["eval", "model", "--tasks", "task"]) == status
    assert capsys.readouterr().err == "\ndataflex: stopped. Repeat the command to start again.\n"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_worker_prints_nothing_because_its_launcher_does() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping.taken(is_worker=True):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before
