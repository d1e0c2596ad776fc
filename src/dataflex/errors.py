"""The errors a user can cause or meet. The command line prints their text, without a traceback, and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class DataFlexError(Exception):
    """A problem with a clear cause that a user can act on; the message is the whole explanation."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a configuration: the dotted key and what to do about it."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(DataFlexError):
    """Bad input: a configuration, a path or an argument. Carries every problem found, not only the first."""

    def __init__(self, message: str = "", problems: Iterable[Problem] = (), source: str = "") -> None:
        """Take either one message or a list of problems found in ``source`` (a file name)."""
        self.problems = list(problems) or [Problem("", message)]
        self.source = source
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}" if self.source else str(self.problems[0])
        head = f"{self.source or 'configuration'}: {len(self.problems)} problems"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class CheckpointError(DataFlexError):
    """A checkpoint cannot be used: incomplete, corrupt, or written by a run that does not match this one."""


class ComponentError(DataFlexError):
    """A component returned something a round cannot be made of (NaN scores, wrong shape, ...)."""


class DivergenceError(DataFlexError):
    """A number that the model gives for data it can be trained on is not finite."""

    def __init__(self, what: str) -> None:
        """Take the number and where it came up, as "the loss of domain 'code' in step 3 is nan"."""
        self.what = what
        super().__init__(
            f"{what}: has training diverged? Lower learning_rate, warm it up, or look at the data and the precision "
            "(bf16, fp16); checkpoints saved before are kept."
        )

    def __reduce__(self) -> tuple[type[DivergenceError], tuple[str]]:
        """Return how it is made again in another process: from what it was made from, not from its message."""
        return type(self), (self.what,)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of ``known``, or an empty string."""
    near = difflib.get_close_matches(str(name), [str(item) for item in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Text for an unknown name: what it is, the nearest valid one, and all valid ones."""
    names = sorted(known)
    hint = did_you_mean(name, names) or "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}."
