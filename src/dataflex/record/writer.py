"""Writer of the run record: ``<output_dir>/dataflex/`` with every decision of a run and its cost.

    config.yaml                  the configuration with every default filled in, to be run again
    environment.json             versions, processes, command, and digests of data, model and plug-ins of every start
    plugins/                     copies of the plug-in files
    record.json                  the version of these files, the pool's domains and the methods
    rounds.jsonl                 one line per round
    evaluations.jsonl            one line per evaluation
    filters/from-round-N.arrows  the samples that the filters of a list of selectors decided on, passed samples first
    plans/from-round-N.arrows    the samples of round N and the next ones: position, index, domain, row, score, rank
    loss_weights.csv             the domain weights in the loss of every step, if a mixer weights the loss
    domain_weights.json          the result of this mixer, written at the end of the run
    token_weights.jsonl          statistics of the token weights between two logs, if the run has a weighter
    token_samples.jsonl          losses and weights of the tokens of some samples of logged steps, if it has one
    summary.json                 time, tokens and notes of the run, written at its end
    run.json                     the run's identity, and the run it resumed if that run has another identity
    changes.jsonl                the settings that were changed at a resume, and the step from which each change holds
    config-until-step-N.yaml     the configuration up to such a change

:mod:`dataflex.record.schema` declares the contents of each file.

The main process writes the record. A resumed run keeps the rounds up to its checkpoint and continues after them. The
results of downstream tasks (``tasks``) come from another command. They are moved aside when training begins or resumes,
because they belong to the model as it was before.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from dataflex.data.pool import Pool
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.planning.chain import StageOutcome
from dataflex.planning.planner import Plan
from dataflex.record.checkpoint import checkpoints, marked
from dataflex.record.configuration import FILE as CONFIGURATION
from dataflex.record.configuration import PLUGINS
from dataflex.record.environment import read_environment
from dataflex.record.files import json_lines
from dataflex.record.identity import FOLDER, new_identity, now, read_identity, write_identity
from dataflex.record.plans import PlanWriter, Rows
from dataflex.record.reader import read_header
from dataflex.record.schema import (
    CHANGES,
    DOMAIN_WEIGHTS,
    ENVIRONMENT,
    EVALUATIONS,
    FILTERS,
    HEADER,
    LOSS_WEIGHTS,
    PLANS,
    ROUNDS,
    SUMMARY,
    TASKS,
    TOKEN_SAMPLES,
    TOKEN_WEIGHTS,
    VERSION,
    Change,
    Cost,
    DomainWeights,
    Environment,
    Evaluation,
    Filtering,
    Header,
    Origin,
    Round,
    Start,
    Summary,
    TokensOfStep,
    TokenWeights,
    from_json,
    to_json,
)

RESULTS = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "predict_results.json")
"""Files that LLaMA-Factory writes beside the record when a training has ended."""

T = TypeVar("T")

_UNTIL = "config-until-step-"
_TAKEN_ALONG = (
    HEADER, ROUNDS, EVALUATIONS, LOSS_WEIGHTS, TOKEN_WEIGHTS, TOKEN_SAMPLES, CONFIGURATION, ENVIRONMENT, CHANGES,
)  # fmt: skip


class RunWriter:
    """Writes the record of one run.

    Args:
        output_dir: LLaMA-Factory's output folder of the run.

    Raises:
        ConfigError: if the folder cannot be written to.
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER
        self._starts: list[Start] = []
        """Environment of each start of the run, first start first."""
        self._header = Header(VERSION)
        self._plans: PlanWriter | None = None
        """Writer of the plans. None before :meth:`begin`."""
        self._filters: PlanWriter | None = None
        """Writer of the filters' decisions. None before :meth:`begin`."""
        self._rounds: set[int] = set()
        """Numbers of the rounds that are on record from before this start."""
        self.last_tokens: int | None = None
        """The last step with a line in ``token_samples.jsonl``. None before the first line."""
        try:
            (self.folder / PLANS).mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / ".writable", b"")
            (self.folder / ".writable").unlink()
        except OSError as error:
            raise ConfigError(f"output_dir: {output_dir} cannot be written to ({error.strerror or error}).") from error

    def begin(
        self,
        configuration: dict[str, Any],
        kept_rounds: int | None,
        step: int = 0,
        *,
        domains: Mapping[str, int] | None = None,
        methods: Mapping[str, str] | None = None,
        plugins: Mapping[str, bytes] | None = None,
        start: Start | None = None,
    ) -> Evaluation | None:
        """Start or continue the record, and return the last evaluation in it, if any.

        Args:
            configuration: the recorded form of the configuration.
            kept_rounds: number of rounds that a resumed run keeps; None for a new run.
            step: number of optimizer steps done before this start.
            domains: number of samples of each domain in the pool; None if no rounds are planned.
            methods: method of each part of the section, from this start on.
            plugins: source code of the plug-in files, by their names in the record.
            start: entry of this start in ``environment.json``.
        """
        evaluations: list[Evaluation] = []
        rounds: list[Round] = []
        if kept_rounds is not None:
            # Everything recorded after the checkpoint is dropped: the resumed run makes the same decisions again.
            self._header = read_header(self.folder) or self._header
            rounds = self._keep(ROUNDS, Round, lambda each: each.round < kept_rounds)
            evaluations = self._keep(EVALUATIONS, Evaluation, lambda each: each.step <= step)
            self._keep_loss_weights(step)
            self._keep(TOKEN_WEIGHTS, TokenWeights, lambda each: each.step <= step)
            kept_tokens = self._keep(TOKEN_SAMPLES, TokensOfStep, lambda each: each.step <= step)
            self.last_tokens = kept_tokens[-1].step if kept_tokens else None
        methods_so_far = self._header.with_methods(kept_rounds or 0, dict(methods or {}))
        self._header = replace(self._header, domains=dict(domains or {}), methods=methods_so_far)
        self._write(HEADER, self._header)
        self._rounds = {each.round for each in rounds}
        kept = [each.plan for each in rounds if each.plan is not None]
        self._plans = PlanWriter(self.folder / PLANS, list(self._header.domains), kept)
        tables = [filtered.table for each in rounds for filtered in each.filters if filtered.table is not None]
        self._filters = PlanWriter(self.folder / FILTERS, list(self._header.domains), tables)
        self._set_tasks_aside()
        for name in (SUMMARY, DOMAIN_WEIGHTS):
            (self.folder / name).unlink(missing_ok=True)  # only a finished run has these files
        for name, source in (plugins or {}).items():
            write_atomically(self.folder / PLUGINS / name, source)
        self._starts = [*(read_environment(self.folder).starts if kept_rounds is not None else []), start or Start(0)]
        self._write_environment()
        text = yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / CONFIGURATION, text.encode())
        return evaluations[-1] if evaluations else None

    def _write_environment(self) -> None:
        """Write the starts of the run."""
        self._write(ENVIRONMENT, Environment(self._starts))

    def open_new(self) -> str:
        """Begin the record of a new run, and return its identity.

        An earlier record, the results that LLaMA-Factory left beside it and all checkpoints are moved to a separate
        folder.
        """
        self._set_aside()
        identity = new_identity()
        write_identity(self.folder, identity)
        return identity

    def open_continued(self, checkpoint: Path, run: str, step: int) -> str:
        """Begin the record of a run that resumes from another run's checkpoint, and return its identity.

        The earlier rounds are copied if the record of the other run is found beside the checkpoint.

        Args:
            checkpoint: folder of the checkpoint.
            run: identity of the run that wrote the checkpoint.
            step: number of optimizer steps done in the checkpoint.
        """
        self._set_aside(keep=checkpoint)
        found = [each for each in (checkpoint.parent / FOLDER, checkpoint.parent) if read_identity(each) == run]
        if found:
            for path in found[0].iterdir():
                if path.name in (PLANS, FILTERS, PLUGINS):
                    shutil.copytree(path, self.folder / path.name, dirs_exist_ok=True)
                elif path.name in _TAKEN_ALONG or path.name.startswith(_UNTIL):
                    shutil.copy2(path, self.folder / path.name)
        else:
            print(
                f"dataflex: the record of the run that wrote {checkpoint} is not beside it, so the rounds before step "
                f"{step} are not in this run's record"
            )
        identity = new_identity()
        write_identity(self.folder, identity, Origin(run, step, str(checkpoint.absolute())))
        return identity

    def open_resumed(self, step: int) -> str:
        """Continue the record of a run, and return its identity.

        Checkpoints of another run, and checkpoints of this run after ``step``, are moved to a separate folder. The user
        may have put the first ones here. The second ones may differ from the checkpoints that this run will write.
        """
        identity = read_identity(self.folder)
        assert identity is not None
        self._move_aside(
            [each for each, marker in marked(self.folder.parent) if marker.run != identity or marker.step > step],
            "checkpoints that this run does not resume from",
        )
        for name in RESULTS:
            (self.folder.parent / name).unlink(missing_ok=True)  # the run had finished, and is trained further
        return identity

    def _set_aside(self, keep: Path | None = None) -> None:
        """Move the files of an earlier run in the same folder to a separate folder.

        All files are moved into the record first, so that they stay together even if this is interrupted.

        Args:
            keep: a checkpoint that is still to be read.
        """
        output_dir = self.folder.parent
        left = [path for path in checkpoints(output_dir) if keep is None or not path.samefile(keep)]
        if not left and not (self.folder / CONFIGURATION).exists():
            return  # the folder is empty, or holds a run that was killed before it began
        for path in [*(output_dir / name for name in RESULTS if (output_dir / name).exists()), *left]:
            path.rename(self.folder / path.name)
        aside = _earlier(self.folder)
        self.folder.rename(aside)
        with_them = f" with its {len(left)} checkpoints" if left else ""
        cut = not left and keep is None and not (aside / SUMMARY).exists()
        anew = ". It was stopped before its first checkpoint (save_steps), so this run begins at step 0" if cut else ""
        print(f"dataflex: the record of an earlier run in this folder is kept as {aside}{with_them}{anew}")
        (self.folder / PLANS).mkdir(parents=True)

    def _move_aside(self, folders: list[Path], what: str) -> None:
        """Move folders to a separate folder, and print their names."""
        if not folders:
            return
        aside = _earlier(self.folder)
        aside.mkdir()
        for path in folders:
            path.rename(aside / path.name)
        print(f"dataflex: {what} are kept in {aside}: {', '.join(path.name for path in folders)}")

    def _set_tasks_aside(self) -> None:
        """Move the results of downstream tasks aside, because they belong to the model before this training."""
        tasks = self.folder / TASKS
        if tasks.exists():
            aside = _earlier(tasks)
            tasks.rename(aside)
            print(f"dataflex: the task results of the model before this training are kept as {aside}")

    def _keep(self, name: str, kind: type[T], is_kept: Callable[[T], bool]) -> list[T]:
        """Keep some lines of a file, and return their objects. An incomplete last line is not kept."""
        path = self.folder / name
        lines = [(value, from_json(kind, value, where, self._header)) for where, value in json_lines(path)]
        kept = [(value, each) for value, each in lines if is_kept(each)]
        if path.exists():
            write_atomically(path, "".join(f"{json_text(value)}\n" for value, _ in kept).encode())
        return [each for _, each in kept]

    def _keep_loss_weights(self, step: int) -> None:
        """Keep the rows of the steps up to ``step``."""
        path = self.folder / LOSS_WEIGHTS
        if not path.exists():
            return
        temporary = path.with_suffix(".tmp")
        with (
            path.open(encoding="utf-8", newline="") as stream,
            temporary.open("w", encoding="utf-8", newline="") as out,
        ):
            rows = csv.reader(stream)
            head = next(rows, [])
            kept = (row for row in rows if len(row) == len(head) and int(row[0]) <= step)
            csv.writer(out, lineterminator="\n").writerows(chain([head], kept) if head else [])
        temporary.replace(path)

    def loss_weights(self, step: int, names: tuple[str, ...], weights: np.ndarray) -> None:
        """Record the domain weights in a step's loss.

        Args:
            step: number of optimizer steps done, including this one.
            names: names of the domains.
            weights: weight of each domain, shape (K,).
        """
        path = self.folder / LOSS_WEIGHTS
        is_new = not path.exists() or path.stat().st_size == 0
        with path.open("a", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream, lineterminator="\n")
            if is_new:
                rows.writerow(["step", *names])
            rows.writerow([step, *weights.tolist()])

    def token_weights(self, line: TokenWeights) -> None:
        """Record statistics of the token weights."""
        self._append(TOKEN_WEIGHTS, line)

    def token_samples(self, line: TokensOfStep) -> None:
        """Record the token losses and weights of some samples."""
        self._append(TOKEN_SAMPLES, line)
        self.last_tokens = line.step

    def has_round(self, number: int) -> bool:
        """Return whether a round was on record when this writer began."""
        return number in self._rounds

    def changes(self, step: int, lines: list[Change]) -> None:
        """Record the settings that are changed at a resume, and keep a copy of the configuration up to the resume.

        Changes at a later step are removed: they belong to a continuation of the run that this resume replaces.

        Args:
            step: number of optimizer steps done at the resume.
            lines: one entry for each changed setting.
        """
        self._keep(CHANGES, Change, lambda each: each.resumed_at < step)
        later = sorted(
            (number, path)
            for path in self.folder.glob(f"{_UNTIL}*.yaml")
            if (number := int(path.stem.removeprefix(_UNTIL))) >= step
        )
        earlier = later[0][1] if later else self.folder / CONFIGURATION
        content = earlier.read_bytes() if earlier.exists() else None
        for _, path in later:
            path.unlink()
        if not lines:
            return
        if content is not None and any(line.holds for line in lines):
            write_atomically(self.folder / f"{_UNTIL}{step}.yaml", content)
        for line in lines:
            self._append(CHANGES, line)

    def domain_weights(self, found: DomainWeights) -> None:
        """Write the result of a mixer that weights the loss."""
        self._write(DOMAIN_WEIGHTS, found)

    def round(self, plan: Plan, pool: Pool, cost: Cost) -> None:
        """Record a round before it is trained: first its plan, then its line."""
        assert self._plans is not None
        ids = pool.domain_ids(plan.indices)
        scores = None if plan.scores is None else plan.scores.astype(np.float32, copy=False)
        rows = Rows(plan.indices, ids, pool.row_numbers(plan.indices), scores, plan.ranks)
        line = Round(
            round=plan.slot.number,
            start_step=plan.slot.start_step,
            steps=plan.slot.steps,
            size=int(plan.indices.size),
            domains=_named(pool, np.bincount(ids, minlength=len(pool.domains))),
            plan_sha256=plan.sha256,
            plan=self._plans.write(plan.slot.number, rows),
            proportions=_named(pool, plan.proportions),
            undecided=plan.undecided,
            not_chosen=plan.not_chosen,
            cost=cost,
            warmup=plan.slot.update is None,
            unscored=plan.unscored,
            candidates=plan.candidates,
            epochs=_named(pool, plan.epochs) if len(pool.domains) > 1 and plan.epochs.size else {},
            clipped_shares=plan.clipped_shares,
            filters=[self._filtering(plan.slot.number, stage, pool) for stage in plan.stages],
            standing=list(plan.standing),
            budget=plan.budget,
        )
        self._append(ROUNDS, line)

    def _filtering(self, number: int, stage: StageOutcome, pool: Pool) -> Filtering:
        """Write the samples of a filter in a round, passed samples first, and return the entry for the round's line."""
        table = None
        if stage.samples.size:
            assert self._filters is not None
            (self.folder / FILTERS).mkdir(exist_ok=True)
            order = np.argsort(~stage.is_kept, kind="stable")
            samples = stage.samples[order]
            scores = None if stage.scores is None else stage.scores[order].astype(np.float32, copy=False)
            ranks = None if stage.ranks is None else stage.ranks[order]
            rows = Rows(samples, pool.domain_ids(samples), pool.row_numbers(samples), scores, ranks)
            table = self._filters.write(number, rows)
        return Filtering(
            key=stage.key,
            method=stage.method,
            candidates=stage.candidates,
            kept=stage.kept,
            of_update=stage.of_update,
            unscored=stage.unscored,
            size=stage.samples.size,
            number_kept=int(np.count_nonzero(stage.is_kept)),
            table=table,
        )

    def evaluation(self, line: Evaluation) -> None:
        """Record an evaluation."""
        self._append(EVALUATIONS, line)

    def summary(self, summary: Summary) -> None:
        """Write the summary of the run."""
        self._starts[-1] = replace(self._starts[-1], finished=now())
        self._write_environment()
        self._write(SUMMARY, summary)

    def _append(self, name: str, line: Any) -> None:
        """Append an object to a file of JSON lines."""
        with (self.folder / name).open("a", encoding="utf-8") as stream:
            stream.write(json_text(to_json(line, self._header)) + "\n")

    def _write(self, name: str, value: Any) -> None:
        """Write an object to a JSON file."""
        write_atomically(self.folder / name, (json_text(to_json(value), indent=2) + "\n").encode())


def _named(pool: Pool, values: np.ndarray) -> dict[str, Any]:
    """Return the value of each domain by its name."""
    return dict(zip(pool.domains, values.tolist(), strict=True))


def _earlier(folder: Path) -> Path:
    """Return an unused name beside ``folder``."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-earlier-{number}")).exists():
        number += 1
    return aside
