"""``dataflex-cli completion``: scripts that complete commands, options and file names in a shell."""

from __future__ import annotations

import argparse
from pathlib import Path

import shtab

_FILES = ("plugins", "tasks", "model")
"""Arguments that may be files or folders although they are read as text, because they may also be names."""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a command line.

    The script is static: a shell completes without starting Python.

    Args:
        parser: the main parser. Arguments of type ``Path`` and those of ``_FILES`` complete to file names.
        shell: ``bash``, ``zsh`` or ``fish``.
    """
    _complete_paths(parser)
    found: str = shtab.complete(parser, shell)
    return found


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Mark the arguments of a parser and of its commands that name files, as shtab expects it."""
    for action in parser._actions:  # argparse has no public way to list them
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command)
        elif action.type is Path or action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
