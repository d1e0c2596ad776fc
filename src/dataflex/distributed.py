"""The few collectives of the package, which do nothing in a single process. Only this module calls torch.distributed.

The processes communicate in two ways. Tensors of a measurement or a step use the training's own collectives
(``all_reduce_sum``, ``all_gather``). In these, no process may be late by more than ``ddp_timeout``. Everything else
uses the store through which the processes found one another (:func:`together` and the functions built on it). Waiting
in the store may take days and needs no further connection, and an error of one process becomes the error of all. Work
that can fail on one process alone is therefore done inside :func:`together`, and the training's collectives come after
it. A :class:`Watch` ends a process that waits in a collective for a process that has failed.

Components import this module, and ``check`` imports components. Importing torch takes seconds, so each function imports
torch when it needs it.
"""

from __future__ import annotations

import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast
from weakref import WeakKeyDictionary

from dataflex.errors import DataFlexError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

T = TypeVar("T")

_PREFIX = "dataflex"
_PIECE = 4 << 20
"""Number of bytes of a value under one key. The store accepts at most 8 MiB."""
_LONGEST_PAUSE = 0.1
"""Longest time in seconds between two queries of the store."""
_PATIENCE = 5.0
"""Time in seconds that a failed process waits until the others have received its error."""
_GRACE = 10.0
"""Time in seconds that a process may take to end normally after another process has failed."""
_LOOK_EVERY = 1.0
"""Time in seconds between a watch's checks for a failure."""
_FAILED = 2
"""Exit status of a process that a watch ends."""
_LOST = (
    "the connection to the main process (rank 0) is lost: that process or its launcher has ended. Its own output says "
    "why; if there is none, the system may have ended it for memory."
)

_boards: WeakKeyDictionary[dist.ProcessGroup, _Board] = WeakKeyDictionary()
"""Boards by their default group, because a group may be destroyed and created again."""
_calls = itertools.count()
"""Numbers of the calls: the same on all processes, because all make the same calls in the same order."""
_run = 0
"""Number of the run. Each run counts its calls from 0, since a failure leaves processes at different calls."""
_watch: Watch | None = None
"""The watch of the current run."""


def world_size() -> int:
    """Return the number of processes."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    import torch.distributed as dist

    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until every process has reached this call, for days if necessary.

    Raises:
        DataFlexError: on every process, if one has failed in the meantime.
    """
    with together():
        pass


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes of a tensor on the training device. ``values`` is changed in place."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(values: torch.Tensor) -> torch.Tensor:
    """Return the values of all processes, concatenated along the first dimension. All must have the same shape."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


@contextmanager
def together() -> Iterator[None]:
    """Make all processes leave a block together or fail together. Collective.

    The block may contain further calls of this module. The training's collectives (``all_reduce_sum``, ``all_gather``)
    are allowed in the block only directly after such a call. A process that fails in the block meets the others in
    their next call, whichever call it is. If they do not arrive within seconds, the process raises its error alone.

    Raises:
        DataFlexError: on every process, if the block raised a DataFlexError on any process; the one of the lowest rank.
            For any other exception, the failed process raises the exception itself, and the others raise a
            DataFlexError that names the process and describes the exception.
    """
    board = _board()
    if board is None:
        yield
        return
    try:
        yield
    except Exception as error:
        if board.knows(error):
            raise
        board.exchange(error=error)
        raise
    board.exchange()


def on_main(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and return its picklable value on every process.

    The call may take longer than ``ddp_timeout``, because the other processes do not wait in a collective of the
    training's group. A value of many megabytes takes a moment for each process, since all of them fetch it from one
    store.

    Raises:
        DataFlexError: on every process, if ``function`` raised a DataFlexError. Any other exception is raised on rank
            0, and the other processes raise a DataFlexError that describes it.

    Example:
        >>> from dataflex import on_main
        >>> on_main(lambda: sorted({"math", "code"}))
        ['code', 'math']
    """
    board = _board()
    if board is None:
        return function()
    return cast(T, board.call(function if rank() == 0 else None, [0])[0])


def on_each(function: Callable[[], T]) -> list[T]:
    """Call ``function`` on every process at once and return all values in the order of the ranks, on every process.

    One call may take longer than another by more than ``ddp_timeout``, as in :func:`on_main`.

    Raises:
        DataFlexError: on every process, if ``function`` raised a DataFlexError on any process; the one of the lowest
            rank. See :func:`together` for other exceptions.
    """
    board = _board()
    if board is None:
        return [function()]
    return cast(list[T], board.call(function, range(world_size())))


def everywhere(value: bool) -> bool:
    """Return whether ``value`` is true on every process."""
    return all(on_each(lambda: value))


def require_equal(value: str, what: str) -> None:
    """Check that every process has the same ``value``.

    Raises:
        DataFlexError: on every process, if the values differ.
    """
    values = on_each(lambda: value)
    if len(set(values)) > 1:
        raise DataFlexError(
            f"{what} differs between processes ({', '.join(map(str, values))}). A component must decide from what its "
            "context gives it (ctx.rng, ctx.probe, ctx.pool), never from global random state or a local file."
        )


def gather_objects(value: T) -> list[T]:
    """Return the picklable values of all processes in the order of the ranks, on every process. They may be large."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    barrier()  # a failed process is reported before the others wait in the collective
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def _board() -> _Board | None:
    """Return the board of the processes, or None in a single process."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    default = dist.group.WORLD
    if default not in _boards:
        _boards[default] = _Board()
    return _boards[default]


class _Board:
    """A board for messages between processes, in the store of the default group.

    The store is the one that the group was created with (``env://``, a file, torchrun's own), so it exists and is
    reachable. Torch provides the store only under a private name. A separate connection to the same address would
    require knowing how the launcher created the store.
    """

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        self._whole = _get_default_store()  # keeps the store alive, which may be the server
        self.store = dist.PrefixStore(_PREFIX, self._whole)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._agreed: BaseException | None = None
        """The last error that this board raised, which all processes have received. None before an error."""
        self._is_own = False
        """Whether the agreed error was first raised on this process."""

    def another(self) -> dist.Store:
        """Return a separate connection to the same store, for another thread."""
        import torch.distributed as dist

        return dist.PrefixStore(_PREFIX, self._whole.clone())

    def knows(self, error: BaseException) -> bool:
        """Return whether all processes have received this error or an error that caused it."""
        return self._agreed is not None and any(each is self._agreed for each in _chain(error))

    def is_told(self, error: BaseException) -> bool:
        """Return whether an error comes from another process."""
        return self.knows(error) and not self._is_own

    def call(self, function: Callable[[], Any] | None, ranks: Sequence[int]) -> list[Any]:
        """Return the values that the processes ``ranks`` get from ``function``. None calls nothing here."""
        value, data = None, None
        if function is not None:
            try:
                value = function()
                data = pickle.dumps(value)
            except Exception as error:
                if not self.knows(error):
                    self.exchange(error=error)
                raise
        return [value if found is None else pickle.loads(found) for found in self.exchange(data, ranks)]

    def exchange(
        self, data: bytes | None = None, ranks: Sequence[int] = (), error: Exception | None = None
    ) -> list[bytes | None]:
        """Wait for all processes, and return the data that the processes ``ranks`` have posted; None for this process.

        Args:
            data: the data that this process posts, or None.
            ranks: the processes that post data.
            error: the reason why this process has nothing to post.

        Raises:
            DataFlexError: the error of the lowest rank, if any process has one; see :func:`together`.
        """
        call = f"{_run}/{next(_calls)}"
        with _connection_told():
            if error is not None:
                self._post(f"{call}/error/{self.rank}", _pickled(error, self.rank))
                self.store.add(f"{call}/errors", 1)
            elif data is not None:
                self._post(f"{call}/value/{self.rank}", data)
            if self.store.add(f"{call}/here", 1) == self.size:
                self.store.set(f"{call}/all", str(self.store.add(f"{call}/errors", 0)))
            are_all_here = self.wait(f"{call}/all", None if error is None else _PATIENCE)
            if not are_all_here or self.store.get(f"{call}/all") != b"0":
                self._fail(call, error)
            keys = {each: f"{call}/value/{each}" for each in ranks if each != self.rank}
            found = dict(zip(keys, self._fetch(list(keys.values())), strict=True))
            if self.store.add(f"{call}/read", 1) == self.size:
                sizes = {keys[each]: len(other) for each, other in found.items()}
                own = {} if data is None else {f"{call}/value/{self.rank}": len(data)}
                self._wipe(call, sizes | own)
        return [found.get(each) for each in ranks]

    def _fail(self, call: str, error: Exception | None) -> NoReturn:
        """Raise the error of the lowest rank that has one."""
        lowest = next((each for each in range(self.size) if self.store.check([f"{call}/error/{each}"])), self.rank)
        self._is_own = error is not None and lowest == self.rank
        if error is not None and self._is_own:
            self._agreed = error
            raise error
        self._agreed = received = cast(DataFlexError, pickle.loads(self._fetch([f"{call}/error/{lowest}"])[0]))
        raise received from error

    def wait(self, key: str, patience: float | None = None) -> bool:
        """Wait for a key, and return whether it exists.

        Args:
            key: the key in the store.
            patience: maximum time in seconds. None means to wait without a limit.

        Raises:
            DataFlexError: if another process has failed in the meantime. Only without a limit.
        """
        end = None if patience is None else time.monotonic() + patience
        pause = 0.001
        while not self.store.check([key]):
            if end is not None and time.monotonic() > end:
                return False
            if end is None and _watch is not None and _watch.failure is not None:
                self._agreed, self._is_own = DataFlexError(_watch.failure), False
                raise self._agreed
            time.sleep(pause)
            pause = min(1.25 * pause, _LONGEST_PAUSE)
        return True

    def _post(self, key: str, data: bytes) -> None:
        """Write bytes in pieces. The key itself holds the number of pieces and the first piece, and is written last."""
        pieces = [data[begin : begin + _PIECE] for begin in range(0, len(data), _PIECE)]
        for number, piece in enumerate(pieces[1:], start=1):
            self.store.set(f"{key}/{number}", piece)
        self.store.set(key, f"{len(pieces)} ".encode() + pieces[0])

    def _fetch(self, keys: Sequence[str]) -> list[bytes]:
        """Return the data under the keys with as few queries as possible, because all processes query at once."""
        if keys and not self.store.check(list(keys)):
            raise DataFlexError(
                "the processes are in different calls. A component must make the same calls of ctx on every process."
            )
        together = len(keys) > 1 and self.store.has_extended_api()
        heads = self.store.multi_get(list(keys)) if together else [self.store.get(key) for key in keys]
        found = []
        for key, head in zip(keys, heads, strict=True):
            count, _, first = head.partition(b" ")
            found.append(first + b"".join(self.store.get(f"{key}/{number}") for number in range(1, int(count))))
        return found

    def _wipe(self, call: str, posted: Mapping[str, int]) -> None:
        """Remove the data of a call after all processes have read it.

        Args:
            call: the name of the call.
            posted: the number of bytes under each key.
        """
        for key, size in posted.items():
            for number in range(1, -(-size // _PIECE)):
                self.store.delete_key(f"{key}/{number}")
            self.store.delete_key(key)
        for name in ("here", "errors", "all", "read"):
            self.store.delete_key(f"{call}/{name}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _pickled(error: Exception, number: int) -> bytes:
    """Return the pickled error that the other processes raise for the error of process ``number``."""
    if not isinstance(error, DataFlexError):
        return pickle.dumps(DataFlexError(describe(error, number)))
    try:
        data = pickle.dumps(error)
        if str(pickle.loads(data)) == str(error):
            return data
    except Exception:  # noqa: BLE001 - a component's error may hold anything
        pass
    return pickle.dumps(DataFlexError(str(error)))


def describe(error: BaseException, number: int) -> str:
    """Return the description of an exception of process ``number`` that is no DataFlexError."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":. ")
    return f"process {number} has failed ({text}). Its own output has the traceback."


@contextmanager
def _connection_told() -> Iterator[None]:
    """Report a lost connection to the store as the end of the process that holds the store."""
    import torch.distributed as dist

    try:
        yield
    except dist.DistError as error:
        raise DataFlexError(_LOST) from error


class Watch:
    """Ends this process when another process has failed, and informs the others when this process has failed.

    A process that waits in one of the training's collectives cannot receive a message, so a thread checks for failures.
    If this process has not ended some seconds after the failure of another one, the thread prints the error and ends
    the process.

    Args:
        report: prints the text of an error.
        say: returns the text of an exception, or None if its traceback is needed.
    """

    def __init__(self, report: Callable[[str], None], say: Callable[[BaseException], str | None]) -> None:
        self.failure: str | None = None
        """The error of another process, once it is known."""
        self._report, self._say = report, say
        self._board: _Board | None = None
        """Connection of this process's main thread. None outside a run of several processes."""
        self._thread: threading.Thread | None = None
        self._left = threading.Event()
        """Set when this process leaves the run, so that the thread stops."""
        self._key = ""
        """Prefix of the keys of this run's watch in the store."""

    def begin(self) -> None:
        """Start checking for failures if the run has several processes.

        All processes call this. Repeated calls do nothing.
        """
        global _watch, _run, _calls
        if self._board is not None:
            return
        self._board = _board()
        if self._board is None:
            return
        _watch, _run, _calls = self, _run + 1, itertools.count()
        self._key = f"{_run}/watch"
        store = self._board.another()
        self._thread = threading.Thread(target=self._look, args=(store,), name="dataflex-watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Watch:
        """Return the watch, which has not started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        """Leave together with all other processes, or inform them of the error.

        Raises:
            DataFlexError: instead of the error of a process that failed because of another process.
        """
        global _watch
        if self._board is None:
            return False
        try:
            if error is None:
                self._leave(self._board)
            elif isinstance(error, Exception | SystemExit):
                self._left.set()
                self._fail(self._board, error)
        finally:
            self._left.set()
            _watch = None
            if self._thread is not None:  # Python must not end while the thread is in torch's code
                self._thread.join(_PATIENCE)
        return False

    def _look(self, store: dist.Store) -> None:
        """Check the store for a failure until this process leaves; if one appears, print it and end the process."""
        import torch.distributed as dist

        failure: str | None = None
        while failure is None and not self._left.wait(_LOOK_EVERY):
            try:
                if store.check([f"{self._key}/failed"]):
                    failure = store.get(f"{self._key}/failed").decode()
                    store.add(f"{self._key}/heard", 1)
            except dist.DistError:
                failure = failure or _LOST
        if failure is None:
            return
        self.failure = failure
        if not self._left.wait(_GRACE):
            threading.Timer(_PATIENCE, os._exit, [_FAILED]).start()  # in case another thread blocks the printing
            self._report(failure)
            os._exit(_FAILED)

    def _leave(self, board: _Board) -> None:
        """Wait until all processes leave. If a process fails now, the others fail too."""
        import torch.distributed as dist

        try:
            if board.store.add(f"{self._key}/left", 1) == board.size:
                board.store.set(f"{self._key}/end", "")
            board.wait(f"{self._key}/end")
        except dist.DistError:  # rank 0 ends the store when all processes have left
            pass
        except DataFlexError:
            if self.failure != _LOST:
                raise

    def _fail(self, board: _Board, error: BaseException) -> None:
        """Inform the others of an error, and raise the first error of the run."""
        import torch.distributed as dist

        said = str(error) if isinstance(error, DataFlexError) else self._say(error)
        own = said or describe(error, board.rank)
        try:
            if board.is_told(error):  # the process with the original error reports more details
                board.wait(f"{self._key}/failed", _PATIENCE)
            first = board.store.compare_set(f"{self._key}/failed", "", own).decode()
            if self.failure is None:
                board.store.add(f"{self._key}/heard", 1)
            end = time.monotonic() + _PATIENCE
            while board.store.add(f"{self._key}/heard", 0) < board.size and time.monotonic() < end:
                time.sleep(_LONGEST_PAUSE)
        except dist.DistError:
            first = self.failure or own
        if first != own:
            raise DataFlexError(first) from error
