"""The losses of a frozen reference model at every token: computed with each batch, or read from a table.

A table is a folder. ``reference.json`` lists the table's domains. Each domain has two flat files: one of float32
losses, sample after sample, and one with the number of losses of every sample. The list holds a digest of each domain's
samples and a digest of the reference's files, so that a table of other data or of another reference is detected.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dataflex import distributed
from dataflex.api.reference import TABLE_FILE, TABLE_FORMAT, ReferenceParams, read_table, vocabulary_problem
from dataflex.data.pool import Pool
from dataflex.data.samples import Samples
from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ComponentError, ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.probe.batches import inputs_of, length_batches, on_device
from dataflex.probe.collation import Collation
from dataflex.probe.head import chunked_values, full_values
from dataflex.probe.memory import BatchLimit
from dataflex.probe.mode import preserved_rng
from dataflex.probe.particulars import head_agrees

_BLOCK = 4096
"""Number of samples of a table that are computed together and written at a time."""
_SINGLE = "Shorten cutoff_len, or name a smaller reference_model."
_OPEN_DOMAINS = 128
"""Number of a table's domains that stay open; a process can often open only about a thousand files."""
_OF_A_MODEL = ("config.json", "adapter_config.json", "model", "pytorch_model", "adapter_model")
"""Beginnings of the names of the files that define a model."""


class Reference(Protocol):
    """Source of the reference's losses of a batch."""

    def losses(self, inputs: dict[str, Any], labels: Tensor, indices: IndexArray | None) -> Tensor:
        """Return the loss at each position that counts, (n,), float32: row after row, left to right.

        Args:
            inputs: arguments of the model's forward, without labels.
            labels: shifted labels, (B, T).
            indices: indices of the samples in the pool, (B,); None in a stream.
        """
        ...


@dataclass
class ReferenceModel:
    """A frozen model that runs on every batch; the head is applied in chunks if that gives the same losses."""

    model: torch.nn.Module
    autocast: Callable[[], AbstractContextManager[Any]]
    limit: BatchLimit = field(default_factory=lambda: BatchLimit("compute a reference's losses", _SINGLE))
    """Limit of batches of samples outside of training steps."""
    _chunked: bool | None = None

    @torch.no_grad()
    def losses(self, inputs: dict[str, Any], labels: Tensor, indices: IndexArray | None = None) -> Tensor:
        """Return the loss at each position that counts, (n,), float32."""
        with self.autocast():
            if self._chunked is None:
                self._chunked = head_agrees(self.model, inputs, labels, labels.device)
            values = full_values if self._chunked is False else chunked_values
            return values(self.model, inputs, labels)[2]


class ReferenceTable:
    """A table of reference losses that is read on demand.

    Args:
        folder: folder of the table.
        pool: the run's samples; the table holds every domain of the pool.
        key: configuration key of the component that names the table, for messages.
    """

    def __init__(self, folder: Path, pool: Pool, key: str) -> None:
        self.pool, self.key = pool, key
        table = read_table(folder)
        if table is None:
            raise ConfigError(
                f"dataflex.{self.key}.reference_losses: {folder} has no {TABLE_FILE} on this machine; every node needs "
                "the table."
            )
        self._paths = [folder / table["domains"][name]["file"] for name in pool.domains]
        self._opened = lru_cache(maxsize=_OPEN_DOMAINS)(self._open)

    def _open(self, domain: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the losses of a domain, and for each sample the index after its last loss.

        Raises:
            ConfigError: if a file cannot be read, or the two files do not belong together.
        """
        path = self._paths[domain]
        losses = path.with_name(f"{path.name}.f32")
        try:
            ends, size = np.cumsum(np.load(_counts_of(path)), dtype=np.int64), losses.stat().st_size
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(
                f"dataflex.{self.key}.reference_losses: the table's losses of {self.pool.domains[domain]!r} cannot be "
                f"read on this machine ({error}); every node needs the table."
            ) from error
        if size != 4 * ends[-1]:
            raise ConfigError(
                f"dataflex.{self.key}.reference_losses: {losses} holds {size // 4} losses of "
                f"{self.pool.domains[domain]!r}, and its samples have {ends[-1]}: it is damaged. Remove the table "
                "or name another folder."
            )
        return (np.memmap(losses, dtype="<f4", mode="r") if size else np.empty(0, np.float32)), ends

    def rows(self, indices: IndexArray) -> list[NDArray[np.float32]]:
        """Return the losses of each sample's trained tokens."""
        found, domains = [], self.pool.domain_ids(indices)
        rows = indices - self.pool.offsets[domains]
        for domain, row in zip(domains.tolist(), rows.tolist(), strict=True):
            losses, ends = self._opened(domain)
            found.append(losses[ends[row - 1] if row else 0 : ends[row]])
        return found

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


def load_reference(
    name: str,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    like: torch.nn.Module,
    options: dict[str, Any],
    key: str,
) -> torch.nn.Module:
    """Return a frozen model for token losses, whole on this process, also under DeepSpeed and FSDP.

    Args:
        name: folder of a model or of an adapter, or a hub name.
        tokenizer: tokenizer of the run.
        device: device of the model.
        dtype: number type of the weights.
        like: the model in training, whose attention implementation is used.
        options: options of LLaMA-Factory: cache_dir, trust_remote_code and the like.
        key: configuration key of the component that names the reference, for messages.

    Raises:
        ConfigError: if the model cannot be loaded, or uses other token ids.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_adapter = (Path(name) / "adapter_config.json").is_file()
    kind: Any = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    try:
        with whole_models(), preserved_rng():
            theirs = AutoTokenizer.from_pretrained(name, **options)
            problem = vocabulary_problem(tokenizer.get_vocab(), theirs.get_vocab(), name)
            if problem is not None:
                raise ConfigError(f"dataflex.{key}.reference_model: {problem}")
            attention: Any = like.config
            model = kind.from_pretrained(
                name, dtype=dtype, attn_implementation=attention._attn_implementation, **options
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"dataflex.{key}.reference_model: {name!r} cannot be loaded: {error}") from error
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def whole_models() -> Iterator[None]:
    """Load models whole on every process while the context is open, even if the run shards its own model.

    DeepSpeed's and FSDP's settings are hidden from Transformers and restored at the end.
    """
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp


@dataclass
class TableMaker:
    """Computes a table of reference losses.

    Attributes:
        folder: folder of the table.
        pool: the run's samples.
        collation: the training collator's batches.
        device: device of the reference.
        batch_tokens: most tokens of one forward pass, padding counted.
        key: configuration key of the component that names the table, for messages.
        progress: whether to show a progress bar.
    """

    folder: Path
    pool: Pool
    collation: Collation
    device: torch.device
    batch_tokens: int
    key: str
    progress: bool = False

    def missing(self, params: ReferenceParams) -> list[str]:
        """Return the domains whose losses are not in the table yet.

        Raises:
            ConfigError: if the table belongs to another reference, or was made for other samples of a domain.
        """
        table = read_table(self.folder)
        if table is None:
            return list(self.pool.domains)
        if params.reference_model is not None and table["model"] != model_files_digest(params.reference_model):
            raise ConfigError(
                f"dataflex.{self.key}.reference_losses: the table in {self.folder} was made with another reference "
                f"({table['name']!r}) than {params.reference_model!r}. Name another folder, or leave out "
                "reference_model to use the table as it is."
            )
        for number, name in enumerate(self.pool.domains):
            kept = table["domains"].get(name)
            if kept is not None and kept["samples_sha256"] != domain_digest(self.pool, number):
                raise ConfigError(
                    f"dataflex.{self.key}.reference_losses: the table in {self.folder} was made for other samples of "
                    f"{name!r} (its data, template, cutoff_len or packing has changed). Name another folder."
                )
        return [name for name in self.pool.domains if name not in table["domains"]]

    def make(self, missing: list[str], reference: ReferenceModel, name: str) -> None:
        """Add domains to the table, on all processes together. Domains that are complete stay as they are.

        Raises:
            ConfigError: if another run is adding to the table.
        """
        lock = FileLock(self.folder / ".lock", timeout=0)
        distributed.on_main(partial(self._lock, lock))
        try:
            with distributed.together(), preserved_rng():
                for domain in missing:
                    self._make_domain(self.pool.domains.index(domain), reference)
                    distributed.on_main(partial(self._list, domain, name))
        finally:
            lock.release()

    def _lock(self, lock: FileLock) -> None:
        """Make the folder and lock it against other runs."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"dataflex.{self.key}.reference_losses: another run is making the table in {self.folder}; wait until "
                "it has finished."
            ) from error
        except OSError as error:
            raise ConfigError(
                f"dataflex.{self.key}.reference_losses: {self.folder} cannot be written to ({error.strerror or error})."
            ) from error

    def _list(self, domain: str, name: str) -> None:
        """Add a domain, whose files are complete, to the table's list."""
        number = self.pool.domains.index(domain)
        table = read_table(self.folder) or {
            "format": TABLE_FORMAT,
            "name": name,
            "model": model_files_digest(name),
            "domains": {},
        }
        table["domains"][domain] = {
            "file": _file_of(domain),
            "samples": int(self.pool.domain_sizes[number]),
            "samples_sha256": domain_digest(self.pool, number),
        }
        write_atomically(self.folder / TABLE_FILE, (json_text(table, indent=1) + "\n").encode())

    def _make_domain(self, number: int, reference: ReferenceModel) -> None:
        """Compute the losses of a domain and write its two files; the main process writes."""
        begin, end = int(self.pool.offsets[number]), int(self.pool.offsets[number + 1])
        name, main = self.pool.domains[number], distributed.rank() == 0
        path = self.folder / f"{_file_of(name)}.f32"
        temporary, counts = path.with_suffix(".tmp"), []
        if main:
            temporary.write_bytes(b"")
        bar = tqdm(total=end - begin, desc=f"Reference losses of {name}", unit="sample", disable=not self.progress)
        for start in range(begin, end, _BLOCK):
            indices = np.arange(start, min(start + _BLOCK, end), dtype=np.int64)
            found, values = losses_of(self.pool, indices, reference, self.collation, self.device, self.batch_tokens)
            counts.append(found)
            if main:
                with temporary.open("ab") as stream:
                    stream.write(values.astype("<f4").tobytes())
            bar.update(indices.size)
        bar.close()
        if main:
            temporary.replace(path)
            kept = _counts_of(path.with_suffix(""))
            np.save(kept.with_suffix(".tmp.npy"), np.concatenate(counts))
            kept.with_suffix(".tmp.npy").replace(kept)


def losses_of(
    pool: Samples,
    indices: IndexArray,
    reference: ReferenceModel,
    collation: Collation,
    device: torch.device,
    batch_tokens: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the number of losses of each sample, (n,), and the losses, sample after sample; the same on every process.

    Args:
        pool: the samples.
        indices: indices of the wanted samples, (n,).
        reference: the reference; each process runs it on its share of the batches.
        collation: the training collator's batches.
        device: device of the reference.
        batch_tokens: most tokens of one forward pass, padding counted.
    """
    lengths = pool.lengths[indices]
    batches = length_batches(lengths, batch_tokens)
    mine, useful = batches.share(distributed.rank(), distributed.world_size())
    counts = torch.zeros(indices.size, dtype=torch.int64, device=device)
    found: list[tuple[IndexArray, Tensor]] = []

    def losses_of_batch(batch: IndexArray) -> Tensor:
        inputs, labels = inputs_of(collation.of(pool, indices[batch]), device)
        counts[on_device(torch.from_numpy(batch), device)] = (labels != IGNORE_INDEX).sum(1)
        return reference.losses(inputs, labels)

    with distributed.together():
        for batch in mine[:useful]:
            found += reference.limit.parts(losses_of_batch, batch, lengths)
    # Each process has filled in its own samples and left zeros elsewhere, so sums join the values of all processes.
    known: NDArray[np.int64] = distributed.all_reduce_sum(counts).cpu().numpy()
    ends = np.cumsum(known)
    values = torch.zeros(int(ends[-1]), dtype=torch.float32, device=device)
    for batch, losses in found:
        for row, part in zip(batch, losses.split(known[batch].tolist()), strict=True):
            values[ends[row] - known[row] : ends[row]] = part
    return known, distributed.all_reduce_sum(values).cpu().numpy()


def _counts_of(path: Path) -> Path:
    """Return the path of the numbers of losses of a domain's samples."""
    return path.with_name(f"{path.name}-counts.npy")


def _file_of(domain: str) -> str:
    """Return the name of a domain's files: a digest, because a domain's name may not be a valid file name."""
    return hashlib.sha256(domain.encode()).hexdigest()[:16]


def domain_digest(pool: Pool, number: int) -> str:
    """Return a digest of all columns of every sample of a domain."""
    rows = range(int(pool.offsets[number]), int(pool.offsets[number + 1]))
    part = Pool(pool.dataset.select(rows), (pool.domains[number],), pool.domain_sizes[number : number + 1])
    return part.content_digest


def model_files_digest(name: str) -> str:
    """Return a digest of a model folder's configuration and weights; for a hub model, its name."""
    folder = Path(name)
    if not folder.is_dir():
        return f"hub:{name}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.startswith(_OF_A_MODEL):
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
