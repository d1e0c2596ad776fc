"""The feature store: features are read back, finished chunks are kept, another key gives another folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex import distributed
from dataflex.errors import DataFlexError
from dataflex.probe import store as store_module
from dataflex.probe.store import FeatureStore, similarities

N, DIM = 23, 17
CHUNKS = [5, 8, 1, 9]
ORDER = np.random.default_rng(7).permutation(N)
KEY: dict[str, Any] = {
    "model": "adapter-1",
    "data": "fingerprint-1",
    "settings": {"preconditioner": "adam", "projection": "count", "seed": 0, "normalize": True},
    "template": "chat",
}
UNTRAINED = 4
"""A sample without a trained token."""


def features() -> torch.Tensor:
    """By position in the caller's list."""
    values = torch.from_numpy(np.random.default_rng(1).standard_normal((N, DIM)).astype(np.float32))
    values[UNTRAINED] = 0
    return values


def norms() -> torch.Tensor:
    values = torch.arange(1, N + 1, dtype=torch.float32) / 3
    values[UNTRAINED] = torch.nan
    return values


def opened(root: Path, **changes: Any) -> FeatureStore:
    asked: dict[str, Any] = {"key": KEY, "order": ORDER, "dim": DIM, "dtype": "float32", "chunks": CHUNKS, **changes}
    return FeatureStore.open(root, **asked)


def fill(store: FeatureStore, chunks: list[int] | None = None) -> list[int]:
    """Write the missing chunks, or some of them, and return which."""
    done = store.missing() if chunks is None else chunks
    for chunk in done:
        positions = store.positions(chunk)
        store.write(chunk, features()[positions], norms()[positions])
    return done


def read(store: FeatureStore, rows: int = 4096) -> np.ndarray:
    """By position in the caller's list."""
    whole = np.full((store.size, store.dim), np.nan, dtype=np.float32)
    for positions, block in store.blocks("cpu", rows):
        assert block.dtype == torch.float32
        assert len(positions) == len(block) <= rows
        whole[positions] = block.numpy()
    return whole


def contents(store: FeatureStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 3, 4096])
def test_features_are_read_back_rounded_to_the_stored_type(tmp_path: Path, dtype: str, rows: int) -> None:
    store = opened(tmp_path, dtype=dtype)
    assert not store.complete
    fill(store)
    assert store.complete
    expected = features().to(getattr(torch, dtype)).float().numpy()
    for reader in (store, FeatureStore.load(store.folder)):
        np.testing.assert_array_equal(read(reader, rows), expected)
        np.testing.assert_array_equal(reader.norms(), norms().numpy())
    on_disk = sum(len(content) for name, content in contents(store).items() if name != "manifest.json")
    assert store.nbytes <= on_disk <= store.nbytes + 256


def test_the_type_of_the_input_does_not_matter(tmp_path: Path) -> None:
    store = opened(tmp_path, order=np.arange(N), chunks=[N], dtype="bfloat16")
    values = features().bfloat16().requires_grad_()
    store.write(0, values, norms().double())
    np.testing.assert_array_equal(read(store), values.detach().float().numpy())


def test_columns_of_a_wider_table_are_written_as_they_are(tmp_path: Path) -> None:
    """Features and lengths may be slices of one table: a chunk of one row is then a slice with a stride."""
    store = opened(tmp_path)
    table = torch.cat([features(), norms()[:, None]], dim=1)
    for chunk in store.missing():
        rows = table[store.positions(chunk)]
        store.write(chunk, rows[:, :-1], rows[:, -1])
    whole = opened(tmp_path / "whole")
    fill(whole)
    assert [path.read_bytes() for path in sorted(store.folder.glob("*.bin"))] == [
        path.read_bytes() for path in sorted(whole.folder.glob("*.bin"))
    ]


def test_untrained_samples_are_stored_as_zeros(tmp_path: Path) -> None:
    store = opened(tmp_path, order=np.arange(N), chunks=[N])
    values = features()
    values[UNTRAINED] = torch.nan
    store.write(0, values, norms())
    np.testing.assert_array_equal(read(store), features().numpy())


def test_load_reads_the_store_from_its_manifest(tmp_path: Path) -> None:
    store = opened(tmp_path, dtype="bfloat16")
    fill(store)
    moved = store.folder.rename(tmp_path / "elsewhere")
    loaded = FeatureStore.load(moved)
    assert (loaded.key, loaded.dim, loaded.dtype, loaded.chunks) == (KEY, DIM, "bfloat16", CHUNKS)
    np.testing.assert_array_equal(loaded.order, ORDER)


def test_resume_writes_exactly_the_missing_chunks(tmp_path: Path) -> None:
    whole = opened(tmp_path / "whole")
    fill(whole)

    cut = opened(tmp_path / "cut")
    fill(cut, [0, 1, 3])
    truncated = cut.folder / "features-000003.bin"
    os.truncate(truncated, truncated.stat().st_size - 1)
    fresh, old = cut.folder / ".features-000002.bin.999.tmp", cut.folder / ".features-000002.bin.998.tmp"
    for leftover in (fresh, old):
        leftover.write_bytes(b"half")
    os.utime(old, (time.time() - 86400,) * 2)
    kept = {name: (cut.folder / name).stat().st_mtime_ns for name in ("features-000000.bin", "norms-000001.bin")}

    again = opened(tmp_path / "cut")
    assert fresh.exists()
    assert not old.exists()
    assert again.missing() == [2, 3]
    with pytest.raises(DataFlexError, match="2 of 4 chunks are missing"):
        again.blocks("cpu")
    with pytest.raises(DataFlexError, match="2 of 4 chunks are missing"):
        again.norms()
    with pytest.raises(DataFlexError, match="2 of 4 chunks are missing"):
        FeatureStore.load(again.folder)
    assert fill(again) == [2, 3]
    assert contents(again) == contents(whole)
    assert {name: (cut.folder / name).stat().st_mtime_ns for name in kept} == kept
    assert fill(opened(tmp_path / "cut")) == []


@pytest.mark.parametrize("name", ["norms-000001.bin", "features-000001.bin"])
def test_a_chunk_needs_both_files(tmp_path: Path, name: str) -> None:
    store = opened(tmp_path)
    fill(store)
    (store.folder / name).unlink()
    assert store.missing() == [1]


def test_a_kill_between_the_two_files_leaves_the_chunk_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    writes = iter([store_module.write_atomically])

    def killed(path: Path, content: bytes) -> None:
        for write in writes:
            return write(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(store, [0])
    assert 0 in store.missing()


CHANGES: dict[str, dict[str, Any]] = {
    "adapter": {"key": {**KEY, "model": "adapter-2"}},
    "data": {"key": {**KEY, "data": "fingerprint-2"}},
    "preconditioner": {"key": {**KEY, "settings": {**KEY["settings"], "preconditioner": "none"}}},
    "projection": {"key": {**KEY, "settings": {**KEY["settings"], "projection": "identity"}}},
    "seed": {"key": {**KEY, "settings": {**KEY["settings"], "seed": 1}}},
    "type of a value": {"key": {**KEY, "settings": {**KEY["settings"], "seed": False}}},
    "normalize": {"key": {**KEY, "settings": {**KEY["settings"], "normalize": False}}},
    "another key": {"key": {**KEY, "reduction": "sum"}},
    "one key less": {"key": {name: value for name, value in KEY.items() if name != "template"}},
    "order": {"order": np.roll(ORDER, 1)},
    "dim": {"dim": DIM + 1},
    "dtype": {"dtype": "float16"},
    "same size, other dtype": {"dtype": "bfloat16"},
    "chunks": {"chunks": [5, 8, 9, 1]},
}


def test_every_change_of_the_key_gives_another_folder(tmp_path: Path) -> None:
    base = opened(tmp_path)
    fill(base)
    folders = {base.folder}
    for change in CHANGES.values():
        changed = opened(tmp_path, **change)
        assert len(changed.missing()) == len(changed.chunks)
        folders.add(changed.folder)
    assert len(folders) == len(CHANGES) + 1
    assert {folder.parent for folder in folders} == {tmp_path}


def test_order_of_the_keys_does_not_matter(tmp_path: Path) -> None:
    turned = {name: KEY[name] for name in reversed(KEY)}
    assert opened(tmp_path, key=turned).folder == opened(tmp_path).folder


TAMPERED: list[tuple[list[str], Any, str]] = [
    (["key", "model"], "adapter-2", r'key\.model is "adapter-2" there and "adapter-1" here'),
    (["key", "settings", "seed"], 0.0, r"key\.settings\.seed is 0\.0 there and 0 here"),
    (["key", "extra"], 1, r"key\.extra is 1 there and absent here"),
    (["dim"], 18, "dim is 18 there and 17 here"),
    (["dtype"], "bfloat16", "dtype is"),
    (["chunks"], [8, 5, 1, 9], "chunks is"),
    (["order"], "0" * 64, "order is"),
    (["format"], 1, "format is 1 there and 2 here"),
]


@pytest.mark.parametrize(("keys", "value", "difference"), TAMPERED)
def test_a_manifest_that_differs_is_an_error(tmp_path: Path, keys: list[str], value: Any, difference: str) -> None:
    store = opened(tmp_path)
    fill(store)
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    inner = manifest
    for name in keys[:-1]:
        inner = inner[name]
    inner[keys[-1]] = value
    path.write_text(json.dumps(manifest))
    before = contents(store)
    with pytest.raises(DataFlexError, match=difference):
        opened(tmp_path)
    with pytest.raises(DataFlexError, match="format" if keys == ["format"] else "changed after it was written"):
        FeatureStore.load(store.folder)
    assert contents(store) == before


@pytest.mark.parametrize("content", [b"", b'{"format": 2', b"[]", b"\xff\xfe\x00", b'{"format": 2, "dim": NaN}'])
def test_a_corrupt_manifest_is_an_error(tmp_path: Path, content: bytes) -> None:
    store = opened(tmp_path)
    fill(store)
    (store.folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataFlexError, match="Delete"):
        opened(tmp_path)
    with pytest.raises(DataFlexError, match="Delete"):
        FeatureStore.load(store.folder)
    assert (store.folder / "manifest.json").read_bytes() == content


@pytest.mark.parametrize("damage", ["other", "cut", "gone"])
def test_a_corrupt_order_is_an_error(tmp_path: Path, damage: str) -> None:
    store = opened(tmp_path)
    fill(store)
    path = store.folder / "order.npy"
    if damage == "other":
        np.save(path, np.roll(ORDER, 1))
    elif damage == "cut":
        os.truncate(path, 100)
    else:
        path.unlink()
    with pytest.raises(DataFlexError, match=r"order\.npy"):
        opened(tmp_path)
    with pytest.raises(DataFlexError, match=r"order\.npy"):
        FeatureStore.load(store.folder)


def test_load_of_another_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataFlexError, match=r"no manifest\.json"):
        FeatureStore.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("block_bytes", [1, 3 * 4 * DIM, 1 << 28])
def test_similarities_equal_those_of_the_whole_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block_bytes: int
) -> None:
    monkeypatch.setattr(store_module, "_BLOCK_BYTES", block_bytes)
    store = opened(tmp_path, dtype=dtype)
    fill(store)
    targets = torch.randn(6, DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores = similarities(store, targets, torch.device("cpu"))
    expected = read(store).astype(np.float64) @ targets.detach().numpy().astype(np.float64).T
    expected[UNTRAINED] = np.nan
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_targets_of_another_length_are_an_error(tmp_path: Path) -> None:
    store = opened(tmp_path)
    fill(store)
    with pytest.raises(DataFlexError, match="length 17"):
        similarities(store, torch.zeros(2, DIM + 1), "cpu")


def test_similarities_need_the_memory_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, dim, block_bytes = 12_800, 8192, 8 << 20
    monkeypatch.setattr(store_module, "_BLOCK_BYTES", block_bytes)
    chunks = [10_000, 2_800]
    store = opened(tmp_path, order=np.arange(rows), dim=dim, dtype="float16", chunks=chunks)
    for chunk, count in enumerate(chunks):
        (store.folder / f"norms-{chunk:06d}.bin").write_bytes(np.ones(count, np.float32).tobytes())
        with (store.folder / f"features-{chunk:06d}.bin").open("wb") as stream:
            stream.truncate(count * dim * 2)  # zeros that take no disk
    assert store.nbytes > 200 << 20
    sizes = {block.nbytes for _, block in store.blocks("cpu")}
    assert max(sizes) == block_bytes
    tracemalloc.start()
    try:
        scores = similarities(store, torch.ones(2, dim), "cpu")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not scores.any()
    assert peak < 4 * block_bytes


def write_share(root: Path, number: int, barrier: Any) -> None:
    barrier.wait(60)
    fill(opened(root), list(range(number, len(CHUNKS), 2)))


@pytest.mark.launch
def test_two_processes_fill_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    other = context.Process(target=write_share, args=(tmp_path / "a", 1, barrier))
    other.start()
    write_share(tmp_path / "a", 0, barrier)
    other.join(60)
    assert other.exitcode == 0
    store = opened(tmp_path / "a")
    assert store.complete
    alone = opened(tmp_path / "b")
    fill(alone)
    assert contents(store) == contents(alone)
    assert len(contents(store)) == len(list(store.folder.iterdir()))


def test_another_process_making_the_folder_first_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage

    def raced(path: Path) -> Any:
        monkeypatch.setattr(shutil, "disk_usage", usage)
        fill(opened(tmp_path), [0, 1])
        return usage(path)

    monkeypatch.setattr(shutil, "disk_usage", raced)
    store = opened(tmp_path)
    assert fill(store) == [2, 3]
    assert FeatureStore.load(store.folder).complete


def test_the_main_process_makes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "on_main", lambda function: None)
    store = opened(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert store.missing() == [0, 1, 2, 3]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = N * (DIM * 4 + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(DataFlexError, match=rf"features-\w+ needs {free:,} bytes .* {free - 1:,} are free"):
        opened(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    store = opened(tmp_path)
    fill(store, [0, 1, 2])
    # Only what is missing counts on a resume.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9 * (DIM * 4 + 4)))
    assert fill(opened(tmp_path)) == [3]


def test_a_failing_write_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "write_atomically", full)
    with pytest.raises(DataFlexError, match=rf"{store.folder.name}.*No space left"):
        fill(store)


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (np.nan, "float32"), (np.inf, "bfloat16")])
def test_features_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: str) -> None:
    store = opened(tmp_path, dtype=dtype)
    with pytest.raises(DataFlexError, match=f"not finite as {dtype}"):
        store.write(0, torch.full((5, DIM), value), torch.ones(5))
    assert 0 in store.missing()


def test_wrong_shapes_are_refused(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for shape, norms_shape in [((5, DIM + 1), (5,)), ((4, DIM), (4,)), ((5, DIM), (5, 1))]:
        with pytest.raises(ValueError, match="chunk 0 takes"):
            store.write(0, torch.zeros(shape), torch.zeros(norms_shape))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"order": np.zeros(N, dtype=np.int64)}, ValueError),
        ({"order": ORDER + 1}, ValueError),
        ({"chunks": [N - 1]}, ValueError),
        ({"chunks": [N, 0]}, ValueError),
        ({"dim": 0}, ValueError),
        ({"dtype": "float64"}, ValueError),
        ({"key": {"seed": float("nan")}}, ValueError),
        ({"key": {"model": b"digest"}}, TypeError),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        opened(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_no_samples_is_complete(tmp_path: Path) -> None:
    store = opened(tmp_path, order=np.empty(0, dtype=np.int64), chunks=[])
    assert store.complete
    assert store.norms().shape == (0,)
    assert similarities(FeatureStore.load(store.folder), torch.zeros(3, DIM), "cpu").shape == (0, 3)
