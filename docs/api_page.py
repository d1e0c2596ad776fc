"""Writes ``docs/api.md`` from the docstrings and signatures of all names that ``dataflex`` exports: ``make docs``."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import dataflex

PAGE = Path(__file__).with_name("api.md")

HEAD = """# Python API

<!-- `make docs` writes this page from the docstrings. Edit the docstrings instead. -->

Every name on this page is imported from `dataflex`. A component of your own needs no other module, and the built-in
methods use no other. The [README](../README.md#a-component-of-your-own) shows how a component is written, and
[methods](methods/README.md#what-a-component-of-your-own-may-say-about-a-run) lists the methods that it may define.
"""

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign


def page() -> str:
    """Return the text of the page."""
    found = {name: _definition(module, name) for name, module in sorted(dataflex.EXPORTS.items())}
    kinds: dict[str, list[str]] = {"Classes": [], "Functions": [], "Values and types": []}
    for name, (node, text) in found.items():
        if isinstance(node, ast.ClassDef):
            kinds["Classes"].append(_of_class(node))
        elif isinstance(node, ast.FunctionDef):
            kinds["Functions"].append(f"### `{name}{_signature(node)}`\n\n{_doc(node)}\n")
        else:
            kinds["Values and types"].append(f"### `{ast.unparse(node)}`\n\n{text}\n")
    text = "\n".join([HEAD, *(f"## {kind}\n\n" + "\n".join(texts) for kind, texts in kinds.items())])
    return re.sub(r":(?:attr|class|data|func|meth):`~?([^`]+)`", r"`\1`", text)  # Markdown has no roles


def _definition(module: str, name: str) -> tuple[Definition, str]:
    """Return the definition of a name in a module, and the docstring that follows an assignment."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    for node, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, ""
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(_is(target, name) for target in targets):
            return node, _text(after)
    raise LookupError(f"{module} does not define {name}")


def _is(target: ast.AST | None, name: str) -> bool:
    return isinstance(target, ast.Name) and target.id == name


def _text(node: ast.AST) -> str:
    """Return the text of a string literal that documents the assignment before it, or an empty text."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def _doc(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return a docstring. Its sections and examples become a code block, which keeps their line ends."""
    lines = (ast.get_docstring(node) or "").splitlines()
    titles = ("Args:", "Raises:", "Attributes:", "Example:", "Returns:", "Yields:")
    begin = next((number for number, line in enumerate(lines) if line in titles), len(lines))
    text, rest = "\n".join(lines[:begin]).strip(), "\n".join(lines[begin:]).strip()
    return f"{text}\n\n```text\n{rest}\n```" if rest else text


def _signature(node: ast.FunctionDef) -> str:
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"({ast.unparse(node.args)}){returns}"


def _of_class(node: ast.ClassDef) -> str:
    """Return the text of a class: its docstring, its fields with their docstrings, and its methods."""
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    parts = [f"### `{node.name}{f'({bases})' if bases else ''}`\n\n{_doc(node)}\n"]
    for member, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if isinstance(member, ast.AnnAssign) and not ast.unparse(member.target).startswith("_"):
            said = _text(after)
            parts.append(f"- `{ast.unparse(member)}`{f': {said}' if said else ''}")
        elif isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
            is_property = any("property" in ast.unparse(each) for each in member.decorator_list)
            shown = member.name if is_property else f"{member.name}{_signature(member)}"
            parts.append(f"- `{shown}`: {' '.join((ast.get_docstring(member) or '').split(chr(10) * 2)[0].split())}")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
