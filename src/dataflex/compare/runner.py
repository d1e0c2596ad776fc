"""Execution of the missing runs of a comparison: a separate process for each run, several at a time."""

from __future__ import annotations

import ctypes
import json
import math
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
    inputs_of,
    run_yaml,
)
from dataflex.compare.remaining import as_text, time_left
from dataflex.compare.result import complete, needs_overwriting, tasks_to_evaluate, trained_problem
from dataflex.compare.tasks import Task
from dataflex.config.masking import handed_on
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.record.files import read_object
from dataflex.trainer.console import duration
from dataflex.trainer.resume import last_of
from dataflex.trainer.stopping import Stopped

PROGRAM = (sys.executable, "-m", "dataflex")
"""The command line that trains and evaluates."""

# The comparison sets the processes of a run: with these variables of a launcher a run would start others, wait for
# them, or meet the processes of another run at the same port.
_NOT_HANDED_ON = (
    *("FORCE_TORCHRUN", "NPROC_PER_NODE", "NNODES", "RDZV_ID", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"),
    *("LOCAL_RANK", "RANK", "WORLD_SIZE", "DATAFLEX_ERROR_FOLDER"),
)
_TAIL = 16_384
_OUT_OF_MEMORY = re.compile(
    r"CUDA (error: )?out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"  # of torch
    r"|does not have enough memory to|does not have enough memory for|memory ran out with"  # of this package
)
"""Text in the log of a run for which the memory of its device was too small."""
_PATIENCE = 20.0
"""Seconds that a process may take to end after it was interrupted."""


@dataclass(frozen=True)
class Workers:
    """The number of runs at a time, and their devices.

    Attributes:
        jobs: runs at a time, >= 1.
        devices: values of CUDA_VISIBLE_DEVICES, each with the devices of one run. Empty without CUDA.
        whole_machine: whether a run is launched as by hand: if the environment says so, it has several processes on all
            devices. Needs one job.
    """

    jobs: int
    devices: tuple[str, ...] = ()
    whole_machine: bool = False

    def environment(self, place: int, processes: int | None = None) -> dict[str, str]:
        """Return the environment of the run in slot ``place``, counted from 0.

        Args:
            place: the slot.
            processes: number of processes that torchrun starts. None means a single process without torchrun, which
                gets the first of the slot's devices.
        """
        if self.whole_machine:
            return {"TQDM_MININTERVAL": "5", **os.environ}
        environment = {key: value for key, value in os.environ.items() if key not in _NOT_HANDED_ON}
        environment.setdefault("TQDM_MININTERVAL", "5")  # seconds; keeps progress bars from filling the log
        if self.devices:
            names = self.devices[place % len(self.devices)]
            environment["CUDA_VISIBLE_DEVICES"] = names.partition(",")[0] if processes is None else names
        if self.jobs > len(self.devices):
            environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // (self.jobs * (processes or 1)))))
        if processes is not None:
            environment |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(processes)}
        return environment

    @property
    def at_once(self) -> int:
        """Number of runs at a time on one device; without CUDA, on the machine."""
        return math.ceil(self.jobs / max(1, len(self.devices)))

    def device(self, place: int) -> str:
        """Return the name of the device of slot ``place``. Without CUDA all slots have the same device."""
        return self.devices[place % len(self.devices)] if self.devices else "the CPU"


def workers(jobs: int | None = None, processes: int = 1) -> Workers:
    """Return one job for every ``processes`` visible CUDA devices, or one without CUDA. ``jobs`` sets another number.

    Raises:
        ConfigError: if there are CUDA devices, but fewer than ``processes``.
    """
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    devices = tuple(named[:count] if named else [str(number) for number in range(count)])
    if 0 < count < processes:
        raise ConfigError(
            f"processes: {processes} needs as many devices, and {count} {'is' if count == 1 else 'are'} visible. Set "
            f"it to {count} or less, and raise gradient_accumulation_steps to keep the samples of a step."
        )
    firsts = range(0, count - count % processes, processes)
    groups = tuple(",".join(devices[first : first + processes]) for first in firsts)
    return Workers(jobs or max(1, len(groups)), groups)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Job:
    """A run whose process is running: in training, or, if there are ``tasks``, evaluating these."""

    run: Run
    place: int
    tasks: tuple[Task, ...]
    process: subprocess.Popen[bytes]
    shares: bool
    """Whether another run was on its device at some time."""

    @property
    def stage(self) -> str:
        return "evaluating tasks" if self.tasks else "training"


class Progress:
    """Display of the progress: one bar in a terminal, else a line whenever a run starts or ends."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._plain = not sys.stderr.isatty()
        self._shown = 0.0
        # tqdm's estimate of the time left is omitted: it knows neither variants nor the number of running runs.
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self._bar = tqdm(total=total, unit="run", disable=self._plain, bar_format=form)

    def say(self, text: str) -> None:
        """Print a line."""
        self._bar.write(text, file=sys.stderr)
        sys.stderr.flush()

    def show(self, jobs: Sequence[_Job], done: int) -> None:
        """Show the running runs, about three times a second at most."""
        if not self._plain and time.monotonic() - self._shown > 0.3:
            self._shown = time.monotonic()
            self._bar.n = done
            self._bar.set_postfix_str(", ".join(f"{job.run.name} {_step(job)}" for job in jobs))

    def close(self) -> None:
        """Stop the bar and leave its last state on the screen."""
        self._bar.close()


@dataclass(frozen=True)
class Ended:
    """The runs that are not complete after :func:`execute`.

    Attributes:
        failed: name of each failed run -> its error.
        left: the runs that were interrupted or not started because of the time limit.
        too_long: of these, names of the runs that were not started because they could not end in time -> seconds that a
            complete run of the variant took.
    """

    failed: dict[str, str]
    left: tuple[Run, ...]
    too_long: dict[str, float]


def execute(
    plan: Plan,
    runs: Sequence[Run],
    at_once: Workers,
    program: Sequence[str] = PROGRAM,
    total: int | None = None,
    until: float = math.inf,
    known: Mapping[str, Sequence[float]] | None = None,
) -> Ended:
    """Train and evaluate runs until each is complete or has failed, or until a time limit.

    After the limit no process is started, and those at work are interrupted. Their checkpoints stay. A run that writes
    no checkpoints is not started if a complete run of its variant took longer than the time that is left.

    Args:
        plan: the plan that the runs belong to.
        runs: the runs that are not complete.
        at_once: the number of runs at a time, and their devices.
        program: the command line, to which ``train FILE`` or ``eval FOLDER --tasks FILE`` is appended.
        total: number of all runs with the complete ones, for messages such as "run 3 of 12". None means ``len(runs)``.
        until: the time limit, as a value of ``time.monotonic()``.
        known: variant -> seconds of its runs that were made earlier, each in one attempt and as many at a time.

    Raises:
        KeyboardInterrupt: if the user stops the command. All processes have ended by then.
    """
    crew = _Crew(plan, runs, at_once, program, total or len(runs), until, known or {})
    with _interruptible():
        try:
            crew.work()
        finally:
            crew.dismiss()
    return Ended(crew.failed, crew.left(runs), crew.too_long)


class _Crew:
    """The runs that wait, the runs at work, and the errors of the others."""

    def __init__(
        self,
        plan: Plan,
        runs: Sequence[Run],
        at_once: Workers,
        program: Sequence[str],
        total: int,
        until: float,
        known: Mapping[str, Sequence[float]],
    ) -> None:
        self.failed: dict[str, str] = {}
        self.too_long: dict[str, float] = {}
        self._plan, self._at_once, self._program = plan, at_once, tuple(program)
        self._waiting, self._at_work, self._done = list(runs), list[_Job](), 0
        self._began: dict[str, float] = {}
        self._before, self._total, self._until = total - len(runs), total, until
        self._alone: set[str] = set()
        """Names of runs for which the memory did not suffice beside other runs. They wait behind all others."""
        self._whole: set[str] = set()
        """Names of runs that started without files of an earlier attempt."""
        self._known = {variant: list(seconds) for variant, seconds in known.items()}
        """Variant -> seconds of such runs, from start to end."""
        self._progress = Progress(len(runs))

    def work(self) -> None:
        """Start runs and handle their ends until no run waits and none is running, or until the time limit."""
        while (self._waiting or self._at_work) and not self._is_over():
            self._begin_waiting()
            time.sleep(0.05)
            for job in [job for job in self._at_work if job.process.poll() is not None]:
                self._at_work.remove(job)
                self._go_on(job)
            self._progress.show(self._at_work, self._done)

    def dismiss(self) -> None:
        """End the processes that are still running. Their checkpoints stay."""
        _end([job.process for job in self._at_work])
        self._progress.close()

    def left(self, runs: Sequence[Run]) -> tuple[Run, ...]:
        """Return the runs that wait, were too long to start, or were at work at the time limit."""
        names = {*self.too_long, *(run.name for run in self._waiting), *(job.run.name for job in self._at_work)}
        return tuple(run for run in runs if run.name in names)

    def _is_over(self) -> bool:
        return time.monotonic() >= self._until

    def _begin_waiting(self) -> None:
        """Begin the waiting runs in order, as long as there are free slots."""
        for run in tuple(self._waiting):
            place = self._place_for(run)
            if place is None or self._is_over():
                return
            self._waiting.remove(run)
            seconds = max(self._known.get(run.variant, ()), default=0.0)
            is_too_long = seconds > self._until - time.monotonic()
            if is_too_long and not _has_checkpoints(run) and trained_problem(run, self._plan) is not None:
                self.too_long[run.name] = seconds
            else:
                self._begin(run, place)

    def _place_for(self, run: Run) -> int | None:
        """Return a free slot, or None. A run that must be alone gets a slot of a device without other runs."""
        taken = {job.place for job in self._at_work}
        free = [place for place in range(self._at_once.jobs) if place not in taken]
        if run.name in self._alone:
            free = [place for place in free if not self._beside(place)]
        return min(free, key=lambda place: (len(self._beside(place)), place), default=None)

    def _beside(self, place: int) -> list[_Job]:
        """Return the running runs on the device of a slot."""
        device = self._at_once.device(place)
        return [job for job in self._at_work if self._at_once.device(job.place) == device]

    def _begin(self, run: Run, place: int) -> None:
        """Start the first step that a run lacks: its training, or else its tasks."""
        self._began[run.name] = time.monotonic()
        if not run.folder.exists():
            self._whole.add(run.name)
        try:
            problem = changed_file(run, self._plan)
            if problem is not None:
                self._fail(run, problem)
                return
            is_trained = trained_problem(run, self._plan) is None
            _prepare(run, self._plan, self._at_once.at_once, is_trained)
            if is_trained:
                self._after_training(run, place)
                return
            # A result on record would be of a training that is about to be replaced.
            (run.folder / COMPLETE_FILE).unlink(missing_ok=True)
            overwrite = ["overwrite_output_dir=true"] if needs_overwriting(run) else []
            self._launch(run, place, (), ["train", str(run.folder / RUN_FILE), *overwrite])
        except (OSError, ConfigError) as error:
            self._fail(run, str(error))

    def _go_on(self, job: _Job) -> None:
        """Start the step that follows a process that has ended."""
        run = job.run
        try:
            problem = changed_file(run, self._plan)
            if problem is not None and not job.tasks:
                # The folder's name has the key of the files before the change, which the model may not match.
                aside = set_aside(run.folder)
                self._fail(run, f"{problem} The model trained in the meantime is in {aside}", aside)
            elif problem is not None or (problem := changed_task(job.tasks)) is not None:
                self._fail(run, problem)
            elif job.process.returncode and job.shares and _OUT_OF_MEMORY.search(_tail(run.folder / LOG_FILE)):
                self._put_back(job)
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

    def _put_back(self, job: _Job) -> None:
        """Let a run wait for a device without other runs, after the memory did not suffice beside them."""
        self._alone.add(job.run.name)
        self._whole.discard(job.run.name)
        self._waiting.append(job.run)
        self._progress.say(
            f"{self._counted(job.run)}: {job.stage}: out of memory while other runs were on the same device "
            f"({self._at_once.device(job.place)}). It is made again when no other run is on its device."
        )

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
        if self._is_over():
            self._waiting.insert(0, run)
            return
        processes = run.processes if run.torchrun and not tasks else None
        environment = {**self._at_once.environment(place, processes), **handed_on(run.configuration)}
        process = _start(run, [*self._program, *arguments], environment)
        others = self._beside(place)
        for other in others:
            other.shares = True
        job = _Job(run, place, tasks, process, bool(others))
        self._at_work.append(job)
        self._progress.say(f"{self._counted(run)}: {job.stage} ({run.folder})")

    def _finish(self, run: Run, evaluated: Sequence[Task]) -> None:
        seconds, is_whole = time.monotonic() - self._began[run.name], run.name in self._whole
        complete(run, self._plan, evaluated, seconds if is_whole else None)
        (run.folder / FAILED_FILE).unlink(missing_ok=True)
        self._done += 1
        if is_whole:
            self._known.setdefault(run.variant, []).append(seconds)
        self._progress.say(f"{self._counted(run)}: complete after {duration(round(seconds))}{self._rest()}")

    def _fail(self, run: Run, error: str, folder: Path | None = None) -> None:
        """Store the error of a run. ``folder`` is the folder of its log if that has moved."""
        self.failed[run.name] = error
        note = {"error": error, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk may be the reason of the failure
            write_atomically(run.folder / FAILED_FILE, json_text(note, indent=2).encode())
        self._done += 1
        log = (folder or run.folder) / LOG_FILE
        seconds = duration(round(time.monotonic() - self._began[run.name]))
        self._progress.say(f"{self._counted(run)}: failed after {seconds}: {error}; see {log}")

    def _counted(self, run: Run) -> str:
        """Return a run's name, with its number if there are several runs."""
        if self._total == 1:
            return run.name
        number = self._before + list(self._began).index(run.name) + 1
        return f"run {number} of {self._total}: {run.name}"

    def _rest(self) -> str:
        """Return the number of runs to go and the time they are expected to take."""
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


def _has_checkpoints(run: Run) -> bool:
    """Return whether the training of a run writes checkpoints before its end, so that it can resume from one."""
    given = run.configuration
    if given.get("save_only_model"):
        return False  # such a checkpoint cannot be resumed from
    save_steps, steps = float(given.get("save_steps") or 500), float(given.get("max_steps") or math.inf)
    strategy = str(given.get("save_strategy") or "steps")
    return strategy == "epoch" or (strategy == "steps" and save_steps < steps)


def _prepare(run: Run, plan: Plan, jobs: int, is_trained: bool) -> None:
    """Write the files that identify the run in a folder.

    Args:
        run: the run.
        plan: the plan that the run belongs to.
        jobs: number of runs at a time.
        is_trained: whether its training is complete. Else it is about to begin, or to resume.
    """
    runs_at_once = (read_object(run.folder / KEY_FILE) or {}).get("runs_at_once")
    if not is_trained:
        runs_at_once = max(runs_at_once or 1, jobs) if last_of(run.folder) is not None else jobs
    key: dict[str, Any] = {
        "format": FORMAT,
        "key": run.key,
        "variant": run.variant,
        "seed": run.seed,
        "working_directory": str(Path.cwd()),
        "runs_at_once": runs_at_once,
        **inputs_of(run, plan),
    }
    write_atomically(run.folder / KEY_FILE, (json_text(key, indent=2) + "\n").encode())
    write_atomically(run.folder / RUN_FILE, run_yaml(run))


def set_aside(path: Path) -> Path:
    """Rename a path whose content no longer matches its name, and return the new path.

    An example is a run's folder whose name has the key of other files.
    """
    number = 1
    while (aside := path.with_name(f"{path.stem}-changed-{number}{path.suffix}")).exists():
        number += 1
    return path.rename(aside)


def _start(run: Run, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a separate process group, with its output appended to the log."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        """Restore SIGINT, which a shell's background jobs ignore, and let the process end with the comparison."""
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
            start_new_session=True,  # Ctrl-C reaches the comparison alone, which can end the whole group
            preexec_fn=prepare,
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt processes, then kill their groups after `_PATIENCE` seconds, or at once if interrupted again."""
    try:
        for process in processes:
            process.send_signal(signal.SIGINT)
        last = time.monotonic() + _PATIENCE
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, last - time.monotonic()))
    finally:
        for process in processes:
            # PermissionError: macOS raises it if only ended processes are left in the group.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.wait()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Handle SIGINT, even if a shell made a background job ignore it, and SIGTERM, inside the ``with`` block."""

    def interrupt(number: int, _: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _last_error(run: Run) -> str:
    """Return the line of a run's log that most likely states the error."""
    lines = [line for line in re.split(r"[\r\n]+", _tail(run.folder / LOG_FILE)) if line.strip()]
    said = [line for line in lines if re.match(r"dataflex: |(\w+\.)*\w*(Error|Exception|Interrupt)\b", line)]
    text = (said or lines or ["the log is empty"])[-1].strip()
    return text if len(text) <= 300 else f"{text[:297]}..."


def _tail(path: Path) -> str:
    """Return the last lines of a log, after its last heading."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL))
        return stream.read().decode(errors="replace").rpartition("\n== ")[2].partition("\n")[2]


def _step(job: _Job) -> str:
    """Return the progress of a run, from the last line of LLaMA-Factory's log."""
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
