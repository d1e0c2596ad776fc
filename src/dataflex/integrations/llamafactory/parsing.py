"""Argument parsing with LLaMA-Factory's own parser: errors that name the keys, and a dry run."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from dataflex.config.arguments import llamafactory_keys
from dataflex.config.checks.values import truthy
from dataflex.config.loading import RunConfig
from dataflex.errors import ConfigError, DataFlexError, Problem

_OF_THE_DEVICE = ("bf16", "fp16", "pure_bf16", "tf32", "bf16_full_eval", "fp16_full_eval", "fp8")
"""Keys that depend on the device: the machine that checks may refuse a key that the machine that trains accepts."""
_LEFT_OUT = ("deepspeed", "tf32")
"""Keys whose parsing sets up processes or the device. Their values are checked elsewhere."""


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module during the block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def parse(get_train_args: Callable[..., Any], args: dict[str, Any], source: str = "") -> Any:
    """Return the arguments parsed by LLaMA-Factory's parser. ``source`` is the file they come from, for messages.

    Raises:
        ConfigError: for every argument that the parser does not accept, naming the keys in question.
    """
    try:
        return get_train_args(args)
    except DataFlexError:
        raise
    except Exception as error:  # LLaMA-Factory and Transformers raise many types for arguments that they refuse
        raise ConfigError(problems=[_explained(error, args)], source=source) from error


def parse_to_train(get_train_args: Callable[..., Any], args: dict[str, Any], source: str = "") -> Any:
    """Parse like :func:`parse`, and also check arguments that the Trainer checks only after the model is loaded.

    Raises:
        ConfigError: also for arguments that do not fit the optimizer or the learning rate schedule, and for a model
            that is to be sharded over processes if there is only one process.
    """
    found = parse(get_train_args, args, source)
    training_args = found[2]
    _try_schedule(training_args, source)
    _try_optimizer(training_args, source)
    if training_args.fsdp and training_args.world_size == 1:
        text = (
            "shards the model over processes, but the run has a single process. Set FORCE_TORCHRUN=1, and "
            "NPROC_PER_NODE to the number of processes."
        )
        raise ConfigError(problems=[Problem("fsdp", text)], source=source)
    return found


def _explained(error: Exception, args: dict[str, Any]) -> Problem:
    """Return LLaMA-Factory's error with the given keys that the raising statements of its source read."""
    looked_at = [key for frame in traceback.extract_tb(error.__traceback__) for key in _keys_at(frame)]
    mentioned = [key for key in llamafactory_keys() if f"`{key}`" in str(error) or f"--{key} " in f"{error} "]
    keys = [key for key in dict.fromkeys([*sorted(mentioned), *reversed(looked_at)]) if args.get(key) is not None]
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "" if isinstance(error, ValueError | AssertionError | ImportError) else f"{type(error).__name__}: "
    end = "" if text.endswith((".", "?", "!")) else "."
    return Problem(", ".join(keys[:4]), f"LLaMA-Factory does not accept these arguments: {kind}{text}{end}")


def _keys_at(frame: traceback.FrameSummary) -> list[str]:
    """Return the arguments that the statement of a stack frame reads, or the condition before the statement."""
    if frame.lineno is None or not any(name in frame.filename for name in ("llamafactory", "transformers")):
        return []
    for node in _statements(frame.filename):
        if isinstance(node, ast.If) and any(_spans(each, frame.lineno) for each in node.body):
            if any(isinstance(each, ast.Raise) and _spans(each, frame.lineno) for each in node.body):
                return _attributes(node.test)
        elif isinstance(node, ast.Assert | ast.Assign | ast.Expr) and _spans(node, frame.lineno):
            return _attributes(node)
    return []


@cache
def _statements(file: str) -> list[ast.AST]:
    """Return the statements of a source file, inner statements first."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return []
    kinds = (ast.If, ast.Assert, ast.Assign, ast.Expr)
    return [node for node in reversed(list(ast.walk(tree))) if isinstance(node, kinds)]


def _spans(node: ast.AST, line: int) -> bool:
    """Return whether a statement includes a line."""
    return getattr(node, "lineno", 0) <= line <= getattr(node, "end_lineno", 0)


def _attributes(node: ast.AST) -> list[str]:
    """Return the names of LLaMA-Factory's arguments that a statement reads."""
    names = [each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)]
    return [name for name in names if name in llamafactory_keys()]


def dry_run(config: RunConfig) -> list[str]:
    """Parse a configuration as training would, without setting anything up, and return notes about this machine.

    The dry run creates no folder, no process group and no context on a device. Loggers, the environment and random
    states stay unchanged. A problem that depends on the device alone is a note, because another machine may train.

    Raises:
        ConfigError: for arguments that no machine accepts.
    """
    disabled, environment = logging.root.manager.disable, dict(os.environ)
    logging.disable(logging.CRITICAL)  # imports and parsing log to the terminal
    os.environ["LLAMAFACTORY_VERBOSITY"] = "ERROR"
    try:
        import transformers
        from llamafactory.hparams import parser

        given = {key: value for key, value in config.llamafactory.items() if key not in _LEFT_OUT}
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            replaced(parser, "_set_transformers_logging", lambda: None),
            # True, because the machine that trains may support bf16. `_notes` reports if this machine does not.
            replaced(parser, "is_torch_bf16_gpu_available", lambda: True),
            replaced(parser, "is_deepspeed_zero3_enabled", lambda: config.zero_stage == 3),
            replaced(transformers, "set_seed", lambda *args, **options: None),
        ):
            arguments = _parsed(parser.get_train_args, {**given, "use_cpu": True}, config.source)
            _try_schedule(arguments[2], config.source)
            _try_optimizer(arguments[2], config.source)
        return list(_notes(config))
    finally:
        logging.disable(disabled)
        os.environ.clear()
        os.environ.update(environment)


def _parsed(get_train_args: Callable[..., Any], given: dict[str, Any], source: str) -> Any:
    """Parse the arguments. If the error names no key, find the keys whose removal avoids it."""
    try:
        return parse(get_train_args, given, source)
    except ConfigError as error:
        (problem,) = error.problems
        if problem.key:
            raise
        keys = []
        for key in given:
            with contextlib.suppress(ConfigError):
                parse(get_train_args, {name: value for name, value in given.items() if name != key})
                keys.append(key)
        raise ConfigError(problems=[Problem(", ".join(keys[:4]), problem.message)], source=source) from error


def _try_schedule(args: Any, source: str) -> None:
    """Make the learning rate schedule for one parameter, which the Trainer does only after it has loaded the model."""
    import torch
    from transformers import get_scheduler

    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        return
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    kind, options = str(args.lr_scheduler_type.value), args.lr_scheduler_kwargs
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 100, scheduler_specific_kwargs=options)
    except Exception as error:  # each schedule raises its own types for options that it does not take
        raise ConfigError(
            problems=[
                Problem("lr_scheduler_kwargs", f"{options or 'none'} does not fit lr_scheduler_type: {kind}: {error}")
            ],
            source=source,
        ) from error


def _try_optimizer(args: Any, source: str) -> None:
    """Make the optimizer for one parameter if ``optim_args`` is set.

    The Trainer does it only after loading the model.
    """
    if not args.optim_args:
        return
    import torch
    from transformers import Trainer

    given = f"{args.optim_args!r} (name=value, name=value) with optim: {args.optim.value}"
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if not {"params", "model", "optimizer_dict"} & set(options):  # these optimizers need layers of the model
            kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except Exception as error:  # each optimizer raises its own types for options that it does not take
        raise ConfigError(problems=[Problem("optim_args", f"{given}: {error}.")], source=source) from error


def unsupported_here(config: RunConfig) -> list[str]:
    """Return the keys that are set and need a device which this machine does not have."""
    from llamafactory.extras.misc import get_device_count
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

    asked = [key for key in _OF_THE_DEVICE if truthy(config, key)]
    devices = get_device_count()
    here = {
        **dict.fromkeys(("bf16", "bf16_full_eval"), is_torch_bf16_gpu_available() or truthy(config, "use_cpu")),
        "pure_bf16": is_torch_bf16_gpu_available(),
        "tf32": is_torch_tf32_available(),
    }
    return [key for key in asked if not here.get(key, devices > 0)]


def _notes(config: RunConfig) -> Iterator[str]:
    """Yield notes on arguments that need devices which this machine does not have."""
    from llamafactory.extras.misc import get_device_count, is_env_enabled

    missing = unsupported_here(config)
    if missing:
        yield f"{', '.join(missing)}: this machine has no device that supports it; train on a machine that has one."
    devices = get_device_count()
    for key in ("deepspeed", "fsdp"):
        if config.llamafactory.get(key) and devices < 2 and not is_env_enabled("FORCE_TORCHRUN"):
            yield f"{key}: with fewer than two accelerators, training starts only if FORCE_TORCHRUN=1 is set."
