"""Files and folders that a run reads and writes, apart from its data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from dataflex import assets
from dataflex.checks.arguments import truthy
from dataflex.config import ASSET_KEYS, RunConfig
from dataflex.errors import Problem, unknown


def problems_of_files(config: RunConfig) -> Iterator[Problem]:
    """Return what is wrong with the model's folder and the one the run writes to."""
    yield from _assets(config)
    yield from _folders(config)


MODEL_FILES = (
    "adapter_model.bin",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
"""Files by which a folder holds a trained model."""


def _assets(config: RunConfig) -> Iterator[Problem]:
    for key in ASSET_KEYS:
        value = str(config.llamafactory.get(key) or "")
        if value.startswith(assets.PREFIX) and value.removeprefix(assets.PREFIX) not in assets.ASSETS:
            yield Problem(key, unknown("asset", value.removeprefix(assets.PREFIX), assets.ASSETS))


def _folders(config: RunConfig) -> Iterator[Problem]:
    model = config.llamafactory.get("model_name_or_path")
    if not model:
        yield Problem("model_name_or_path", "needed: a model folder or hub name.")
    elif str(model).startswith(("/", "./", "../", "~")) and not (Path(model).expanduser() / "config.json").is_file():
        yield Problem("model_name_or_path", f"no model in {str(model)!r} (there is no config.json).")
    output = config.llamafactory.get("output_dir")
    if output is None:
        yield Problem("output_dir", "needed: the folder the run writes to.")
        return
    existing = Path(output).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        yield Problem("output_dir", f"{str(output)!r} cannot be made: {existing} is a file.")
    elif not os.access(existing, os.W_OK):
        yield Problem("output_dir", f"{str(output)!r} cannot be written to: {existing} is read-only.")
    elif _holds_finished_run(config, Path(output)):
        yield Problem(
            "output_dir",
            f"{str(output)!r} holds a finished run; choose another folder (output_dir=...), or set "
            "overwrite_output_dir: true (its record is kept under another name) or, where there are checkpoints, "
            "resume_from_checkpoint: true.",
        )


def _holds_finished_run(config: RunConfig, output: Path) -> bool:
    """Return whether LLaMA-Factory would refuse to train into the folder, or only repeat the end of a finished run."""
    free = truthy(config, "overwrite_output_dir") or truthy(config, "resume_from_checkpoint")
    if free or config.offline or not truthy(config, "do_train") or not output.is_dir():
        return False
    if any(output.glob("checkpoint-*")):
        return _finished(config, output)
    return any((output / name).is_file() for name in MODEL_FILES)


def _finished(config: RunConfig, output: Path) -> bool:
    """Return whether a run came to its end in the folder, its last evaluation included."""
    evaluates = truthy(config, "do_eval") or truthy(config, "eval_strategy")
    files = [output / "trainer_state.json", *([output / "eval_results.json"] if evaluates else [])]
    began = output / "dataflex" / "config.yaml"
    try:
        steps = json.loads((output / "dataflex" / "summary.json").read_bytes())["steps"]
        reached = json.loads(files[0].read_bytes())["global_step"]
        return bool(steps == reached) and all(file.stat().st_mtime >= began.stat().st_mtime for file in files)
    except (OSError, ValueError, LookupError, TypeError):
        return False
