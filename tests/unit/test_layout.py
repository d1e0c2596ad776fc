"""The layout of the package: few modules in its root, imports in one direction, functions of a readable size."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/dataflex"

MODULES = 6
"""Modules in the root of the package, at most; ``__init__`` and ``__main__`` are two of them."""

LINES = 60
PARAMETERS = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_in(source: str) -> Iterator[Function]:
    """Return the functions of a module but Triton's kernels, which are given numbers and pointers one by one."""
    found = (each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
    return (each for each in found if not any("triton.jit" in ast.unparse(mark) for mark in each.decorator_list))


def lines_of(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def parameters_of(function: Function) -> int:
    """Count the parameters, ``*args`` and ``**kwargs`` among them, but neither ``self`` nor ``cls``."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args)]
    own = len(names) - (names[:1] in (["self"], ["cls"]))
    return own + len(given.kwonlyargs) + (given.vararg is not None) + (given.kwarg is not None)


def test_lines_and_parameters_are_counted() -> None:
    source = "class A:\n    @f\n    def a(self, b, /, c, *d, e=1, **f):\n        return (\n            b\n        )\n"
    [function] = functions_in(source)
    assert (lines_of(function), parameters_of(function)) == (4, 5)
    assert not list(functions_in("@triton.jit(do_not_specialize=[1])\ndef a(b): pass"))
    [function] = functions_in("async def a(b, self): pass")
    assert (lines_of(function), parameters_of(function)) == (1, 2)


def test_the_root_of_the_package_has_few_modules() -> None:
    modules = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(modules) <= MODULES, modules


def test_functions_are_short_and_take_few_arguments() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {each.name}": (lines_of(each), parameters_of(each))
        for path in PACKAGE.rglob("*.py")
        for each in functions_in(path.read_text())
    }
    assert len(found) > 1000  # all of the package was read
    beyond = {name: sizes for name, sizes in found.items() if sizes[0] > LINES or sizes[1] > PARAMETERS}
    assert not beyond, beyond


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_nothing_is_described_twice() -> None:
    bodies = [
        (path, node.body)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | Function)
    ]
    twice = [
        f"{path}:{second.lineno}"
        for path, body in bodies
        for first, second in pairwise(body)
        if is_text(first) and is_text(second)
    ]
    assert not twice, twice


def test_imports_go_in_one_direction() -> None:
    # In a process of its own: import-linter configures logging, which would silence the loggers of other tests.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    command = [sys.executable, "-c", code, str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
