"""Features kept on disk: made chunk by chunk, so that what a killed process finished is not made again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataflex import distributed
from dataflex.api.probe import GradientSettings
from dataflex.data.pool import Pool
from dataflex.data.sampling import IndexArray
from dataflex.probe.checkpoints import adapter_settings
from dataflex.probe.moments import Moments
from dataflex.probe.store import FeatureStore

if TYPE_CHECKING:
    from dataflex.probe.model import ModelProbe

_CHUNK_ROWS = 256
"""Samples after which a chunk of whole batches is closed."""


def extract(probe: ModelProbe, pool: Pool, indices: IndexArray, settings: GradientSettings, root: Path) -> FeatureStore:
    """Return the store of the samples' features, after making the chunks that are missing.

    Collective. Every process makes its share of the chunks; under a sharded model all run the same number of batches.

    Args:
        probe: the model.
        pool: what ``indices`` are of.
        indices: shape (n,); row positions in the store are positions in it.
        settings: what is made of the gradients.
        root: folder of the stores; each state of model, data and settings has one of its own in it.
    """
    key = {
        "model": model_digest(probe.model(), probe.sharded),
        "adapter": adapter_settings(probe.model()),
        "precision": _precision(probe),
        "moments": None if settings.preconditioner == "none" else moments_digest(probe.optimizer_moments()),
        "data": pool.content_digest,
        "samples": hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").data).hexdigest(),
        "settings": asdict(settings),
        "batch_tokens": probe.gradient_batch_tokens or probe.batch_tokens,
    }
    dim = sum(probe.parameter_sizes().values()) if settings.sketch == "identity" else settings.dim
    with probe.sketching(pool, indices, settings) as features_of:
        batches = probe.gradient_batches(pool, indices)
        chunks = _chunks(batches)
        rows = [sum(batch.size for batch in chunk) for chunk in chunks]
        store = FeatureStore.open(root, key, np.concatenate(batches), dim, "float16", rows)
        missing = distributed.on_main(store.missing)
        if missing:
            _make(probe, indices, store, chunks, missing, features_of)
            made = np.concatenate([batch for number in missing for batch in chunks[number]])
            probe.count(pool, indices[made])
    distributed.barrier()
    return store


def _precision(probe: ModelProbe) -> str:
    device = probe.device.type
    with probe.autocast():
        return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as stored"


def _make(
    probe: ModelProbe,
    indices: IndexArray,
    store: FeatureStore,
    chunks: list[list[IndexArray]],
    missing: list[int],
    features_of: Callable[[IndexArray], tuple[Tensor, Tensor]],
) -> None:
    """Write this process's share of the missing chunks."""
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = missing[rank::world_size]
    longest = max(len(chunks[number]) for number in missing)
    total = sum(len(chunks[number]) for number in mine)
    with tqdm(total=total, desc="Features", unit="batch", disable=not probe.progress) as bar:
        for turn in range(-(-len(missing) // world_size)):
            batches = chunks[mine[turn]] if turn < len(mine) else []
            found = []
            for batch in batches:
                found.append(features_of(indices[batch]))
                bar.update()
            if probe.sharded:  # a forward is collective, and the others may have more batches
                for _ in range(longest - len(batches)):
                    features_of(indices[chunks[missing[0]][0]])
            if found:
                features, lengths = (torch.cat(both) for both in zip(*found, strict=True))
                store.write(mine[turn], features, lengths)


def _chunks(batches: list[IndexArray]) -> list[list[IndexArray]]:
    """Return batches in chunks of a few hundred samples."""
    chunks: list[list[IndexArray]] = []
    rows = _CHUNK_ROWS
    for batch in batches:
        if rows >= _CHUNK_ROWS:
            chunks.append([])
            rows = 0
        chunks[-1].append(batch)
        rows += batch.size
    return chunks


def model_digest(model: nn.Module, sharded: bool) -> str:
    """Return a digest of every parameter and buffer: name, shape, whether it is trained, and every number."""
    digest = hashlib.sha256()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {value.requires_grad}".encode())
        _add(digest, value)
    parts = distributed.gather_objects(digest.hexdigest()) if sharded else [digest.hexdigest()]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def moments_digest(moments: dict[str, Moments]) -> str:
    """Return a digest of the optimizer's moments."""
    digest = hashlib.sha256()
    for name, item in moments.items():
        digest.update(f"{name} {item.step} {item.betas} {item.eps}".encode())
        _add(digest, item.exp_avg)
        _add(digest, item.exp_avg_sq)
    return digest.hexdigest()


def _add(digest: Any, value: Tensor) -> None:
    """Add the bytes this process holds of a tensor: its shard under ZeRO-3 and FSDP2."""
    local: Any = value.detach()
    local = getattr(value, "ds_tensor", local)
    local = local.to_local() if isinstance(local, torch.distributed.tensor.DTensor) else local
    digest.update(str((tuple(value.shape), value.dtype)).encode())
    digest.update(local.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
