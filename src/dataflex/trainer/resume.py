"""Starting point of a run: nothing, or a checkpoint, with the settings that differ from the checkpoint's.

Nothing here imports torch or LLaMA-Factory, so that ``check`` reports the same as ``train``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dataflex.api.component import State
from dataflex.api.components import family_key
from dataflex.config.changes import Change, differences, kept_values, snapshot
from dataflex.config.checks.files import is_finished
from dataflex.config.checks.values import number, truthy
from dataflex.config.loading import RunConfig
from dataflex.errors import CheckpointError, Problem
from dataflex.record.checkpoint import Marker, checkpoints, last_complete, marked, problem_of, read_marker, read_state
from dataflex.record.identity import FOLDER, read_identity

_PLANNING = ("select", "mix", "order")
"""Component families whose decisions are made for a round and hold for the whole round."""
_NEW_RUN = "Set overwrite_output_dir: true for a new run (nothing is deleted), or choose another output_dir."


@dataclass(frozen=True)
class Resume:
    """A checkpoint to resume from.

    Attributes:
        folder: folder of the checkpoint.
        marker: contents of the checkpoint's marker file.
        is_own: whether ``output_dir`` holds the record of the run that wrote the checkpoint.
        changes: the settings that differ.
        state: the run's state in the checkpoint.
    """

    folder: Path
    marker: Marker
    is_own: bool
    changes: tuple[Change, ...]
    state: State

    @property
    def next_decision(self) -> int:
        """Number of optimizer steps done when the next round begins.

        At the end of a round this is the checkpoint's step.
        """
        plan = self.state["plan"]
        return self.marker.step if plan is None else max(self.marker.step, plan["start_step"] + plan["steps"])

    def holds_from(self, change: Change) -> int:
        """Return the number of optimizer steps done when a change takes effect."""
        return self.next_decision if change.family in _PLANNING else self.marker.step

    def effective(self, config: RunConfig) -> RunConfig:
        """Return the configuration with the earlier value of every setting that a resume does not change."""
        kept = kept_values(self.changes)
        given = {key: value for key, value in config.llamafactory.items() if key not in kept}
        return replace(config, llamafactory=given | {key: value for key, value in kept.items() if value is not None})

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each setting that differs but cannot change at a resume."""
        for change in self.changes:
            if change.effect == "fixed":
                yield Problem(
                    change.key,
                    f"cannot change at a resume ({change.values}): {change.reason}. Use the earlier value to resume "
                    f"from {self.folder}, or another output_dir for a new run.",
                )
            elif change.is_method and change.family in _PLANNING:
                yield from self._problem_of_method(change)

    def _problem_of_method(self, change: Change) -> Iterator[Problem]:
        """Yield a problem if another method cannot take over at this checkpoint."""
        had_rounds, plan = self.state["planner"] is not None, self.state["plan"]
        methods = set(self.state["components"])
        for each in self.changes:
            if each.is_method and each.entry is not None:
                methods = methods - {each.entry} if each.now is None else methods | {each.entry}
        keeps = not {family_key(entry) for entry in methods}.isdisjoint(_PLANNING)
        if had_rounds != keeps:
            yield Problem(
                change.key,
                f"cannot change at a resume ({change.values}): a run with select, mix or order draws its samples in "
                "rounds, one without them in LLaMA-Factory's way, and neither can continue where the other stopped. "
                "Use another output_dir for a new run.",
            )
        elif plan is not None and self.next_decision > self.marker.step:
            yield Problem(
                change.key,
                f"cannot change inside a round ({change.values}): the checkpoint of step {self.marker.step} is in "
                f"round {plan['number']}, steps {plan['start_step'] + 1} to {self.next_decision}, whose samples the "
                f"earlier method chose. Resume from a checkpoint at a round's end (step {plan['start_step']} or "
                f"{self.next_decision}, say), or use the earlier method.",
            )

    def lines(self) -> Iterator[str]:
        """Yield a line for each setting that differs and is allowed to."""
        for change in self.changes:
            if change.effect == "from here":
                yield f"{change.key} holds from step {self.holds_from(change) + 1} on: {change.values}."
            elif change.effect == "kept":
                yield (
                    f"{change.key} has no effect at a resume ({change.values}): {change.reason}. The earlier value "
                    "stays in force."
                )


def find(config: RunConfig) -> tuple[Resume | None, list[str]]:
    """Return the checkpoint that a configuration resumes from, if any, and a line for each checkpoint that is not used.

    Raises:
        CheckpointError: if a named checkpoint cannot be used, if a resume is requested and there is no checkpoint, or
            if the folder holds a run that cannot resume and that a new run would replace unnoticed.
    """
    if config.dataflex is None or config.offline or not truthy(config, "do_train"):
        return None, []
    output_dir = Path(str(config.llamafactory.get("output_dir", "")))
    asked = config.llamafactory.get("resume_from_checkpoint")
    if asked is False or (asked is None and truthy(config, "overwrite_output_dir")):
        return None, []
    own = read_identity(output_dir / FOLDER)
    left: list[str] = []
    folder: Path | None
    if isinstance(asked, str):
        folder = _named(Path(asked))
    else:
        folder, left = _last(output_dir, own, asked=bool(asked))
    if folder is None:
        return None, left
    marker = read_marker(folder)
    changes = differences(marker.config, snapshot(config))
    return Resume(folder, marker, marker.run == own, tuple(changes), read_state(folder)), left


def last_of(output_dir: Path) -> Marker | None:
    """Return the marker of the checkpoint that the run in a folder would resume from; None if it has none."""
    own = read_identity(output_dir / FOLDER)
    folder = None if own is None else last_complete(output_dir, own)[0]
    return None if folder is None else read_marker(folder)


def problems_of(config: RunConfig) -> Iterator[Problem]:
    """Yield the reasons why a configuration cannot resume from its checkpoint."""
    try:
        resume, _ = find(config)
    except CheckpointError as error:
        yield Problem("", str(error))
        return
    if resume is None:
        return
    yield from resume.problems()
    steps = config.dataflex.train_steps if config.dataflex is not None else None
    total = steps or int(number(config, "max_steps", -1))
    if total > 0 and (problem := nothing_left(resume, total, config)):
        yield problem


def nothing_left(resume: Resume, total: int, config: RunConfig) -> Problem | None:
    """Return a problem if a run of ``total`` steps would train nothing after its checkpoint; else None.

    A run that was interrupted after its last step may resume: it has not been evaluated and saved yet.
    """
    step = resume.marker.step
    if step < total:
        return None
    if step == total and resume.is_own and not is_finished(config, Path(str(config.llamafactory["output_dir"]))):
        return None
    return Problem(
        "resume_from_checkpoint",
        f"{resume.folder} is of step {step}, and this run has {total} steps: nothing would be trained. Give it more "
        "(max_steps, dataflex.train_steps, num_train_epochs), or name an earlier checkpoint.",
    )


def told(config: RunConfig) -> Iterator[str]:
    """Yield the lines for the user about a resume: checkpoints not used, the one that is, and the settings that differ.

    The configuration must have no problems.
    """
    resume, left = find(config)
    yield from left
    if resume is not None:
        yield f"resumes from {resume.folder} (step {resume.marker.step})."
        yield from resume.lines()


def notes(config: RunConfig) -> Iterator[str]:
    """Yield notes for the user about checkpoints, before the run starts."""
    saves = str(config.llamafactory.get("save_strategy", "steps")).lower() not in ("no", "false")
    if config.dataflex is not None and saves and truthy(config, "save_only_model"):
        yield (
            "save_only_model: true: checkpoints hold the model alone, without optimizer, schedule and random state, so "
            "this run cannot resume if it is interrupted."
        )


def _named(folder: Path) -> Path:
    """Return a checkpoint folder that the user named, after checking that it can be used."""
    problem = problem_of(folder)
    if problem is not None:
        complete, _ = last_complete(folder.parent, None)
        hint = f" The last complete checkpoint there is {complete}." if complete else ""
        raise CheckpointError(f"resume_from_checkpoint: {folder} cannot be used: {problem}.{hint}")
    return folder


def _last(output_dir: Path, own: str | None, asked: bool) -> tuple[Path | None, list[str]]:
    """Return the newest usable checkpoint of the folder's run, and a line for each newer one that is not used."""
    there = checkpoints(output_dir)
    if own is None and any(True for _ in marked(output_dir)):
        raise CheckpointError(
            f"output_dir: {output_dir} holds checkpoints ({', '.join(path.name for path in there)}) without the record "
            f"of their run ({FOLDER}/run.json), so it is unknown whether they belong to this run. Name the one to "
            f"resume from with resume_from_checkpoint: PATH. {_NEW_RUN}"
        )
    complete, left = last_complete(output_dir, own) if own is not None else (None, [])
    if complete is not None:
        return complete, left
    if asked:
        raise CheckpointError(
            f"resume_from_checkpoint: {output_dir} has no complete checkpoint. {' '.join(left)}".rstrip()
        )
    # This run has checkpoints with a marker, and all of them lack something. A new run would hide that.
    if any(marker.run == own for _, marker in marked(output_dir)):
        raise CheckpointError(f"output_dir: the run in {output_dir} cannot resume. {' '.join(left)} {_NEW_RUN}")
    if own is None:
        left = [f"{folder} is not used: {problem_of(folder)}." for folder in there]
    return None, left
