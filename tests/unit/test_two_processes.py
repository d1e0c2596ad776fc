"""Work shared by two processes, and that both have the results of one process."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from datasets import Dataset

from dataflex.data import clusters
from dataflex.data.pool import Pool
from dataflex.errors import CheckpointError, ConfigError
from dataflex.probe.store import FeatureStore, similarities
from dataflex.trainer.inputs import RunData
from unit.ranks import on_two_processes

WORLD, COUNT, ROWS = 2, 190, 40


class Counted(Pool):
    """Counts how often it is hashed."""

    hashed = 0

    @cached_property
    def fingerprint(self) -> str:
        self.hashed += 1
        return Pool.fingerprint.func(self)  # type: ignore[attr-defined]


def pool_of(count: int, longest: int = 30) -> Counted:
    rng = np.random.default_rng(5)
    rows = [(1000 + 50 * (row % 4) + rng.integers(0, 50, rng.integers(10, longest))).tolist() for row in range(count)]
    return Counted(Dataset.from_dict({"input_ids": rows, "labels": rows}), ("a",), np.array([count]))


def store_in(folder: Path) -> FeatureStore:
    order = np.random.default_rng(1).permutation(23)
    return FeatureStore.open(folder, {"data": "x"}, order, 5, "float32", [5, 8, 1, 9])


def filled(folder: Path) -> FeatureStore:
    store, rng = store_in(folder), np.random.default_rng(2)
    for chunk, rows in enumerate(store.chunks):
        norms = torch.ones(rows)
        norms[rows // 2] = torch.nan
        store.write(chunk, torch.from_numpy(rng.standard_normal((rows, 5))), norms)
    return store


def targets() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).standard_normal((4, 5)))


def checked(data: RunData, fingerprint: str | None) -> None:
    """Compare the data of the processes, and with a checkpoint's."""
    from dataflex.trainer.data_checks import check_data

    state = {
        "pool_fingerprint": fingerprint,
        "step": 4,
        "column_fingerprints": {},
        "validation_fingerprints": {},
        "evaluation_fingerprint": None,
    }
    resume = None if fingerprint is None else SimpleNamespace(state=state)
    inputs: Any = SimpleNamespace(resume=resume, methods={})
    check_data(inputs, data)


def work(rank: int, folder: Path, fingerprint: str) -> None:
    pool = pool_of(COUNT)
    with pytest.MonkeyPatch.context() as patch:
        read: list[int] = []
        counted = clusters._token_counts
        patch.setattr(clusters, "_ROWS", ROWS)
        patch.setattr(
            clusters, "_token_counts", lambda table, field: read.append(table.num_rows) or counted(table, field)
        )
        np.save(folder / f"clusters-{rank}.npy", clusters.token_clusters(pool, 6, 0))
        assert sum(read) == (COUNT + 80 if rank == 0 else COUNT - 80)  # the main process reads all of them to fit

        opened: list[str] = []
        memmap = np.memmap
        patch.setattr(
            np, "memmap", lambda path, *more, **named: opened.append(path.name) or memmap(path, *more, **named)
        )
        np.save(folder / f"products-{rank}.npy", similarities(store_in(folder), targets(), "cpu"))
        assert opened == [f"features-{chunk:06d}.bin" for chunk in (rank, rank + 2)]

    checked(RunData(pool=pool), fingerprint)
    assert pool.hashed == (rank == 0)
    with pytest.raises(CheckpointError, match="other training data"):
        checked(RunData(pool=pool), "of other data")
    assert pool.hashed == (rank == 0)
    with pytest.raises(ConfigError, match="different training samples"):
        checked(RunData(pool=pool_of(COUNT, 30 + rank)), None)


@pytest.mark.launch
def test_two_processes_share_the_work_and_give_the_results_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    pool = pool_of(COUNT)
    on_two_processes(work, tmp_path, tmp_path, pool.fingerprint)
    monkeypatch.setattr(clusters, "_ROWS", ROWS)
    alone = {
        "clusters": clusters.token_clusters(pool, 6, 0),
        "products": similarities(store_in(tmp_path), targets(), "cpu"),
    }
    assert len(np.unique(alone["clusters"])) > 1
    assert np.isnan(alone["products"]).any(axis=1).sum() == 4
    for name, wanted in alone.items():
        for rank in range(WORLD):
            np.testing.assert_array_equal(np.load(tmp_path / f"{name}-{rank}.npy"), wanted)
