"""The few collectives the package uses. The only module that calls torch.distributed; no-ops in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from dataflex.errors import DataFlexError

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes of a tensor on the training device; changes ``values`` in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(values: torch.Tensor) -> torch.Tensor:
    """Return the values of all processes, concatenated along the first dimension; all of one shape."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def on_main(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and return its value on every process.

    Raises:
        DataFlexError: on every process, if ``function`` raised one.
    """
    if world_size() == 1:
        return function()
    box: list[T | DataFlexError | None] = [None]
    if rank() == 0:
        try:
            box = [function()]
        except DataFlexError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], DataFlexError):
        raise box[0]
    return cast(T, box[0])


def everywhere(value: bool, device: torch.device) -> bool:
    """Return whether ``value`` is true on every process."""
    if world_size() == 1:
        return value
    flag = torch.tensor(0.0 if value else 1.0, device=device)
    return all_reduce_sum(flag).item() == 0.0


def require_equal(value: str, what: str) -> None:
    """Check that every process has the same ``value``.

    Raises:
        DataFlexError: on every process, if they differ.
    """
    if world_size() == 1:
        return
    values: list[str | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        raise DataFlexError(
            f"{what} differs between processes ({', '.join(map(str, values))}). A component must decide from what its "
            "context gives it (ctx.rng, ctx.probe, ctx.pool), never from global random state or a local file."
        )


def gather_objects(value: T) -> list[T]:
    """Return the picklable value of every process, in order of rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)
