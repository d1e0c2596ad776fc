"""Makes a table of reference losses: domain after domain, in parts that survive a stop.

The losses of a part are computed on all processes, and the main process writes them as float32. When all parts of a
domain exist, they become the domain's files, and the domain is listed in the table. So a domain takes 4 more bytes a
token on the disk while it is made.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from dataflex import distributed
from dataflex.api.reference import TABLE_FILE, TABLE_FORMATS, NumberType, damage_of, files_of_domain, read_table
from dataflex.data.pool import Pool
from dataflex.data.sampling import IndexArray
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.probe.loss_code import Encoder, Errors
from dataflex.probe.mode import preserved_rng
from dataflex.probe.reference import Advance, model_files, model_files_digest
from dataflex.probe.reference_table import parts_of

_PART_TOKENS = 1 << 20
"""Number of tokens of a part, unless a single sample has more. An interrupted part is computed again."""

Compute = Callable[[IndexArray, Advance], tuple[NDArray[np.int64], NDArray[np.float32]]]
"""Returns the number of losses of each sample and the losses, sample after sample, on all processes together."""


@dataclass
class TableMaker:
    """Completes a table of reference losses.

    Attributes:
        folder: folder of the table.
        pool: the run's samples.
        setting: the setting that names the table, for messages.
        kind: number type of the losses. None means the type of the table, or float32 for a new one.
        progress: whether to show a progress bar.
    """

    folder: Path
    pool: Pool
    setting: str
    kind: NumberType | None = None
    progress: bool = False

    def missing(self, model: str | None) -> list[str]:
        """Return the domains whose losses are not in the table yet.

        Args:
            model: the reference. None means the one that the table was made with.

        Raises:
            ConfigError: if the table has another number type, belongs to another reference, was made for other samples
                of a domain, or is damaged.
        """
        table = read_table(self.folder)
        if table is None:
            return list(self.pool.domains)
        if self.kind not in (None, table["type"]):
            raise ConfigError(
                f"{self.setting}: the table in {self.folder} holds losses as {table['type']} and not as {self.kind}. "
                "Name another folder."
            )
        if model is not None and table["model"] != model_files_digest(model):
            raise ConfigError(
                f"{self.setting}: the table in {self.folder} was made with another reference ({table['name']!r}) than "
                f"{model!r}. Name another folder, or name the table without a reference to use it as it is."
            )
        found, parts = table["domains"], parts_of(table, self.pool)
        ends = [start for start, _ in parts[1:]] + [self.pool.size]
        lacking = []
        for (begin, name), end in zip(parts, ends, strict=True):
            if name not in found:
                lacking.append(name)
            elif (damage := damage_of(self.folder, table, name)) is not None:
                raise ConfigError(f"{self.setting}: {damage}")
            elif found[name]["samples_sha256"] != samples_digest(self.pool, name, begin, end):
                raise ConfigError(
                    f"{self.setting}: the table in {self.folder} was made for other samples of {name!r} (its data, "
                    "template, cutoff_len or packing has changed). Name another folder."
                )
        return lacking

    def make(self, missing: list[str], compute: Compute, model: str) -> None:
        """Add domains to the table, on all processes together. Domains that are complete stay as they are.

        Args:
            missing: names of the domains.
            compute: computes the losses of samples of the pool.
            model: the reference that computes them.

        Raises:
            ConfigError: if another run is adding to the table, or if a loss has no code.
        """
        # Reading all weights for their digest takes seconds, so a thread does it while the first losses are computed.
        with self._alone(), ThreadPoolExecutor(1) as thread, distributed.together(), preserved_rng():
            digest = thread.submit(model_files_digest, model) if distributed.rank() == 0 else None
            for domain in missing:
                self._make_domain(domain, compute, model, digest)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Make the folder and lock it against other runs during the block."""
        with ExitStack() as stack:
            distributed.on_main(partial(self._lock, stack))
            yield

    def _lock(self, stack: ExitStack) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(self.folder / ".lock", timeout=0))
        except Timeout as error:
            raise ConfigError(
                f"{self.setting}: another run is making the table in {self.folder}; wait until it has finished."
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{self.setting}: {self.folder} cannot be written to ({error.strerror or error})."
            ) from error

    def _make_domain(self, domain: str, compute: Compute, model: str, model_digest: Future[str] | None) -> None:
        """Compute the losses of a domain, and add the domain to the table.

        Args:
            domain: name of the domain.
            compute: computes the losses of samples.
            model: the reference.
            model_digest: digest of its files, on the main process.
        """
        number, main = self.pool.domains.index(domain), distributed.rank() == 0
        begin, end = int(self.pool.offsets[number]), int(self.pool.offsets[number + 1])
        lengths, parts = self.pool.lengths[begin:end], _Parts(self.folder, _file_of(domain))
        digest: str = distributed.on_main(partial(samples_digest, self.pool, domain, begin, end))
        done: list[int] = distributed.on_main(lambda: parts.begin(f"{digest} {_versions_of(model)}"))
        ends = np.cumsum(lengths, dtype=np.int64)
        processes = distributed.world_size()
        with self._bar(domain, int(ends[-1])) as bar:

            def advance(tokens: int) -> None:
                bar.update(tokens * processes)  # about as many on each process; the end of a part is exact

            for first, last in part_ranges(lengths):
                if first not in done:
                    found = compute(np.arange(begin + first, begin + last), advance)
                    if main:
                        self._check(domain, first, *found)
                        parts.write(first, *found)
                bar.update(int(ends[last - 1]) - bar.n)

        def finish() -> None:
            assert model_digest is not None
            self._finish(domain, parts, digest, {"name": model, "model": model_digest.result()})

        distributed.on_main(finish)

    def _bar(self, domain: str, tokens: int) -> tqdm[Any]:
        about = f"Reference losses of {domain}"
        return tqdm(total=tokens, desc=about, unit="token", unit_scale=True, disable=not self.progress)

    def _check(self, domain: str, first: int, counts: NDArray[np.int64], losses: NDArray[np.float32]) -> None:
        """Check that every loss has a code, if losses are coded."""
        has_code = np.isfinite(losses) & (losses >= 0)
        if self._kind() == "float32" or has_code.all():
            return
        place = int(np.argmin(has_code))
        sample = first + int(np.searchsorted(np.cumsum(counts), place, side="right"))
        raise ConfigError(
            f"{self.setting}: the reference's loss on sample {sample} of {domain!r} is {losses[place]}, and a table of "
            "bytes holds finite losses of at least 0 only. Compute in a precision in which the reference does not "
            "overflow, or make a table of float32."
        )

    def _kind(self) -> NumberType:
        table = read_table(self.folder)
        return self.kind or ("float32" if table is None else table["type"])

    def _finish(self, domain: str, parts: _Parts, digest: str, about: dict[str, str]) -> None:
        """Write the files of a domain from its parts, and add the domain to the table's list."""
        kind, file = self._kind(), _file_of(domain)
        files = files_of_domain(self.folder, kind, file)
        samples = self.pool.domain_sizes[self.pool.domains.index(domain)]
        tokens, errors = _write_floats(files, parts) if kind == "float32" else _write_bytes(files, parts)
        entry: dict[str, Any] = {"file": file, "samples": int(samples), "samples_sha256": digest, "tokens": tokens}
        if errors is not None:
            entry["error"] = {"mean": errors.mean, "rms": errors.rms, "max": errors.largest}
        table = read_table(self.folder) or {**about, "domains": {}}
        table = {**table, "format": TABLE_FORMATS[kind], "type": kind}
        table["domains"][domain] = entry
        write_atomically(self.folder / TABLE_FILE, (json_text(table, indent=1) + "\n").encode())
        parts.remove()


def part_ranges(lengths: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Return the first sample of each part and the sample after its last one.

    A part has at most ``_PART_TOKENS`` tokens or a single sample. Parts do not depend on the number of processes.

    Args:
        lengths: number of tokens of every sample, (n,).
    """
    ends, found, first = np.cumsum(lengths, dtype=np.int64), [], 0
    while first < lengths.size:
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _PART_TOKENS, side="right")))
        found.append((first, last))
        first = last
    return found


class _Parts:
    """The finished parts of the domain that is being made, in a folder inside the table's."""

    def __init__(self, folder: Path, file: str) -> None:
        self._table, self._file = folder, file
        self._folder = folder

    def begin(self, key: str) -> list[int]:
        """Return the first samples of the parts that exist. Parts of other samples or another reference are deleted.

        Args:
            key: a text that says what the losses are computed from.
        """
        name = hashlib.sha256(f"{key} {_PART_TOKENS}".encode()).hexdigest()[:16]
        self._folder = self._table / f"{self._file}-{name}.parts"
        for other in self._table.glob(f"{self._file}-*.parts"):
            if other != self._folder:
                shutil.rmtree(other)
        self._folder.mkdir(exist_ok=True)
        return self._firsts()

    def _firsts(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*.npz"))

    def write(self, first: int, counts: NDArray[np.int64], losses: NDArray[np.float32]) -> None:
        """Write the losses of a part whose first sample has the number ``first``."""
        temporary = self._folder / f"{first}.tmp"
        with temporary.open("wb") as stream:
            np.savez(stream, counts=counts, losses=losses)
        temporary.replace(self._folder / f"{first}.npz")

    def read(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield the number of losses of each sample and the losses of every part, in order."""
        for first in self._firsts():
            with np.load(self._folder / f"{first}.npz") as part:
                yield part["counts"], part["losses"]

    def remove(self) -> None:
        """Delete the parts."""
        shutil.rmtree(self._folder)


def _write_floats(files: dict[str, Path], parts: _Parts) -> tuple[int, None]:
    """Write the files of a domain of float32 losses, and return the number of its losses."""
    counts, temporary = [], files["losses"].with_suffix(".tmp")
    with temporary.open("wb") as stream:
        for found, losses in parts.read():
            counts.append(found)
            stream.write(losses.astype("<f4").tobytes())
    temporary.replace(files["losses"])
    joined = np.concatenate(counts)
    _save(files["counts"], joined)
    return int(joined.sum()), None


def _write_bytes(files: dict[str, Path], parts: _Parts) -> tuple[int, Errors]:
    """Write the files of a domain of coded losses, and return the number of its losses and their errors."""
    encoder, temporary = Encoder(), files["losses"].with_suffix(".tmp")
    counts, means, steps = [], [], []
    with temporary.open("wb") as stream:
        for found, losses in parts.read():
            counts.append(found)
            means.append(_means(losses, found))
            codes, of_blocks = encoder.add(losses)
            stream.write(codes.tobytes())
            steps.append(of_blocks)
        codes, of_blocks = encoder.end()
        stream.write(codes.tobytes())
    temporary.replace(files["losses"])
    ends = np.cumsum(np.concatenate(counts), dtype=np.uint64)
    _save(files["steps"], np.concatenate([*steps, of_blocks]))
    _save(files["means"], np.concatenate(means))
    _save(files["ends"], ends.astype(np.uint32) if ends[-1] <= np.iinfo(np.uint32).max else ends)
    return int(ends[-1]), encoder.errors


def _means(losses: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the mean loss of each sample, (n,), NaN without a loss."""
    rows = np.repeat(np.arange(counts.size), counts)
    sums = np.bincount(rows, weights=losses, minlength=counts.size)
    return np.divide(sums, counts, out=np.full(counts.size, np.nan), where=counts > 0).astype(np.float32)


def _save(path: Path, values: NDArray[Any]) -> None:
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, values)
    temporary.replace(path)


def _versions_of(model: str) -> str:
    """Return a text that changes when the files of a model are written again; reading them would take longer."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model_files(model)]
    return repr((model, files))


def _file_of(domain: str) -> str:
    """Return the name of a domain's files: a digest, because a domain's name may not be a valid file name."""
    return hashlib.sha256(domain.encode()).hexdigest()[:16]


def samples_digest(pool: Pool, domain: str, begin: int, end: int) -> str:
    """Return a digest of a domain's name and of all columns of the samples ``begin`` to ``end`` of a pool."""
    part = Pool(pool.dataset.select(range(begin, end)), (domain,), np.array([end - begin]))
    return part.content_digest
