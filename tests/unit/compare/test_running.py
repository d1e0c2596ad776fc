"""How a comparison runs its runs: its time limit, several runs on one device, and the time that runs are known to take.

A small program stands in for the runs. It notes when it begins and ends, waits, and runs out of memory on demand.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex import cli
from dataflex.commands.compare import compare
from dataflex.compare import page, runner
from dataflex.compare.experiment import load
from dataflex.compare.result import read_result, state_of
from dataflex.compare.runner import Workers
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory import parsing
from unit.compare.test_compare import PROGRAM, RANDOM, Lab, variants

BEFORE = """
import atexit, json, os, sys, time
from pathlib import Path

import yaml

folder = Path(sys.argv[2]) if sys.argv[1] == "eval" else Path(sys.argv[2]).parent
data = Path(yaml.safe_load((folder / "run.yaml").read_text())["dataset_dir"])
name = folder.parts[-2] + "/" + folder.name.split("-")[1]
plan = json.loads((data / "plans.json").read_text()).get(name, {})


def note(what):
    with (data / "events.txt").open("a") as stream:
        stream.write(json.dumps([what, name, os.environ.get("CUDA_VISIBLE_DEVICES")]) + "\\n")


note("begin")
atexit.register(note, "end")
time.sleep(plan.get("seconds", 0))
attempts = (data / "events.txt").read_text().count(json.dumps(["begin", name])[:-1])
if attempts <= plan.get("out_of_memory", 0):
    print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    sys.exit(1)
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(page, "write", lambda outcome: None)  # it takes a second
    lab = Lab(tmp_path)
    (tmp_path / "program.py").write_text(BEFORE + PROGRAM)
    plan(lab, {})
    return lab


def plan(lab: Lab, plans: dict[str, dict[str, float]]) -> None:
    """Set what the runs do: name -> seconds to wait, and attempts that run out of memory."""
    (lab.data / "plans.json").write_text(json.dumps(plans))
    (lab.data / "events.txt").unlink(missing_ok=True)


def events(lab: Lab) -> list[tuple[str, str, str | None]]:
    return [tuple(json.loads(line)) for line in (lab.data / "events.txt").read_text().splitlines()]


def begun(lab: Lab) -> list[str]:
    return [name for what, name, _ in events(lab) if what == "begin"] if (lab.data / "events.txt").exists() else []


def statuses(lab: Lab) -> dict[str, str]:
    return {f"{run['variant']}/{run['seed']}": run["status"] for run in lab.result()["runs"]}


def seconds_of(lab: Lab, variant: str, seed: int) -> float | None:
    experiment = load(lab.file)
    [run] = [run for run in experiment.of(variant) if run.seed == seed]
    result = read_result(run, experiment)
    assert result is not None
    return result.seconds


def as_if_it_took(lab: Lab, variant: str, seed: int, seconds: float) -> None:
    file = lab.folder_of(variant, seed) / "complete.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": seconds}))


# The time limit.


class Clock:
    """The time module, but an hour later as soon as a run has begun."""

    def __init__(self, lab: Lab, name: str) -> None:
        self._lab, self._name = lab, name

    def monotonic(self) -> float:
        return time.monotonic() + (3600 if self._name in begun(self._lab) else 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def test_after_the_time_limit_the_partial_result_is_written_and_the_rest_is_left(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.write(seeds=[1, 2], **variants(better=RANDOM))
    plan(lab, {"better/1": {"seconds": 60}})
    monkeypatch.setattr(runner, "time", Clock(lab, "better/1"))
    began = time.monotonic()
    assert lab.compare(jobs=1, time_limit=1800.0) == 124
    assert time.monotonic() - began < 50
    assert begun(lab) == ["plain/1", "better/1"]
    assert statuses(lab) == {
        "plain/1": "compared", "plain/2": "missing", "better/1": "missing", "better/2": "missing",
    }  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == (
        "time limit of 30 min: 1 of 4 runs are complete, 3 left. To continue: "
        f"dataflex-cli compare {lab.file} --time-limit 1800"
    )
    monkeypatch.undo()
    monkeypatch.setattr(page, "write", lambda outcome: None)
    plan(lab, {})
    assert lab.compare(jobs=1, time_limit=1800.0) == 0
    assert begun(lab) == ["better/1", "plain/2", "better/2"]


@pytest.mark.parametrize(
    "keys, jobs, starts",
    [
        ({}, 1, False),
        ({"save_strategy": "steps", "save_steps": 2}, 1, True),  # it could resume
        ({"save_strategy": "steps", "save_steps": 500}, 1, False),  # more than the steps of the run
        ({"save_strategy": "epoch"}, 1, True),
        ({}, 2, True),  # the time beside another run is not known
    ],
)
def test_a_run_that_can_neither_end_nor_resume_is_not_started(
    keys: dict[str, Any], jobs: int, starts: bool, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.base |= keys
    lab.write(seeds=[1], **variants(better=RANDOM))
    assert lab.compare(jobs=1) == 0
    as_if_it_took(lab, "better", 1, 1000.0)
    lab.write(seeds=[1, 2])
    plan(lab, {})
    assert lab.compare(jobs=jobs, time_limit=500.0) == (0 if starts else 124)
    assert sorted(begun(lab)) == (["better/2", "plain/2"] if starts else ["plain/2"])
    if not starts:
        said = capsys.readouterr().out.splitlines()[-2:]
        assert "3 of 4 runs are complete, 1 left. To continue: " in said[0]
        assert said[0].endswith("--time-limit SECONDS, above 1,000")
        assert said[1].startswith("not started, because a run could neither end")
        assert said[1].endswith(": better/seed 2 (about 17 min)")


def test_a_limit_that_is_not_reached_changes_nothing(lab: Lab) -> None:
    lab.write(seeds=[1], **variants(better=RANDOM))
    assert lab.compare(jobs=1, time_limit=500.0) == 0
    assert set(statuses(lab).values()) == {"compared"}


@pytest.mark.parametrize(
    "text, seconds", [("45s", 45.0), ("90m", 5400.0), ("2h", 7200.0), ("0.5h", 1800.0), ("600", 600.0)]
)
def test_times_on_the_command_line(text: str, seconds: float) -> None:
    assert cli._parser().parse_args(["compare", "x.yaml", "--time-limit", text]).time_limit == seconds


@pytest.mark.parametrize("text", ["", "0", "0m", "-3", "5 m", "5d", "m", "1e3", "nan", "soon"])
def test_a_bad_time_is_an_error_that_names_what_is_allowed(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "x.yaml", f"--time-limit={text}"])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"must be a time above 0 such as 45s, 90m, 2h, or 3600 (seconds), got {text!r}" in said


def test_the_seconds_of_a_run_are_kept_if_one_attempt_made_it(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.write(seeds=[1], **variants(better=RANDOM))
    plan(lab, {"plain/1": {"seconds": 0.5}})
    lab.behave({"better/1": "crash"})
    began = time.monotonic()
    assert lab.compare(jobs=1) == 1
    seconds = seconds_of(lab, "plain", 1)
    assert seconds is not None
    assert 0.5 < seconds < time.monotonic() - began
    lab.behave({})
    as_if_it_took(lab, "plain", 1, 600.0)
    assert lab.compare(jobs=1) == 0
    assert "2 runs: 1 complete, 1 to run, about 10 min left" in capsys.readouterr().out
    assert seconds_of(lab, "better", 1) is None  # a part of it may have been made by the attempt before
    lab.write(seeds=[1, 2])
    assert lab.compare(jobs=1) == 0
    said = capsys.readouterr()
    assert "4 runs: 2 complete, 2 to run, about 20 min left" in said.out
    assert re.search(r"run 3 of 4: plain/seed 2: complete after \d+ s; 1 to go, about .* to 10 min left", said.err)


# Several runs on one device.


def test_runs_that_share_a_device_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner, "_cores", lambda: 12)
    shared = Workers(3, ("5",)).environment(2)
    assert (shared["CUDA_VISIBLE_DEVICES"], shared["OMP_NUM_THREADS"]) == ("5", "4")
    own = Workers(2, ("5", "6")).environment(1)
    assert own["CUDA_VISIBLE_DEVICES"] == "6"
    assert "OMP_NUM_THREADS" not in own
    assert Workers(2).environment(0)["OMP_NUM_THREADS"] == "6"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert Workers(3, ("5",)).environment(2)["OMP_NUM_THREADS"] == "7"


def on_the_device_with_the_last(lab: Lab, name: str) -> set[str]:
    """Return the runs that were on the device of a run during its last attempt."""
    happened = events(lab)
    first = max(at for at, (what, run, _) in enumerate(happened) if (what, run) == ("begin", name))
    device = happened[first][2]
    at_work: set[str] = set()
    for what, run, where in happened[:first]:
        if where == device:
            (at_work.add if what == "begin" else at_work.discard)(run)
    last = next(at for at, (what, run, _) in enumerate(happened) if at > first and (what, run) == ("end", name))
    return at_work | {run for what, run, where in happened[first + 1 : last] if where == device and what == "begin"}


@pytest.mark.parametrize("devices, jobs", [(("0",), 3), (("0", "1"), 4)])
def test_a_run_out_of_memory_beside_others_is_made_again_alone(
    devices: tuple[str, ...], jobs: int, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.write(seeds=[1, 2])
    busy = {name: {"seconds": 1.0} for name in ("plain/1", "worse/1", "plain/2", "worse/2")}
    plan(lab, {**busy, "better/1": {"out_of_memory": 1}, "better/2": {"out_of_memory": 1}})
    assert compare(lab.file, program=lab.program, at_once=Workers(jobs, devices)) == 0
    assert {where for _, _, where in events(lab)} == set(devices)
    assert sorted(begun(lab)) == sorted([*busy, "better/1", "better/1", "better/2", "better/2"])
    assert on_the_device_with_the_last(lab, "better/1") == on_the_device_with_the_last(lab, "better/2") == set()
    assert on_the_device_with_the_last(lab, "worse/1") != set()
    said = capsys.readouterr().err
    assert (
        len(re.findall(r"better/seed \d: training: out of memory while other runs were on the same device", said)) == 2
    )
    assert {run["runs_at_once"] for run in lab.result()["runs"]} == {jobs // len(devices)}
    assert seconds_of(lab, "better", 1) is None
    assert seconds_of(lab, "plain", 1) is not None
    assert any("several at a time include waiting for each other" in note for note in lab.result()["notes"])


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has", True),
        ("torch.cuda.OutOfMemoryError: Allocation on device", True),
        ("torch.AcceleratorError: CUDA error: out of memory", True),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("dataflex: --batch-size: memory ran out with 8 prompts at once; set a smaller batch size.", True),
        ("dataflex: the device does not have enough memory to measure losses of 1 sample of 900 tokens", True),
        ("RuntimeError: CUDA error: device-side assert triggered", False),
        ("MemoryError: Unable to allocate 7.45 GiB for an array", False),  # the memory of the machine
    ],
)
def test_errors_of_a_device_that_is_full_are_recognised(text: str, is_one: bool) -> None:
    assert bool(runner._OUT_OF_MEMORY.search(text)) == is_one


def test_arguments_that_the_machine_does_not_accept_stop_before_the_first_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parsing, "unsupported_here", lambda config: ["bf16"] if config.llamafactory.get("bf16") else [])
    two = variants(better={**RANDOM, "bf16": True}, plain={"dataflex": {}, "bf16": True})
    lab.write(seeds=[1], **two)
    with pytest.raises(ConfigError, match=r"base\.bf16: this machine has no device that supports it"):
        compare(lab.file, program=lab.program)
    lab.write(seeds=[1], **variants(better={**RANDOM, "bf16": True}))
    with pytest.raises(ConfigError, match=r"variants\.better\.bf16: this machine has no device that supports it"):
        compare(lab.file, program=lab.program)
    assert begun(lab) == []


def test_complete_runs_may_be_of_a_machine_with_other_devices(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = variants(better={**RANDOM, "bf16": True})
    monkeypatch.setattr(parsing, "unsupported_here", lambda config: [])
    lab.write(seeds=[1], **bf16)
    assert compare(lab.file, program=lab.program) == 0
    monkeypatch.setattr(parsing, "unsupported_here", lambda config: ["bf16"] if config.llamafactory.get("bf16") else [])
    bf16["variants"]["other"] = {**RANDOM, "dataflex.warmup_steps": 1}
    lab.write(seeds=[1], **bf16)
    plan(lab, {})
    assert compare(lab.file, program=lab.program) == 0
    assert begun(lab) == ["other/1"]


def test_a_run_goes_to_the_device_with_the_fewest_runs(lab: Lab) -> None:
    lab.write(seeds=[1])
    experiment = load(lab.file)
    first, second = experiment.runs[:2]
    crew = runner._Crew(experiment, experiment.runs, Workers(3, ("0", "1")), (), 2, 0.0, {})
    assert crew._place_for(first) == 0
    crew._at_work = [SimpleNamespace(run=first, place=2)]  # on device 0, as slot 0 is
    assert crew._place_for(second) == 1
    crew._at_work = []
    crew.dismiss()


def test_a_run_out_of_memory_alone_has_failed(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.write(seeds=[1], **variants(better=RANDOM))
    plan(lab, {"plain/1": {"seconds": 1.0}, "better/1": {"out_of_memory": 9}})
    assert compare(lab.file, program=lab.program, at_once=Workers(2, ("0",))) == 1
    assert begun(lab).count("better/1") == 2
    plan(lab, {"better/1": {"out_of_memory": 9}})
    assert compare(lab.file, program=lab.program, at_once=Workers(1, ("0",))) == 1
    assert begun(lab) == ["better/1"]
    said = "better/seed 1: failed after 0 s: training: torch.OutOfMemoryError: CUDA out of memory."
    assert said in capsys.readouterr().err
    assert statuses(lab)["better/1"] == "failed"


def test_runs_made_with_other_numbers_of_runs_at_a_time_are_noted(lab: Lab) -> None:
    def notes() -> list[str]:
        return [note for note in lab.result()["notes"] if "at a time" in note]

    lab.write(seeds=[1], **variants(better=RANDOM))
    assert lab.compare(jobs=1) == 0
    assert notes() == []
    lab.write(seeds=[1, 2])
    assert lab.compare(jobs=2) == 0
    assert notes()[0] == "Runs with different numbers of runs at a time (1, 2) cannot be compared by their seconds."
    assert {(run["seed"], run["runs_at_once"]) for run in lab.result()["runs"]} == {(1, 1), (2, 2)}


def test_a_run_that_resumes_keeps_the_larger_number_of_runs_at_a_time(lab: Lab) -> None:
    lab.write(seeds=[1], **variants(better=RANDOM))
    lab.behave({"better/1": "slow"})
    run = load(lab.file).of("better")[0]
    plan(lab, {})
    (lab.folder / "program.py").write_text(BEFORE + PROGRAM.replace("time.sleep(60)", "sys.exit(1)"))
    assert lab.compare(jobs=3) == 1
    assert state_of(run, load(lab.file)) == "to resume"
    assert lab.compare(jobs=1) == 0
    assert json.loads((run.folder / "complete.json").read_text())["runs_at_once"] == 3
    assert run.folder == lab.folder_of("better", 1)
