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

Written by the main process. A resumed run keeps the rounds up to its checkpoint and goes on after them. Results of
downstream tasks (``tasks``), which another command puts here, are set aside when training begins or goes on: they
speak of the model as it was.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dataflex.data.plan import Plan
from dataflex.data.pool import Pool
from dataflex.errors import ConfigError
from dataflex.files import write_atomically
from dataflex.probe.cost import Cost
from dataflex.record.configuration import PLUGINS
from dataflex.record.environment import FILE as ENVIRONMENT
from dataflex.record.environment import now, starts

FOLDER = "dataflex"
LOSS_WEIGHTS = "loss_weights.csv"


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
            kept_rounds: rounds a resumed run keeps; None for a new run, which sets an earlier record aside.
            step: optimizer steps done, after which a resumed run goes on.
            plugins: sources of the plug-in files, by their names in the record.
            start: this start's entry of ``environment.json``.
        """
        evaluations: list[str] = []
        if kept_rounds is None:
            self._set_aside()
        else:
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
        write_atomically(self.folder / ENVIRONMENT, (json.dumps({"starts": self._starts}, indent=2) + "\n").encode())

    def _set_aside(self) -> None:
        """Move the record of an earlier run in the same folder to a name of its own."""
        if not (self.folder / "config.yaml").exists():
            return
        aside = _earlier(self.folder)
        self.folder.rename(aside)
        print(f"dataflex: the record of an earlier run in this folder is kept as {aside}")
        (self.folder / "plans").mkdir(parents=True)

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

    def domain_weights(self, found: dict[str, Any]) -> None:
        """Write what a mixer that weighs the loss found."""
        write_atomically(self.folder / "domain_weights.json", (json.dumps(found, indent=2) + "\n").encode())

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
            "components": components,
            "cost": asdict(cost),
        }
        if plan.slot.update is None:
            line["warmup"] = True
        if plan.budget is not None:
            line["budget"] = plan.budget
        if plan.unscored:
            line["unscored"] = plan.unscored
        if plan.candidates:
            line["candidates"] = plan.candidates
        if len(pool.domains) > 1 and plan.epochs.size:
            line["epochs"] = {name: float(count) for name, count in zip(pool.domains, plan.epochs, strict=True)}
        if plan.capped:
            line["capped"] = plan.capped
        with (self.folder / "rounds.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _write_plan(self, plan: Plan, pool: Pool, ids: np.ndarray) -> None:
        columns = {
            "position": pa.array(np.arange(plan.indices.size, dtype=np.int64)),
            "index": pa.array(plan.indices),
            "domain": pa.DictionaryArray.from_arrays(ids.astype(np.int32), list(pool.domains)),
        }
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
            stream.write(json.dumps(line) + "\n")

    def summary(self, values: dict[str, Any]) -> None:
        """Write what the run took."""
        self._starts[-1]["finished"] = now()
        self._write_environment()
        write_atomically(self.folder / "summary.json", (json.dumps(values, indent=2) + "\n").encode())


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
