"""The checkpoint that a configuration resumes, and the problems that prevent a resume."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.changes import snapshot
from dataflex.config.loading import RunConfig, split_config
from dataflex.errors import CheckpointError, ConfigError
from dataflex.record.identity import LOCK_FILE, only_run_in, read_identity, write_identity
from dataflex.record.schema import FROM_HERE, Change
from dataflex.record.writer import RunWriter
from dataflex.trainer import resume
from unit.fakes import CHECKPOINT_PARTS, RUN, make_checkpoint

MIX = {"update_steps": 4, "mix": {"method": "static", "proportions": [0.5, 0.5]}}


def config(output: Path, section: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
    given = {"do_train": True, "output_dir": str(output), "learning_rate": 1e-4, **keys}
    return split_config({**given, "dataflex": section or MIX})


def checkpoint(output: Path, step: int, *, inside: int = 0, **changes: Any) -> Path:
    """Write a checkpoint of the run above, ``inside`` steps into a round of four."""
    state = {
        "components": {"mix": {}},
        "planner": {},
        "plan": {"number": 1, "start_step": step - (inside or 4), "steps": 4},
    }
    given = {"config": snapshot(config(output)), "state": state, **changes}
    return make_checkpoint(output / f"checkpoint-{step}", **given)


def found(given: RunConfig) -> Path | None:
    taken, _ = resume.find(given)
    return None if taken is None else taken.folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The folder of a run with a record."""
    write_identity(tmp_path / "dataflex", RUN)
    return tmp_path


def test_the_newest_checkpoint_of_the_records_run_is_taken(output: Path) -> None:
    assert found(config(output)) is None
    good = checkpoint(output, 8)
    checkpoint(output, 12, complete=False)
    checkpoint(output, 40, run="another")
    taken, left = resume.find(config(output))
    assert taken is not None
    assert taken.folder == good
    assert taken.is_own
    assert [line.split(" is not used")[0] for line in left] == [str(output / f"checkpoint-{n}") for n in (40, 12)]
    assert "belongs to another run" in left[0]
    assert found(config(output, resume_from_checkpoint=True)) == good
    assert found(config(output, overwrite_output_dir=True)) is None
    assert found(config(output, resume_from_checkpoint=False)) is None
    assert found(config(output, do_train=False)) is None
    assert found(split_config({"do_train": True, "output_dir": str(output)})) is None  # LLaMA-Factory's own run


def test_a_run_with_no_step_left_is_refused(output: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    good = checkpoint(output, 8)

    def problems(**keys: Any) -> list[str]:
        return [str(problem) for problem in resume.problems_of(config(keys.pop("into", output), **keys))]

    assert problems(max_steps=9) == []
    (fewer,) = [text for text in problems(max_steps=7) if "nothing would be trained" in text]
    assert fewer.startswith(f"resume_from_checkpoint: {good} is of step 8, and this run has 7 steps")
    assert problems(max_steps=8) == []  # cut off after its last step: it is still to be evaluated and saved
    (output / "dataflex" / "summary.json").write_text('{"saved": ["model"]}')
    assert "8 steps: nothing would be trained" in problems(max_steps=8, resume_from_checkpoint=True)[0]
    new = tmp_path_factory.mktemp("new")
    assert "8 steps: nothing would be trained" in problems(into=new, max_steps=8, resume_from_checkpoint=str(good))[0]


def test_a_named_checkpoint_is_taken_or_refused(output: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    good, other = checkpoint(output, 8), checkpoint(output, 12, run="another")
    broken = checkpoint(output, 16, complete=False)
    elsewhere = config(tmp_path_factory.mktemp("new"), resume_from_checkpoint=str(good))
    taken, _ = resume.find(elsewhere)
    assert taken is not None
    assert not taken.is_own
    assert found(config(output, resume_from_checkpoint=str(other))) == other
    with pytest.raises(CheckpointError, match=r"checkpoint-16 cannot be used.*last complete.*checkpoint-12"):
        resume.find(config(output, resume_from_checkpoint=str(broken)))
    with pytest.raises(CheckpointError, match="no such folder"):
        resume.find(config(output, resume_from_checkpoint=str(output / "checkpoint-99")))


def test_without_a_complete_checkpoint_a_new_run_starts_unless_a_resume_is_required(output: Path) -> None:
    checkpoint(output, 12, complete=False)
    taken, left = resume.find(config(output))
    assert taken is None
    assert "checkpoint-12 is not used" in left[0]
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resume.find(config(output, resume_from_checkpoint=True))


def test_checkpoints_without_a_record_are_not_taken_by_their_number(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 8)
    (problem,) = resume.problems_of(config(tmp_path))
    for word in ("checkpoint-8", "run.json", "resume_from_checkpoint: PATH", "overwrite_output_dir: true"):
        assert word in str(problem)
    assert found(config(tmp_path, resume_from_checkpoint=str(good))) == good
    assert found(config(tmp_path, overwrite_output_dir=True)) is None


def test_a_run_that_saved_the_model_alone_cannot_resume(output: Path) -> None:
    kept = tuple(name for name in CHECKPOINT_PARTS if name in ("model.safetensors", "trainer_state.json"))
    only = checkpoint(output, 8, parts=kept)
    for given in (config(output), config(output, resume_from_checkpoint=str(only))):
        (problem,) = resume.problems_of(given)
        assert "save_only_model: true" in str(problem)
    assert found(config(output, overwrite_output_dir=True)) is None
    assert ["save_only_model" in note for note in resume.notes(config(output, save_only_model=True))] == [True]
    assert not list(resume.notes(config(output, save_only_model=True, save_strategy="no")))


def test_fixed_settings_cannot_change_and_settings_without_effect_keep_their_value(output: Path) -> None:
    checkpoint(output, 8)
    given = config(output, cutoff_len=64, train_on_prompt=True, learning_rate=1e-3, seed=7, save_steps=5)
    taken, _ = resume.find(given)
    assert taken is not None
    assert {problem.key for problem in taken.problems()} == {"cutoff_len", "train_on_prompt"}
    text = "\n".join(taken.lines())
    assert "save_steps holds from step 9 on: 500 up to the checkpoint, 5 now" in text
    assert "learning_rate has no effect at a resume (0.0001 up to the checkpoint, 0.001 now)" in text
    effective = taken.effective(given).llamafactory
    assert (effective["learning_rate"], effective["seed"], effective["save_steps"]) == (1e-4, 42, 5)


ODM = {"update_steps": 4, "mix": {"method": "odm"}}


def test_a_method_may_change_between_rounds_only(output: Path) -> None:
    checkpoint(output, 8)
    (change,) = resume.find(config(output, ODM))[0].changes
    assert change.is_method
    assert not list(resume.problems_of(config(output, ODM)))
    checkpoint(output, 10, inside=2)
    (problem,) = resume.problems_of(config(output, ODM))
    assert problem.key == "dataflex.mix.method"
    for word in ("inside a round", "steps 9 to 12", "step 8 or 12", '"static"', '"odm"'):
        assert word in problem.message
    weighted = {**MIX, "weight": {"method": "loss"}}
    assert not list(resume.problems_of(config(output, weighted)))  # a weighter acts on steps, not on rounds


def test_a_run_with_rounds_is_not_resumed_without_rounds(output: Path) -> None:
    checkpoint(output, 8)
    (problem,) = resume.problems_of(config(output, {"update_steps": 4, "weight": {"method": "loss"}}))
    assert "draws its samples in rounds" in problem.message
    assert not list(resume.problems_of(config(output, {"update_steps": 4, "order": {"method": "shuffle"}})))


def test_other_proportions_hold_from_the_next_round_on(output: Path) -> None:
    checkpoint(output, 10, inside=2)
    taken, _ = resume.find(config(output, {**MIX, "mix": {"method": "static", "proportions": [0.9, 0.1]}}))
    assert taken is not None
    assert not list(taken.problems())
    assert [taken.holds_from(change) for change in taken.changes] == [12]
    assert "dataflex.mix.proportions holds from step 13 on" in next(taken.lines())


def rounds(folder: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (folder / "dataflex" / "rounds.jsonl").read_text().splitlines()]


def record(output: Path, *numbers: int) -> RunWriter:
    writer = RunWriter(output)
    with (writer.folder / "rounds.jsonl").open("a") as stream:
        for number in numbers:
            line = {"round": number, "start_step": 4 * number, "steps": 4, "size": 0, "domains": {}}
            stream.write(json.dumps(line) + "\n")
    (writer.folder / "config.yaml").write_text("{}")
    return writer


def test_a_new_run_sets_checkpoints_aside_with_the_record(tmp_path: Path) -> None:
    first = record(tmp_path, 0, 1).open_new()
    checkpoint(tmp_path, 8, run=first)
    checkpoint(tmp_path, 12, complete=False)
    (tmp_path / "all_results.json").write_text('{"eval_loss": 1.0}')
    record(tmp_path, 0)
    second = RunWriter(tmp_path).open_new()
    assert first != second == read_identity(tmp_path / "dataflex")
    earlier = sorted(tmp_path.glob("dataflex-earlier-*"))[-1]
    assert {"run.json", "all_results.json", "checkpoint-8", "checkpoint-12"} <= {
        path.name for path in earlier.iterdir()
    }
    assert read_identity(earlier) == first
    assert not list(tmp_path.glob("checkpoint-*")) + list(tmp_path.glob("*.json"))
    assert found(config(tmp_path)) is None  # and so after a kill of the new run: it begins again, as itself


def test_resuming_an_earlier_checkpoint_sets_later_ones_aside(output: Path) -> None:
    for step in (4, 8, 12):
        checkpoint(output, step)
    checkpoint(output, 6, run="another")
    checkpoint(output, 16, complete=False)
    assert RunWriter(output).open_resumed(8) == RUN
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-16",
        "checkpoint-4",
        "checkpoint-8",
    ]
    aside = output / "dataflex-earlier-1"
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-12", "checkpoint-6"]


def test_a_run_in_a_new_folder_copies_the_recorded_rounds(
    output: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    record(output, 0, 1, 2)
    (output / "dataflex" / "plans").mkdir(exist_ok=True)
    (output / "dataflex" / "plans" / "round-00000.parquet").write_bytes(b"plan")
    folder = checkpoint(output, 8)
    new = tmp_path_factory.mktemp("new")
    writer = RunWriter(new)
    identity = writer.open_continued(folder, RUN, 8)
    writer.begin({"dataflex": {}}, 2, 8)
    assert rounds(new) == [0, 1]
    assert (new / "dataflex" / "plans" / "round-00000.parquet").read_bytes() == b"plan"
    about = json.loads((new / "dataflex" / "run.json").read_text())
    assert about["id"] == identity != RUN
    assert about["continues"] == {"run": RUN, "step": 8, "checkpoint": str(folder)}
    assert rounds(output) == [0, 1, 2]


def test_a_resume_without_the_earlier_record_gives_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "alone", 8)
    writer = RunWriter(tmp_path / "new")
    writer.open_continued(folder, RUN, 8)
    assert "rounds before step 8 are not in this run's record" in capsys.readouterr().out
    assert not writer.has_round(1)


def test_changes_are_recorded_once_with_the_configuration_before(output: Path) -> None:
    folder = output / "dataflex"

    def resumed(step: int, seed: int, changes: bool = True) -> None:
        writer = RunWriter(output)
        writer.changes(step, [Change(step, step, "k", None, seed, FROM_HERE)] if changes else [])
        writer.begin({"dataflex": {"seed": seed}}, 0, step)

    def seeds() -> dict[str, str]:
        return {path.name: path.read_text().split()[-1] for path in folder.glob("config*")}

    def to() -> list[int]:
        return [json.loads(each)["now"] for each in (folder / "changes.jsonl").read_text().splitlines()]

    RunWriter(output).begin({"dataflex": {"seed": 0}}, None)
    resumed(4, 1)
    resumed(8, 2)
    assert seeds() == {"config-until-step-4.yaml": "0", "config-until-step-8.yaml": "1", "config.yaml": "2"}
    resumed(8, 3)  # killed before it came to anything, and changed again
    assert seeds() == {"config-until-step-4.yaml": "0", "config-until-step-8.yaml": "1", "config.yaml": "3"}
    assert to() == [1, 3]
    resumed(6, 4)  # back to before that change
    assert seeds() == {"config-until-step-4.yaml": "0", "config-until-step-6.yaml": "1", "config.yaml": "4"}
    assert to() == [1, 4]
    resumed(10, 4, changes=False)
    assert seeds() == {"config-until-step-4.yaml": "0", "config-until-step-6.yaml": "1", "config.yaml": "4"}


HOLD = """
import os, sys, time
from pathlib import Path
from dataflex.record.identity import only_run_in
with only_run_in(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker of a data loader lives on for a while
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_died(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        refused = pytest.raises(ConfigError, match=rf"another run is at work in .*process {process.pid} on")
        with refused, only_run_in(tmp_path):
            raise AssertionError
    finally:
        process.kill()
        process.wait()
    with only_run_in(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_a_file_system_without_locks_gives_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with only_run_in(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
