"""Features stored on disk chunk by chunk, so that a restarted process computes only the missing chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from dataflex import distributed
from dataflex.api.measurement import MeasuredBatch
from dataflex.api.probe import GradientSettings
from dataflex.data.pool import Pool
from dataflex.errors import ComponentError
from dataflex.probe.batches import Batches
from dataflex.probe.checkpoints import adapter_settings
from dataflex.probe.gradient_runs import feature_size, gradient_batches, projection_of, reduced_gradients
from dataflex.probe.moments import Moments
from dataflex.probe.projections import MAP_VERSION
from dataflex.probe.store import FeatureStore, bytes_of

if TYPE_CHECKING:
    from dataflex.probe.model import ModelProbe
    from dataflex.probe.runner import Runner

_CHUNK_ROWS = 256
"""Number of samples after which a chunk of whole batches is closed."""


def extract(runner: Runner, settings: GradientSettings, root: Path) -> FeatureStore:
    """Return the store of the samples' features, after computing the missing chunks.

    Collective. Every process computes its share of the chunks. If the model is sharded, all processes run the same
    number of batches.

    Args:
        runner: the model and the samples. Row positions in the store are positions in ``runner.indices``.
        settings: settings of the features; features have length 1.
        root: folder of all stores. Each state of model, data and settings has a separate store in it.

    Raises:
        ComponentError: if the samples are a list of rows, whose content has no digest.
    """
    probe, samples = runner.probe, runner.samples
    if not isinstance(samples, Pool):
        raise ComponentError("features are kept of the run's samples and of validation samples, not of a list of rows.")
    key = {
        "model": model_digest(runner.model, probe.sharded),
        "adapter": adapter_settings(runner.model),
        "precision": precision_of(probe),
        "moments": None if settings.preconditioner == "none" else moments_digest(probe.optimizer_moments()),
        "data": distributed.on_main(lambda: samples.content_digest),  # the digest reads all data, so once is enough
        "samples": hashlib.sha256(np.ascontiguousarray(runner.indices, dtype="<i8").data).hexdigest(),
        "settings": asdict(settings),
        "map": MAP_VERSION,
        "batch_tokens": probe.gradient_batch_tokens or probe.batch_tokens,
    }
    if probe.stage_loss is not None:
        reference = probe.references.of_batch([(samples, runner.indices)])
        values = b"" if reference is None else bytes_of(reference)
        key["stage"] = {**probe.stage_settings, "reference": hashlib.sha256(values).hexdigest()}
    with reduced_gradients(runner, settings, projection_of(probe, settings)) as gradient_features:

        def with_lengths(batch: MeasuredBatch) -> Tensor:
            """Return features scaled to length 1, with their original lengths in a last column, (B, k + 1)."""
            features = gradient_features(batch)
            return torch.cat([normalize(features, dim=1), features.norm(dim=1, keepdim=True)], dim=1)

        batches = gradient_batches(runner)
        chunks = _chunks(batches)
        rows = [sum(batch.size for batch in chunk) for chunk in chunks]
        store = FeatureStore.open(root, key, batches.order, feature_size(probe, settings), "float16", rows)
        missing = distributed.on_main(store.missing)
        if missing:
            with distributed.together(), runner.unfit_noted() as noted:
                _make(runner, store, chunks, missing, with_lengths, noted)
            is_made = np.repeat(np.isin(np.arange(len(rows)), missing), rows)
            probe.count(samples, runner.indices[batches.order[is_made]])
    distributed.barrier()
    return store


def precision_of(probe: ModelProbe) -> str:
    """Return the number type of a forward pass: the autocast type, or "as stored" without autocast."""
    device = probe.device.type
    with probe.autocast():
        return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as stored"


def _make(
    runner: Runner,
    store: FeatureStore,
    chunks: list[Batches],
    missing: list[int],
    with_lengths: Callable[[MeasuredBatch], Tensor],
    noted: Callable[[], AbstractContextManager[None]],
) -> None:
    """Write this process's share of the missing chunks; skip a chunk if one of its batches had an error."""
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = missing[rank::world_size]
    longest = max(len(chunks[number]) for number in missing)
    total = sum(len(chunks[number]) for number in mine)
    with tqdm(total=total, desc="Features", unit="batch", disable=not runner.probe.progress) as bar:
        for turn in range(-(-len(missing) // world_size)):
            batches = chunks[mine[turn]] if turn < len(mine) else chunks[0][:0]
            found = []
            for batch in batches:
                with noted():
                    found.append(runner.attempt(with_lengths, runner.indices[batch]))
                bar.update()
            # A forward pass is collective and the other processes may have more batches, so this process runs a batch
            # again, whose values are discarded, until all have run the same number.
            if runner.probe.sharded:
                for _ in range(longest - len(batches)):
                    with noted():
                        runner.attempt(with_lengths, runner.indices[chunks[missing[0]][0]])
            if found and len(found) == len(batches):
                values = torch.cat(found)
                store.write(mine[turn], values[:, :-1], values[:, -1])


def _chunks(batches: Batches) -> list[Batches]:
    """Return the batches in chunks of a few hundred samples."""
    begins, rows = [0], 0
    for number, batch in enumerate(batches):
        if rows >= _CHUNK_ROWS:
            begins.append(number)
            rows = 0
        rows += batch.size
    return [batches[begin:end] for begin, end in pairwise([*begins, len(batches)])]


def model_digest(model: nn.Module, sharded: bool) -> str:
    """Return a digest of every parameter and buffer: its name, shape, type, values, and whether it is trained.

    Under a sharded model each process hashes its own shards, and the digests of all processes are joined.
    """
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
    """Add this process's part of a tensor to a digest: the shard under ZeRO-3 and FSDP2, else the whole tensor."""
    local: Any = value.detach()
    local = getattr(value, "ds_tensor", local)
    local = local.to_local() if isinstance(local, torch.distributed.tensor.DTensor) else local
    digest.update(str((tuple(value.shape), value.dtype)).encode())
    digest.update(bytes_of(local))
