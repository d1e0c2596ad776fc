"""The pipeline of LESS's authors (``cost_less_authors.py``) against ``dataflex-cli features`` and ``score``.

Both read the same warm-up checkpoints and the same tokenized samples. In one pair of seconds each pipeline handles one
checkpoint, in a process that has loaded the model before: the features of pool and validation samples, and the
cosines. Then both commands run as a user runs them, with the starts of their processes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from turns import Serve, Turns, in_turn, ratio, row, run_command

Sample = dict[str, list[int]]
Floats = NDArray[np.floating[Any]]

TUNINGS: dict[str, dict[str, Any]] = {
    "lora_8": {"finetuning_type": "lora", "lora_rank": 8},
    "lora_128": {"finetuning_type": "lora", "lora_rank": 128},
    "full": {"finetuning_type": "full"},
}
LORA_TARGET = "q_proj,k_proj,v_proj,o_proj"
CHECKPOINTS = 4
DIM = 8192
BATCH = 4
CUTOFF = 64


@dataclass(frozen=True)
class Inputs:
    """What both pipelines read.

    Attributes:
        folder: has ``warm/checkpoint-N``, ``select.yaml`` and ``samples.json``.
        model: the model's folder.
        tuning: a key of ``TUNINGS``.
        dim: length of a projected gradient.
    """

    folder: Path
    model: str
    tuning: str
    dim: int = DIM

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of the warm-up's checkpoints, in order."""
        return [self.folder / "warm" / f"checkpoint-{step}" for step in range(1, CHECKPOINTS + 1)]

    @property
    def file(self) -> Path:
        """The file of the commands."""
        return self.folder / "select.yaml"

    @property
    def samples(self) -> dict[str, list[Sample]]:
        """The tokenized training samples, and the validation samples by sub-task."""
        return json.loads((self.folder / "samples.json").read_text())


# Inputs


def write_inputs(data: Path, inputs: Inputs, size: int) -> None:
    """Write the pool, the validation samples of two sub-tasks, the warm-up's samples and the YAML file.

    Args:
        data: has ``instruct/pool_permissive.jsonl`` and ``eval/mmlu_val_alpaca.jsonl``.
        inputs: where to write.
        size: samples of the pool; half as many validation samples.
    """
    import yaml

    rows = lines(data / "instruct" / "pool_permissive.jsonl", 2 * size)
    held = lines(data / "eval" / "mmlu_val_alpaca.jsonl", 400)
    subjects = list(dict.fromkeys(row["subject"] for row in held))[:2]
    each = max(1, size // 4)
    held = [row for name in subjects for row in [row for row in held if row["subject"] == name][:each]]
    info = {}
    for name, part in (("pool", rows[:size]), ("warm", rows[size:]), ("held", held)):
        (inputs.folder / f"{name}.json").write_text(json.dumps(part))
        info[name] = {"file_name": f"{name}.json"}
    (inputs.folder / "dataset_info.json").write_text(json.dumps(info))
    inputs.file.write_text(yaml.safe_dump(selecting(inputs), sort_keys=False))


def lines(file: Path, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a file of JSON lines."""
    with file.open(encoding="utf-8") as source:
        return [json.loads(line) for line, _ in zip(source, range(count), strict=False)]


def arguments(inputs: Inputs) -> dict[str, Any]:
    """Return the training arguments that the warm-up and the scoring have in common."""
    tuning = TUNINGS[inputs.tuning]
    return {
        "model_name_or_path": inputs.model,
        "stage": "sft",
        "do_train": True,
        **tuning,
        **({"lora_target": LORA_TARGET} if tuning["finetuning_type"] == "lora" else {}),
        "dataset_dir": str(inputs.folder),
        "template": "default",
        "cutoff_len": CUTOFF,
        "disable_gradient_checkpointing": True,  # as in the authors' steps: no activation is computed twice
        "report_to": "none",
        "disable_tqdm": True,
    }


def warming(inputs: Inputs) -> dict[str, Any]:
    """Return the warm-up run: one step for each checkpoint."""
    return {
        **arguments(inputs),
        "dataset": "warm",
        "output_dir": str(inputs.folder / "warm"),
        "per_device_train_batch_size": 2,
        "learning_rate": 1.0e-4 if inputs.tuning == "full" else 1.0e-3,
        "max_steps": CHECKPOINTS,
        "save_steps": 1,
        "logging_steps": 1,
    }


def selecting(inputs: Inputs) -> dict[str, Any]:
    """Return the file of ``dataflex-cli features`` and ``score``."""
    select = {
        "method": "less",
        "validation": ["held"],
        "subtask_column": "subject",
        "preconditioner": "adam_less",
        "proj_dim": inputs.dim,
        "checkpoints": [str(each) for each in inputs.checkpoints],
    }
    common = {**arguments(inputs), "dataset": "pool", "per_device_train_batch_size": BATCH}
    return {**common, "output_dir": str(inputs.folder / "select"), "dataflex": {"select": select}}


def warm_up(inputs: Inputs, serve: Serve) -> None:
    """Train the warm-up, and write the tokenized samples."""
    from dataflex.config.loading import split_config
    from dataflex.integrations.llamafactory.pool_only import pool_of
    from dataflex.integrations.llamafactory.run import run

    run(split_config(warming(inputs)))
    found: dict[str, list[Sample]] = {}
    for name, column in (("pool", None), ("held", "subject")):
        config = split_config({**arguments(inputs), "dataset": name, "output_dir": str(inputs.folder)})
        pool, _ = pool_of(config, column)
        for domain, low, high in zip(pool.domains, pool.offsets, pool.offsets[1:], strict=False):
            rows = [dict(each) for each in pool.rows(np.arange(low, high))]
            found[domain] = [{key: list(map(int, each[key])) for key in ("input_ids", "labels")} for each in rows]
    (inputs.folder / "samples.json").write_text(json.dumps(found))
    serve(lambda _: None)


# Both pipelines


def theirs(inputs: Inputs, serve: Serve) -> None:
    """Answer the number of a checkpoint, or ``whole``: the first checkpoint in float32, all elements projected."""
    import torch
    from cost_less_authors import Steps, load_model

    lora = TUNINGS[inputs.tuning]["finetuning_type"] == "lora"
    model = load_model(inputs.model, inputs.checkpoints[0] if lora else None)
    subtasks = inputs.samples
    pool = subtasks.pop("pool")

    def work(asked: int | str) -> Any:
        if asked == "whole":
            return Steps(model, inputs.dim, torch.float32, whole=True).run(inputs.checkpoints[0], pool, subtasks)
        return Steps(model, inputs.dim).run(inputs.checkpoints[int(asked)], pool, subtasks)

    def warm() -> None:
        Steps(model, inputs.dim).run(
            inputs.checkpoints[0], pool[:1], {name: part[:1] for name, part in subtasks.items()}
        )

    serve(work, warm)


def ours(inputs: Inputs, serve: Serve) -> None:
    """Answer the number of a checkpoint, or ``identity``: the first checkpoint, unprojected gradients."""
    from dataflex.commands import offline
    from dataflex.config.loading import load_config
    from dataflex.integrations.llamafactory.run import load_only
    from dataflex.selectors.less import LessSelector

    config = load_config(inputs.file)
    output = inputs.folder / "in-process"

    def when_loaded(run: Any, model: Any) -> None:
        selector = run.inputs.components.select[0].component
        ctx = offline._context(run, model, selector)
        everyone = np.arange(ctx.pool.size)

        def of(number: int, **changes: Any) -> LessSelector:
            one = {"checkpoints": [str(inputs.checkpoints[number])], "checkpoint_weights": [1.0]}
            return LessSelector(selector.params.model_copy(update={**one, **changes}))

        def work(asked: int | str) -> Floats:
            if asked == "identity":
                plain = of(0, projection="identity", feature_dir=None)
                return plain.measured(ctx, everyone, plain.params.settings())
            one = of(int(asked))
            one.extract(ctx, everyone)
            return one.measured(ctx, everyone, one.params.settings())

        plain = of(0, feature_dir=None)
        serve(work, lambda: plain.measured(ctx, everyone[:2], plain.params.settings()))

    load_only(offline.prepared(config, output, None), when_loaded)


# The part


def measure(settings: Any, folder: Path, tuning: str) -> dict[str, Any]:
    """Return the part of one tuning; see ``cost.Settings``."""
    from dataflex import assets

    inputs, commands = Inputs(folder, str(assets.resolve(settings.model)), tuning), tuning in settings.commands
    write_inputs(settings.data, inputs, settings.samples)
    print(f"less_{tuning}: warm-up (not timed)", flush=True)
    with in_turn({"warm": warm_up}, inputs, folder / "logs"):
        pass
    return {f"less_{tuning}": of_inputs(inputs, settings.device, commands=commands)}


def of_inputs(inputs: Inputs, device: str, *, commands: bool) -> dict[str, Any]:
    """Measure both pipelines, and the commands as a user runs them if asked."""
    from dataflex.probe.checkpoints import learning_rates

    print(f"less_{inputs.tuning}", flush=True)
    logs = inputs.folder / "logs"
    with in_turn({"authors": theirs, "dataflex": ours}, inputs, logs) as turns:
        found = turns.measure(range(CHECKPOINTS))
        checks = exact_checks(turns, inputs) if inputs.tuning == "lora_8" else {}
    samples = inputs.samples
    size, everyone = len(samples["pool"]), sum(map(len, samples.values()))
    answers = found["authors"].values
    seconds = [each.gradient_seconds + each.projection_seconds for each in answers]
    authors = row(found["authors"], everyone, seconds, reckoned=answers[0].reckoned)
    authors["gradient_seconds"] = [each.gradient_seconds for each in answers]
    authors["projection_seconds"] = [each.projection_seconds for each in answers]
    if authors["peak_bytes"] is not None:  # the sums of validation gradients serve the exact scores alone
        authors["peak_bytes"] -= 4 * answers[0].elements * (len(inputs.samples) - 1)
    mine = row(found["dataflex"], everyone)
    weights = np.array(learning_rates(inputs.checkpoints))
    exact = np.tensordot(weights, np.stack([each.exact for each in answers]), 1).max(1)
    scores = np.tensordot(weights, np.stack(found["dataflex"].values), 1).max(1)
    named = {"checkpoints": CHECKPOINTS, "cutoff": CUTOFF, "elements": answers[0].elements, "dim": inputs.dim}
    part: dict[str, Any] = {
        "about": "seconds of one checkpoint; of the commands: all checkpoints, with the starts of both processes",
        "settings": {"pool": size, "validation": everyone - size, **named},
        "variants": {"authors": authors, "dataflex": mine},
        "ratios": {"authors / dataflex": ratio(authors, mine)},
        "agreement": {
            "projected scores against the authors' unprojected scores": compared(scores, exact, inputs.dim),
            **checks,
        },
    }
    if commands:
        each, peak, written = run_commands(inputs, logs)
        whole = {"seconds": [authors["start_seconds"] + sum(seconds)], "reckoned": authors["reckoned"]}
        both = {"seconds": [sum(each.values())], "of": each, "samples": everyone, "reckoned": False}
        part["variants"]["dataflex commands"] = both | {"peak_bytes": peak if device == "cpu" else None}
        part["ratios"]["authors with one start / dataflex commands"] = ratio(whole, both)
        part["agreement"]["scores of the commands against those in the process"] = {
            "largest_difference": largest(written, scores)
        }
    return part


def exact_checks(turns: Turns, inputs: Inputs) -> dict[str, Any]:
    """Compare what both compute on the first checkpoint: without a projection, and with the whole dense projection."""
    mine, whole = turns.ask("dataflex", "identity"), turns.ask("authors", "whole")
    reckoned = turns.found["authors"].values[0].projection_seconds
    return {
        "unprojected, first checkpoint": {"largest_difference": largest(mine, whole.exact)},
        "authors' dense projection against no projection, first checkpoint": compared(
            whole.projected.max(1), whole.exact.max(1), inputs.dim
        ),
        "seconds of the dense projection, first checkpoint": {"whole": whole.projection_seconds, "reckoned": reckoned},
    }


def compared(projected: Floats, exact: Floats, dim: int) -> dict[str, float]:
    """Return how projected scores agree with exact ones; 1 / sqrt(k) is a cosine's standard deviation."""
    from scipy.stats import spearmanr

    return {
        "largest_difference": largest(projected, exact),
        "rms_difference": float(np.sqrt(np.mean((projected - exact) ** 2))),
        "bound_of_the_standard_deviation": dim**-0.5,
        "spearman": float(spearmanr(projected, exact).statistic),
    }


def largest(first: Floats, second: Floats) -> float:
    return float(np.abs(np.asarray(first, dtype=np.float64) - second).max())


def run_commands(inputs: Inputs, logs: Path) -> tuple[dict[str, float], int, Floats]:
    """Run ``features`` and ``score`` as a user does; return the seconds of each, the peak memory and the scores."""
    import pyarrow.parquet as pq

    file, output = inputs.file, inputs.folder / "commands"
    seconds, peaks = {}, []
    for command in ("features", "score"):
        arguments = [sys.executable, "-m", "dataflex", command, str(file), "--output", str(output)]
        seconds[command], peak = run_command(arguments, logs / f"{command}.txt")
        print(f"  dataflex-cli {command}: {seconds[command]:.2f} s", flush=True)
        peaks.append(peak)
    return seconds, max(peaks), np.array(pq.read_table(output / "scores.parquet")["score"].to_pylist())
