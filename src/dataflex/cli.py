"""The command line: parse, call, print. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex import __version__
from dataflex.errors import ConfigError, DataFlexError, did_you_mean

if TYPE_CHECKING:
    from dataflex.config import RunConfig

BAD_INPUT = 2
"""Exit status for what the user can mend."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for bad input, or a failing worker's status."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    known = sorted(_COMMANDS)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        hint = did_you_mean(arguments[0], known) or "."
        print(f"unknown command {arguments[0]!r}{hint} Commands: {', '.join(known)}.", file=sys.stderr)
        return BAD_INPUT
    options, further = parser.parse_known_args(arguments)
    if further and (options.overrides is None or any(text.startswith("-") for text in further)):
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    if further:  # argparse takes the overrides before the first option only
        options.overrides += further
    options.arguments = arguments
    if options.command is None:
        parser.print_help()
        return BAD_INPUT
    try:
        return _COMMANDS[options.command](options)
    except DataFlexError as error:
        from dataflex.launch import report_error

        report_error(f"dataflex: {error}")
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dataflex-cli",
        description="Select, mix, order and weight the training data of a LLaMA-Factory run while it trains.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(overrides=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in (
        ("train", "train a YAML"),
        ("check", "validate a YAML without loading a model, and report all problems"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=Path, help="a LLaMA-Factory YAML or JSON file, with a dataflex: section")
        command.add_argument("overrides", nargs="*", help="key=value, e.g. dataflex.select.method=loss")
    for name, text in (
        ("features", "compute and keep the gradient features of a YAML's data sets, without training"),
        ("score", "score a YAML's data sets with its selector, without training, and write the best of them"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=Path, help="a LLaMA-Factory YAML with a dataflex: section and a selector")
        command.add_argument("overrides", nargs="*", help="key=value")
        command.add_argument("--features", type=Path, help="folder features are kept in (default: OUTPUT/features)")
        command.add_argument("--output", type=Path, help="folder to write to (default: output_dir/scores)")
        if name == "score":
            amount = command.add_mutually_exclusive_group()
            amount.add_argument("--fraction", type=_share, default=0.05, help="share of the pool to select (0.05)")
            amount.add_argument("--count", type=_positive, help="number of samples to select")
    listing = commands.add_parser("list", help="families, methods, and their parameters with defaults")
    listing.add_argument("name", nargs="?", help="a family or a method; none: everything")
    listing.add_argument("--plugins", nargs="*", default=[], help="Python files that register components")
    commands.add_parser("version", help="versions of DataFlex and of what it runs on")
    report = commands.add_parser("report", help="one HTML page and a table about one or several runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    report.add_argument("--output", type=Path, help="the HTML file")
    assets = commands.add_parser("assets", help="the demo's model and data, by name")
    assets.add_argument("name", nargs="?", help="which to fetch; none: list them")
    demo = commands.add_parser("demo", help="train a small model with and without selection, and compare")
    demo.add_argument("--output", type=Path, help="folder of the demo's files and runs")
    return parser


def _checked_config(options: argparse.Namespace, offline: bool = False) -> RunConfig:
    """Load the configuration, and raise every problem together; ``offline``: it is only to score."""
    from dataflex import checks
    from dataflex.config import parse_config
    from dataflex.yaml_file import read_yaml

    raw = read_yaml(options.config, options.overrides)
    config, problems = parse_config(raw, str(options.config), options.config.resolve().parent)
    config = replace(config, offline=offline)
    problems += checks.problems_of(config)
    if problems:
        raise ConfigError(problems=problems, source=str(options.config))
    return config


def _print_notes(config: RunConfig) -> None:
    for note in config.notes:
        print(f"dataflex: note: {note}", file=sys.stderr)


def _check(options: argparse.Namespace) -> int:
    config = _checked_config(options)
    _print_notes(config)
    acting = ", ".join(f"{key}: {cls.name}" for key, (cls, _) in config.params.items())
    print(f"{options.config}: no problems ({acting or 'plain LLaMA-Factory'})")
    return 0


def _train(options: argparse.Namespace) -> int:
    from dataflex import launch

    config = _checked_config(options).with_assets()
    if launch.is_worker():
        return _train_here(config)
    _print_notes(config)
    if launch.wants_many():
        return launch.run_many(["train", str(options.config), *options.overrides])
    return _train_here(config)


def _train_here(config: RunConfig) -> int:
    from dataflex import bridge

    bridge.run(config)
    return 0


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _offline(options: argparse.Namespace) -> int:
    from dataflex import launch, offline

    config = _checked_config(options, offline=True).with_assets()
    output = options.output or Path(str(config.llamafactory["output_dir"])) / "scores"
    config = offline.prepared(config, output, options.features)
    if not launch.is_worker():
        _print_notes(config)
        if launch.wants_many():
            return launch.run_many(options.arguments)
    amount = offline.Amount() if options.command == "features" else offline.Amount(options.fraction, options.count)
    offline.run(config, options.command, output, amount)
    return 0


def _list(options: argparse.Namespace) -> int:
    from dataflex.listing import render

    print(render(options.name, options.plugins))
    return 0


def _version(options: argparse.Namespace) -> int:
    from dataflex.record.versions import installed_versions

    for package, version in installed_versions().items():
        print(f"{package} {version}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from dataflex.record.report import report

    print(f"report: {report(options.runs, options.output)}")
    return 0


def _assets(options: argparse.Namespace) -> int:
    from dataflex import assets

    if options.name is None:
        for asset in assets.ASSETS.values():
            print(f"asset:{asset.name}  ({asset.kind})  {asset.help}")
        return 0
    print(assets.fetch(options.name))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from dataflex import demo

    return demo.run(options.output)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "features": _offline,
    "score": _offline,
    "check": _check,
    "list": _list,
    "version": _version,
    "report": _report,
    "assets": _assets,
    "demo": _demo,
}
