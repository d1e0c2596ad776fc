"""The command line: parse, call, print. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataflex import __version__
from dataflex.config.processes import is_worker
from dataflex.errors import DataFlexError, did_you_mean
from dataflex.trainer import stopping

_Commands = Any
"""What ``add_subparsers`` returns; argparse does not name its type."""

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
        with stopping.taken(is_worker()):
            status = _COMMANDS[options.command](options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail either
        return 1
    except DataFlexError as error:
        return _fail(str(error), error)
    except Exception as error:
        from dataflex.api.registry import failure_of_component

        said = failure_of_component(error)
        if said is None:
            raise
        return _fail(f"{said}. {TRACEBACK}=1 prints the traceback.", error)
    except KeyboardInterrupt as stop:
        return stopping.end(stop, _STOPPED.get(options.command, "stopped."))


TRACEBACK = "DATAFLEX_TRACEBACK"
"""Environment variable: print the tracebacks of errors that are told in one paragraph."""


def _fail(text: str, error: Exception) -> int:
    from dataflex.integrations.llamafactory.launch import report_error

    if os.environ.get(TRACEBACK, "").lower() in ("1", "true", "y"):
        traceback.print_exception(error)
    report_error(f"dataflex: {text}")
    return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dataflex-cli",
        description="Select, mix, order and weight the training data of a LLaMA-Factory run while it trains.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(overrides=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for add in (_add_training, _add_schema, _add_offline, _add_record, _add_evaluation, _add_experiments):
        add(commands)
    assets = commands.add_parser("assets", help="the demo's model and data, by name")
    assets.add_argument("name", nargs="?", help="which to fetch; none: list them")
    demo = commands.add_parser("demo", help="train a small model with and without selection, and compare")
    demo.add_argument("--output", type=Path, help="folder of the demo's files and runs")
    return parser


def _add_training(commands: _Commands) -> None:
    for name, text in (
        ("train", "train a YAML"),
        ("check", "validate a YAML without loading a model, and report all problems"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=Path, help="a LLaMA-Factory YAML or JSON file, with a dataflex: section")
        command.add_argument("overrides", nargs="*", help="key=value, e.g. dataflex.select.method=loss")
    listing = commands.add_parser("list", help="families, methods, and their parameters with defaults")
    listing.add_argument("name", nargs="?", help="a family or a method; none: everything")
    listing.add_argument(
        "--plugins", nargs="*", default=[], help="Python files that register components or measurements"
    )
    commands.add_parser("version", help="versions of DataFlex and of what it runs on")


def _add_schema(commands: _Commands) -> None:
    command = commands.add_parser(
        "schema",
        help="print the JSON schema with which an editor completes and checks a YAML file",
        description="Print the JSON schema of a configuration with a dataflex: section. An editor completes and checks "
        "a YAML file with it, if the first line of the file is `# yaml-language-server: $schema=FILE`.",
        epilog="example:\n  dataflex-cli schema --output dataflex.schema.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # else argparse joins the lines of the example
    )
    command.add_argument(
        "--plugins",
        nargs="*",
        default=[],
        metavar="FILE",
        help="Python files that register components; the schema includes their methods",
    )
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="write the schema to a file instead of printing it"
    )


def _add_offline(commands: _Commands) -> None:
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

    embed = commands.add_parser("embed", help="make the embeddings that a YAML's components read, without training")
    embed.add_argument("config", type=Path, help="a LLaMA-Factory YAML whose dataflex: section asks for embeddings")
    embed.add_argument("overrides", nargs="*", help="key=value, e.g. dataflex.select.encoder=asset:all-minilm-l6-v2")
    embed.add_argument("--output", type=Path, help="folder they are kept in (default: where the run looks for them)")


def _add_record(commands: _Commands) -> None:
    report = commands.add_parser("report", help="one HTML page and a table about one or several runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    report.add_argument("--output", type=Path, help="the HTML file")
    explain = commands.add_parser("explain", help="which samples a run chose, when and why, with their text")
    explain.add_argument("run", type=Path, metavar="RUN", help="a run's output_dir")
    asked = explain.add_mutually_exclusive_group()
    asked.add_argument("--index", type=_not_negative, nargs="+", default=[], metavar="I", help="samples, by pool index")
    asked.add_argument("--text", metavar="PHRASE", help="samples whose text contains this")
    asked.add_argument("--top", type=_positive, metavar="N", help="the best N samples of a round")
    explain.add_argument("--round", type=_not_negative, metavar="R", help="of --top (the last one with a selector)")
    explain.add_argument("--no-text", action="store_true", help="do not load the data for the samples' texts")
    explain.add_argument("--full", action="store_true", help="texts whole, with special tokens")
    explain.add_argument("--json", action="store_true", help="print JSON")
    export = commands.add_parser("export", help="write the samples a run chose as a data set")
    export.add_argument("run", type=Path, metavar="RUN", help="a run's output_dir")
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty folder to write to")
    rounds = export.add_mutually_exclusive_group()
    rounds.add_argument("--round", type=_not_negative, metavar="R", help="of one round (default: all but the warm-up)")
    rounds.add_argument("--all", action="store_true", help="of all rounds, the warm-up too")


def _add_evaluation(commands: _Commands) -> None:
    evaluation = commands.add_parser("eval", help="run downstream tasks with a model or the result of a run")
    evaluation.add_argument("model", metavar="MODEL_OR_RUN", help="a run or model folder, asset:NAME or a hub name")
    evaluation.add_argument(
        "--tasks", nargs="+", required=True, help=".jsonl files, YAML files of task settings, or tasks of lm-eval"
    )
    evaluation.add_argument("--adapter", type=Path, help="folder of an adapter to put on the model")
    evaluation.add_argument("--output", type=Path, help="folder for the results (default: RUN/dataflex/tasks)")
    evaluation.add_argument("--fewshot-file", type=Path, help="rows of the same form to take examples from")
    evaluation.add_argument("--num-fewshot", type=int, help="examples before each question")
    evaluation.add_argument("--choices", choices=("letters", "text"), help="what of a choice is scored (letters)")
    evaluation.add_argument("--limit", type=int, help="questions of each task, drawn by the seed")
    evaluation.add_argument("--batch-size", type=_positive, default=8, help="prompts at once (8)")
    evaluation.add_argument("--device", help="e.g. cpu or cuda:0 (default: the accelerator if there is one)")
    evaluation.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights (as stored)"
    )
    evaluation.add_argument("--apply-chat-template", action="store_true", help="ask in the model's chat template")
    evaluation.add_argument("--seed", type=_not_negative, default=42, help="of the draw under --limit (42)")


def _add_experiments(commands: _Commands) -> None:
    compare = commands.add_parser("compare", help="train variants over seeds and say what their differences support")
    compare.add_argument("experiment", type=Path, help="a YAML that names the variants, the seeds and the budget")
    compare.add_argument("--jobs", type=_positive, help="runs at a time (default: one for each CUDA device, else one)")
    compare.add_argument("--dry-run", action="store_true", help="print what would be run, and what it would cost")
    doremi = commands.add_parser("doremi", help="train a reference, a proxy that weighs the data sets, and the model")
    doremi.add_argument("file", type=Path, help="a YAML with base, output_dir, and what each of the three changes")
    only = doremi.add_mutually_exclusive_group()
    only.add_argument("--print", action="store_true", help="print the three YAMLs, to train them by hand")
    only.add_argument("--dry-run", action="store_true", help="print how far each of the three is")
    regmix = commands.add_parser("regmix", help="train small models on many mixtures, and predict the best mixture")
    regmix.add_argument("file", type=Path, help="a YAML with base, output_dir, proxies, target, regressor, final")
    regmix.add_argument(
        "--jobs", type=_positive, help="proxies at a time (default: one for each CUDA device, else one)"
    )
    regmix.add_argument("--dry-run", action="store_true", help="print what would be trained")


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


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return int(text)


def _check(options: argparse.Namespace) -> int:
    from dataflex.commands.train import check

    check(options.config, options.overrides)
    return 0


def _train(options: argparse.Namespace) -> int:
    from dataflex.commands.train import train

    return train(options.config, options.overrides)


def _features(options: argparse.Namespace) -> int:
    return _scored(options, fraction=1.0, count=None)


def _score(options: argparse.Namespace) -> int:
    return _scored(options, options.fraction, options.count)


def _scored(options: argparse.Namespace, fraction: float, count: int | None) -> int:
    from dataflex.commands.offline import Amount
    from dataflex.commands.score import Asked, score

    asked = Asked(
        options.command,
        options.config,
        options.overrides,
        options.arguments,
        options.output,
        options.features,
        Amount(fraction, count),
    )
    return score(asked)


def _embed(options: argparse.Namespace) -> int:
    from dataflex.commands.embed import Asked, embed

    return embed(Asked(options.config, options.overrides, options.arguments, options.output))


def _list(options: argparse.Namespace) -> int:
    from dataflex.commands.listing import render

    print(render(options.name, options.plugins))
    return 0


def _schema(options: argparse.Namespace) -> int:
    from dataflex.commands.schema import write_schema

    print(write_schema(options.plugins, options.output))
    return 0


def _version(options: argparse.Namespace) -> int:
    from dataflex.record.versions import installed_versions

    for package, version in installed_versions().items():
        print(f"{package} {version}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from dataflex.report.report import report

    print(f"report: {report(options.runs, options.output)}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from dataflex.explain.explain import Question, explain

    question = Question(
        indices=tuple(options.index),
        text=options.text,
        top=options.top,
        round=options.round,
        with_text=not options.no_text,
        full=options.full,
    )
    explain(options.run, question, options.json)
    return 0


def _export(options: argparse.Namespace) -> int:
    from dataflex.explain.export import export

    export(options.run, options.output, options.round, options.all)
    return 0


def _eval(options: argparse.Namespace) -> int:
    from dataflex.commands.evaluate import Request, evaluate
    from dataflex.evaluation.downstream import Asking

    given = {
        "fewshot_file": options.fewshot_file and options.fewshot_file.absolute(),
        "num_fewshot": options.num_fewshot,
        "choices": options.choices,
        "limit": options.limit,
    }
    asking = Asking(options.batch_size, options.device, options.dtype, options.apply_chat_template, options.seed)
    request = Request(
        options.model,
        options.tasks,
        adapter=options.adapter,
        output=options.output,
        changes={key: value for key, value in given.items() if value is not None},
    )
    folder = evaluate(request, asking)
    print(f"results: {folder}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from dataflex.commands.compare import compare

    return compare(options.experiment, options.jobs, options.dry_run)


def _doremi(options: argparse.Namespace) -> int:
    from dataflex.workflows.doremi import doremi

    return doremi(options.file, options.print, options.dry_run)


def _regmix(options: argparse.Namespace) -> int:
    from dataflex.workflows.regmix import regmix

    return regmix(options.file, options.jobs, options.dry_run)


def _assets(options: argparse.Namespace) -> int:
    from dataflex import assets

    if options.name is None:
        for asset in assets.ASSETS.values():
            print(f"asset:{asset.name}  ({asset.kind})  {asset.help}")
        return 0
    print(assets.fetch(options.name))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from dataflex.commands import demo

    return demo.run(options.output)


_STOPPED = {
    "train": "stopped before the training began.",
    "features": "stopped; the same command goes on with the features that are kept.",
    "score": "stopped, nothing is selected; the same command begins again, with the features that are kept.",
    "embed": "stopped; the same command goes on with the embeddings that are kept.",
    "eval": "stopped; the same command begins again.",
}
"""What is said of a command that is stopped and does not say it itself."""

_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "features": _features,
    "score": _score,
    "embed": _embed,
    "check": _check,
    "list": _list,
    "schema": _schema,
    "version": _version,
    "report": _report,
    "eval": _eval,
    "explain": _explain,
    "export": _export,
    "compare": _compare,
    "doremi": _doremi,
    "regmix": _regmix,
    "assets": _assets,
    "demo": _demo,
}
