"""Making the embeddings of texts by an encoder: what is on disk is read, what is missing is made by all processes."""

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
    """An encoder that is loaded when something is to be made, and the folder its embeddings are kept in.

    Attributes:
        choice: the encoder.
        root: folder of the stores; each list of texts has one of its own in it.
        device: where the encoder runs on this process.
        progress: whether to show a progress bar.
        chunk_rows: texts of a chunk.
    """

    choice: EncoderChoice
    root: Path
    device: torch.device | str = "cpu"
    progress: bool = False
    chunk_rows: int = CHUNK_ROWS
    _encoder: Encoder | None = field(default=None, init=False)
    _key: dict[str, Any] | None = field(default=None, init=False)

    def open(self) -> Encoder:
        """Return the encoder, loaded once.

        Raises:
            DataFlexError: if it cannot be loaded, or its service does not answer.
        """
        from dataflex.probe.mode import preserved_rng
        from dataflex.probe.reference import whole_models

        if self._encoder is None:
            # Whole on each process, and without a trace in the random streams that the model in training begins with.
            with quietly(), whole_models(), preserved_rng():
                self._encoder = self.choice.load(self.device)
        return self._encoder

    def close(self) -> None:
        """Give back the encoder's memory."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    def embed(self, texts: Texts, what: str = "texts") -> EmbeddingStore:
        """Return the finished store of the embeddings of texts. All processes make this call together.

        Args:
            texts: a text without anything but white space has a row of zeros.
            what: they are, for messages.

        Raises:
            DataFlexError: on every process, if the encoder or the disk fails on one; finished chunks stay.
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
                    f"{folder} holds embeddings of {store.dim} numbers, and {self._encoder.says} gives "
                    f"{self._encoder.dim}: it is another one now. Delete {folder} to make the embeddings again."
                )
            return store

    def _found(self, texts: Texts) -> tuple[dict[str, Any], Path, bool]:
        """Return what the embeddings depend on, the folder of their store, and whether all of them are there."""
        if self._key is None:
            self._key = self.choice.key()
        key = {**self._key, "texts": texts.digest, "rows": texts.size}
        folder = self.root / f"embeddings-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
        store = EmbeddingStore.load(folder)
        return key, folder, store is not None and not store.missing()

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """Have other runs that want the same embeddings wait, as the runs of a comparison that share a folder do."""
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
        """Return the chunks that are missing in a store, begun if there is none."""
        store = EmbeddingStore.load(folder)
        if store is None:
            encoder = self.open()
            about = {"encoder": encoder.says, "of": what, "key": key}
            store = EmbeddingStore.make(folder, rows, encoder.dim, about, self.chunk_rows)
        return store.missing()

    def _make(self, folder: Path, texts: Texts, missing: list[int], what: str) -> None:
        """Make this process's share of the missing chunks."""
        from dataflex.probe.mode import preserved_rng

        store, encoder = EmbeddingStore.load(folder), self.open()
        assert store is not None
        mine = missing[distributed.rank() :: distributed.world_size()]
        with preserved_rng(), ThreadPoolExecutor(1) as reader:  # the next texts are decoded while the device works
            ahead = [reader.submit(texts.read, *store.range_of(chunk)) for chunk in mine[:1]]
            for number, chunk in enumerate(self._bar(mine, what)):
                read = ahead.pop().result()
                ahead = [reader.submit(texts.read, *store.range_of(later)) for later in mine[number + 1 : number + 2]]
                store.write(chunk, unit_vectors(encoder, read, store.range_of(chunk)[0]))

    def _bar(self, chunks: list[int], what: str) -> tqdm[int]:
        return tqdm(chunks, desc=f"Embeddings of {what}", unit="chunk", disable=not self.progress, leave=False)


def unit_vectors(encoder: Encoder, texts: list[str], first: int = 0) -> NDArray[np.float32]:
    """Return a vector of length 1 for each text, (n, H); zeros for one of white space alone.

    Raises:
        DataFlexError: if the encoder gives numbers that are not finite; ``first`` is the number of the first text.
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
        raise DataFlexError(f"{encoder.says} gives numbers that are not finite for text {bad}.")
    found[there] = vectors / np.where(lengths > 0, lengths, 1.0)[:, None]
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Keep Transformers from printing the configuration of the encoder as if it were the model's."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def told(make: Callable[[], EmbeddingStore], what: str) -> EmbeddingStore:
    """Make embeddings, and print on the main process where they are, of what shape, and how long it took."""
    begin = time.monotonic()
    store = make()
    if distributed.rank() == 0:
        seconds = time.monotonic() - begin
        print(f"dataflex: embeddings of {store.rows:,} {what} ({store.dim} numbers each, {seconds:.1f} s): ", end="")
        print(store.folder, flush=True)
    return store
