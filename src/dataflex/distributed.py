"""The few collectives the package uses. The only module that calls torch.distributed; no-ops in one process.

Two ways lead from process to process. Tensors of a measurement or a step go through the training's own collectives
(``all_reduce_sum``, ``all_gather``), in which nobody may be late by more than ``ddp_timeout``. All else goes through
the store in which the processes found one another (:func:`together` and what is made of it): there one may wait for
days, no further connection is needed, and an error of one process becomes the error of all. So work that can fail on
one process alone is done inside :func:`together`, and the training's collectives come behind it. A :class:`Watch` ends
a process that waits in a collective for one that has failed elsewhere.

Components import it, and ``check`` imports components: torch, which takes seconds to import, is imported where it is
used.
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
"""Bytes of a value under one key; the store takes 8 MiB."""
_LONGEST_PAUSE = 0.1
"""Seconds between two looks into the store."""
_PATIENCE = 5.0
"""Seconds a process that has failed waits for the others to hear of it."""
_GRACE = 10.0
"""Seconds a process may take to end by itself when another has failed."""
_LOOK_EVERY = 1.0
"""Seconds between a watch's looks for a failure."""
_FAILED = 2
"""Exit status of a process that a watch ends."""
_LOST = (
    "the connection to the main process (rank 0) is lost: that process or its launcher has ended. Its own output says "
    "why; if there is none, the system may have ended it for memory."
)

_boards: WeakKeyDictionary[dist.ProcessGroup, _Board] = WeakKeyDictionary()
"""By the default group they belong to: that may be destroyed and made anew."""
_calls = itertools.count()
"""Numbers of the calls, the same on all processes, because all make the same calls in the same order."""
_run = 0
"""Number of the run: calls are counted anew in each, since a failure leaves processes at different calls."""
_watch: Watch | None = None
"""Of the run."""


def world_size() -> int:
    """Return the number of processes."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    import torch.distributed as dist

    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until every process is here, for days if need be.

    Raises:
        DataFlexError: on every process, if one has failed in the meantime.
    """
    with together():
        pass


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


@contextmanager
def together() -> Iterator[None]:
    """Have all processes leave a block together, or fail together. Collective.

    The block may contain further calls of this module except the training's collectives (``all_reduce_sum``,
    ``all_gather``), unless one of ours comes right before them. A process that fails in the block meets the others in
    their next call, whichever that is; if they do not come within seconds, it raises alone.

    Raises:
        DataFlexError: on every process, if the block raised one on any: that of the lowest rank. In the place of
            another exception, which is raised where it was, the others get one that names the process and tells it.
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
    """Call ``function`` on rank 0 and return its value, which can be pickled, on every process.

    It may take longer than ``ddp_timeout``: the others do not wait in a collective of the training's group. A value of
    many megabytes takes a moment for each process, since all of them fetch it from one store.

    Raises:
        DataFlexError: on every process, if ``function`` raised one. Another exception is raised on rank 0, and on the
            others a DataFlexError that tells it.
    """
    board = _board()
    if board is None:
        return function()
    return cast(T, board.call(function if rank() == 0 else None, [0])[0])


def on_each(function: Callable[[], T]) -> list[T]:
    """Call ``function`` on every process at once and return the values of all, in order of rank, on every process.

    One may take longer than another by more than ``ddp_timeout``, as in :func:`on_main`.

    Raises:
        DataFlexError: on every process, if ``function`` raised one on any: that of the lowest rank; see
            :func:`together` for other exceptions.
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
        DataFlexError: on every process, if they differ.
    """
    values = on_each(lambda: value)
    if len(set(values)) > 1:
        raise DataFlexError(
            f"{what} differs between processes ({', '.join(map(str, values))}). A component must decide from what its "
            "context gives it (ctx.rng, ctx.probe, ctx.pool), never from global random state or a local file."
        )


def gather_objects(value: T) -> list[T]:
    """Return the picklable value of every process, in order of rank, on every process; it may be large."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    barrier()  # who has failed is known before anybody waits in the collective
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def _board() -> _Board | None:
    """Return what the processes write to one another on; None in one process."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    default = dist.group.WORLD
    if default not in _boards:
        _boards[default] = _Board()
    return _boards[default]


class _Board:
    """What processes write to one another, in the store of the default group.

    The store is the one the group was made with, whatever that was (``env://``, a file, torchrun's own), so it is there
    and reachable. Torch gives it under a private name only; another connection to the same address would have to know
    how the launcher made it.
    """

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        self._whole = _get_default_store()  # held, because it may be the server
        self.store = dist.PrefixStore(_PREFIX, self._whole)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._agreed: BaseException | None = None
        self._is_own = False

    def another(self) -> dist.Store:
        """Return a connection of its own to the same store, for another thread."""
        import torch.distributed as dist

        return dist.PrefixStore(_PREFIX, self._whole.clone())

    def knows(self, error: BaseException) -> bool:
        """Return whether all processes have heard of an error, or of one that led to it."""
        return self._agreed is not None and any(each is self._agreed for each in _chain(error))

    def is_told(self, error: BaseException) -> bool:
        """Return whether an error is another process's."""
        return self.knows(error) and not self._is_own

    def call(self, function: Callable[[], Any] | None, ranks: Sequence[int]) -> list[Any]:
        """Return the values of the processes ``ranks`` from a call of ``function``; None calls nothing here."""
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
        """Wait for all processes, and return what the other ones of ``ranks`` have posted; None for this one.

        Args:
            data: what this process posts; None: nothing.
            ranks: the processes that post something.
            error: why this process has nothing to post.

        Raises:
            DataFlexError: that of the lowest rank, if there is one; see :func:`together`.
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
        self._agreed = told = cast(DataFlexError, pickle.loads(self._fetch([f"{call}/error/{lowest}"])[0]))
        raise told from error

    def wait(self, key: str, patience: float | None = None) -> bool:
        """Wait for a key, and return whether it is there.

        Args:
            key: in the store.
            patience: most seconds; None: for ever.

        Raises:
            DataFlexError: if a process is known to have failed in the meantime.
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
        """Write bytes: the number of pieces and the first one under the key itself, which comes last."""
        pieces = [data[begin : begin + _PIECE] for begin in range(0, len(data), _PIECE)]
        for number, piece in enumerate(pieces[1:], start=1):
            self.store.set(f"{key}/{number}", piece)
        self.store.set(key, f"{len(pieces)} ".encode() + pieces[0])

    def _fetch(self, keys: Sequence[str]) -> list[bytes]:
        """Return what was posted under keys, in as few looks as there can be: all processes make them at once."""
        if keys and not self.store.check(list(keys)):
            raise DataFlexError(
                "the processes wait for different things. A component must make the same calls of ctx on every process."
            )
        together = len(keys) > 1 and self.store.has_extended_api()
        heads = self.store.multi_get(list(keys)) if together else [self.store.get(key) for key in keys]
        found = []
        for key, head in zip(keys, heads, strict=True):
            count, _, first = head.partition(b" ")
            found.append(first + b"".join(self.store.get(f"{key}/{number}") for number in range(1, int(count))))
        return found

    def _wipe(self, call: str, posted: Mapping[str, int]) -> None:
        """Remove what a call has left, when everybody has read it.

        Args:
            call: its name.
            posted: the bytes under each key.
        """
        for key, size in posted.items():
            for number in range(1, -(-size // _PIECE)):
                self.store.delete_key(f"{key}/{number}")
            self.store.delete_key(key)
        for name in ("here", "errors", "all", "read"):
            self.store.delete_key(f"{call}/{name}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Return an error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _pickled(error: Exception, number: int) -> bytes:
    """Return what the other processes raise for the error of process ``number``."""
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
    """Return what is said of an exception of process ``number`` that is no DataFlexError."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":. ")
    return f"process {number} has failed ({text}). Its own output has the traceback."


@contextmanager
def _connection_told() -> Iterator[None]:
    """Tell a lost connection to the store as the end of the process that keeps it."""
    import torch.distributed as dist

    try:
        yield
    except dist.DistError as error:
        raise DataFlexError(_LOST) from error


class Watch:
    """Ends this process when another one has failed, and tells the others when this one has.

    A process that waits in one of the training's collectives cannot hear of anything else, so a thread looks for
    failures. A process that has not ended by itself some seconds after one has its error printed and is ended.

    Args:
        report: prints an error's text.
        say: returns the text of an exception, or None for one of which the traceback is what is needed.
    """

    def __init__(self, report: Callable[[str], None], say: Callable[[BaseException], str | None]) -> None:
        self.failure: str | None = None
        """What another process has failed with, once that is known."""
        self._report, self._say = report, say
        self._board: _Board | None = None
        self._thread: threading.Thread | None = None
        self._left = threading.Event()
        self._key = ""

    def begin(self) -> None:
        """Begin to look, if there are several processes; all of them do so. Again: nothing."""
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
        """Return the watch, which has not begun."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        """Leave with all other processes, or tell them why not.

        Raises:
            DataFlexError: in the place of the error of a process that failed because of another one.
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
            if self._thread is not None:  # Python must not end while it is in torch's code
                self._thread.join(_PATIENCE)
        return False

    def _look(self, store: dist.Store) -> None:
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
            threading.Timer(_PATIENCE, os._exit, [_FAILED]).start()  # if somebody holds what printing needs
            self._report(failure)
            os._exit(_FAILED)

    def _leave(self, board: _Board) -> None:
        """Wait until all processes leave: one that fails now has the others fail too."""
        import torch.distributed as dist

        try:
            if board.store.add(f"{self._key}/left", 1) == board.size:
                board.store.set(f"{self._key}/end", "")
            board.wait(f"{self._key}/end")
        except dist.DistError:  # the process that keeps the store has left, which it does when all are here
            pass
        except DataFlexError:
            if self.failure != _LOST:
                raise

    def _fail(self, board: _Board, error: BaseException) -> None:
        """Tell the others of an error, and raise the one that was first."""
        import torch.distributed as dist

        said = str(error) if isinstance(error, DataFlexError) else self._say(error)
        own = said or describe(error, board.rank)
        try:
            if board.is_told(error):  # the process it comes from knows more
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
