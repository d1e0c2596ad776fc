"""Errors that a user can cause or meet. The command line prints the text without a traceback and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class DataFlexError(Exception):
    """Base of all errors with a clear cause that a user can act on. The message is the whole explanation."""


@dataclass(frozen=True)
class Problem:
    """One error in a configuration: the dotted key, and a message that says how to correct the value.

    Example:
        >>> from dataflex import Problem
        >>> print(Problem("dataflex.select.keep", "must be at most 1, got 1.5."))
        dataflex.select.keep: must be at most 1, got 1.5.
    """

    key: str
    """The dotted key of the setting; empty if the error belongs to no setting."""
    message: str
    """The error and its correction, a sentence."""

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(DataFlexError):
    """Invalid input: a configuration, a path or an argument. The error holds every problem found, not only the first.

    Example:
        >>> from dataflex import ConfigError, Problem
        >>> problems = [Problem("dataflex.seed", "must be an integer."), Problem("dataflex.mix", "needs a method.")]
        >>> print(ConfigError(problems=problems, source="train.yaml"))
        train.yaml: 2 problems
          dataflex.seed: must be an integer.
          dataflex.mix: needs a method.
    """

    def __init__(self, message: str = "", problems: Iterable[Problem] = (), source: str = "") -> None:
        """Take either one message or a list of problems in the file ``source``."""
        self.problems = list(problems) or [Problem("", message)]
        self.source = source
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}" if self.source else str(self.problems[0])
        head = f"{self.source or 'configuration'}: {len(self.problems)} problems"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class CheckpointError(DataFlexError):
    """An unusable checkpoint: incomplete, corrupt, or written by a run that does not match this one.

    Example:
        A component that checks the state of a checkpoint before it loads the state:

        >>> from dataflex import CheckpointError
        >>> def load_state_dict(state):
        ...     if "means" not in state:
        ...         raise CheckpointError("the checkpoint has no means of the domains; start a new run.")
        >>> load_state_dict({})
        Traceback (most recent call last):
        dataflex.errors.CheckpointError: the checkpoint has no means of the domains; start a new run.
    """


class ComponentError(DataFlexError):
    """An error of a component: it returned a value that cannot be used (NaN scores, a wrong shape, ...).

    Example:
        >>> from dataflex import ComponentError
        >>> def score(lengths):
        ...     if not any(lengths):
        ...         raise ComponentError("every sample has length 0; check the data.")
        >>> score([0, 0, 0])
        Traceback (most recent call last):
        dataflex.errors.ComponentError: every sample has length 0; check the data.
    """


class DivergenceError(DataFlexError):
    """A loss or another value is not finite although the model can be trained on the samples.

    Example:
        >>> from dataflex import DivergenceError
        >>> error = DivergenceError("the loss of domain 'code' in step 3 is nan")
        >>> str(error)[:66]
        "the loss of domain 'code' in step 3 is nan: has training diverged?"
    """

    def __init__(self, what: str) -> None:
        """Take the value and its origin, such as "the loss of domain 'code' in step 3 is nan"."""
        self.what = what
        super().__init__(
            f"{what}: has training diverged? Lower learning_rate, warm it up, or look at the data and the precision "
            "(bf16, fp16); checkpoints saved before are kept."
        )

    def __reduce__(self) -> tuple[type[DivergenceError], tuple[str]]:
        """Return how pickle rebuilds the error in another process: from ``what`` and not from the message."""
        return type(self), (self.what,)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the element of ``known`` that is most similar, or an empty string."""
    near = difflib.get_close_matches(str(name), [str(item) for item in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name: its kind, the most similar valid name, and all valid names.

    Example:
        >>> from dataflex import unknown
        >>> unknown("domain", "cod", ["code", "math"])
        "unknown domain 'cod'; did you mean 'code'? Known: code, math."
    """
    names = sorted(known)
    hint = did_you_mean(name, names) or "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}."
