"""Running what is missing of a comparison: each run a process of its own, several at a time."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dataflex.compare.experiment import (
    COMPLETE_FILE,
    FAILED_FILE,
    FORMAT,
    KEY_FILE,
    LOG_FILE,
    RUN_FILE,
    TASKS_FILE,
    Plan,
    Run,
    changed_file,
    changed_task,
    run_yaml,
)
from dataflex.compare.remaining import as_text, time_left
from dataflex.compare.result import complete, needs_overwriting, tasks_to_evaluate, trained_problem
from dataflex.compare.tasks import Task
from dataflex.config.masking import handed_on
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.record.versions import installed_versions
from dataflex.trainer.console import duration
from dataflex.trainer.stopping import Stopped

PROGRAM = (sys.executable, "-m", "dataflex")
"""The command line that trains and evaluates."""

_NOT_HANDED_ON = ("FORCE_TORCHRUN", "LOCAL_RANK", "RANK", "WORLD_SIZE", "DATAFLEX_ERROR_FOLDER")
_TAIL = 16_384
_PATIENCE = 20.0
"""Seconds a process may take to end after it was asked to."""


@dataclass(frozen=True)
class Workers:
    """How many runs go on at once, and where.

    Attributes:
        jobs: runs at a time, >= 1.
        devices: names for CUDA_VISIBLE_DEVICES; empty without CUDA.
        whole_machine: whether each run is launched as by hand, in several processes on all devices where the
            environment says so; with one job.
    """

    jobs: int
    devices: tuple[str, ...] = ()
    whole_machine: bool = False

    def environment(self, place: int) -> dict[str, str]:
        """Return the environment of the run in place number ``place``, from 0."""
        if self.whole_machine:
            return {"TQDM_MININTERVAL": "5", **os.environ}
        environment = {key: value for key, value in os.environ.items() if key not in _NOT_HANDED_ON}
        environment.setdefault("TQDM_MININTERVAL", "5")  # of the bars in the log
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[place % len(self.devices)]
        else:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self.jobs)))
        return environment


def workers(jobs: int | None = None) -> Workers:
    """Return one job for each visible CUDA device, one without any; ``jobs`` sets their number."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    devices = tuple(named[:count] if named else [str(number) for number in range(count)])
    return Workers(jobs or max(1, count), devices)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Job:
    """A run at work: in training, or evaluating these tasks."""

    run: Run
    place: int
    tasks: tuple[Task, ...]
    process: subprocess.Popen[bytes]

    @property
    def stage(self) -> str:
        return "evaluating tasks" if self.tasks else "training"


class Progress:
    """Tells how far the runs are: one bar in a terminal, else a line for every run begun or ended."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._plain = not sys.stderr.isatty()
        self._shown = 0.0
        # Without tqdm's own time left, which knows neither variants nor how many runs are at work.
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self._bar = tqdm(total=total, unit="run", disable=self._plain, bar_format=form)

    def say(self, text: str) -> None:
        """Print a line."""
        self._bar.write(text, file=sys.stderr)
        sys.stderr.flush()

    def show(self, jobs: Sequence[_Job], done: int) -> None:
        """Show the runs at work, a few times a second at most."""
        if not self._plain and time.monotonic() - self._shown > 0.3:
            self._shown = time.monotonic()
            self._bar.n = done
            self._bar.set_postfix_str(", ".join(f"{job.run.name} {_step(job)}" for job in jobs))

    def close(self) -> None:
        """Leave the line as it is."""
        self._bar.close()


def execute(
    plan: Plan, runs: Sequence[Run], at_once: Workers, program: Sequence[str] = PROGRAM, total: int | None = None
) -> dict[str, str]:
    """Train and evaluate runs until each is complete or has failed.

    Args:
        plan: what they belong to.
        runs: those that are not complete.
        at_once: how many at a time, and where.
        program: the command line, to which ``train FILE`` or ``eval FOLDER --tasks FILE`` is added.
        total: number of all runs, with those that are complete already, by which they are counted; None: no others.

    Returns:
        Name of each run that failed -> why.

    Raises:
        KeyboardInterrupt: if the user stops it; the processes have ended then.
    """
    crew = _Crew(plan, runs, at_once, program, total or len(runs))
    with _interruptible():
        try:
            crew.work()
        finally:
            crew.dismiss()
    return crew.failed


class _Crew:
    """The runs that wait, those at work, and what became of the others."""

    def __init__(self, plan: Plan, runs: Sequence[Run], at_once: Workers, program: Sequence[str], total: int) -> None:
        self.failed: dict[str, str] = {}
        self._plan, self._at_once, self._program = plan, at_once, tuple(program)
        self._waiting, self._at_work, self._done = list(runs), list[_Job](), 0
        self._began: dict[str, float] = {}
        self._before, self._total = total - len(runs), total
        self._whole: set[str] = set()
        """Runs that began without anything of an earlier attempt."""
        self._known: dict[str, list[float]] = {}
        """Variant -> seconds of such runs, from beginning to end."""
        self._progress = Progress(len(runs))

    def work(self) -> None:
        """Go on until nothing waits and nobody works."""
        while self._waiting or self._at_work:
            free = sorted(set(range(self._at_once.jobs)) - {job.place for job in self._at_work})
            while self._waiting and free:
                self._begin(self._waiting.pop(0), free.pop(0))
            time.sleep(0.05)
            for job in [job for job in self._at_work if job.process.poll() is not None]:
                self._at_work.remove(job)
                self._go_on(job)
            self._progress.show(self._at_work, self._done)

    def dismiss(self) -> None:
        """End whoever is still at work; their checkpoints stay."""
        _end([job.process for job in self._at_work])
        self._progress.close()

    def _begin(self, run: Run, place: int) -> None:
        """Start what a run lacks first."""
        self._began[run.name] = time.monotonic()
        if not run.folder.exists():
            self._whole.add(run.name)
        try:
            problem = changed_file(run, self._plan)
            if problem is not None:
                self._fail(run, problem)
                return
            _prepare(run)
            if trained_problem(run, self._plan) is None:
                self._after_training(run, place)
                return
            (run.folder / COMPLETE_FILE).unlink(missing_ok=True)
            overwrite = ["overwrite_output_dir=true"] if needs_overwriting(run) else []
            self._launch(run, place, (), ["train", str(run.folder / RUN_FILE), *overwrite])
        except (OSError, ConfigError) as error:
            self._fail(run, str(error))

    def _go_on(self, job: _Job) -> None:
        """Start what comes after a process that has ended."""
        run = job.run
        try:
            problem = changed_file(run, self._plan)
            if problem is not None and not job.tasks:
                aside = set_aside(run.folder)
                self._fail(run, f"{problem} What was trained meanwhile is in {aside}", aside)
            elif problem is not None or (problem := changed_task(job.tasks)) is not None:
                self._fail(run, problem)
            elif job.process.returncode:
                self._fail(run, f"{job.stage}: {_last_error(run)} (status {job.process.returncode})")
            elif job.tasks:
                self._finish(run, job.tasks)
            elif (problem := trained_problem(run, self._plan)) is not None:
                self._fail(run, problem)
            else:
                self._after_training(run, job.place)
        except (OSError, ConfigError) as error:
            self._fail(run, str(error))

    def _after_training(self, run: Run, place: int) -> None:
        tasks = tuple(tasks_to_evaluate(run, self._plan))
        if not tasks:
            self._finish(run, ())
        elif (problem := changed_task(tasks)) is not None:
            self._fail(run, problem)
        else:
            text = yaml.safe_dump([task.settings for task in tasks], sort_keys=False, allow_unicode=True)
            write_atomically(run.folder / TASKS_FILE, text.encode())
            self._launch(run, place, tasks, ["eval", str(run.folder), "--tasks", str(run.folder / TASKS_FILE)])

    def _launch(self, run: Run, place: int, tasks: tuple[Task, ...], arguments: list[str]) -> None:
        environment = {**self._at_once.environment(place), **handed_on(run.configuration)}
        process = _start(run, [*self._program, *arguments], environment)
        job = _Job(run, place, tasks, process)
        self._at_work.append(job)
        self._progress.say(f"{self._counted(run)}: {job.stage} ({run.folder})")

    def _finish(self, run: Run, evaluated: Sequence[Task]) -> None:
        complete(run, self._plan, evaluated)
        (run.folder / FAILED_FILE).unlink(missing_ok=True)
        self._done += 1
        seconds = time.monotonic() - self._began[run.name]
        if run.name in self._whole:
            self._known.setdefault(run.variant, []).append(seconds)
        self._progress.say(f"{self._counted(run)}: complete after {duration(round(seconds))}{self._rest()}")

    def _fail(self, run: Run, error: str, folder: Path | None = None) -> None:
        """Keep why a run failed; ``folder``: where its log is, if it is not in its own folder."""
        self.failed[run.name] = error
        note = {"error": error, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk may be why it failed
            write_atomically(run.folder / FAILED_FILE, json_text(note, indent=2).encode())
        self._done += 1
        log = (folder or run.folder) / LOG_FILE
        seconds = duration(round(time.monotonic() - self._began[run.name]))
        self._progress.say(f"{self._counted(run)}: failed after {seconds}: {error}; see {log}")

    def _counted(self, run: Run) -> str:
        """Return a run's name, with its number among several."""
        if self._total == 1:
            return run.name
        number = self._before + list(self._began).index(run.name) + 1
        return f"run {number} of {self._total}: {run.name}"

    def _rest(self) -> str:
        """Return how many runs are to go, and how long they are expected to take."""
        to_go = len(self._waiting) + len(self._at_work)
        if not to_go:
            return ""
        now = time.monotonic()
        left = time_left(
            self._known,
            [(job.run.variant, now - self._began[job.run.name]) for job in self._at_work],
            [run.variant for run in self._waiting],
            self._at_once.jobs,
        )
        return f"; {to_go} to go{as_text(left)}"


def _prepare(run: Run) -> None:
    """Write what says which run a folder holds."""
    key: dict[str, Any] = {
        "format": FORMAT,
        "key": run.key,
        "variant": run.variant,
        "seed": run.seed,
        "working_directory": str(Path.cwd()),
        "versions": installed_versions(),
        "contents": run.contents,
    }
    write_atomically(run.folder / KEY_FILE, (json_text(key, indent=2) + "\n").encode())
    write_atomically(run.folder / RUN_FILE, run_yaml(run))


def set_aside(path: Path) -> Path:
    """Rename what no longer is what its place says, such as a run's folder under another key; return the new name."""
    number = 1
    while (aside := path.with_name(f"{path.stem}-changed-{number}{path.suffix}")).exists():
        number += 1
    return path.rename(aside)


def _start(run: Run, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own, its output behind what the log already has."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        """Take SIGINT, which a shell's background jobs ignore; end when the comparison is killed, lest it go unseen."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if prctl is not None:
            prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    with (run.folder / LOG_FILE).open("ab") as log:
        log.write(f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
        log.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=prepare,
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt processes, and kill what is left of their groups after a while, or when interrupted again."""
    try:
        for process in processes:
            process.send_signal(signal.SIGINT)
        last = time.monotonic() + _PATIENCE
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, last - time.monotonic()))
    finally:
        for process in processes:
            with suppress(ProcessLookupError, PermissionError):  # the second where only the dead are left (macOS)
                os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.wait()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Take Ctrl-C, also where a shell had it ignored in the background, and SIGTERM like it, for a while."""

    def interrupt(number: int, _: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _last_error(run: Run) -> str:
    """Return the line of a run's log that says best what went wrong."""
    lines = [line for line in re.split(r"[\r\n]+", _tail(run.folder / LOG_FILE)) if line.strip()]
    said = [line for line in lines if re.match(r"dataflex: |(\w+\.)*\w*(Error|Exception|Interrupt)\b", line)]
    text = (said or lines or ["it said nothing"])[-1].strip()
    return text if len(text) <= 300 else f"{text[:297]}..."


def _tail(path: Path) -> str:
    """Return the last lines of a file since its last heading."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL))
        return stream.read().decode(errors="replace").rpartition("\n== ")[2].partition("\n")[2]


def _step(job: _Job) -> str:
    """Return how far a run is, from the last line of LLaMA-Factory's log."""
    if job.tasks:
        return "tasks"
    try:
        with (job.run.folder / "trainer_log.jsonl").open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 4096))
            line = json.loads(stream.read().splitlines()[-1])
        return f"{line['current_steps']}/{line['total_steps']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "starting"
