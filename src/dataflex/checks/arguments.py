"""LLaMA-Factory's arguments, read from its source files, and the values a configuration gives them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dataflex.config import RunConfig

_LLAMAFACTORY_FILES = (
    "model_args.py",
    "data_args.py",
    "training_args.py",
    "finetuning_args.py",
    "generating_args.py",
)

_TRANSFORMERS_FILES = ("training_args.py", "training_args_seq2seq.py")


def number(config: RunConfig, key: str, default: float) -> float:
    """Return a numeric argument; one that is no number is LLaMA-Factory's to refuse."""
    value = config.llamafactory.get(key)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def truthy(config: RunConfig, key: str) -> bool:
    """Return whether an argument is given and not false, 0 or none, also where it is written as text."""
    value = config.llamafactory.get(key)
    return bool(value) and str(value).lower() not in ("false", "0", "0.0", "none", "no")


def dataset_names(config: RunConfig, key: str = "dataset") -> tuple[str, ...]:
    """Return the data sets named under ``key``, in order, each once."""
    value = config.llamafactory.get(key)
    parts = value.split(",") if isinstance(value, str) else list(value or [])
    return tuple(dict.fromkeys(str(part).strip() for part in parts if str(part).strip()))


@cache
def llamafactory_fields() -> dict[str, ast.expr]:
    """Return LLaMA-Factory's training arguments and their annotations, read from the installed packages' source."""
    fields: dict[str, ast.expr] = {}
    for package, subfolder, files in (
        ("transformers", "", _TRANSFORMERS_FILES),
        ("llamafactory", "hparams", _LLAMAFACTORY_FILES),
    ):
        folder = _package_folder(package)
        if folder is None:
            return {}
        for file in files:
            fields.update(_annotated_fields(folder / subfolder / file))
    return fields


def llamafactory_keys() -> frozenset[str]:
    """Return the names of LLaMA-Factory's training arguments."""
    return frozenset(llamafactory_fields())


@cache
def templates() -> frozenset[str]:
    """Return the names of LLaMA-Factory's templates."""
    folder = _package_folder("llamafactory")
    if folder is None:
        return frozenset()
    names = set()
    for node in ast.parse((folder / "data" / "template.py").read_text(encoding="utf-8")).body:
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register_template":
            given = [word.value for word in call.keywords if word.arg == "name"]
            names |= {str(value.value) for value in given if isinstance(value, ast.Constant)}
    return frozenset(names)


def _package_folder(package: str) -> Path | None:
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _annotated_fields(path: Path) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield item.target.id, item.annotation
