"""The losses of a frozen reference model at every token: computed with each batch, or read from a table.

A table is a folder. ``reference.json`` lists its domains; of each there is a flat file of float32 losses, sample
after sample, and one of the number of losses of every sample. A domain is known by a digest of its samples, the
reference by a digest of its files, so that a table is never taken for another's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataflex import distributed
from dataflex.data.pool import Pool
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError, ConfigError
from dataflex.files import write_atomically
from dataflex.probe.batches import length_batches, share_of
from dataflex.probe.mode import preserved_rng
from dataflex.reference import TABLE_FILE, TABLE_FORMAT, ReferenceParams, read_table, vocabulary_problem
from dataflex.token_loss import IGNORE_INDEX, shifted

_BLOCK = 4096
"""Samples of a table that are computed together and written at a time."""
_WEIGHTS = (".safetensors", ".bin")


class Reference(Protocol):
    """Where the reference's losses of a batch come from."""

    def losses(self, inputs: dict[str, Any], targets: Tensor, indices: IndexArray) -> Tensor:
        """Return the loss at each position that counts, (n,), float32: row after row, left to right.

        Args:
            inputs: what the model is given, without labels.
            targets: shifted labels, (B, T).
            indices: the samples' places in the pool, (B,).
        """
        ...


@dataclass
class ReferenceModel:
    """A frozen model, run on every batch."""

    model: torch.nn.Module
    autocast: Callable[[], AbstractContextManager[Any]]

    @torch.no_grad()
    def losses(self, inputs: dict[str, Any], targets: Tensor, indices: IndexArray | None = None) -> Tensor:
        """Return the loss at each position that counts, (n,), float32."""
        with self.autocast():
            logits = self.model(**inputs, use_cache=False).logits
        return counted_losses(logits, targets)


def counted_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy at each position whose target counts, (n,), float32, row after row."""
    counted = targets != IGNORE_INDEX
    return F.cross_entropy(logits[counted].float(), targets[counted], reduction="none")


class ReferenceTable:
    """A table of reference losses, read as it is needed.

    Args:
        folder: of the table.
        pool: the run's samples; every domain of it is in the table.
    """

    def __init__(self, folder: Path, pool: Pool) -> None:
        self.pool = pool
        table = read_table(folder)
        assert table is not None
        files = [table["domains"][name]["file"] for name in pool.domains]
        self._losses = [np.memmap(folder / f"{file}.f32", dtype="<f4", mode="r") for file in files]
        self._ends = [np.cumsum(np.load(folder / f"{file}-counts.npy"), dtype=np.int64) for file in files]

    def losses(self, inputs: dict[str, Any], targets: Tensor, indices: IndexArray) -> Tensor:
        """Return the loss at each position that counts, (n,), float32."""
        found, domains = [], self.pool.domain_ids(indices)
        rows = indices - self.pool.offsets[domains]
        for domain, row in zip(domains, rows, strict=True):
            ends = self._ends[domain]
            found.append(self._losses[domain][ends[row - 1] if row else 0 : ends[row]])
        values = torch.from_numpy(np.concatenate(found))
        counted = int((targets != IGNORE_INDEX).sum())
        if values.numel() != counted:
            raise ComponentError(
                f"reference_losses: the table has {values.numel()} losses for a batch with {counted} trained tokens; "
                "it was made under another collator or padding. Name another folder to have it made anew."
            )
        return values.to(targets.device)


def load_reference(
    name: str, tokenizer: Any, device: torch.device, dtype: torch.dtype, like: torch.nn.Module, options: dict[str, Any]
) -> torch.nn.Module:
    """Return a frozen model for token losses, whole on this process, under DeepSpeed and FSDP too.

    Args:
        name: folder of a model or of an adapter, or a hub name.
        tokenizer: of the run.
        device: where it is to be.
        dtype: of its weights.
        like: the model in training, whose kind of attention it takes.
        options: of LLaMA-Factory: cache_dir, trust_remote_code and the like.

    Raises:
        ConfigError: if it cannot be loaded, or reads other token ids.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _whole_models(), preserved_rng():
            theirs = AutoTokenizer.from_pretrained(name, **options)
            problem = vocabulary_problem(tokenizer.get_vocab(), theirs.get_vocab(), name)
            if problem is not None:
                raise ConfigError(f"dataflex.mix.reference_model: {problem}")
            attention: Any = like.config
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, attn_implementation=attention._attn_implementation, **options
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"dataflex.mix.reference_model: {name!r} cannot be loaded: {error}") from error
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _whole_models() -> Iterator[None]:
    """Have models loaded whole on every process, though the run spreads its own over them."""
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
    """What making a table takes.

    Attributes:
        folder: of the table.
        pool: the run's samples.
        collate: the training collator, on rows of the pool.
        device: where the reference runs.
        batch_tokens: tokens, padding counted, of one forward.
        progress: whether to show a progress bar.
    """

    folder: Path
    pool: Pool
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    device: torch.device
    batch_tokens: int
    progress: bool = False

    def missing(self, params: ReferenceParams) -> list[str]:
        """Return the domains whose losses are not in the table yet.

        Raises:
            ConfigError: if the table is of another reference, or one of its domains has other samples by now.
        """
        table = read_table(self.folder)
        if table is None:
            return list(self.pool.domains)
        if params.reference_model is not None and table["model"] != model_files_digest(params.reference_model):
            raise ConfigError(
                f"dataflex.mix.reference_losses: the table in {self.folder} was made with another reference than "
                f"{params.reference_model!r} (it was {table['name']!r}). Name another folder, or leave out "
                "reference_model to use the table as it is."
            )
        for number, name in enumerate(self.pool.domains):
            kept = table["domains"].get(name)
            if kept is not None and kept["samples_sha256"] != domain_digest(self.pool, number):
                raise ConfigError(
                    f"dataflex.mix.reference_losses: the table in {self.folder} was made for other samples of {name!r} "
                    "(its data, template, cutoff_len or packing has changed). Name another folder."
                )
        return [name for name in self.pool.domains if name not in table["domains"]]

    def make(self, missing: list[str], reference: ReferenceModel, name: str) -> None:
        """Add domains to the table; on all processes together. A domain that is complete is kept."""
        with preserved_rng():
            for domain in missing:
                self._make_domain(self.pool.domains.index(domain), reference)
                distributed.on_main(partial(self._list, domain, name))

    def _list(self, domain: str, name: str) -> None:
        """Add a domain whose files are complete to the table's list."""
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
        write_atomically(self.folder / TABLE_FILE, (json.dumps(table, indent=1) + "\n").encode())

    def _make_domain(self, number: int, reference: ReferenceModel) -> None:
        begin, end = int(self.pool.offsets[number]), int(self.pool.offsets[number + 1])
        name, main = self.pool.domains[number], distributed.rank() == 0
        path = self.folder / f"{_file_of(name)}.f32"
        temporary, counts = path.with_suffix(".tmp"), []
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(b"")
        bar = tqdm(total=end - begin, desc=f"Reference losses of {name}", unit="sample", disable=not self.progress)
        for start in range(begin, end, _BLOCK):
            indices = np.arange(start, min(start + _BLOCK, end), dtype=np.int64)
            found, values = self._block(indices, reference)
            counts.append(found)
            if main:
                with temporary.open("ab") as stream:
                    stream.write(values.astype("<f4").tobytes())
            bar.update(indices.size)
        bar.close()
        if main:
            temporary.replace(path)
            kept = self.folder / f"{_file_of(name)}-counts"
            np.save(kept.with_suffix(".tmp.npy"), np.concatenate(counts))
            kept.with_suffix(".tmp.npy").replace(kept.with_name(f"{kept.name}.npy"))

    def _block(self, indices: IndexArray, reference: ReferenceModel) -> tuple[np.ndarray, np.ndarray]:
        """Return how many losses each sample has, and the losses sample after sample; the same on every process."""
        batches = length_batches(self.pool.lengths[indices], self.batch_tokens)
        mine, useful = share_of(batches, distributed.rank(), distributed.world_size())
        counts = torch.zeros(indices.size, dtype=torch.int64, device=self.device)
        found: list[tuple[IndexArray, Tensor]] = []
        for batch in mine[:useful]:
            inputs = {key: value.to(self.device) for key, value in self.collate(self.pool.rows(indices[batch])).items()}
            targets = shifted(inputs.pop("labels"))
            counts[torch.from_numpy(batch).to(self.device)] = (targets != IGNORE_INDEX).sum(1)
            found.append((batch, reference.losses(inputs, targets)))
        counts = distributed.all_reduce_sum(counts)
        ends = torch.cumsum(counts, 0)
        values = torch.zeros(int(ends[-1]), dtype=torch.float32, device=self.device)
        for batch, losses in found:
            taken = 0
            for row in batch:
                count, stop = int(counts[row]), int(ends[row])
                values[stop - count : stop] = losses[taken : taken + count]
                taken += count
        return counts.cpu().numpy(), distributed.all_reduce_sum(values).cpu().numpy()


def _file_of(domain: str) -> str:
    """Return the name of a domain's files: no domain's name need be fit for one."""
    return hashlib.sha256(domain.encode()).hexdigest()[:16]


def domain_digest(pool: Pool, number: int) -> str:
    """Return a digest of all columns of every sample of a domain."""
    rows = range(int(pool.offsets[number]), int(pool.offsets[number + 1]))
    part = Pool(pool.dataset.select(rows), (pool.domains[number],), pool.domain_sizes[number : number + 1])
    return part.content_digest


def model_files_digest(name: str) -> str:
    """Return a digest of a model folder's configuration and weights; of a hub model, its name."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return f"hub:{name}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS or path.name in ("config.json", "adapter_config.json"):
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
