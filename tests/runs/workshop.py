"""Trainings of several tests that are started together: their specifications, their start and their results."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
from launch import ON_THE_CPU, run_script
from records import round_lines

HERE = Path(__file__).parent


@dataclass
class Workshop:
    """Collects specifications of runs, starts the runs together, and reads their files.

    Attributes:
        root: Folder of the output folders.
        model: Model of the runs.
        dropout_model: Model of the runs with ``dropout=True``.
        data: LLaMA-Factory's ``dataset_dir``.
        environment: Environment variables of the starts.
        specs: Runs that were added after the last start.
    """

    root: Path
    model: Path
    dropout_model: Path
    data: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(ON_THE_CPU))
    specs: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        name: str,
        *,
        plain: bool = False,
        stop_at: int | None = None,
        die_at: int | None = None,
        keep: int | None = None,
        **changes: Any,
    ) -> Path:
        """Add a run and return its output folder.

        Args:
            name: Name of the run and of its output folder.
            plain: Whether LLaMA-Factory trains without DataFlex.
            stop_at: Step at whose beginning the run is killed.
            die_at: Number of the moment at which the run is killed.
            keep: Step whose micro-batches and gradient are stored.
            changes: Arguments that differ from ``tiny.arguments``. ``into`` names another run's folder to write to,
                and ``dropout=True`` takes the model with dropout.
        """
        output = self.root / changes.pop("into", name)
        model = self.dropout_model if changes.pop("dropout", False) else self.model
        args = tiny.arguments(model, self.data, output, **changes)
        self.specs.append({"name": name, "args": args, "plain": plain, "stop_at": stop_at, "die_at": die_at})
        self.specs[-1]["keep"] = keep
        return output

    def repeat(self, name: str, source: str) -> None:
        """Add a run that repeats the recorded configuration of another run."""
        record = self.root / source / "dataflex" / "config.yaml"
        args = {"output_dir": str(self.root / name)}
        self.specs.append({"name": name, "args": args, "record": str(record)})

    def start(self, processes: int, script: str = "runner.py", *, torchrun: bool = False) -> None:
        """Run the added specifications in one start of ``processes`` processes, by torchrun if there are several."""
        spec = self.root / f"spec-{processes}-{len(list(self.root.iterdir()))}.json"
        spec.write_text(json.dumps(self.specs))
        self.specs = []
        run_script(
            HERE / script,
            spec,
            log=spec.with_suffix(".log"),
            processes=processes,
            torchrun=torchrun,
            environment=self.environment,
        )

    def trace(self, name: str, rank: int = 0) -> dict[str, Any]:
        """Return the trace of a finished run. A run that failed fails the test."""
        result = json.loads((self.root / name / f"trace-{rank}.json").read_text())
        assert result["error"] in (None, "killed"), (name, result["error"])
        return result

    def rounds(self, name: str) -> list[dict[str, Any]]:
        """Return the recorded rounds of a run."""
        return round_lines(self.root / name)

    def plan_digests(self, name: str) -> list[str]:
        """Return the digests of a run's plans in order."""
        return [line["plan_sha256"] for line in self.rounds(name)]

    def copy(self, source: str, target: str) -> None:
        """Copy a run's folder."""
        shutil.copytree(self.root / source, self.root / target)
