"""Features of many samples on disk: computed chunk by chunk, resumed after a kill, and scored block by block.

A store is a folder named after a digest of everything that its features depend on, so that a changed adapter, data set
or parameter gives another folder. ``manifest.json`` describes these dependencies, and ``order.npy`` the sample of each
row. Chunk c is ``norms-c.bin`` (float32) and ``features-c.bin``, row after row. The features file is written last and
marks the chunk as complete. Every file is renamed to its final name when it is complete, so several processes may write
chunks of one store at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dataflex import distributed
from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray
from dataflex.errors import DataFlexError
from dataflex.files import json_text, write_atomically

FeatureType = Literal["float16", "bfloat16", "float32"]

FORMAT = 2
"""Version of the format. Version 1 has features made with other random signs."""
MANIFEST_FILE = "manifest.json"
ORDER_FILE = "order.npy"
_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_BLOCK_BYTES = 1 << 28
"""Most bytes of a block of features on the device, as float32."""
_LEFTOVER_AGE = 3600.0
"""Age in seconds from which a temporary file counts as left behind by a killed process."""
_SUMMED_ROWS = 65536
"""Number of rows of products that are summed over the processes at a time."""
_SHOWN = 80
"""Most characters of a value in an error message."""


@dataclass(frozen=True, eq=False)
class FeatureStore:
    """Features of a list of ``N`` samples; use :meth:`open` to fill one and :meth:`load` to read a finished one.

    Attributes:
        folder: folder of the files.
        key: the values that the features depend on, as JSON values.
        order: row r is the sample at position ``order[r]`` of the caller's list, shape (N,), read-only.
        dim: length of a feature, k.
        dtype: number type of the stored features; features are read as float32.
        chunks: number of rows of each chunk.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> import torch
        >>> from dataflex import FeatureStore
        >>> root = Path(tempfile.mkdtemp())
        >>> store = FeatureStore.open(root, {"data": "v1"}, np.arange(3), dim=2, dtype="float32", chunks=[2, 1])
        >>> for chunk in store.missing():
        ...     rows = store.positions(chunk).size
        ...     store.write(chunk, torch.tensor([[0.6, 0.8]]).repeat(rows, 1), torch.full((rows,), 5.0))
        >>> FeatureStore.load(store.folder).norms()
        array([5., 5., 5.], dtype=float32)
    """

    folder: Path
    key: dict[str, Any]
    order: IndexArray
    dim: int
    dtype: FeatureType
    chunks: list[int]

    @classmethod
    def open(
        cls, root: Path, key: dict[str, Any], order: IndexArray, dim: int, dtype: FeatureType, chunks: Sequence[int]
    ) -> FeatureStore:
        """Return the store of exactly these features below ``root``; make the store if it does not exist.

        With several processes, all of them must call this method.

        Args:
            root: folder of all stores, on a file system that all processes share.
            key: values that the features depend on (digests of model and data, settings, versions), as JSON values.
            order: a permutation of ``range(N)``, shape (N,).
            dim: length of a feature, k >= 1.
            dtype: number type of the stored features.
            chunks: rows of each chunk, >= 1; they add up to N.

        Raises:
            DataFlexError: if the folder exists but does not match its name, the folder cannot be written, or its disk
                has less free space than the missing chunks need.
            TypeError: if ``key`` holds other values than JSON values.
            ValueError: if ``key`` holds NaN or infinity, or another argument is not as described.
        """
        order = np.array(order, dtype=np.int64)
        order.setflags(write=False)
        chunks = [int(rows) for rows in chunks]
        if not np.array_equal(np.sort(order), np.arange(order.size)):
            raise ValueError("order must be a permutation of range(N)")
        if min(chunks, default=1) < 1 or sum(chunks) != order.size:
            raise ValueError(f"chunks must be at least 1 each and add up to {order.size}")
        if dim < 1 or dtype not in _TYPES:
            raise ValueError(f"dim must be at least 1 and dtype one of {', '.join(_TYPES)}; got {dim} and {dtype!r}")
        manifest = _manifest(key, order, int(dim), dtype, chunks)
        folder = Path(root) / f"features-{manifest['digest'][:16]}"
        store = cls(folder, manifest["key"], order, int(dim), dtype, chunks)
        distributed.require_equal(folder.name, "the key of the feature store")
        distributed.on_main(lambda: store._prepare(manifest))
        return store

    @classmethod
    def load(cls, path: Path) -> FeatureStore:
        """Return the finished store in folder ``path``. The path is enough, because the manifest describes the store.

        Raises:
            DataFlexError: if the folder holds no store, or the store is incomplete, damaged, or from another release.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        if manifest.get("format") != FORMAT:
            raise DataFlexError(f"{folder} has format {manifest.get('format')}, this release reads {FORMAT}.")
        if manifest.get("digest") != _digest(manifest):
            raise DataFlexError(f"{folder / MANIFEST_FILE} was changed after it was written. {_remedy(folder)}")
        order = _read_order(folder, manifest["order"])
        store = cls(folder, manifest["key"], order, manifest["dim"], manifest["dtype"], manifest["chunks"])
        store._require_complete()
        return store

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return self.order.size

    @property
    def nbytes(self) -> int:
        """Bytes of the finished store on disk, without the manifest."""
        return self._bytes(self.size) + self.order.nbytes

    @property
    def complete(self) -> bool:
        """Whether every chunk is complete."""
        return not self.missing()

    def missing(self) -> list[int]:
        """Return the indices of the chunks to write: a file of each is absent or has another size than it should."""
        return [
            chunk
            for chunk, rows in enumerate(self.chunks)
            if _file_size(self._features_file(chunk)) != rows * self._row_bytes
            or _file_size(self._norms_file(chunk)) != rows * 4
        ]

    def positions(self, chunk: int) -> IndexArray:
        """Return the positions of a chunk's samples in the caller's list, in the order of its rows, shape (rows,)."""
        start = int(self._starts[chunk])
        return self.order[start : start + self.chunks[chunk]].copy()

    def write(self, chunk: int, features: Tensor, norms: Tensor) -> None:
        """Store a chunk. Several processes may call this at the same time, each for other chunks.

        Reading needs all chunks, so place a barrier between the last call of this method and :meth:`blocks`.

        Args:
            chunk: index of the chunk.
            features: shape (rows, dim), any floating type and device. Rows whose norm is NaN are stored as zeros.
            norms: shape (rows,); NaN for a sample without a trained token.

        Raises:
            DataFlexError: if a feature is not finite in the stored type, or the files cannot be written.
            ValueError: if the number of rows or the length of the features differs from the chunk's.
        """
        rows = self.chunks[chunk]
        if features.shape != (rows, self.dim) or norms.shape != (rows,):
            raise ValueError(
                f"chunk {chunk} takes features ({rows}, {self.dim}) and norms ({rows},), "
                f"got {tuple(features.shape)} and {tuple(norms.shape)}"
            )
        stored = features.detach().to(_TYPES[self.dtype])
        stored = stored.masked_fill(norms.detach().isnan().to(stored.device)[:, None], 0)
        if not stored.isfinite().all():
            raise DataFlexError(
                f"chunk {chunk} of {self.folder} holds features that are not finite as {self.dtype}. Normalise them "
                "or store float32; if that does not help, the model's gradients are not finite."
            )
        try:
            # The features come last, because their file marks the chunk as complete.
            write_atomically(self._norms_file(chunk), bytes_of(norms.detach().float()))
            write_atomically(self._features_file(chunk), bytes_of(stored))
        except OSError as error:
            raise DataFlexError(f"{self.folder} cannot be written ({error}).") from error

    def blocks(
        self, device: torch.device | str, rows: int = 4096, chunks: Iterable[int] | None = None
    ) -> Iterator[tuple[IndexArray, Tensor]]:
        """Return an iterator over blocks of features, read from memory maps in the order of the rows.

        Args:
            device: device of the blocks.
            rows: most rows of a block. A block has fewer rows at the end of a chunk, or if it would exceed 256 MiB.
            chunks: indices of the chunks to read, ascending; None means all.

        Returns:
            Pairs of positions in the caller's list, shape (b,), and their features, shape (b, dim), float32.

        Raises:
            DataFlexError: if a chunk is missing.
        """
        self._require_complete()
        chunks = range(len(self.chunks)) if chunks is None else chunks
        return self._blocks(device, max(1, min(rows, _BLOCK_BYTES // (4 * self.dim))), chunks)

    def norms(self) -> ScoreArray:
        """Return the norm of every sample by its position in the caller's list, shape (N,), float32.

        Raises:
            DataFlexError: if a chunk is missing.
        """
        self._require_complete()
        norms = np.empty(self.size, dtype=np.float32)
        start = 0
        for chunk, rows in enumerate(self.chunks):
            norms[self.order[start : start + rows]] = self.norms_of(chunk)
            start += rows
        return norms

    def norms_of(self, chunk: int) -> ScoreArray:
        """Return the norms of a chunk's samples, in the order of its rows, shape (rows,), float32."""
        return np.fromfile(self._norms_file(chunk), dtype=np.float32)

    @cached_property
    def _starts(self) -> IndexArray:
        """Index of the first row of each chunk."""
        return np.cumsum([0, *self.chunks], dtype=np.int64)[:-1]

    @property
    def _row_bytes(self) -> int:
        return self.dim * _TYPES[self.dtype].itemsize

    def _bytes(self, rows: int) -> int:
        return rows * (self._row_bytes + 4)

    def _features_file(self, chunk: int) -> Path:
        return self.folder / f"features-{chunk:06d}.bin"

    def _norms_file(self, chunk: int) -> Path:
        return self.folder / f"norms-{chunk:06d}.bin"

    def _prepare(self, manifest: dict[str, Any]) -> None:
        """Check the folder against ``manifest``, or make the folder; check that the missing chunks fit on the disk."""
        path = self.folder / MANIFEST_FILE
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _require_same(self.folder, _read_manifest(self.folder), manifest)
                _read_order(self.folder, manifest["order"])
                self._drop_leftovers()
            self._require_space()
            if not path.exists():
                # Runs that get here at the same time write the same bytes. The manifest is last and marks the store as
                # made.
                order = io.BytesIO()
                np.save(order, self.order)
                write_atomically(self.folder / ORDER_FILE, order.getvalue())
                write_atomically(path, json_text(manifest, indent=1).encode())
        except OSError as error:
            raise DataFlexError(f"{self.folder} cannot be written ({error}).") from error

    def _drop_leftovers(self) -> None:
        """Delete incomplete files of killed processes, but no file that another process is writing."""
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LEFTOVER_AGE:
                    path.unlink()

    def _require_space(self) -> None:
        """Raise an error if the missing chunks do not fit on the disk."""
        needed = sum(self._bytes(self.chunks[chunk]) for chunk in self.missing())
        free = shutil.disk_usage(self.folder.parent).free
        if needed > free:
            raise DataFlexError(
                f"{self.folder} needs {needed:,} bytes for its features, but only {free:,} are free on that disk. Free "
                "some space, or choose another folder, a smaller dim or a smaller dtype."
            )

    def _require_complete(self) -> None:
        """Raise an error if a chunk is missing."""
        if missing := self.missing():
            raise DataFlexError(
                f"{self.folder} is not complete: {len(missing)} of {len(self.chunks)} chunks are missing. Start the "
                "computation of its features again; it computes only the missing chunks."
            )

    def _blocks(
        self, device: torch.device | str, rows: int, chunks: Iterable[int]
    ) -> Iterator[tuple[IndexArray, Tensor]]:
        """Yield the blocks of some chunks."""
        for chunk in chunks:
            first, count = int(self._starts[chunk]), self.chunks[chunk]
            shape = (count, self._row_bytes)
            # Bytes, because numpy has no bfloat16.
            stored = np.memmap(self._features_file(chunk), dtype=np.uint8, mode="r", shape=shape)
            for start in range(0, count, rows):
                stop = min(start + rows, count)
                # A copy, because a tensor must not share the read-only memory of the map.
                block = torch.from_numpy(np.array(stored[start:stop])).view(_TYPES[self.dtype])
                yield self.order[first + start : first + stop].copy(), block.to(device).float()


def similarities(store: FeatureStore, targets: Tensor, device: torch.device | str) -> ScoreArray:
    """Return the inner products of every feature with each target, computed block by block.

    Collective: each process reads its share of the chunks, and every process returns all products.

    Args:
        store: a complete store.
        targets: features to compare with, shape (S, k).
        device: device of the products.

    Returns:
        Products by position in the caller's list, shape (N, S), float32. Rows are NaN if the norm is NaN.

    Raises:
        DataFlexError: if the store is not complete, or the targets have another length than the features.
    """
    if targets.ndim != 2 or targets.shape[1] != store.dim:
        raise DataFlexError(
            f"{store.folder} holds features of length {store.dim}, but the targets have shape {tuple(targets.shape)}."
        )
    columns = targets.detach().to(device, torch.float32).T
    scores = np.zeros((store.size, targets.shape[0]), dtype=np.float32)
    mine = range(distributed.rank(), len(store.chunks), distributed.world_size())

    def fill_in() -> None:
        for positions, block in store.blocks(device, chunks=mine):
            scores[positions] = (block @ columns).cpu().numpy()
        for chunk in mine:
            scores[store.positions(chunk)[np.isnan(store.norms_of(chunk))]] = np.nan

    distributed.on_each(fill_in)
    if distributed.world_size() > 1:
        # A process has zeros in the rows of other processes, so a sum joins them.
        for begin in range(0, store.size, _SUMMED_ROWS):
            part = torch.from_numpy(scores[begin : begin + _SUMMED_ROWS])
            part.copy_(distributed.all_reduce_sum(part.to(device, copy=True)))
    return scores


def _manifest(key: dict[str, Any], order: IndexArray, dim: int, dtype: str, chunks: list[int]) -> dict[str, Any]:
    """Return the description of a store, with its digest."""
    manifest = {
        "format": FORMAT,
        "rows": order.size,
        "dim": dim,
        "dtype": dtype,
        "chunks": chunks,
        "order": _order_digest(order),
        "key": json.loads(_canonical(key)),
    }
    return {**manifest, "digest": _digest(manifest)}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(manifest: dict[str, Any]) -> str:
    """Return the digest that names the folder.

    The format is not part of the name. So a store of another format has the same name and is noticed, not ignored.
    """
    named = {name: value for name, value in manifest.items() if name not in ("format", "digest")}
    return hashlib.sha256(_canonical(named).encode()).hexdigest()


def _order_digest(order: IndexArray) -> str:
    return hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of features.

    Raises:
        DataFlexError: if there is none, or it cannot be read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise DataFlexError(f"{folder} has no {MANIFEST_FILE}, so it is not a folder of features.")
    try:
        manifest = json.loads(path.read_bytes(), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise DataFlexError(f"{path} cannot be read ({error}). {_remedy(folder)}") from error
    if not isinstance(manifest, dict):
        raise DataFlexError(f"{path} is not a manifest. {_remedy(folder)}")
    return manifest


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read_order(folder: Path, digest: str) -> IndexArray:
    """Return the sample index of each stored row, after comparing its digest with the manifest's.

    Raises:
        DataFlexError: if the file cannot be read or has changed.
    """
    path = folder / ORDER_FILE
    try:
        order = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataFlexError(f"{path} cannot be read ({error}). {_remedy(folder)}") from error
    if _order_digest(order) != digest:
        raise DataFlexError(f"{path} was changed after it was written. {_remedy(folder)}")
    order.setflags(write=False)
    return order


def _require_same(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise an error that lists the differences between the stored and the expected manifest."""
    there, wanted = _flat(stored), _flat(asked)
    differences = [
        f"{name} is {_shown(there.get(name))} there and {_shown(wanted.get(name))} here"
        for name in sorted({*there, *wanted})
        if there.get(name) != wanted.get(name)
    ]
    if differences:
        raise DataFlexError(
            f"{folder / MANIFEST_FILE} does not belong to these features: {'; '.join(differences)}. {_remedy(folder)}"
        )


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Return the leaves of nested dictionaries by dotted name, as JSON text."""
    if not isinstance(value, dict) or not value:
        return {name: _canonical(value)}
    leaves: dict[str, str] = {}
    for key, item in value.items():
        leaves |= _flat(item, f"{name}.{key}" if name else key)
    return leaves


def _shown(text: str | None) -> str:
    """Return a value's text for a message, shortened if it is long."""
    if text is None:
        return "absent"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _remedy(folder: Path) -> str:
    """Return the advice for a damaged folder."""
    return f"Delete {folder} to make the features again."


def _file_size(path: Path) -> int:
    """Return the size of a file in bytes; -1 if the file does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def bytes_of(values: Tensor) -> memoryview:
    """Return the bytes of a tensor's values, row after row."""
    # contiguous() returns a slice of one value unchanged, with a stride that view refuses. Only a copy has stride 1.
    copied = values.cpu().clone(memory_format=torch.contiguous_format)
    return copied.flatten().view(torch.uint8).numpy().data
