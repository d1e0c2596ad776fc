"""DataFlex's files in a checkpoint: the state, and the marker that says the checkpoint is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.errors import CheckpointError, ComponentError
from dataflex.record.checkpoint import (
    MARKER_FILE,
    STATE_FILE,
    STATE_VERSION,
    check_state,
    checkpoints,
    delete,
    keep_only,
    last_complete,
    mark_complete,
    problem_of,
    read_marker,
    read_state,
    rotate,
    write_state,
)
from unit.fakes import CHECKPOINT_PARTS as PARTS
from unit.fakes import RUN
from unit.fakes import make_checkpoint as make

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


def assert_same(here: Any, there: Any, where: str = "") -> None:
    """Equal, and of the same types all the way down."""
    assert type(here) is type(there), where
    if isinstance(here, dict):
        assert [(type(key), key) for key in here] == [(type(key), key) for key in there], where
        for key, value in here.items():
            assert_same(value, there[key], f"{where}/{key}")
    elif isinstance(here, list | tuple):
        assert len(here) == len(there), where
        for number, (one, other) in enumerate(zip(here, there, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    elif isinstance(here, np.ndarray | np.generic):
        assert (here.dtype, here.shape) == (there.dtype, there.shape), where
        np.testing.assert_array_equal(here, there)
    else:
        assert here == there or (here != here and there != there), where


def test_a_state_is_read_back_unchanged(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]  # no temporary file is left
    assert_same(STATE, read_state(tmp_path))


def test_keys_that_resemble_markers_are_kept(tmp_path: Path) -> None:
    array = np.arange(3)
    names = ["__tree__", "array", "array_0", "scalar", "dict", "tuple", "float", "version", "", "a/b", "a.npy", "\x00"]
    state = {
        "version": STATE_VERSION,
        "single": [{name: value} for name in names for value in ("array_0", array, None, [["x", 1]], "nan")],
        "together": {name: number for number, name in enumerate(names)},
    }
    write_state(tmp_path, state)
    assert_same(state, read_state(tmp_path))


def test_keys_and_values_keep_their_types(tmp_path: Path) -> None:
    state = {
        "version": STATE_VERSION,
        "keys": {1: "int", "1": "text", False: "bool", 2.5: "float", None: "none", ("a", 1): "pair"},
        "lists": [np.arange(2), [np.float32(0.1), (1, "x", np.int64(3))], {"in": [np.zeros((0, 2))]}],
        "numbers": (float("nan"), float("inf"), -float("inf"), -0.0, 10**30, np.bool_(True), np.str_("\u00e9")),
        "structured": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    }
    write_state(tmp_path, state)
    there = read_state(tmp_path)
    assert_same(state, there)
    assert np.signbit(there["numbers"][3])


class Kind(int):
    pass


@pytest.mark.parametrize(
    "value, text",
    [
        (np.array([{}, None], dtype=object), "array of object"),
        ({1, 2}, "builtins.set"),
        (b"bytes", "builtins.bytes"),
        (Counter("ab"), "collections.Counter"),
        (torch.zeros(2), "torch.Tensor"),
        (np.ma.masked_array([1, 2], [True, False]), "MaskedArray"),
        (Kind(3), "Kind"),
        ({b"key": 1}, "key of type bytes"),
        (np.zeros(2, dtype="V2"), "array of"),
    ],
)
def test_values_that_cannot_be_stored_are_refused_with_their_path(value: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ComponentError) as caught:
        write_state(tmp_path, {"version": STATE_VERSION, "components": {"mix": {"seen": [0, value]}}})
    assert text in str(caught.value)
    assert "the state, 'components', 'mix', 'seen', 1" in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ComponentError, match=r"state_dict\(\) of mixer 'mine', 'x'"):
        check_state({"x": value}, "mixer 'mine'")


def test_a_state_of_an_earlier_release_is_refused_by_its_version(tmp_path: Path) -> None:
    tree = {"version": 2, "step": 3, "plan": {"indices": {"__tree__": "array_0"}}}
    np.savez(tmp_path / STATE_FILE, __tree__=np.array(json.dumps(tree)), array_0=np.arange(2))
    with pytest.raises(CheckpointError, match=f"version 2, and this release reads version {STATE_VERSION}"):
        read_state(tmp_path)


def test_a_missing_or_newer_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no {STATE_FILE}"):
        read_state(tmp_path)
    write_state(tmp_path, STATE)
    write_state(tmp_path, {**STATE, "version": STATE_VERSION + 1})
    with pytest.raises(CheckpointError, match=f"version {STATE_VERSION + 1}.*reads version {STATE_VERSION}"):
        read_state(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_state_is_an_error(tmp_path: Path, share: float) -> None:
    write_state(tmp_path, STATE)
    whole = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path)


def test_a_marked_checkpoint_is_complete(tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint-10")
    assert problem_of(folder) is None
    marker = read_marker(folder)
    assert (marker.run, marker.step, marker.config) == (RUN, 10, {"stage": "sft"})
    assert marker.files == {**dict.fromkeys(PARTS, 100), "empty": 0, STATE_FILE: (folder / STATE_FILE).stat().st_size}
    (folder / "added_later.txt").write_text("fine")
    assert problem_of(folder) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "empty", STATE_FILE])
def test_missing_and_resized_files_are_noticed(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "checkpoint-10")
    content = (folder / name).read_bytes()
    for changed in (content + b"z", content[:-1]):
        if changed != content:
            (folder / name).write_bytes(changed)
            assert "another size" in str(problem_of(folder))
    (folder / name).unlink()
    assert "missing" in str(problem_of(folder))
    assert name in str(problem_of(folder))


DEEPSPEED = ("global_step10/mp_rank_00_model_states.pt", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json")
FSDP = ("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "scheduler.pt", "trainer_state.json")


@pytest.mark.parametrize(
    ("parts", "marker", "lacks"),
    [
        (PARTS, {}, None),
        (PARTS, {"has_scaler": True}, "the gradients' scale"),
        ((*PARTS, "scaler.pt"), {"has_scaler": True}, None),
        (PARTS, {"local_processes": 2}, "the random state"),
        (DEEPSPEED, {"local_processes": 2}, None),
        (DEEPSPEED, {"local_processes": 3}, "the random state"),
        ((*FSDP, "rng_state.pth"), {}, None),
        (FSDP, {}, "the random state"),
        (("adapter_model.safetensors", *PARTS[1:]), {}, None),
        *((tuple(part for part in PARTS if part != name), {}, "it was saved without") for name in PARTS),
    ],
)
def test_a_checkpoint_has_all_that_an_exact_resume_needs(
    tmp_path: Path, parts: tuple[str, ...], marker: dict[str, Any], lacks: str | None
) -> None:
    problem = problem_of(make(tmp_path / "checkpoint-10", parts=parts, **marker))
    assert problem is None if lacks is None else lacks in str(problem)


def test_a_checkpoint_of_the_model_alone_lists_the_missing_parts(tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint-10", parts=("model.safetensors", "trainer_state.json"))
    for word in ("optimizer", "schedule of learning rates", "random state", "save_only_model: true"):
        assert word in str(problem_of(folder))


def test_a_missing_or_broken_marker_is_named(tmp_path: Path) -> None:
    assert "no such folder" in str(problem_of(tmp_path / "checkpoint-1"))
    folder = make(tmp_path / "checkpoint-2", complete=False)
    assert MARKER_FILE in str(problem_of(folder))
    mark_complete(folder, RUN, 2, {})
    assert problem_of(folder) is None
    for text in ("", "{", "[]", "{}", '{"run": "x", "step": 1}'):
        (folder / MARKER_FILE).write_text(text)
        assert "cannot be read" in str(problem_of(folder))
    (folder / MARKER_FILE).write_text('{"files": {}}')
    assert "earlier release" in str(problem_of(folder))


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (5, 10, 90, 100):
        make(tmp_path / f"checkpoint-{step}", complete=step in (5, 90))
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7-old").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (100, 90, 10, 5)]
    folder, left = last_complete(tmp_path, RUN)
    assert folder == tmp_path / "checkpoint-90"
    assert len(left) == 1
    assert "checkpoint-100" in left[0]
    (tmp_path / "checkpoint-90" / "model.safetensors").unlink()
    folder, left = last_complete(tmp_path, RUN)
    assert folder == tmp_path / "checkpoint-5"
    assert len(left) == 3
    assert last_complete(tmp_path / "nothing", RUN) == (None, [])


def test_a_checkpoint_of_another_run_or_name_is_not_taken(tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-5")
    make(tmp_path / "checkpoint-9", run="other")
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "checkpoint-8")
    folder, left = last_complete(tmp_path, RUN)
    assert folder == tmp_path / "checkpoint-5"
    assert "checkpoint-9 is not used: it belongs to another run (other, this one is 0a0a0a0a)." in left[0]
    assert "checkpoint-8 is not used: it was written at step 5" in left[1]
    assert last_complete(tmp_path, None)[0] == tmp_path / "checkpoint-9"


def names(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in checkpoints(folder))


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [5, 10, 15, 20]),
        (0, None, [5, 10, 15, 20]),
        (1, None, [20]),
        (1, 5, [5, 20]),  # the newest and the best one stay
        (2, 20, [15, 20]),
        (3, 5, [5, 15, 20]),
        (9, 5, [5, 10, 15, 20]),
    ],
)
def test_the_oldest_checkpoints_by_step_are_deleted(
    tmp_path: Path, limit: int | None, best: int | None, left: list[int]
) -> None:
    for age, step in enumerate((20, 5, 15, 10)):  # a copy or a download gives files other times
        os.utime(make(tmp_path / f"checkpoint-{step}"), (age, age))
    make(tmp_path / "checkpoint-1", run="other")
    make(tmp_path / "checkpoint-99", run="other")
    make(tmp_path / "checkpoint-98", complete=False)
    rotate(tmp_path, limit, RUN, best)
    assert names(tmp_path) == [1, *left, 98, 99]


def test_an_interrupted_deletion_leaves_no_checkpoint_and_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10):
        make(tmp_path / f"checkpoint-{step}")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before anything is gone
    rotate(tmp_path, 1, RUN, None)
    monkeypatch.undo()
    assert names(tmp_path) == [10]
    rotate(tmp_path, 1, RUN, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    delete(tmp_path / "checkpoint-10")
    delete(tmp_path / "checkpoint-11")  # nothing there is fine
    assert not list(tmp_path.iterdir())


def test_a_half_written_marker_of_a_killed_run_is_ignored(tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint-5", complete=False)
    (folder / f".{MARKER_FILE}.123.tmp").write_text("{")
    mark_complete(folder, RUN, 5, {})
    (folder / f".{MARKER_FILE}.123.tmp").unlink()
    assert problem_of(folder) is None


def test_keep_only_leaves_the_best_checkpoint_of_the_run(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        make(tmp_path / f"checkpoint-{step}", run="other" if step == 15 else RUN)
    keep_only(tmp_path, RUN, tmp_path / "checkpoint-5")
    assert names(tmp_path) == [5, 15]
