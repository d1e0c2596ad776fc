"""Names, types and choices of LLaMA-Factory's arguments, read from the installed packages' source files.

Importing LLaMA-Factory takes ten seconds or more. Parsing its source files takes a tenth of a second.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_HPARAMS = ("model_args.py", "data_args.py", "training_args.py", "finetuning_args.py", "generating_args.py")
_TRANSFORMERS = ("training_args.py", "training_args_seq2seq.py")
_FILES = (
    *(("transformers", name) for name in _TRANSFORMERS),
    *(("llamafactory", f"hparams/{name}") for name in _HPARAMS),
)
"""Source files that define the training arguments. A definition in a later file replaces an earlier one."""
_V1 = ("model_args.py", "data_args.py", "training_args.py", "sample_args.py")
_ENUMS = (
    ("transformers", "trainer_utils.py"),
    ("transformers", "training_args.py"),
    ("transformers", "debug_utils.py"),
    ("llamafactory", "extras/constants.py"),
)
_ALSO = {"resume_from_checkpoint": "bool", "fsdp": "bool"}
"""Keys that accept another type besides those of their annotation."""
_CHOICES = {
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "fp8_backend": ("auto", "torchao", "te", "msamp"),
    "log_level": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "xccl", "hccl", "cncl", "mccl"),
}
"""Allowed values of keys whose annotation allows any text."""
_READ_AS = {False: ("no", "off"), True: ("yes", "on")}
"""Words that YAML reads as false and as true."""
_SCALARS = ("str", "int", "float", "bool")


@dataclass(frozen=True)
class Argument:
    """The values that an argument may have.

    Attributes:
        types: names among ``str``, ``int``, ``float``, ``bool``, ``list``, ``dict``, ``None``; ``any`` for all of them.
        choices: the allowed words; empty if the argument is not limited to a set of words.
    """

    types: frozenset[str]
    choices: tuple[str, ...] = ()


_COMPUTED_DEFAULTS = {
    "optim": "adamw_torch_fused",
    "flash_attn": "auto",
    "quantization_method": "bnb",
    "infer_backend": "huggingface",
    "include_for_metrics": [],
    "image_max_pixels": 768 * 768,
    "image_min_pixels": 32 * 32,
    "video_max_pixels": 256 * 256,
    "video_min_pixels": 16 * 16,
}
"""Defaults that the source files compute at run time, written as a YAML file would give them."""


@cache
def llamafactory_arguments() -> dict[str, Argument]:
    """Return LLaMA-Factory's training arguments by name."""
    fields: dict[str, ast.expr] = {}
    split: set[str] = set()
    for package, name in _FILES:
        tree = _tree(package, name)
        if tree is None:
            return {}
        fields.update(_annotated_fields(tree))
        split |= set(_split_fields(tree))
    return {name: _argument(name, annotation, split) for name, annotation in fields.items()}


def llamafactory_keys() -> frozenset[str]:
    """Return the names of LLaMA-Factory's training arguments."""
    return frozenset(llamafactory_arguments())


@cache
def inference_keys() -> frozenset[str]:
    """Return the names of the arguments of LLaMA-Factory's commands that use a model and do not train."""
    trees = (_tree("llamafactory", f"hparams/{name}") for name in _HPARAMS if name != "training_args.py")
    return frozenset(name for tree in trees if tree is not None for name, _ in _annotated_fields(tree))


def with_words(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return LLaMA-Factory's keys with truth values turned back into words for keys that accept words alone.

    YAML reads ``eval_strategy: no`` as false, in a file and on the command line.
    """
    found = dict(given)
    for key, value in given.items():
        argument = llamafactory_arguments().get(key) if isinstance(value, bool) else None
        if argument is not None and "bool" not in argument.types:
            found.update((key, word) for word in argument.choices if word in _READ_AS[value])
    return found


@cache
def llamafactory_defaults() -> dict[str, Any]:
    """Return the defaults of LLaMA-Factory's training arguments by name."""
    found: dict[str, Any] = {}
    for package, name in _FILES:
        tree = _tree(package, name)
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                value: ast.expr = node.value
                if isinstance(value, ast.Call):
                    value = next((word.value for word in value.keywords if word.arg == "default"), value)
                with contextlib.suppress(ValueError):  # the default is an expression; _COMPUTED_DEFAULTS has its value
                    found[node.target.id] = ast.literal_eval(value)
    found |= _COMPUTED_DEFAULTS
    return {key: value for key, value in found.items() if key in llamafactory_arguments()}


@cache
def v1_keys() -> frozenset[str]:
    """Return the names of the arguments that exist only in LLaMA-Factory's v1 form."""
    names: set[str] = set()
    for name in _V1:
        tree = _tree("llamafactory", f"v1/config/{name}")
        if tree is not None:
            names |= {field for field, _ in _annotated_fields(tree)}
    return frozenset(names) - llamafactory_keys()


@cache
def templates() -> frozenset[str]:
    """Return the names of LLaMA-Factory's templates."""
    tree = _tree("llamafactory", "data/template.py")
    names = set()
    for node in tree.body if tree is not None else ():
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register_template":
            given = [word.value for word in call.keywords if word.arg == "name"]
            names |= {str(value.value) for value in given if isinstance(value, ast.Constant)}
    return frozenset(names)


@cache
def required_packages() -> tuple[tuple[str, str], ...]:
    """Return (key, requirement) for each package that LLaMA-Factory requires if the key is set."""
    tree = _tree("llamafactory", "hparams/parser.py")
    found = []
    for node in ast.walk(tree) if tree is not None else ():
        if not (isinstance(node, ast.FunctionDef) and node.name == "_check_extra_dependencies"):
            continue
        for branch in ast.walk(node):
            test = branch.test if isinstance(branch, ast.If) else None
            if isinstance(test, ast.Compare) and "is not None" in ast.unparse(test):
                test = test.left
            if isinstance(branch, ast.If) and isinstance(test, ast.Attribute):
                key = test.attr
                calls = [each.value for each in branch.body if isinstance(each, ast.Expr)]
                found += [(key, requirement) for call in calls if (requirement := _requirement(call)) is not None]
    return tuple(found)


def _requirement(call: ast.expr) -> str | None:
    """Return the requirement of a call ``check_version(requirement, mandatory=True)``; None for any other call."""
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "check_version":
        mandatory = [word for word in call.keywords if word.arg == "mandatory"]
        if mandatory and call.args and isinstance(call.args[0], ast.Constant):
            return str(call.args[0].value)
    return None


@cache
def _tree(package: str, file: str) -> ast.Module | None:
    """Return the syntax tree of a file of an installed package; None if the package or the file is missing."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None


def _annotated_fields(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield (name, annotation) of the class fields in a file that a user can set."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not _is_derived(item.value):
                yield item.target.id, item.annotation


def _is_derived(value: ast.expr | None) -> bool:
    """Return whether the class itself sets a field: ``field(init=False)``."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return any(word.arg == "init" and ast.unparse(word.value) == "False" for word in keywords)


def _split_fields(tree: ast.Module) -> Iterator[str]:
    """Yield the fields that may also be a list, because LLaMA-Factory passes them through ``split_arg``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "split_arg":
            yield from (each.attr for each in node.args if isinstance(each, ast.Attribute))


def _argument(name: str, annotation: ast.expr, split: set[str]) -> Argument:
    types, choices = _read(annotation)
    if name in split:
        types = types | {"list"}
    if name in _ALSO:
        types = types | {_ALSO[name]}
    return Argument(frozenset(types), _CHOICES.get(name, choices))


def _read(annotation: ast.expr) -> tuple[set[str], tuple[str, ...]]:
    """Return the types and choices of an annotation."""
    if isinstance(annotation, ast.BinOp):  # X | Y
        left, right = _read(annotation.left), _read(annotation.right)
        types, choices = left[0] | right[0], left[1] + right[1]
        return types, choices
    if isinstance(annotation, ast.Constant):
        return {"None"} if annotation.value is None else {"any"}, ()
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value)
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if outer == "Optional":
            types, choices = _read(inner[0])
            return types | {"None"}, choices
        if outer == "Literal":
            values = [each.value for each in inner if isinstance(each, ast.Constant)]
            words = tuple(value for value in values if isinstance(value, str))
            return {"str"} if words else {"bool"}, words
        if outer == "list":
            return {outer}, _read(inner[0])[1]
        return {outer} if outer == "dict" else {"any"}, ()
    name = ast.unparse(annotation)
    if name in _SCALARS:
        return {name}, ()
    if name in ("dict", "list"):
        return {name}, ()
    members = _enums().get(name)
    return ({"any"}, ()) if members is None else ({"str"}, members)


@cache
def _enums() -> dict[str, tuple[str, ...]]:
    """Return the values of the enumerations that annotations refer to, by class name."""
    found = {}
    for package, file in _ENUMS:
        tree = _tree(package, file)
        for node in tree.body if tree is not None else ():
            if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
                given = [item.value.value for item in node.body if _is_word(item)]  # type: ignore[attr-defined]
                found[node.name] = tuple(given)
    return found


def _is_word(item: ast.stmt) -> bool:
    value = item.value if isinstance(item, ast.Assign) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def is_on(value: Any) -> bool:
    """Return whether a value of an argument is not empty, false, 0 or none, written as a value or as text."""
    return bool(value) and str(value).lower() not in ("false", "0", "0.0", "none", "no")
