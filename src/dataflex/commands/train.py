"""``dataflex-cli train`` and ``check``: check a configuration, and train it in one process or several."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataflex.config import checks
from dataflex.config.checks.plan import planned
from dataflex.config.checks.values import truthy
from dataflex.config.loading import RunConfig, parse_config
from dataflex.config.processes import is_worker
from dataflex.config.yaml_file import read_yaml
from dataflex.errors import ConfigError
from dataflex.trainer import resume, stopping

_KEYS_BESIDE_BASE = {
    "regmix": {"proxies", "target", "regressor"},
    "hard-pairs": {"halves", "keep", "measurements"},
    "compare": {"variants", "baseline", "seeds", "equal"},
    "doremi": {"reference", "proxy", "final"},
}
"""Command -> keys beside ``base`` in its files.

Keys that several commands know, such as ``final`` and ``seeds``, count for the last command that knows them.
"""


def checked_config(
    path: Path,
    overrides: list[str],
    *,
    offline: bool = False,
    change: Callable[[RunConfig], RunConfig] = lambda config: config,
) -> RunConfig:
    """Return the configuration of a file with its overrides.

    Args:
        path: the YAML or JSON file.
        overrides: ``key=value`` texts.
        offline: whether the configuration is used without training, for example to score or to embed samples.
        change: changes a configuration that could be read, before it is checked.

    Raises:
        ConfigError: if there are problems. The error lists all of them.
    """
    raw = read_yaml(path, overrides)
    _refuse_file_of_another_command(path, raw)
    config, problems = parse_config(raw, str(path), path.resolve().parent)
    config = replace(config, offline=offline)
    if not problems:
        config = change(config)
    problems += checks.problems_of(config)
    if not problems:
        problems += resume.problems_of(config)
    if problems:
        raise ConfigError(problems=problems, source=str(path))
    return config


def _refuse_file_of_another_command(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise a ConfigError if the file is one for compare, doremi, regmix or hard-pairs.

    The keys of such a file are no arguments of LLaMA-Factory, so the other problems of the file would mislead.
    """
    if "base" not in raw:
        return
    for command, keys in _KEYS_BESIDE_BASE.items():
        if not keys.isdisjoint(raw):
            file = shlex.quote(str(path))
            raise ConfigError(
                f"{path} is a file for `dataflex-cli {command}`: run `dataflex-cli {command} {file} --dry-run`."
            )


def print_notes(config: RunConfig) -> None:
    """Print the notes about a configuration: facts that the user should know although they are no errors."""
    for note in (*config.notes, *resume.notes(config)):
        print(f"dataflex: note: {note}", file=sys.stderr)


def check(path: Path, overrides: list[str]) -> None:
    """Check a configuration, and print the plan of its run.

    Args:
        path: the YAML or JSON file.
        overrides: ``key=value`` texts.

    Raises:
        ConfigError: if there are problems. The error lists all of them.
    """
    from dataflex.integrations.llamafactory import parsing

    config = checked_config(path, overrides)
    notes = parsing.dry_run(config)  # last, because the import of torch and LLaMA-Factory takes most of the time
    print_notes(replace(config, notes=(*config.notes, *notes)))
    for line in resume.told(config):
        print(f"dataflex: note: {line}", file=sys.stderr)
    acting = ", ".join(f"{key}: {cls.name}" for key, (cls, _) in config.params.items())
    print(f"{path}: no problems ({acting or 'plain LLaMA-Factory'})")
    if truthy(config, "do_train"):
        plan = planned(config)
        print("\n".join(["plan:", *plan.lines()]))
        for note in plan.notes():
            print(f"dataflex: note: {note}", file=sys.stderr)


def train(path: Path, overrides: list[str]) -> int:
    """Train a configuration in as many processes as LLaMA-Factory's launcher starts.

    Args:
        path: the YAML or JSON file.
        overrides: ``key=value`` texts.

    Returns:
        The exit status.

    Raises:
        ConfigError: for errors that the user can correct.
    """
    from dataflex.integrations.llamafactory import launch

    config = checked_config(path, overrides).with_assets()
    if is_worker():
        return _train_here(config)
    print_notes(config)
    try:
        many = launch.wants_many()
        status = launch.run_many(["train", str(path), *overrides]) if many else _train_here(config)
    except KeyboardInterrupt as stop:
        return stopping.end(stop, stopping.of_training(config))
    if status == 0:
        _print_next(config)
    return status


def _train_here(config: RunConfig) -> int:
    from dataflex.integrations.llamafactory.run import run

    run(config)
    return 0


def _print_next(config: RunConfig) -> None:
    """Print the commands that show a finished training, if the record of the run is on this machine."""
    output = Path(str(config.llamafactory.get("output_dir")))
    trained = config.dataflex is not None and config.llamafactory.get("do_train")
    if not trained or not (output / "dataflex" / "summary.json").is_file():
        return
    folder = shlex.quote(str(output))
    print(f"dataflex: the run on one page: dataflex-cli report {folder}")
    if (output / "dataflex" / "rounds.jsonl").is_file():
        top = " --top 5" if "select" in config.families else ""
        print(f"dataflex: the chosen samples and the reasons: dataflex-cli explain {folder}{top}")
