"""The few collectives the package uses. The only module that calls torch.distributed; no-ops in one process.

Components import it, and ``check`` imports components: torch, which takes seconds to import, is imported where it is
used.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast
from weakref import WeakKeyDictionary

from dataflex.errors import DataFlexError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
_waiting_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
"""The group to wait in, by the default group it belongs to: that may be destroyed and made anew."""


def world_size() -> int:
    """Return the number of processes."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    import torch.distributed as dist

    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until every process is here."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes of a tensor on the training device; changes ``values`` in place."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(values: torch.Tensor) -> torch.Tensor:
    """Return the values of all processes, concatenated along the first dimension; all of one shape."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def on_main(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and return its value on every process.

    It may take longer than ``ddp_timeout``: the others do not wait in a collective of the training's group.

    Raises:
        DataFlexError: on every process, if ``function`` raised one.
    """
    import torch.distributed as dist

    if world_size() == 1:
        return function()
    group = _waiting_group()  # before the others have to wait
    box: list[T | DataFlexError | None] = [None]
    if rank() == 0:
        try:
            box = [function()]
        except DataFlexError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0, group=group)
    if isinstance(box[0], DataFlexError):
        raise box[0]
    return cast(T, box[0])


def on_each(function: Callable[[], T]) -> list[T]:
    """Call ``function`` on every process at once and return the values of all, in order of rank, on every process.

    One may take longer than another by more than ``ddp_timeout``, as in :func:`on_main`.

    Raises:
        DataFlexError: on every process, if ``function`` raised one on any: that of the lowest rank.
    """
    import torch.distributed as dist

    if world_size() == 1:
        return [function()]
    group = _waiting_group()
    own: T | DataFlexError
    try:
        own = function()
    except DataFlexError as error:
        own = error
    values: list[T | DataFlexError | None] = [None] * world_size()
    dist.all_gather_object(values, own, group=group)
    for value in values:
        if isinstance(value, DataFlexError):
            raise value
    return cast(list[T], values)


def _waiting_group() -> dist.ProcessGroup:
    """Return a group of all processes in which one may wait for days; made by all together at the first call.

    Gloo, because NCCL ends a run whose processes wait for more than ``ddp_timeout``, and its waiting keeps the GPU
    busy.
    """
    import torch.distributed as dist

    default = dist.group.WORLD
    if default not in _waiting_groups:
        _waiting_groups[default] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _waiting_groups[default]


def everywhere(value: bool, device: torch.device) -> bool:
    """Return whether ``value`` is true on every process."""
    import torch

    if world_size() == 1:
        return value
    flag = torch.tensor(0.0 if value else 1.0, device=device)
    return all_reduce_sum(flag).item() == 0.0


def require_equal(value: str, what: str) -> None:
    """Check that every process has the same ``value``.

    Raises:
        DataFlexError: on every process, if they differ.
    """
    import torch.distributed as dist

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
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)
