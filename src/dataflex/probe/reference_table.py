"""A table of a frozen model's token losses, read on demand.

A table is a folder. ``reference.json`` lists the table's domains, with a digest of each domain's samples and a digest
of the model's files, so that a table of other data or of another model is detected. The losses of a domain are in a
flat file, sample after sample, as one of two number types:

- ``float32``: the losses in ``X.f32``, and the number of losses of each sample in ``X-counts.npy``.
- ``byte``: a code of each loss in ``X.u8`` (see ``loss_code.py``), the step of each block of codes in ``X-steps.npy``,
  the index after the last loss of each sample in ``X-ends.npy``, and the mean of each sample's float32 losses, before
  they are coded, in ``X-means.npy``.

Files are memory-mapped, so that a batch reads its own losses only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.api.reference import TABLE_FILE, NumberType, damage_of, files_of_domain, read_table
from dataflex.data.pool import Pool
from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ComponentError, ConfigError
from dataflex.probe.loss_code import BLOCK, decode

_OPEN_DOMAINS = {"float32": 128, "byte": 64}
"""Number of a table's domains that stay open; a process can often open only about a thousand files, and a domain of
bytes has four."""
_SMALL = 4096
"""Files of fewer bytes are read as a whole. An array without elements cannot be mapped."""


class _Domain(Protocol):
    """The stored losses of one domain."""

    def rows(self, rows: IndexArray) -> list[NDArray[np.float32]]:
        """Return the losses of each sample, given their numbers in the domain, (n,)."""
        ...

    def means(self, rows: IndexArray) -> ScoreArray | None:
        """Return the mean loss of each sample, (n,), NaN without a loss; None if the means are not stored."""
        ...


class _Floats:
    """A domain of float32 losses."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._ends = np.cumsum(np.load(files["counts"]), dtype=np.int64)
        size = files["losses"].stat().st_size
        _check(files["losses"], size // 4, int(self._ends[-1]))
        self._losses = np.memmap(files["losses"], dtype="<f4", mode="r") if size else np.empty(0, np.float32)

    def rows(self, rows: IndexArray) -> list[NDArray[np.float32]]:
        """Return the losses of each sample."""
        return [self._losses[begin:end] for begin, end in zip(*_ranges(self._ends, rows), strict=True)]

    def means(self, rows: IndexArray) -> None:
        """Return None: the means are not stored."""


class _Bytes:
    """A domain of losses in one byte each."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._ends, self._means, self._steps = (_mapped(files[name]) for name in ("ends", "means", "steps"))
        size, count = files["losses"].stat().st_size, int(self._ends[-1])
        _check(files["losses"], size, count)
        _check(files["steps"], self._steps.size, -(-count // BLOCK))
        _check(files["means"], self._means.size, self._ends.size)
        self._codes = np.memmap(files["losses"], dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)

    def rows(self, rows: IndexArray) -> list[NDArray[np.float32]]:
        """Return the losses of each sample."""
        begins, ends = _ranges(self._ends, rows)
        counts = ends - begins
        after = np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(begins - (after - counts), counts)
        losses = decode(self._codes[places], self._steps[places // BLOCK])
        return np.split(losses, after[:-1])

    def means(self, rows: IndexArray) -> ScoreArray:
        """Return the mean loss of each sample before the losses were coded."""
        return np.array(self._means[rows], dtype=np.float32)


class ReferenceTable:
    """A table of reference losses that is read on demand.

    Args:
        folder: folder of the table.
        pool: the run's samples; the table holds every domain of the pool.
        key: configuration key of the component that names the table, for messages.
    """

    def __init__(self, folder: Path, pool: Pool, key: str) -> None:
        self.pool, self.key, self.folder = pool, key, folder
        table = read_table(folder)
        if table is None:
            raise ConfigError(
                f"dataflex.{self.key}.reference_losses: {folder} has no {TABLE_FILE} on this machine; every node needs "
                "the table."
            )
        self._table = table
        self._parts = parts_of(table, pool)
        self._starts = np.array([start for start, _ in self._parts])
        self._opened = lru_cache(maxsize=_OPEN_DOMAINS[table["type"]])(self._open)

    def _open(self, part: int) -> _Domain:
        """Return the stored losses of a part of the pool.

        Raises:
            ConfigError: if a file cannot be read, or the files do not belong together.
        """
        name = self._parts[part][1]
        kind: NumberType = self._table["type"]
        files = files_of_domain(self.folder, kind, self._table["domains"][name]["file"])
        try:
            return _Floats(files) if kind == "float32" else _Bytes(files)
        except (OSError, ValueError, EOFError) as error:
            damage = error if isinstance(error, _DamagedError) else damage_of(self.folder, self._table, name)
            raise ConfigError(
                f"dataflex.{self.key}.reference_losses: the table's losses of {name!r} cannot be read on this machine "
                f"({damage or error}); every node needs the whole table. If it is damaged, remove the table or name "
                "another folder."
            ) from error

    def rows(self, indices: IndexArray) -> list[NDArray[np.float32]]:
        """Return the losses of each sample's trained tokens."""
        found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * indices.size
        for part, places, rows in self._by_part(indices):
            for place, losses in zip(places.tolist(), self._opened(part).rows(rows), strict=True):
                found[place] = losses
        return found

    def means(self, indices: IndexArray) -> ScoreArray | None:
        """Return the mean of each sample's float32 losses, (n,), NaN without a loss; None if they are not stored."""
        found = np.empty(indices.size, np.float32)
        for part, places, rows in self._by_part(indices):
            means = self._opened(part).means(rows)
            if means is None:
                return None
            found[places] = means
        return found

    def _by_part(self, indices: IndexArray) -> list[tuple[int, IndexArray, IndexArray]]:
        """Return each part of the pool with the places of its samples in ``indices``, and their numbers in the part."""
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        return [
            (part, places, indices[places] - self._starts[part])
            for part in np.unique(parts).tolist()
            for places in (np.flatnonzero(parts == part),)
        ]

    def losses(self, inputs: dict[str, Any], labels: Tensor, indices: IndexArray | None) -> Tensor:
        """Return the loss at each position that counts, (n,), float32."""
        assert indices is not None  # a stream cannot use a table
        values = torch.from_numpy(np.concatenate(self.rows(indices)))
        counted = int((labels != IGNORE_INDEX).sum())
        if values.numel() != counted:
            raise ComponentError(
                f"reference_losses: the table has {values.numel()} losses for a batch with {counted} trained tokens, "
                "so it was made with another collator or padding. Name another folder, and a new table is made there."
            )
        return values.to(labels.device)


def parts_of(table: Mapping[str, Any], pool: Pool) -> list[tuple[int, str]]:
    """Return the parts of a pool that a table's domains may hold: the first pool index and the table's name of each.

    These are the pool's domains. But a run whose samples LLaMA-Factory draws has one domain of all data sets. If the
    table does not hold that domain, all domains of the table with as many samples together may be its parts. Whether
    the samples are the same is for their digests to say.
    """
    domains = table["domains"]
    if len(pool.domains) == 1 and pool.domains[0] not in domains:
        sizes = [entry.get("samples", 0) for entry in domains.values()]
        if sum(sizes) == pool.size:
            return list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), domains, strict=True))
    return list(zip(pool.offsets[:-1].tolist(), pool.domains, strict=True))


class _DamagedError(ValueError):
    """The files of a domain do not belong together."""


def _check(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise _DamagedError(f"{path} holds {found} values and not {expected}: it is damaged")


def _mapped(path: Path) -> NDArray[Any]:
    """Return an array that stays on disk, unless it is small."""
    found: NDArray[Any] = np.load(path, mmap_mode=None if path.stat().st_size < _SMALL else "r")
    return found


def _ranges(ends: NDArray[Any], rows: IndexArray) -> tuple[IndexArray, IndexArray]:
    """Return the index of the first loss of each sample and the index after its last one, each (n,)."""
    begins = np.where(rows > 0, ends[rows - 1], 0).astype(np.int64)
    return begins, np.asarray(ends[rows], dtype=np.int64)
