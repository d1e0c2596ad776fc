"""What DataFlex adds to a checkpoint: its state, and a marker that says every file was written.

``dataflex_state.npz`` holds the round, the plan, the position in it and the components' states;
``dataflex_complete.json``, written last, lists every file of the checkpoint with its size. A checkpoint without the
marker, or whose files differ from it, was cut off while it was written and is not used.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.components import State
from dataflex.errors import CheckpointError, ComponentError
from dataflex.files import write_atomically

STATE_FILE = "dataflex_state.npz"
MARKER_FILE = "dataflex_complete.json"
STATE_VERSION = 3
_TREE_KEY = "__tree__"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def write_state(folder: Path, state: State) -> None:
    """Write a state of JSON values and numpy arrays, nested in dicts, as one file."""
    arrays: dict[str, np.ndarray] = {}
    tree = _split(state, arrays)
    buffer = io.BytesIO()
    arrays[_TREE_KEY] = np.array(json.dumps(tree))
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(folder / STATE_FILE, buffer.getvalue())


def read_state(folder: Path) -> State:
    """Return the state of a checkpoint.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE_FILE}: it was not written by a run with a dataflex: section, so there is no round "
            "to go on with."
        )
    try:
        with np.load(path, allow_pickle=False) as stored:
            state = _join(json.loads(str(stored[_TREE_KEY])), stored)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(f"{path} has version {state.get('version')}, this release reads {STATE_VERSION}.")
    return state


def _split(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return ``value`` with every array replaced by a reference into ``arrays``."""
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise ComponentError(f"state_dict() holds an array of {value.dtype}; use JSON values and numeric arrays.")
        key = f"array_{len(arrays)}"
        arrays[key] = value
        return {_TREE_KEY: key}
    if isinstance(value, dict):
        return {name: _split(item, arrays) for name, item in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return value


def _join(tree: Any, arrays: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {_TREE_KEY}:
        return arrays[tree[_TREE_KEY]]
    return {name: _join(item, arrays) for name, item in tree.items()}


def unmark(folder: Path) -> None:
    """Take back the marker of a checkpoint that is about to be written again."""
    (folder / MARKER_FILE).unlink(missing_ok=True)


def mark_complete(folder: Path) -> None:
    """Write the marker, with every file's size."""
    marker = {"files": _sizes(folder)}
    write_atomically(folder / MARKER_FILE, json.dumps(marker, indent=1).encode())


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER_FILE)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def problem_of(folder: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None where it is complete."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files = dict(json.loads((folder / MARKER_FILE).read_text())["files"])
    except FileNotFoundError:
        return f"it has no {MARKER_FILE}, so it was cut off while it was written (or not by a DataFlex run)"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MARKER_FILE} cannot be read"
    found = _sizes(folder)
    for name, size in files.items():
        if found.get(name) != size:
            return f"its file {name} is missing" if name not in found else f"its file {name} has another size"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest step first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _CHECKPOINT.match(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def last_complete(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of a run, and a line for each newer one that had to be left."""
    left: list[str] = []
    for folder in checkpoints(output_dir):
        problem = problem_of(folder)
        if problem is None:
            return folder, left
        left.append(f"{folder} is not used: {problem}.")
    return None, left


def resolve(requested: str | bool | None, explicit: bool, output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from.

    Args:
        requested: what LLaMA-Factory would resume from: a path, True for the last one, or nothing.
        explicit: whether the user named that path.
        output_dir: the run's folder.

    Raises:
        CheckpointError: if the user named a checkpoint that cannot be used, or asked to resume and there is none.
    """
    if not requested:
        return None, []
    if explicit and not isinstance(requested, bool):
        folder = Path(requested)
        problem = problem_of(folder)
        if problem is not None:
            complete, _ = last_complete(folder.parent)
            hint = f" The last complete checkpoint there is {complete}." if complete else ""
            raise CheckpointError(f"resume_from_checkpoint: {folder} cannot be used: {problem}.{hint}")
        return folder, []
    complete, left = last_complete(output_dir)
    if complete is None and explicit:
        raise CheckpointError(f"resume_from_checkpoint: {output_dir} has no complete checkpoint. {' '.join(left)}")
    return complete, left
