"""DataFlex's part of a checkpoint: the run's state, and a marker with the run's identity and the size of every file.

``dataflex_state.npz`` holds the round, the plan, the position in it and the components' states.
``dataflex_complete.json`` is written last. It names the run, the step and the configuration in force, and lists every
file of the checkpoint with its size. A checkpoint without the marker, or whose files differ from it, was interrupted
while it was written and is not used. A checkpoint that lacks a part which an exact resume needs, such as the optimizer,
is not used either.

Nothing here imports torch.
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.api.component import State
from dataflex.errors import CheckpointError, ComponentError
from dataflex.files import json_text, write_atomically

STATE_FILE = "dataflex_state.npz"
MARKER_FILE = "dataflex_complete.json"
STATE_VERSION = 5
_TREE_KEY = "__tree__"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def write_state(folder: Path, state: State) -> None:
    """Write a state as one file, from which :func:`read_state` restores equal values of the same types.

    Args:
        folder: folder of the checkpoint.
        state: None, booleans, numbers, text, numpy arrays and scalars, in dicts, lists and tuples.

    Raises:
        ComponentError: naming a value of any other type, and its position in the state.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = _split(state, arrays, "the state")
    buffer = io.BytesIO()
    arrays[_TREE_KEY] = np.array(json.dumps(tree, allow_nan=False))
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(folder / STATE_FILE, buffer.getvalue())


def check_state(state: State, owner: str) -> None:
    """Raise the error that :func:`write_state` would raise for the state of ``owner``."""
    _split(state, {}, f"state_dict() of {owner}")


def read_state(folder: Path) -> State:
    """Return the state of a checkpoint.

    Raises:
        CheckpointError: if the checkpoint has no state, or the state cannot be read.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE_FILE}: it was not written by a run with a dataflex: section, so there is no round "
            "to resume. Name a checkpoint of a DataFlex run, or begin a new run."
        )
    try:
        with np.load(path, allow_pickle=False) as stored:
            tree = json.loads(str(stored[_TREE_KEY]))
            # Earlier releases wrote the dict itself. It has the key "version", which a tree of `_split` never has.
            state = _join(tree, stored) if isinstance(tree, dict) and "version" not in tree else tree
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != STATE_VERSION:
        raise CheckpointError(
            f"{path} has version {version}, and this release reads version {STATE_VERSION}. Resume with the release "
            "that wrote it, or begin a new run."
        )
    return state


# In the tree, every JSON object has a single key that names the kind of the value. The dicts of a state are stored as
# lists of pairs. So a domain name or a component's key is never mistaken for such a kind, and keys keep their types.


def _split(value: Any, arrays: dict[str, np.ndarray], where: str) -> Any:
    """Return ``value`` as JSON, after moving every array in it to ``arrays``."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is np.ndarray or isinstance(value, np.generic):
        if value.dtype.hasobject or (value.dtype.kind == "V" and not value.dtype.names):
            raise ComponentError(f"{where} holds an array of {value.dtype}; use numbers, text, or arrays of numbers.")
        key = f"array_{len(arrays)}"
        arrays[key] = np.asarray(value)
        return {"array" if kind is np.ndarray else "scalar": key}
    if kind is dict:
        pairs = []
        for name, item in value.items():
            inside = f"{where}, {name!r}"
            if type(name) not in (str, int, bool, float, tuple) and name is not None:
                raise ComponentError(
                    f"{where} has a key of type {type(name).__name__} ({name!r}); use text or numbers."
                )
            pairs.append([_split(name, arrays, inside), _split(item, arrays, inside)])
        return {"dict": pairs}
    if kind in (list, tuple):
        items = [_split(item, arrays, f"{where}, {number}") for number, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    raise ComponentError(
        f"{where} holds a {kind.__module__}.{kind.__qualname__}; use None, True, False, numbers, text, numpy arrays, "
        "and dicts, lists and tuples of these."
    )


def _join(tree: Any, arrays: Any) -> Any:
    """Return the value from which :func:`_split` made ``tree``."""
    if isinstance(tree, list):
        return [_join(item, arrays) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "dict":
        return {_join(name, arrays): _join(item, arrays) for name, item in content}
    if kind == "tuple":
        return tuple(_join(item, arrays) for item in content)
    if kind == "float":
        return float(content)
    if kind not in ("array", "scalar"):
        raise ValueError(f"unknown kind of value {kind!r}")
    return arrays[content] if kind == "array" else arrays[content][()]


@dataclass(frozen=True)
class Marker:
    """Contents of a complete checkpoint's marker file.

    Attributes:
        run: identity of the run that wrote the checkpoint.
        step: number of optimizer steps done.
        config: configuration in force, as :func:`dataflex.config.changes.snapshot` returns it.
        local_processes: number of processes on the main process's machine. Each one left its random state there.
        has_scaler: whether gradients were scaled, as under fp16.
        files: size of each file in bytes.
    """

    run: str
    step: int
    config: dict[str, Any]
    local_processes: int
    has_scaler: bool
    files: dict[str, int]

    @property
    def lacks(self) -> list[str]:
        """Names of the parts that an exact resume needs and the checkpoint does not have."""
        needed = dict(_PARTS)
        if self.has_scaler:
            needed["the gradients' scale"] = ("scaler.pt",)
        found = [name for name, patterns in needed.items() if not self._has(*patterns)]
        states = [f"rng_state_{i}.pth" for i in range(self.local_processes)]
        if not all(self._has(name) for name in (states if self.local_processes > 1 else ["rng_state.pth"])):
            found.append("the random state")
        return found

    def _has(self, *patterns: str) -> bool:
        """Return whether a file matches one of the patterns."""
        return any(fnmatchcase(name, pattern) for name in self.files for pattern in patterns)


_DEEPSPEED = "global_step*/*"
_PARTS: dict[str, tuple[str, ...]] = {
    "the weights": ("*.safetensors", "*_model.bin", "*_model-*.bin", "*_model_fsdp*", _DEEPSPEED),
    "the optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*/*", _DEEPSPEED),
    "the schedule of learning rates": ("scheduler.pt", _DEEPSPEED),
    "the Trainer's state": ("trainer_state.json",),
    "the state of the rounds": (STATE_FILE,),
}
"""Parts of a checkpoint, and the files of which any one holds the part, under DDP, FSDP or DeepSpeed."""


_DELETED = ".deleted-"
"""Prefix of the name of a checkpoint that is being deleted."""


def delete(folder: Path) -> None:
    """Delete a checkpoint or a part of one.

    The folder is renamed first, so that the rest of an interrupted deletion is not mistaken for a checkpoint.
    """
    if not folder.exists():
        return
    doomed = folder.with_name(f"{_DELETED}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)  # a file that cannot be deleted must not end the training
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def mark_complete(
    folder: Path, run: str, step: int, config: dict[str, Any], *, local_processes: int = 1, has_scaler: bool = False
) -> None:
    """Write the marker, with the size of every file."""
    marker = {
        "run": run,
        "step": step,
        "local_processes": local_processes,
        "has_scaler": has_scaler,
        "config": config,
        "files": _sizes(folder),
    }
    write_atomically(folder / MARKER_FILE, json_text(marker, indent=1).encode())


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size of every file of a checkpoint except the marker."""
    names = (MARKER_FILE, f".{MARKER_FILE}.")  # the second is the prefix of the marker's temporary name
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(names))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def read_marker(folder: Path) -> Marker:
    """Return the marker of a checkpoint, after checking its files.

    Raises:
        CheckpointError: with the reason why the checkpoint cannot be used, if it has no marker or is not complete.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder")
    try:
        given = json.loads((folder / MARKER_FILE).read_bytes())
        if "files" in given and "run" not in given:
            raise CheckpointError("it was written by an earlier release, which did not note the run it belongs to")
        marker = Marker(
            run=str(given["run"]),
            step=int(given["step"]),
            config=dict(given["config"]),
            local_processes=int(given["local_processes"]),
            has_scaler=bool(given["has_scaler"]),
            files=dict(given["files"]),
        )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"it has no {MARKER_FILE}, so it was cut off while it was written (or not by a DataFlex run)"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"its {MARKER_FILE} cannot be read") from error
    found = _sizes(folder)
    for name, size in marker.files.items():
        if found.get(name) != size:
            how = f"its file {name} is missing" if name not in found else f"its file {name} has another size"
            raise CheckpointError(how)
    return marker


def problem_of(folder: Path) -> str | None:
    """Return the reason why a run cannot resume from a checkpoint, or None if it can."""
    try:
        lacks = read_marker(folder).lacks
    except CheckpointError as error:
        return str(error)
    if "the optimizer" in lacks:
        return (
            f"it was saved without {_words(lacks)} (save_only_model: true), so a resumed run would start them from the "
            "beginning"
        )
    return f"it was saved without {_words(lacks)}" if lacks else None


def _words(names: list[str]) -> str:
    """Return names as an enumeration."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest step first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _CHECKPOINT.match(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def marked(output_dir: Path) -> Iterator[tuple[Path, Marker]]:
    """Yield the checkpoints that were written completely, newest step first."""
    for folder in checkpoints(output_dir):
        try:
            marker = read_marker(folder)
        except CheckpointError:
            continue  # without a valid marker the run that wrote it is unknown
        if folder.name == f"checkpoint-{marker.step}":
            yield folder, marker


def last_complete(output_dir: Path, run: str | None) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that a run can resume from, and a line for each newer checkpoint that is not used.

    Args:
        output_dir: output folder of the run.
        run: identity of the run. None accepts checkpoints of any run.
    """
    left: list[str] = []
    for folder in checkpoints(output_dir):
        problem = problem_of(folder)
        if problem is None:
            marker = read_marker(folder)
            if run is not None and marker.run != run:
                problem = f"it belongs to another run ({marker.run[:8]}, this one is {run[:8]})"
            elif folder.name != f"checkpoint-{marker.step}":
                problem = f"it was written at step {marker.step}, although its name says otherwise"
        if problem is None:
            return folder, left
        left.append(f"{folder} is not used: {problem}.")
    return None, left


def keep_only(output_dir: Path, run: str, best: Path) -> None:
    """Delete every checkpoint of a run except the one with the best evaluation, which may be in any folder."""
    for folder, marker in list(marked(output_dir)):
        if marker.run == run and folder.resolve() != best.resolve():
            delete(folder)


def rotate(output_dir: Path, limit: int | None, run: str, best_step: int | None) -> None:
    """Delete the oldest checkpoints of a run, by step, until ``limit`` are left.

    The newest and the best checkpoint are never deleted, nor is a folder that is not a complete checkpoint of this run.

    Args:
        output_dir: output folder of the run.
        limit: number of checkpoints to leave. None, 0 and negative numbers delete nothing.
        run: identity of the run.
        best_step: step of the checkpoint with the best evaluation, if the run tracks it.
    """
    for left in output_dir.glob(f"{_DELETED}checkpoint-*"):  # rests of interrupted deletions
        shutil.rmtree(left, ignore_errors=True)
    if limit is None or limit <= 0:
        return
    own = [(folder, marker.step) for folder, marker in marked(output_dir) if marker.run == run]
    kept = {step for _, step in own[:1]} | {step for _, step in own if step == best_step}
    surplus = len(own) - max(limit, len(kept))
    for folder in [folder for folder, step in reversed(own) if step not in kept][: max(0, surplus)]:
        delete(folder)
