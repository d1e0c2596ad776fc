"""The commands of ``llamafactory-cli`` that ``dataflex-cli`` passes on to LLaMA-Factory.

The module imports little, because every command of ``dataflex-cli`` reads the names in it.
"""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path

from dataflex.errors import ConfigError

COMMANDS = {
    "api": "serve a model behind an API of OpenAI's form",
    "chat": "chat with a model in the terminal",
    "webchat": "chat with a model in the browser",
    "webui": "start LlamaBoard, which trains with LLaMA-Factory alone",
    "env": "print the versions of LLaMA-Factory and of the packages it uses",
}
"""Commands that only LLaMA-Factory has -> their line in the help."""

_READ_A_FILE = ("api", "chat", "webchat", "export")
_SUFFIXES = (".yaml", ".yml", ".json")


def is_passed_on(arguments: list[str]) -> bool:
    """Return whether a command line is for LLaMA-Factory.

    ``export`` and ``eval`` are LLaMA-Factory's with a configuration file, and ``export`` also with options such as
    ``--export_dir``, whose names have underscores. DataFlex's commands of these names take a run.

    Args:
        arguments: the arguments after the program's name.
    """
    command, rest = arguments[0], arguments[1:]
    if command in ("export", "eval") and _names_file(rest):
        return True
    return command in COMMANDS or (command == "export" and any(re.match(r"--\w+_", word) for word in rest))


def pass_on(arguments: list[str]) -> None:
    """Run a command of LLaMA-Factory in this process, with its arguments, streams and exit status.

    Arguments reach LLaMA-Factory unchanged. Only a file with a ``dataflex:`` section or an ``asset:NAME`` is replaced,
    for LLaMA-Factory would refuse it: see ``inference_file.py``.

    Args:
        arguments: the command and its arguments.

    Raises:
        ConfigError: if the file must be replaced and has errors, or if its training has no result; for ``eval``, which
            in LLaMA-Factory only raises an error.
    """
    from dataflex.commands.inference_file import arguments_for_llamafactory

    command, *rest = arguments
    if command == "eval":
        raise ConfigError(
            f"eval {rest[0]}: LLaMA-Factory's eval command cannot evaluate; it only raises an error. "
            "`dataflex-cli eval MODEL_OR_RUN --tasks NAME` runs tasks, and `dataflex-cli train` with do_eval: true "
            "computes losses."
        )
    before = sys.argv
    reads = command in _READ_A_FILE and _names_file(rest)
    with arguments_for_llamafactory(rest) if reads else nullcontext(rest) as words:
        sys.argv = ["llamafactory-cli", command, *words]
        try:
            from llamafactory.cli import main

            main()
        finally:
            sys.argv = before


def _names_file(words: list[str]) -> bool:
    """Return whether the first argument is a configuration file, as LLaMA-Factory decides it."""
    return bool(words) and words[0].endswith(_SUFFIXES) and not Path(words[0]).is_dir()
