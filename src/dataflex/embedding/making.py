"""Computes the embeddings of texts with an encoder. All processes share the chunks that are missing on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from dataflex import distributed
from dataflex.embedding.encoders import Encoder, EncoderChoice
from dataflex.embedding.store import CHUNK_ROWS, EmbeddingStore
from dataflex.embedding.texts import Texts
from dataflex.errors import DataFlexError

if TYPE_CHECKING:
    import torch


@dataclass
class EncoderRun:
    """An encoder that is loaded only if embeddings are missing, and the folder that stores its embeddings.

    Attributes:
        choice: the encoder.
        root: folder of the stores. Each list of texts has a separate store.
        device: the device of the encoder on this process.
        progress: whether to show a progress bar.
        chunk_rows: number of texts in a chunk.
    """

    choice: EncoderChoice
    root: Path
    device: torch.device | str = "cpu"
    progress: bool = False
    chunk_rows: int = CHUNK_ROWS
    _encoder: Encoder | None = field(default=None, init=False)
    _key: dict[str, Any] | None = field(default=None, init=False)

    def open(self) -> Encoder:
        """Return the encoder. It is loaded only once.

        Raises:
            DataFlexError: if the encoder cannot be loaded or its service does not answer.
        """
        from dataflex.probe.mode import preserved_rng
        from dataflex.probe.reference import whole_models

        if self._encoder is None:
            # The encoder is loaded unsharded on each process, and the random state that the training starts with is
            # unchanged.
            with quietly(), whole_models(), preserved_rng():
                self._encoder = self.choice.load(self.device)
        return self._encoder

    def close(self) -> None:
        """Release the encoder's memory."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    def embed(self, texts: Texts, what: str = "texts") -> EmbeddingStore:
        """Return the finished store of the embeddings of texts. All processes make this call together.

        Args:
            texts: the texts. A text of only white space has a row of zeros.
            what: a name of the texts for messages.

        Raises:
            DataFlexError: on every process, if the encoder or the disk fails on one process. Finished chunks stay on
                disk.
        """
        key, folder, is_complete = distributed.on_main(partial(self._found, texts))
        if not is_complete:
            with self._alone(folder):
                missing = distributed.on_main(partial(self._begun, key, folder, texts.size, what))
                if missing:
                    distributed.on_each(partial(self._make, folder, texts, missing, what))
        with distributed.together():
            store = EmbeddingStore.load(folder)
            assert store is not None
            if self._encoder is not None and self._encoder.dim != store.dim:
                raise DataFlexError(
                    f"{folder} holds embeddings of length {store.dim}, and {self._encoder.says} gives length "
                    f"{self._encoder.dim}: the encoder has changed. Delete {folder} to compute the embeddings again."
                )
            return store

    def _found(self, texts: Texts) -> tuple[dict[str, Any], Path, bool]:
        """Return the key of the embeddings, the folder of their store, and whether the store is complete."""
        if self._key is None:
            self._key = self.choice.key()
        key = {**self._key, "texts": texts.digest, "rows": texts.size}
        folder = self.root / f"embeddings-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
        store = EmbeddingStore.load(folder)
        return key, folder, store is not None and not store.missing()

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """Hold a lock, so that other runs that need the same embeddings wait.

        The runs of a comparison, for example, may share the folder.
        """
        lock = FileLock(folder / ".lock")

        def take() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(poll_interval=0.5)
            except OSError as error:
                raise DataFlexError(f"{folder} cannot be written ({error}).") from error

        distributed.on_main(take)
        try:
            yield
        finally:
            if distributed.rank() == 0:
                lock.release()

    def _begun(self, key: dict[str, Any], folder: Path, rows: int, what: str) -> list[int]:
        """Return the missing chunks of a store. The store is created if it does not exist."""
        store = EmbeddingStore.load(folder)
        if store is None:
            encoder = self.open()
            about = {"encoder": encoder.says, "of": what, "key": key}
            store = EmbeddingStore.make(folder, rows, encoder.dim, about, self.chunk_rows)
        return store.missing()

    def _make(self, folder: Path, texts: Texts, missing: list[int], what: str) -> None:
        """Compute this process's share of the missing chunks."""
        from dataflex.probe.mode import preserved_rng

        store, encoder = EmbeddingStore.load(folder), self.open()
        assert store is not None
        mine = missing[distributed.rank() :: distributed.world_size()]
        with preserved_rng(), ThreadPoolExecutor(1) as reader:  # a thread decodes the next texts while the device works
            ahead = [reader.submit(texts.read, *store.range_of(chunk)) for chunk in mine[:1]]
            for number, chunk in enumerate(self._bar(mine, what)):
                read = ahead.pop().result()
                ahead = [reader.submit(texts.read, *store.range_of(later)) for later in mine[number + 1 : number + 2]]
                store.write(chunk, unit_vectors(encoder, read, store.range_of(chunk)[0]))

    def _bar(self, chunks: list[int], what: str) -> tqdm[int]:
        return tqdm(chunks, desc=f"Embeddings of {what}", unit="chunk", disable=not self.progress, leave=False)


def unit_vectors(encoder: Encoder, texts: list[str], first: int = 0) -> NDArray[np.float32]:
    """Return a vector of length 1 for each text, (n, H). A text of only white space has a row of zeros.

    Raises:
        DataFlexError: if the encoder returns values that are not finite. ``first`` is the number of the first text.
    """
    found = np.zeros((len(texts), encoder.dim), dtype=np.float32)
    there = np.array([number for number, text in enumerate(texts) if text.strip()], dtype=np.int64)
    if not there.size:
        return found
    vectors = encoder.encode([texts[number] for number in there])
    if vectors.shape != (there.size, encoder.dim):
        raise DataFlexError(f"{encoder.says} gave vectors of shape {vectors.shape} for {there.size} texts.")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if not np.isfinite(lengths).all():
        bad = int(there[~np.isfinite(lengths)][0]) + first
        raise DataFlexError(f"{encoder.says} returned values that are not finite for text {bad}.")
    found[there] = vectors / np.where(lengths > 0, lengths, 1.0)[:, None]
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Prevent Transformers from printing the encoder's configuration, which would look like the model's."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def told(make: Callable[[], EmbeddingStore], what: str) -> EmbeddingStore:
    """Compute embeddings, and print their folder, shape and time on the main process."""
    begin = time.monotonic()
    store = make()
    if distributed.rank() == 0:
        seconds = time.monotonic() - begin
        print(f"dataflex: embeddings of {store.rows:,} {what} (length {store.dim}, {seconds:.1f} s): ", end="")
        print(store.folder, flush=True)
    return store
