"""Checks of the files and folders that a run reads and writes, apart from its data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from dataflex import assets
from dataflex.config.checks.values import truthy
from dataflex.config.loading import ASSET_KEYS, RunConfig
from dataflex.errors import Problem, did_you_mean, unknown
from dataflex.files import is_path

MODEL_FILES = (
    "adapter_model.bin",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
"""Files that show that a folder holds a trained model."""


def problems_of_files(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of the model's folder, of the output folder, and of files that keys name."""
    yield from _assets(config)
    yield from _model(config)
    yield from _output(config)
    yield from _settings(config)
    yield from _adapters(config)


def _assets(config: RunConfig) -> Iterator[Problem]:
    for key in ASSET_KEYS:
        value = str(config.llamafactory.get(key) or "")
        if value.startswith(assets.PREFIX) and value.removeprefix(assets.PREFIX) not in assets.ASSETS:
            yield Problem(key, unknown("asset", value.removeprefix(assets.PREFIX), assets.ASSETS))


def _model(config: RunConfig) -> Iterator[Problem]:
    model = config.llamafactory.get("model_name_or_path")
    if not model:
        yield Problem("model_name_or_path", "needed: a folder with a model, or a name on the model hub.")
    elif isinstance(model, str) and is_path(model) and not (Path(model).expanduser() / "config.json").is_file():
        yield Problem(
            "model_name_or_path", f"no model in {model!r}: there is no config.json. Give a model folder or a hub name."
        )


def _output(config: RunConfig) -> Iterator[Problem]:
    output = config.llamafactory.get("output_dir")
    if output is None or output == "":
        yield Problem("output_dir", "needed: the folder to which the run writes.")
        return
    if not isinstance(output, str):
        return  # the check of values reports the wrong type
    existing = Path(output).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        yield Problem(
            "output_dir",
            f"the folder {output!r} cannot be created, because {existing} is a file; choose another folder.",
        )
    elif not os.access(existing, os.W_OK):
        yield Problem(
            "output_dir", f"{output!r} cannot be written to, because {existing} is read-only; choose another folder."
        )
    elif _holds_finished_run(config, Path(output)):
        yield Problem(
            "output_dir",
            f"{output!r} holds a finished run. Choose another folder (output_dir=...), or set overwrite_output_dir: "
            "true (the earlier record is kept under another name). To continue from the last checkpoint, set "
            "resume_from_checkpoint: true and more steps.",
        )


def _settings(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of JSON files with settings."""
    for key in ("deepspeed", "fsdp_config", "accelerator_config"):
        given = config.llamafactory.get(key)
        if not isinstance(given, str):
            continue
        path = Path(given).expanduser()
        inline = given.lstrip().startswith("{")
        try:
            found = json.loads(given if inline else path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            others = [file.name for file in path.parent.glob("*.json")]
            yield Problem(key, f"there is no file {given!r}{did_you_mean(path.name, others) or '.'}")
        except (OSError, UnicodeDecodeError) as error:
            yield Problem(key, f"{given!r} cannot be read: {error}.")
        except json.JSONDecodeError as error:
            name = "its text" if inline else given
            yield Problem(key, f"{name} is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}.")
        else:
            if not isinstance(found, dict):
                yield Problem(key, f"{given!r} must hold a JSON object of settings, got {type(found).__name__}.")


def _adapters(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of folders from which adapters and further models are loaded."""
    for key, file in (
        ("adapter_name_or_path", "adapter_config.json"),
        ("ref_model", "config.json"),
        ("ref_model_adapters", "adapter_config.json"),
        ("reward_model_adapters", "adapter_config.json"),
    ):
        given = config.llamafactory.get(key)
        for name in given.split(",") if isinstance(given, str) else ():
            folder = Path(name.strip()).expanduser()
            if name.strip() and is_path(name.strip()) and not (folder / file).is_file():
                yield Problem(key, f"{name.strip()!r} holds nothing to load: there is no {file} in it.")
    tokens = config.llamafactory.get("new_special_tokens_config")
    if isinstance(tokens, str) and not Path(tokens).is_file():
        yield Problem("new_special_tokens_config", f"there is no file {tokens!r}.")


def _holds_finished_run(config: RunConfig, output: Path) -> bool:
    """Return whether LLaMA-Factory would refuse to train into a folder, or only repeat the end of a finished run."""
    free = truthy(config, "overwrite_output_dir") or truthy(config, "resume_from_checkpoint")
    if free or config.offline or not truthy(config, "do_train") or not output.is_dir():
        return False
    has_model = any((output / name).is_file() for name in MODEL_FILES)
    if not any(output.glob("checkpoint-*")):
        return has_model
    # Without a record, a run with a section cannot resume from the checkpoints. It would overwrite the model.
    is_foreign = config.dataflex is not None and not (output / "dataflex" / "run.json").is_file()
    return (is_foreign and has_model) or is_finished(config, output)


def is_finished(config: RunConfig, output: Path) -> bool:
    """Return whether the record of a folder says that its run is finished, including evaluation and prediction."""
    needed = {"model"}
    if truthy(config, "do_eval") or truthy(config, "eval_strategy"):
        needed.add("eval")
    if truthy(config, "do_predict"):
        needed.add("predict")
    try:
        saved = json.loads((output / "dataflex" / "summary.json").read_bytes())["saved"]
        return needed <= set(saved)
    except (OSError, ValueError, LookupError, TypeError):
        return False
