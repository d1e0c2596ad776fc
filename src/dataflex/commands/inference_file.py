"""Files of a training, given to a command of LLaMA-Factory that uses a model and does not train."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dataflex import assets
from dataflex.config.arguments import inference_keys, is_on, llamafactory_keys
from dataflex.config.loading import ASSET_KEYS, SECTION, problems_of_masks
from dataflex.config.yaml_file import read_yaml
from dataflex.errors import ConfigError

_OURS = re.compile(rf"\b{SECTION}[\"']?\s*[:.=]|\b{assets.PREFIX}")
"""Text of a file or an override that only DataFlex understands."""


@contextmanager
def arguments_for_llamafactory(words: list[str]) -> Iterator[list[str]]:
    """Yield a configuration file and overrides as LLaMA-Factory can read them.

    They are the given ones, unless the file or an override has a ``dataflex:`` section or an ``asset:NAME``. Then a
    temporary file replaces them.

    Args:
        words: the file and the overrides.

    Raises:
        ConfigError: if the file must be replaced and has errors, or if its training has no result.
    """
    path, overrides = Path(words[0]), words[1:]
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    if not any(_OURS.search(each) for each in (text, *overrides)):
        yield words
        return
    raw = read_yaml(path, overrides)
    keys, notes = keys_for_inference(raw, {override.partition("=")[0] for override in overrides}, str(path))
    for note in notes:
        print(f"dataflex: note: {note}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="dataflex-") as folder:
        file = Path(folder) / "arguments.yaml"
        file.write_text(yaml.safe_dump(keys, allow_unicode=True, sort_keys=False), encoding="utf-8")
        yield [str(file)]


def keys_for_inference(raw: Mapping[str, Any], given: set[str], source: str) -> tuple[dict[str, Any], list[str]]:
    """Return LLaMA-Factory's keys of a file of a training, for a command that uses a model.

    The section and the arguments of the training are left out, because these commands refuse them. The model is the
    result of the training, unless an override names a model or an adapter. Keys that are unknown are kept, so that
    LLaMA-Factory names them.

    Args:
        raw: the merged content of the file.
        given: keys that the command line overrides.
        source: name of the file, for messages.

    Returns:
        The keys, and notes for the user.

    Raises:
        ConfigError: if secrets are masked in the file, an asset is unknown, or the training has no result.
    """
    problems = problems_of_masks(raw)
    if problems:
        raise ConfigError(problems=problems, source=source)
    rest = {key: value for key, value in raw.items() if key != SECTION}
    notes = []
    if SECTION in raw:
        training = [key for key in rest if key in llamafactory_keys() and key not in inference_keys()]
        trained = {} if given & {"model_name_or_path", "adapter_name_or_path"} else _result(rest, source)
        rest = {key: value for key, value in rest.items() if key not in training} | trained
        left = ", ".join([SECTION, *training])
        notes.append(f"LLaMA-Factory's command uses a model and does not train. Left out of {source}: {left}.")
        notes += [f"the model is the result of the training: {key}={value}" for key, value in trained.items()]
    for key in ASSET_KEYS:
        if str(rest.get(key, "")).startswith(assets.PREFIX):
            rest[key] = assets.resolve(str(rest[key]))
    return rest, notes


def _result(keys: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the keys that name the result of a training; none if the file has no training.

    LLaMA-Factory merges the earlier adapters into the model. It trains on the last of them, or, with
    ``create_new_adapter``, a new adapter. In both cases output_dir has the adapter that was trained.
    """
    output = keys.get("output_dir")
    if not output or not is_on(keys.get("do_train")):
        return {}
    folder = Path(str(output))
    adapter = str(keys.get("finetuning_type", "lora")) in ("lora", "oft")
    if not (folder / ("adapter_config.json" if adapter else "config.json")).is_file():
        key = "adapter_name_or_path" if adapter else "model_name_or_path"
        raise ConfigError(
            f"{source}: output_dir {folder} has no trained {'adapter' if adapter else 'model'}. Train it with "
            f"`dataflex-cli train`, or name {'an adapter' if adapter else 'a model'}: {key}=FOLDER."
        )
    if not adapter:
        return {"model_name_or_path": str(folder)}
    given = keys.get("adapter_name_or_path") or []
    earlier = [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)
    kept = earlier if is_on(keys.get("create_new_adapter")) else earlier[:-1]
    return {"adapter_name_or_path": ",".join([*kept, str(folder)])}
