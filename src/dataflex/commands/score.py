"""``dataflex-cli features`` and ``score``: the folders of a command line, and one process or several."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from dataflex.commands import offline
from dataflex.commands.train import checked_config, print_notes
from dataflex.config.processes import is_worker


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Attributes:
        command: ``features`` or ``score``.
        config: the YAML file.
        overrides: ``key=value`` texts.
        arguments: the whole command line after the program's name, for further processes.
        output: folder to write to; none: ``scores`` in the output_dir.
        features: folder features are kept in; none: ``features`` in the output.
        amount: how much of the pool is selected.
    """

    command: str
    config: Path
    overrides: list[str]
    arguments: list[str]
    output: Path | None
    features: Path | None
    amount: offline.Amount


def score(asked: Asked) -> int:
    """Score a pool, or make its features, and return the exit status.

    Raises:
        ConfigError: for what the user can mend.
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
        print(f"dataflex: to score with them: {shlex.join(['dataflex-cli', 'score', *asked.arguments[1:]])}")
    return status
