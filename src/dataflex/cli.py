"""The command line ``dataflex-cli``: arguments of every command, and the calls of the functions behind them.

Each function imports the modules of its command when it runs. ``--help`` and ``list`` stay fast that way, because they
need no torch.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataflex import __version__
from dataflex.commands import llamafactory
from dataflex.config.processes import is_worker
from dataflex.errors import DataFlexError, did_you_mean
from dataflex.trainer import stopping

_Commands = Any
"""Type of the object that ``add_subparsers`` returns. The class is private in argparse."""

BAD_INPUT = 2
"""Exit status for errors that the user can correct."""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name. None means those of this process.

    Returns:
        The exit status: 0, 2 for bad input, or the status of a worker process that failed.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if arguments and not arguments[0].startswith("-"):
        known = sorted([*_COMMANDS, *llamafactory.COMMANDS])
        if arguments[0] not in known:
            hint = did_you_mean(arguments[0], known) or "."  # argparse lists the commands but suggests none
            print(f"unknown command {arguments[0]!r}{hint} Commands: {', '.join(known)}.", file=sys.stderr)
            return BAD_INPUT
        try:
            if llamafactory.is_passed_on(arguments):
                llamafactory.pass_on(arguments)
                return 0
        except DataFlexError as error:
            return _fail(str(error), error)
    parser = _parser()
    options, further = parser.parse_known_args(arguments)
    if further and (options.overrides is None or any(text.startswith("-") for text in further)):
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    if further:  # argparse assigns only the overrides before the first option
        options.overrides = [*options.overrides, *further]
    options.arguments = arguments
    if options.command is None:
        parser.print_help()
        return BAD_INPUT
    try:
        with stopping.taken(is_worker()):
            status = _COMMANDS[options.command](options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the program that reads our output has ended, for example `| head`
        # Python flushes the output at its exit, which must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DataFlexError as error:
        return _fail(str(error), error)
    except Exception as error:  # an error from a plug-in's code becomes one message; any other keeps its traceback
        from dataflex.api.registry import failure_of_component

        said = failure_of_component(error)
        if said is None:
            raise
        return _fail(f"{said}. {TRACEBACK}=1 prints the traceback.", error)
    except KeyboardInterrupt as stop:
        return stopping.end(stop, _STOPPED.get(options.command, "stopped."))


TRACEBACK = "DATAFLEX_TRACEBACK"
"""Environment variable: ``1`` prints tracebacks beside the messages of errors that the user can correct."""


def _fail(text: str, error: Exception) -> int:
    from dataflex.integrations.llamafactory.launch import report_error

    if os.environ.get(TRACEBACK, "").lower() in ("1", "true", "y"):
        traceback.print_exception(error)
    report_error(f"dataflex: {text}")
    return BAD_INPUT


def _parser(completing: bool = False) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
        completing: whether the parser is for a completion script, which lists LLaMA-Factory's commands too.
    """
    passed_on = {**llamafactory.COMMANDS, "export": "merge an adapter into its model (with a YAML file)"}
    lines = [f"    {name:<10}{text}" for name, text in passed_on.items()]
    parser = argparse.ArgumentParser(
        prog="dataflex-cli",
        description="Select, mix, order and weight the training data of a LLaMA-Factory run while it trains.",
        epilog="\n".join(
            [
                "commands of LLaMA-Factory, passed on to it unchanged:",
                *lines,
                "",
                "Every command has its own help: dataflex-cli train --help",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # else argparse joins the lines of the epilog
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(overrides=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_training(commands)
    _add_schema(commands)
    _add_offline(commands)
    _add_record(commands)
    _add_explain(commands)
    _add_evaluation(commands)
    _add_experiments(commands)
    _add_workflows(commands)
    _add_others(commands)
    for name, text in llamafactory.COMMANDS.items() if completing else ():
        commands.add_parser(name, help=text).add_argument("config", type=Path, nargs="?")
    return parser


def _command(commands: _Commands, name: str, summary: str, description: str, example: str) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    Args:
        commands: the commands of the main parser.
        name: the command.
        summary: its line in the list of commands.
        description: the paragraph at the top of its help.
        example: a command line, printed at the end of its help.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 79),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # else argparse joins the lines of the example
    )
    return command


def _add_training(commands: _Commands) -> None:
    train = _command(
        commands,
        "train",
        "train a model as a YAML file says",
        "Train a model with LLaMA-Factory. If the file has a dataflex: section, the section selects, mixes, orders and "
        "weights the training data while the model trains. A run that was interrupted resumes from its last checkpoint "
        "when the same command is repeated.",
        "dataflex-cli train run.yaml dataflex.select.method=loss output_dir=saves/loss",
    )
    check = _command(
        commands,
        "check",
        "report all problems of a YAML file and the plan of its run, without loading a model",
        "Check a configuration without loading a model. The command reports all problems together. If it finds none, "
        "it prints the plan of the run: steps, rounds, decisions and their expected cost.",
        "dataflex-cli check run.yaml",
    )
    for command in (train, check):
        command.add_argument("config", type=Path, help="LLaMA-Factory YAML or JSON file, with a dataflex: section")
        _add_overrides(command, "dataflex.select.method=loss")
    listing = _command(
        commands,
        "list",
        "print the methods and their parameters",
        "Print every method of the four families (select, mix, order, weight) with its parameters, the values that "
        "each parameter takes, and the defaults.",
        "dataflex-cli list less",
    )
    listing.add_argument("name", nargs="?", help="a family or a method (default: print everything)")
    listing.add_argument(
        "--plugins",
        nargs="*",
        default=[],
        metavar="FILE",
        help="Python files that register further components or measurements",
    )
    _command(
        commands,
        "version",
        "print the versions of DataFlex and of the packages it runs on",
        "Print the installed versions of DataFlex, LLaMA-Factory, torch and the other packages that results may "
        "depend on, one on each line.",
        "dataflex-cli version",
    )


def _add_overrides(command: argparse.ArgumentParser, example: str) -> None:
    # Without a default argparse lists the overrides among the arguments that are required.
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help=f"settings that replace those of the file, for example {example}",
    )


def _add_schema(commands: _Commands) -> None:
    command = _command(
        commands,
        "schema",
        "print the JSON schema with which an editor completes and checks a YAML file",
        "Print the JSON schema of a configuration with a dataflex: section. An editor completes and checks a YAML file "
        "with it, if the first line of the file is `# yaml-language-server: $schema=FILE`.",
        "dataflex-cli schema --output dataflex.schema.json",
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
    features = _command(
        commands,
        "features",
        "compute the gradient features of a pool and store them on disk, without training",
        "Compute the gradient features that the selector of the file reads, for every sample of the training data, and "
        "store them on disk. Nothing is trained. An interrupted command resumes with the stored features.",
        "dataflex-cli features select.yaml --features saves/features",
    )
    score = _command(
        commands,
        "score",
        "score a pool once with a selector and write the best samples as a data set, without training",
        "Score every sample of the training data with the selector of the file. The command writes a table of all "
        "scores, and the samples with the highest scores as a data set for LLaMA-Factory. Nothing is trained.",
        "dataflex-cli score select.yaml --fraction 0.05 --output saves/scores",
    )
    for command in (features, score):
        command.add_argument("config", type=Path, help="LLaMA-Factory YAML file, with a selector in dataflex.select")
        _add_overrides(command, "dataflex.select.method=less")
        command.add_argument(
            "--features", type=Path, metavar="DIR", help="folder of the stored features (default: OUTPUT/features)"
        )
        command.add_argument(
            "--output", type=Path, metavar="DIR", help="folder of the results (default: scores in output_dir)"
        )
    amount = score.add_mutually_exclusive_group()
    amount.add_argument(
        "--fraction", type=_share, default=0.05, help="share of the scored samples to select (default: 0.05)"
    )
    amount.add_argument("--count", type=_positive, metavar="N", help="number of samples to select")
    embed = _command(
        commands,
        "embed",
        "compute the embeddings that a YAML file's components read, without training",
        "Compute the embeddings that the components of the file read, and store those of an encoder on disk. A run of "
        "the same file reads them from there. Nothing is trained.",
        "dataflex-cli embed run.yaml dataflex.select.encoder=asset:all-minilm-l6-v2",
    )
    embed.add_argument("config", type=Path, help="LLaMA-Factory YAML file, with a component that reads embeddings")
    _add_overrides(embed, "dataflex.select.encoder=asset:all-minilm-l6-v2")
    embed.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the embeddings (default: the folder in which a run of the file looks for them)",
    )
    _add_reference(commands)


def _add_reference(commands: _Commands) -> None:
    reference = _command(
        commands,
        "reference",
        "compute a table of a frozen model's token losses, without training",
        "Compute the loss of every trained token of the training data under a frozen model, and store the losses as a "
        "table. Runs of the same data read the table with reference_losses. Nothing is trained. An interrupted command "
        "resumes with the losses computed so far.",
        "dataflex-cli reference run.yaml --model saves/reference --output saves/table",
    )
    reference.add_argument("config", type=Path, help="LLaMA-Factory YAML file, with or without a dataflex: section")
    _add_overrides(reference, "cutoff_len=2048")
    reference.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the table")
    reference.add_argument(
        "--model",
        metavar="MODEL",
        help="the frozen model: folder of a model or of an adapter, asset:NAME or the name of a hub model (default: "
        "model_name_or_path of the file)",
    )
    reference.add_argument(
        "--type",
        choices=["byte", "float32"],
        default="byte",
        help="how a loss is stored: byte has a small error, float32 has none and four times the size (default: byte)",
    )


def _add_record(commands: _Commands) -> None:
    report = _command(
        commands,
        "report",
        "write one HTML page, and print a table, about one or several runs",
        "Write one HTML page about one run or several: losses, evaluations, proportions, scores and costs. The main "
        "figures are also printed as a table.",
        "dataflex-cli report saves/first saves/control --output report.html",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the output_dir of a run")
    report.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the HTML file (default: RUN/dataflex/report.html for one run, dataflex-report.html for several)",
    )
    export = _command(
        commands,
        "export",
        "write the samples that a run chose as a data set",
        "Write the raw rows of the samples that a run chose as a data set for LLaMA-Factory. By default these are the "
        "samples of all rounds after the warm-up. With a YAML file in place of a run, LLaMA-Factory's export merges an "
        "adapter into its model.",
        "dataflex-cli export saves/first --output saves/chosen",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty folder for the data set")
    rounds = export.add_mutually_exclusive_group()
    rounds.add_argument(
        "--round", type=_not_negative, metavar="R", help="one round (default: all rounds after the warm-up)"
    )
    rounds.add_argument("--all", action="store_true", help="all rounds, including the warm-up")


def _add_explain(commands: _Commands) -> None:
    explain = _command(
        commands,
        "explain",
        "print which samples a run chose, when, why, and their text",
        "Print which samples a run trained on: in which round, which method chose them, with which score and rank, and "
        "their text. Without --index, --text or --top the command gives an overview of the run.",
        "dataflex-cli explain saves/first --top 5 --round 2",
    )
    explain.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    asked = explain.add_mutually_exclusive_group()
    asked.add_argument(
        "--index", type=_not_negative, nargs="+", default=[], metavar="I", help="explain these samples, by pool index"
    )
    asked.add_argument("--text", metavar="PHRASE", help="explain the samples whose text contains this phrase")
    asked.add_argument("--top", type=_positive, metavar="N", help="explain the N best samples of a round")
    explain.add_argument(
        "--round",
        type=_not_negative,
        metavar="R",
        help="the round of --top (default: the last round in which a selector chose)",
    )
    explain.add_argument(
        "--tokens",
        action="store_true",
        help="show the losses and weights of the tokens of the samples of --index, or list the samples on record",
    )
    explain.add_argument(
        "--step",
        type=_positive,
        metavar="N",
        help="with --tokens --index: the recorded step (default: the last)",
    )
    explain.add_argument("--no-text", action="store_true", help="leave out the texts, so that no data is loaded")
    explain.add_argument("--full", action="store_true", help="print whole texts, with special tokens")
    explain.add_argument("--json", action="store_true", help="print JSON")


def _add_evaluation(commands: _Commands) -> None:
    evaluation = _command(
        commands,
        "eval",
        "run downstream tasks with a model or with the result of a run",
        "Run multiple-choice or exact-match tasks with lm-evaluation-harness, and report the results with standard "
        "errors. The model is that of a finished run, a model folder, or a model of the hub.",
        "dataflex-cli eval saves/first --tasks questions.jsonl --output tasks",
    )
    evaluation.add_argument(
        "model", metavar="MODEL_OR_RUN", help="a run folder, a model folder, asset:NAME or the name of a hub model"
    )
    evaluation.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help=".jsonl files of questions, YAML files of task settings, or names of lm-eval's tasks",
    )
    evaluation.add_argument("--adapter", type=Path, metavar="DIR", help="folder of an adapter to load on the model")
    evaluation.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the results (default: RUN/dataflex/tasks; required if the model is not a run)",
    )
    _add_questions(evaluation)
    evaluation.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="prompts in one batch (default: 8)"
    )
    evaluation.add_argument("--device", help="for example cpu or cuda:0 (default: the accelerator if there is one)")
    evaluation.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="data type of the weights (default: auto, the type in which they are stored)",
    )
    evaluation.add_argument(
        "--apply-chat-template", action="store_true", help="put the prompts into the model's chat template"
    )


def _add_questions(evaluation: argparse.ArgumentParser) -> None:
    """Add the options that choose the questions of a task and their form."""
    evaluation.add_argument(
        "--fewshot-file",
        type=Path,
        metavar="FILE",
        help="rows of the same form as the task's, from which the few-shot examples are drawn",
    )
    evaluation.add_argument("--num-fewshot", type=int, metavar="N", help="few-shot examples before each question")
    evaluation.add_argument(
        "--choices",
        choices=("letters", "text"),
        help="score the letter of each choice, or its text (default: letters)",
    )
    evaluation.add_argument(
        "--limit", type=int, metavar="N", help="number of questions of each task, drawn with --seed (default: all)"
    )
    evaluation.add_argument(
        "--seed", type=_not_negative, default=42, help="seed for drawing the questions of --limit (default: 42)"
    )


def _add_experiments(commands: _Commands) -> None:
    compare = _command(
        commands,
        "compare",
        "train variants over several seeds and compare their results with intervals",
        "Train the variants of an experiment over several seeds at an equal budget. The result is a table, a page, and "
        "a sentence for each difference that says whether the runs support it. Complete runs are not repeated.",
        "dataflex-cli compare experiment.yaml --dry-run",
    )
    compare.add_argument("experiment", type=Path, help="YAML file with the base, the variants, seeds and the budget")
    _add_jobs(compare, "runs")
    compare.add_argument("--dry-run", action="store_true", help="print the runs that are missing and their cost")
    compare.add_argument(
        "--time-limit",
        type=seconds_of,
        metavar="TIME",
        help="time after which the runs are interrupted and the result of the complete ones is written: 45s, 90m, 2h, "
        "or a number of seconds",
    )
    compare.add_argument(
        "--merge",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="output_dir of the same experiment made elsewhere, whose complete runs are taken over",
    )


def _add_workflows(commands: _Commands) -> None:
    doremi = _command(
        commands,
        "doremi",
        "run DoReMi: train a reference, a proxy that weighs the data sets, and the final model",
        "Run the three trainings of DoReMi one after another: the reference, the proxy that finds the proportions of "
        "the data sets, and the model that is trained with them. Trainings that are complete are not repeated.",
        "dataflex-cli doremi doremi.yaml --dry-run",
    )
    doremi.add_argument("file", type=Path, help="YAML file with base, output_dir, and the changes of each training")
    only = doremi.add_mutually_exclusive_group()
    only.add_argument("--print", action="store_true", help="print the three YAML files, to train them by hand")
    only.add_argument("--dry-run", action="store_true", help="print the state of each of the three trainings")
    pairs = _command(
        commands,
        "hard-pairs",
        "run Selective DPO: measure how hard each preference pair is, and train on the easiest ones",
        "Run the trainings of Selective DPO one after another: for each seed one on each half of the pairs, which "
        "measures the losses of the other half, and the final one on the easiest pairs. Trainings that are complete "
        "are not repeated.",
        "dataflex-cli hard-pairs hard_pairs.yaml --dry-run",
    )
    pairs.add_argument("file", type=Path, help="YAML file with base, output_dir, seeds, measurements, keep and more")
    pairs.add_argument("--dry-run", action="store_true", help="print the state of each training")
    regmix = _command(
        commands,
        "regmix",
        "run RegMix: train small models on many mixtures and predict the best mixture",
        "Run RegMix: train small proxy models on many mixtures of the data sets, fit a regression of their losses, "
        "predict the best mixture, and train the final model with it. Trainings that are complete are not repeated.",
        "dataflex-cli regmix regmix.yaml --jobs 2",
    )
    regmix.add_argument("file", type=Path, help="YAML file with base, output_dir, proxies, target, regressor, final")
    _add_jobs(regmix, "proxies")
    regmix.add_argument("--dry-run", action="store_true", help="print the trainings that are missing")


def _add_jobs(command: argparse.ArgumentParser, runs: str) -> None:
    command.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help=f"{runs} to train at the same time (default: one for each CUDA device, or one without any)",
    )


def _add_others(commands: _Commands) -> None:
    assets = _command(
        commands,
        "assets",
        "list or fetch the models and data sets of the demo",
        "Fetch a model or data set that a configuration names as asset:NAME, and print its folder. Assets are stored "
        "in a cache on this machine.",
        "dataflex-cli assets python-docs",
    )
    assets.add_argument("name", nargs="?", help="the asset to fetch (default: list all assets)")
    demo = _command(
        commands,
        "demo",
        "train a small model with and without selection, and compare the two runs",
        "Fine-tune a model of 135 million parameters twice, on a uniform draw of the data and on a selection. The "
        "command compares both runs and takes a few minutes on two CPU cores.",
        "dataflex-cli demo --output demo-output",
    )
    demo.add_argument("--output", type=Path, metavar="DIR", help="folder of the demo (default: demo-output)")
    completion = _command(
        commands,
        "completion",
        "print a script that completes commands and options in a shell",
        "Print a script with which a shell completes the commands, options and file names of dataflex-cli. The shell "
        "reads it at its start if its configuration file evaluates it.",
        "echo 'eval \"$(dataflex-cli completion bash)\"' >> ~/.bashrc",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that reads the script")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], got {text!r}")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float:
    """Return the seconds of a time such as 45s, 90m, 2h or 3600."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    if not re.fullmatch(r"\d+(\.\d+)?", number) or float(number) <= 0:
        raise argparse.ArgumentTypeError(
            f"must be a time above 0 such as 45s, 90m, 2h, or 3600 (seconds), got {text!r}"
        )
    return float(number) * _UNITS[unit]


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
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


def _reference(options: argparse.Namespace) -> int:
    from dataflex.commands.reference import Asked, reference

    given = options.config, options.overrides, options.arguments
    return reference(Asked(*given, output=options.output, model=options.model, kind=options.type))


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
        tokens=options.tokens,
        step=options.step,
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

    return compare(
        options.experiment, options.jobs, options.dry_run, time_limit=options.time_limit, merge=options.merge
    )


def _doremi(options: argparse.Namespace) -> int:
    from dataflex.workflows.doremi import doremi

    return doremi(options.file, options.print, options.dry_run)


def _hard_pairs(options: argparse.Namespace) -> int:
    from dataflex.workflows.hard_pairs import hard_pairs

    return hard_pairs(options.file, options.dry_run)


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


def _completion(options: argparse.Namespace) -> int:
    from dataflex.commands.completion import script

    print(script(_parser(completing=True), options.shell))
    return 0


_STOPPED = {
    "train": "stopped before the training began.",
    "features": "stopped. Repeat the command to resume with the stored features.",
    "score": "stopped before samples were selected. Repeat the command to score again, with the stored features.",
    "embed": "stopped. Repeat the command to resume with the stored embeddings.",
    "reference": "stopped. Repeat the command to resume with the losses computed so far.",
    "eval": "stopped. Repeat the command to start again.",
}
"""Message when Ctrl-C or SIGTERM stops a command that prints no message of its own."""

_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "features": _features,
    "score": _score,
    "embed": _embed,
    "reference": _reference,
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
    "hard-pairs": _hard_pairs,
    "regmix": _regmix,
    "assets": _assets,
    "demo": _demo,
    "completion": _completion,
}
