"""What DataFlex adds to a checkpoint: the state, and the marker that says the checkpoint is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.errors import CheckpointError, ComponentError
from dataflex.trainer.checkpoint import (
    MARKER_FILE,
    STATE_FILE,
    STATE_VERSION,
    checkpoints,
    last_complete,
    mark_complete,
    problem_of,
    read_state,
    resolve,
    unmark,
    write_state,
)

STATE: dict[str, Any] = {
    "version": STATE_VERSION,
    "step": 12,
    "nothing": None,
    "flag": True,
    "share": 0.1,
    "text": "domain \u00e9/\x1f",
    "list": [1, 2.5, "x", None],
    "empty": {},
    "plan": {
        "indices": np.array([5, 3, 2**40], dtype=np.int64),
        "scores": np.array([1.5, np.nan, -np.inf], dtype=np.float32),
    },
    "components": {
        "select": {"baseline": np.zeros((2, 3), dtype=np.float16), "deep": {"mask": np.array([True, False])}},
        "mix": {"scalar": np.array(3), "none": np.empty(0), "number": np.float64(2.5), "count": np.int32(4)},
    },
}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}/{key}")
    return found


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]  # no temporary file is left
    here, there = flat(STATE), flat(read_state(tmp_path))
    assert list(here) == list(there)
    for key, value in here.items():
        other = there[key]
        if isinstance(value, np.ndarray):
            assert other.dtype == value.dtype, key
            np.testing.assert_array_equal(other, value)
        else:
            assert other == value, key


def test_arrays_that_need_pickle_are_refused_when_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(ComponentError, match=r"array of object.*JSON values and numeric arrays"):
        write_state(tmp_path, {"version": STATE_VERSION, "bad": np.array([{}, None], dtype=object)})


def test_a_missing_or_newer_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no {STATE_FILE}"):
        read_state(tmp_path)
    write_state(tmp_path, STATE)
    write_state(tmp_path, {**STATE, "version": STATE_VERSION + 1})
    with pytest.raises(CheckpointError, match=f"version {STATE_VERSION + 1}.*reads {STATE_VERSION}"):
        read_state(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_state_that_was_cut_off_is_an_error(tmp_path: Path, share: float) -> None:
    write_state(tmp_path, STATE)
    whole = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path)


def make(folder: Path, complete: bool = True) -> Path:
    (folder / "global_step").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    (folder / "global_step" / "optimizer.pt").write_bytes(b"y" * 50)
    (folder / "empty").write_bytes(b"")
    write_state(folder, STATE)
    if complete:
        mark_complete(folder)
    return folder


def test_a_marked_checkpoint_is_complete(tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint-10")
    assert problem_of(folder) is None
    listed = json.loads((folder / MARKER_FILE).read_text())["files"]
    sizes = {name: size for name, size in listed.items() if name != STATE_FILE}
    assert sizes == {"model.safetensors": 100, str(Path("global_step") / "optimizer.pt"): 50, "empty": 0}
    assert listed[STATE_FILE] == (folder / STATE_FILE).stat().st_size
    (folder / "added_later.txt").write_text("fine")
    assert problem_of(folder) is None


@pytest.mark.parametrize("name", ["model.safetensors", "global_step/optimizer.pt", "empty", STATE_FILE])
def test_missing_and_resized_files_are_noticed(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "checkpoint-10")
    content = (folder / name).read_bytes()
    for changed in (content + b"z", content[:-1]):
        if changed != content:
            (folder / name).write_bytes(changed)
            assert "another size" in str(problem_of(folder))
    (folder / name).unlink()
    assert "missing" in str(problem_of(folder))
    assert Path(name).name in str(problem_of(folder))


def test_no_marker_no_folder_and_a_broken_marker(tmp_path: Path) -> None:
    assert "no such folder" in str(problem_of(tmp_path / "checkpoint-1"))
    folder = make(tmp_path / "checkpoint-2", complete=False)
    assert MARKER_FILE in str(problem_of(folder))
    mark_complete(folder)
    assert problem_of(folder) is None
    unmark(folder)
    unmark(folder)  # nothing to take back is fine
    assert "cut off" in str(problem_of(folder))
    for text in ("", "{", "[]", "{}"):
        (folder / MARKER_FILE).write_text(text)
        assert problem_of(folder) is not None


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (5, 10, 90, 100):
        make(tmp_path / f"checkpoint-{step}", complete=step in (5, 90))
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7-old").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (100, 90, 10, 5)]
    folder, left = last_complete(tmp_path)
    assert folder == tmp_path / "checkpoint-90"
    assert len(left) == 1
    assert "checkpoint-100" in left[0]
    (tmp_path / "checkpoint-90" / "model.safetensors").unlink()
    folder, left = last_complete(tmp_path)
    assert folder == tmp_path / "checkpoint-5"
    assert len(left) == 3
    assert last_complete(tmp_path / "nothing") == (None, [])


def test_what_is_resumed(tmp_path: Path) -> None:
    good, broken = make(tmp_path / "checkpoint-10"), make(tmp_path / "checkpoint-20", complete=False)
    for requested in (None, False, ""):
        assert resolve(requested, True, tmp_path) == (None, [])
    # the user named one: that one or an error
    assert resolve(str(good), True, tmp_path) == (good, [])
    with pytest.raises(CheckpointError, match=r"checkpoint-20 cannot be used.*last complete.*checkpoint-10"):
        resolve(str(broken), True, tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(str(tmp_path / "checkpoint-99"), True, tmp_path)
    # the user asked for the last one
    folder, left = resolve(True, True, tmp_path)
    assert folder == good
    assert len(left) == 1
    # LLaMA-Factory found one by itself: the last complete one, or a new start
    folder, left = resolve(str(broken), False, tmp_path)
    assert folder == good
    assert len(left) == 1
    (good / "empty").unlink()
    folder, left = resolve(str(broken), False, tmp_path)
    assert folder is None
    assert len(left) == 2
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resolve(True, True, tmp_path)
