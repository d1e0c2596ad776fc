"""``dataflex-cli features`` and ``score``: choose the folders, and start one process or several."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from dataflex.commands import offline
from dataflex.commands.train import checked_config, print_notes
from dataflex.config.processes import is_worker


@dataclass(frozen=True)
class Asked:
    """The arguments of a command line.

    Attributes:
        command: ``features`` or ``score``.
        config: the YAML file.
        overrides: ``key=value`` texts.
        arguments: the whole command line after the program's name, with which further processes are started.
        output: folder of the results. None means ``scores`` in the output_dir.
        features: folder of the stored features. None means the selector's ``feature_dir``, or ``features`` in the
            folder of the results.
        amount: number of samples to select.
    """

    command: str
    config: Path
    overrides: list[str]
    arguments: list[str]
    output: Path | None
    features: Path | None
    amount: offline.Amount


def score(asked: Asked) -> int:
    """Score a pool, or compute its features, and return the exit status.

    Args:
        asked: the arguments.

    Raises:
        ConfigError: for errors that the user can correct.
    """
    from dataflex.integrations.llamafactory import launch

    config = checked_config(asked.config, asked.overrides, offline=True).with_assets()
    output = asked.output or Path(str(config.llamafactory["output_dir"])) / "scores"
    config = offline.prepared(config, output, asked.features)
    if is_worker():
        offline.run(config, asked.command, output, asked.amount)
        return 0
    print_notes(config)
    if launch.wants_many():
        status = launch.run_many(asked.arguments)
    else:
        offline.run(config, asked.command, output, asked.amount)
        status = 0
    if status == 0 and asked.command == "features":
        print(f"dataflex: to score with these features: {shlex.join(['dataflex-cli', 'score', *asked.arguments[1:]])}")
    return status
