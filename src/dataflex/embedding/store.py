"""Embeddings on disk: one file in the order of the samples, computed in chunks and continued after an interruption.

A store is a folder named after a digest of the texts and of the encoder. ``embeddings.npy`` (float16, N x H) is created
at the beginning. A chunk of rows is written into this file and then marked as done by a file in ``done/``, so that
several processes can write chunks of one store. ``manifest.json`` is written last when a store is created.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataFlexError
from dataflex.files import json_text, write_atomically

FORMAT = 1
MANIFEST_FILE = "manifest.json"
EMBEDDINGS_FILE = "embeddings.npy"
DONE = "done"
CHUNK_ROWS = 2048
_TYPE = np.dtype("<f2")


@dataclass(frozen=True)
class EmbeddingStore:
    """Embeddings of a list of N texts.

    Attributes:
        folder: the folder of the files.
        rows: number of texts, N.
        dim: length of an embedding, H.
        chunk_rows: number of rows in a chunk. The last chunk may have fewer rows.
        offset: number of bytes before the first row.
    """

    folder: Path
    rows: int
    dim: int
    chunk_rows: int
    offset: int

    @classmethod
    def load(cls, folder: Path) -> EmbeddingStore | None:
        """Return the store in a folder, complete or not, or None if the folder holds no store.

        Raises:
            DataFlexError: if the store is damaged, or another release wrote it.
        """
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataFlexError(f"{folder / MANIFEST_FILE} cannot be read ({error}). {_remedy(folder)}") from error
        if manifest.get("format") != FORMAT:
            raise DataFlexError(f"{folder} has format {manifest.get('format')}, this release reads {FORMAT}.")
        rows, dim, chunk_rows = (int(manifest[name]) for name in ("rows", "dim", "chunk_rows"))
        file = folder / EMBEDDINGS_FILE
        offset = _offset(file)
        if offset is None or file.stat().st_size != offset + rows * dim * _TYPE.itemsize:
            raise DataFlexError(f"{file} is damaged: it does not hold {rows} x {dim} values. {_remedy(folder)}")
        return cls(folder, rows, dim, chunk_rows, offset)

    @classmethod
    def make(
        cls, folder: Path, rows: int, dim: int, about: dict[str, Any], chunk_rows: int = CHUNK_ROWS
    ) -> EmbeddingStore:
        """Create an empty store. ``about`` is stored in the manifest for human readers.

        Raises:
            DataFlexError: if the folder cannot be written, or the disk has too little free space.
        """
        try:
            (folder / DONE).mkdir(parents=True, exist_ok=True)
            for mark in (folder / DONE).iterdir():  # marks of a store whose manifest is missing
                mark.unlink()
            needed, free = rows * dim * _TYPE.itemsize, shutil.disk_usage(folder).free
            if needed > free:
                raise DataFlexError(
                    f"{folder} needs {needed:,} bytes for its embeddings, and {free:,} are free on that disk. Free "
                    "some, or name another embedding_folder."
                )
            temporary = folder / f".{EMBEDDINGS_FILE}.{os.getpid()}.tmp"
            np.lib.format.open_memmap(temporary, mode="w+", dtype=_TYPE, shape=(rows, dim)).flush()
            temporary.replace(folder / EMBEDDINGS_FILE)
            manifest = {"format": FORMAT, "rows": rows, "dim": dim, "chunk_rows": chunk_rows, **about}
            write_atomically(folder / MANIFEST_FILE, json_text(manifest, indent=1).encode())
        except OSError as error:
            raise DataFlexError(f"{folder} cannot be written ({error}).") from error
        found = cls.load(folder)
        assert found is not None
        return found

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.rows // self.chunk_rows)

    def missing(self) -> list[int]:
        """Return the numbers of the chunks that are not done."""
        done = {path.name for path in (self.folder / DONE).iterdir()} if (self.folder / DONE).is_dir() else set[str]()
        return [chunk for chunk in range(self.chunks) if str(chunk) not in done]

    def range_of(self, chunk: int) -> tuple[int, int]:
        """Return the first row of a chunk and the row after its last row."""
        return chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.rows)

    def write(self, chunk: int, values: NDArray[np.floating[Any]]) -> None:
        """Write a chunk and mark it as done. Several processes may write different chunks at the same time.

        Raises:
            DataFlexError: if the length of the embeddings differs from the length in the store, or if the disk fails.
        """
        start, stop = self.range_of(chunk)
        if values.shape != (stop - start, self.dim):
            raise DataFlexError(
                f"{self.folder} holds embeddings of length {self.dim}, and those of rows {start} to {stop - 1} have "
                f"shape {values.shape}: the encoder has changed. {_remedy(self.folder)}"
            )
        content = np.ascontiguousarray(values, dtype=_TYPE)
        try:
            with (self.folder / EMBEDDINGS_FILE).open("r+b") as stream:
                stream.seek(self.offset + start * self.dim * _TYPE.itemsize)
                stream.write(content.data)
                stream.flush()
                os.fsync(stream.fileno())
            write_atomically(self.folder / DONE / str(chunk), b"")
        except OSError as error:
            raise DataFlexError(f"{self.folder} cannot be written ({error}).") from error

    def array(self) -> NDArray[np.float16]:
        """Return all embeddings, (N, H), as a read-only memory map."""
        if not self.rows:
            return np.zeros((0, self.dim), dtype=np.float16)
        found: NDArray[np.float16] = np.load(self.folder / EMBEDDINGS_FILE, mmap_mode="r")
        return found


def _offset(file: Path) -> int | None:
    """Return the length in bytes of the header of a numpy file, or None if the header is invalid."""
    with contextlib.suppress(OSError, ValueError), file.open("rb") as stream:
        if np.lib.format.read_magic(stream) == (1, 0):
            np.lib.format.read_array_header_1_0(stream)
            return stream.tell()
    return None


def _remedy(folder: Path) -> str:
    return f"Delete {folder} to compute the embeddings again."
