"""Writing the run record: ``<output_dir>/dataflex/`` with every decision of a run and what it cost.

    config.yaml                  the configuration with every default filled in, to be run again
    environment.json             versions, processes, command, and digests of data, model and plug-ins of every start
    plugins/                     the plug-in files as they were
    rounds.jsonl                 one line per round
    evaluations.jsonl            one line per evaluation
    plans/round-NNNNN.parquet    the samples of a round: position, index, domain, score, rank
    loss_weights.csv             the domains' weights in the loss of every step, where a mixer weighs the loss
    domain_weights.json          what such a mixer found, at the run's end
    summary.json                 what the run took, at its end
    run.json                     the run's identity, and the run it goes on from if that has another
    changes.jsonl                the settings that were changed at a resume, from which step on
    config-until-step-N.yaml     the configuration up to such a change

Written by the main process. A resumed run keeps the rounds up to its checkpoint and goes on after them. Results of
downstream tasks (``tasks``), which another command puts here, are set aside when training begins or goes on: they
speak of the model as it was.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dataflex.data.pool import Pool
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.planning.planner import Plan
from dataflex.probe.cost import Cost
from dataflex.record.checkpoint import checkpoints, marked
from dataflex.record.configuration import PLUGINS
from dataflex.record.environment import FILE as ENVIRONMENT
from dataflex.record.environment import starts
from dataflex.record.identity import FOLDER, new_identity, now, read_identity, write_identity
from dataflex.record.selected import row_column

LOSS_WEIGHTS = "loss_weights.csv"
RESULTS = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "predict_results.json")
"""What LLaMA-Factory writes beside the record when a training has ended."""

CHANGES = "changes.jsonl"
FROM_HERE = "from this step on"
"""What a line of it says of a change that has an effect."""
_UNTIL = "config-until-step-"
_TAKEN_ALONG = ("rounds.jsonl", "evaluations.jsonl", LOSS_WEIGHTS, "config.yaml", ENVIRONMENT, CHANGES)


class RunWriter:
    """Writes one run's record.

    Args:
        output_dir: LLaMA-Factory's output folder of the run.

    Raises:
        ConfigError: if the folder cannot be written to.
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER
        self._starts: list[dict[str, Any]] = []
        try:
            (self.folder / "plans").mkdir(parents=True, exist_ok=True)
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
        plugins: Mapping[str, bytes] | None = None,
        start: dict[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Start or go on with the record, and return the last evaluation on it, if any.

        Args:
            configuration: as it is kept.
            kept_rounds: rounds a resumed run keeps; None for a new run.
            step: optimizer steps done, after which a resumed run goes on.
            plugins: sources of the plug-in files, by their names in the record.
            start: this start's entry of ``environment.json``.
        """
        evaluations: list[str] = []
        if kept_rounds is not None:
            # What was recorded after the checkpoint is made again, the same.
            self._keep("rounds.jsonl", "round", kept_rounds - 1)
            evaluations = self._keep("evaluations.jsonl", "step", step)
            self._keep_loss_weights(step)
        self._set_tasks_aside()
        for name in ("summary.json", "domain_weights.json"):
            (self.folder / name).unlink(missing_ok=True)  # they speak of a finished run
        for name, source in (plugins or {}).items():
            write_atomically(self.folder / PLUGINS / name, source)
        self._starts = [*(starts(self.folder.parent) if kept_rounds is not None else []), start or {}]
        self._write_environment()
        text = yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / "config.yaml", text.encode())
        return json.loads(evaluations[-1]) if evaluations else None

    def _write_environment(self) -> None:
        write_atomically(self.folder / ENVIRONMENT, (json_text({"starts": self._starts}, indent=2) + "\n").encode())

    def open_new(self) -> str:
        """Begin the record of a new run, and return its identity.

        An earlier record, the results that LLaMA-Factory left beside it and all checkpoints are moved to a folder of
        their own.
        """
        self._set_aside()
        identity = new_identity()
        write_identity(self.folder, identity)
        return identity

    def open_continued(self, checkpoint: Path, run: str, step: int) -> str:
        """Begin the record of a run that goes on from another one's checkpoint, and return its identity.

        The rounds before are taken along if the record of that run is found beside the checkpoint.

        Args:
            checkpoint: the folder.
            run: identity of the run that wrote it.
            step: optimizer steps done there.
        """
        self._set_aside(keep=checkpoint)
        found = [each for each in (checkpoint.parent / FOLDER, checkpoint.parent) if read_identity(each) == run]
        if found:
            for path in found[0].iterdir():
                if path.name in ("plans", PLUGINS):
                    shutil.copytree(path, self.folder / path.name, dirs_exist_ok=True)
                elif path.name in _TAKEN_ALONG or path.name.startswith(_UNTIL):
                    shutil.copy2(path, self.folder / path.name)
        else:
            print(
                f"dataflex: the record of the run that wrote {checkpoint} is not beside it, so the rounds before step "
                f"{step} are not in this run's record"
            )
        identity = new_identity()
        write_identity(self.folder, identity, {"run": run, "step": step, "checkpoint": str(checkpoint.absolute())})
        return identity

    def open_resumed(self, step: int) -> str:
        """Go on with the record of a run, and return its identity.

        Checkpoints of another run, and those of this one after ``step``, are moved to a folder of their own: the
        first were put here by somebody, and the second need not be what comes now.
        """
        identity = read_identity(self.folder)
        assert identity is not None
        self._move_aside(
            [each for each, marker in marked(self.folder.parent) if marker.run != identity or marker.step > step],
            "checkpoints that this run does not go on from",
        )
        for name in RESULTS:
            (self.folder.parent / name).unlink(missing_ok=True)  # of a finished run, which now goes on
        return identity

    def _set_aside(self, keep: Path | None = None) -> None:
        """Move what an earlier run left in the same folder to a name of its own.

        All goes into the record first, so that it stays together wherever this is cut off.

        Args:
            keep: a checkpoint that is still to be read.
        """
        output_dir = self.folder.parent
        left = [path for path in checkpoints(output_dir) if keep is None or not path.samefile(keep)]
        if not left and not (self.folder / "config.yaml").exists():
            return  # nothing, or a run that was killed before it began
        for path in [*(output_dir / name for name in RESULTS if (output_dir / name).exists()), *left]:
            path.rename(self.folder / path.name)
        aside = _earlier(self.folder)
        self.folder.rename(aside)
        with_them = f" with its {len(left)} checkpoints" if left else ""
        print(f"dataflex: the record of an earlier run in this folder is kept as {aside}{with_them}")
        (self.folder / "plans").mkdir(parents=True)

    def _move_aside(self, folders: list[Path], what: str) -> None:
        if not folders:
            return
        aside = _earlier(self.folder)
        aside.mkdir()
        for path in folders:
            path.rename(aside / path.name)
        print(f"dataflex: {what} are kept in {aside}: {', '.join(path.name for path in folders)}")

    def _set_tasks_aside(self) -> None:
        """Move results of downstream tasks of the model as it was to a name of their own."""
        tasks = self.folder / "tasks"
        if tasks.exists():
            aside = _earlier(tasks)
            tasks.rename(aside)
            print(f"dataflex: the task results of the model before this training are kept as {aside}")

    def _keep(self, name: str, key: str, last: int) -> list[str]:
        """Keep the lines of a file whose ``key`` is at most ``last``, and return them."""
        path = self.folder / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _number(line, key) <= last]
        if len(kept) < len(lines):
            write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        return kept

    def _keep_loss_weights(self, step: int) -> None:
        """Keep the rows of steps up to ``step``."""
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
        """Record the weights of the domains in a step's loss.

        Args:
            step: optimizer steps done, that one included.
            names: of the domains.
            weights: shape (K,).
        """
        path = self.folder / LOSS_WEIGHTS
        is_new = not path.exists() or path.stat().st_size == 0
        with path.open("a", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream, lineterminator="\n")
            if is_new:
                rows.writerow(["step", *names])
            rows.writerow([step, *weights.tolist()])

    def has_round(self, number: int) -> bool:
        """Return whether a round is on record."""
        path = self.folder / "rounds.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return any(_number(line, "round") == number for line in lines)

    def changes(self, step: int, lines: list[dict[str, Any]]) -> None:
        """Record the settings that are changed at a resume, and keep the configuration up to there.

        What was changed at a later step, by a run that is given up now, is taken back.

        Args:
            step: optimizer steps done where the run goes on.
            lines: one for each setting.
        """
        self._keep(CHANGES, "resumed_at", step - 1)
        later = sorted(
            (number, path)
            for path in self.folder.glob(f"{_UNTIL}*.yaml")
            if (number := int(path.stem.removeprefix(_UNTIL))) >= step
        )
        earlier = later[0][1] if later else self.folder / "config.yaml"
        content = earlier.read_bytes() if earlier.exists() else None
        for _, path in later:
            path.unlink()
        if not lines:
            return
        if content is not None and any(line["effect"] == FROM_HERE for line in lines):
            write_atomically(self.folder / f"{_UNTIL}{step}.yaml", content)
        with (self.folder / CHANGES).open("a", encoding="utf-8") as stream:
            stream.writelines(json_text(line) + "\n" for line in lines)

    def domain_weights(self, found: dict[str, Any]) -> None:
        """Write what a mixer that weighs the loss found."""
        write_atomically(self.folder / "domain_weights.json", (json_text(found, indent=2) + "\n").encode())

    def round(self, plan: Plan, pool: Pool, components: dict[str, str], cost: Cost) -> None:
        """Record a round before it is trained: its plan first, then its line."""
        ids = pool.domain_ids(plan.indices)
        counts = np.bincount(ids, minlength=len(pool.domains))
        self._write_plan(plan, pool, ids)
        line: dict[str, Any] = {
            "round": plan.slot.number,
            "start_step": plan.slot.start_step,
            "steps": plan.slot.steps,
            "size": int(plan.indices.size),
            "plan_sha256": plan.sha256,
            "pool": {name: int(size) for name, size in zip(pool.domains, pool.domain_sizes, strict=True)},
            "domains": {name: int(count) for name, count in zip(pool.domains, counts, strict=True)},
            "proportions": {name: float(share) for name, share in zip(pool.domains, plan.proportions, strict=True)},
            "components": {key: name for key, name in components.items() if key not in plan.undecided},
            "cost": asdict(cost),
        }
        if plan.slot.update is None:
            line["warmup"] = True
        if plan.budget is not None:
            line["budget"] = plan.budget
        if plan.undecided:
            line["undecided"] = plan.undecided
        if plan.not_chosen:
            line["not_chosen"] = plan.not_chosen
        if plan.unscored:
            line["unscored"] = plan.unscored
        if plan.candidates:
            line["candidates"] = plan.candidates
        if len(pool.domains) > 1 and plan.epochs.size:
            line["epochs"] = {name: float(count) for name, count in zip(pool.domains, plan.epochs, strict=True)}
        if plan.capped:
            line["capped"] = plan.capped
        with (self.folder / "rounds.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json_text(line) + "\n")

    def _write_plan(self, plan: Plan, pool: Pool, ids: np.ndarray) -> None:
        columns = {
            "position": pa.array(np.arange(plan.indices.size, dtype=np.int64)),
            "index": pa.array(plan.indices),
            "domain": pa.DictionaryArray.from_arrays(ids.astype(np.int32), list(pool.domains)),
        }
        if pool.rows_of:
            columns["row"] = row_column(pool, plan.indices)
        if plan.scores is not None:
            columns["score"] = pa.array(plan.scores, from_pandas=True)
        if plan.ranks is not None:
            columns["rank"] = pa.array(plan.ranks, mask=plan.ranks == 0)
        path = self.folder / "plans" / f"round-{plan.slot.number:05d}.parquet"
        temporary = path.with_suffix(".tmp")
        pq.write_table(pa.table(columns), temporary)
        temporary.replace(path)

    def evaluation(self, line: dict[str, Any]) -> None:
        """Record what an evaluation found."""
        with (self.folder / "evaluations.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json_text(line) + "\n")

    def summary(self, values: dict[str, Any]) -> None:
        """Write what the run took."""
        self._starts[-1]["finished"] = now()
        self._write_environment()
        write_atomically(self.folder / "summary.json", (json_text(values, indent=2) + "\n").encode())


def _earlier(folder: Path) -> Path:
    """Return a name beside ``folder`` that is free."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-earlier-{number}")).exists():
        number += 1
    return aside


def _number(line: str, key: str) -> float:
    """Return a number of a line; infinity for one whose writing was cut off."""
    try:
        return json.loads(line)[key]
    except (ValueError, KeyError, TypeError):
        return float("inf")
