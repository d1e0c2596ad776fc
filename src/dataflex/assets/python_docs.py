"""Build of instruction data from the Python packages installed on this machine: real text that needs no download.

There are three domains. Each is a LLaMA-Factory data set in alpaca format with a separate held-out set:

- ``docs_to_code``: a function's signature and docstring. The answer is the function's source.
- ``code_to_docs``: a function's source. The answer is the function's docstring.
- ``prose``: the beginning of a paragraph of a README or of a module's or class's docstring. The answer is the rest.

The held-out sets come from other packages than the training sets. Half of the training rows are useless on purpose:
half of these have the answer of another row, and the other half have their own answer with its words in random order.
The column ``useless`` marks these rows (LLaMA-Factory does not read it), and ``useless.json`` lists their row numbers.

The same installed packages give the same files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dataflex.errors import ConfigError
from dataflex.files import json_text

SEED = 20240
TRAIN_ROWS = 500
HELD_OUT_ROWS = 32
USELESS_SHARE = 0.5
BLOCK = 20

FILES_PER_PACKAGE = 32
ROWS_PER_PACKAGE = 32
"""Most rows of a package in a domain, so that a few large packages do not supply all rows."""

FILE_BYTES = (400, 60_000)
DOC_CHARS = (60, 180)
CODE_CHARS = (90, 270)
PARAGRAPH_CHARS = (140, 460)

SKIPPED_PACKAGES = {"dataflex"}
SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "vendor", "vendored", "third_party", "extern", "_pytest"}

ABOUT = """# python-docs

Made by DataFlex from the documentation and the source of the Python packages installed on this machine, for use on
this machine: the texts keep the licences of their packages (column `package`). Half of the training rows are useless
on purpose (column `useless`, and `useless.json`): their answer belongs to another row, or has its words scrambled.
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Row:
    """Sample in alpaca format, with the package it comes from and the way in which it is made useless, if it is."""

    instruction: str
    input: str
    output: str
    package: str
    useless: Literal["", "swapped", "scrambled"] = ""


@dataclass(frozen=True)
class Documented:
    """Documented function of a package: its signature, its source without the docstring, and its docstring."""

    package: str
    module: str
    signature: str
    code: str
    doc: str


def build(target: Path) -> None:
    """Write the data sets, ``dataset_info.json`` and ``useless.json`` into ``target``.

    Raises:
        ConfigError: If the installed packages do not have enough documentation.
    """
    pools: dict[str, list[Row]] = {"docs_to_code": [], "code_to_docs": [], "prose": []}
    for package in _packages():
        sources = list(_sources(package))
        functions = [item for source in sources for item in _functions(source)]
        # Each function is used in one direction only. Otherwise one domain would contain the answers of the other.
        pools["docs_to_code"] += [_docs_to_code(item) for item in functions if _key(item.code) % 2]
        pools["code_to_docs"] += [_code_to_docs(item) for item in functions if not _key(item.code) % 2]
        docstrings = (doc for source in sources for doc in _long_docstrings(source))
        pools["prose"] += list(_prose(package, [_description(package), *docstrings]))
    useless: dict[str, list[int]] = {}
    info: dict[str, dict[str, str]] = {}
    for number, (domain, pool) in enumerate(pools.items()):
        rng = np.random.default_rng([SEED, number])
        train, held_out = _split(domain, pool, rng)
        train = _spoil(train, rng)
        useless[domain] = [index for index, row in enumerate(train) if row.useless]
        for name, rows in ((domain, train), (f"{domain}_val", held_out)):
            _write_json(target / f"{name}.json", [vars(row) for row in rows])
            info[name] = {"file_name": f"{name}.json"}
    _write_json(target / "dataset_info.json", info)
    _write_json(target / "useless.json", useless)
    (target / "README.md").write_text(ABOUT, encoding="utf-8")


def _packages() -> list[importlib.metadata.Distribution]:
    """Return the installed distributions, one for each name, sorted by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for package in importlib.metadata.distributions():
        found.setdefault(_name(package), package)
    return [found[name] for name in sorted(found) if name not in SKIPPED_PACKAGES]


def _name(package: importlib.metadata.Distribution) -> str:
    """Return the normalised name of a distribution."""
    return re.sub(r"[-_.]+", "-", package.metadata["Name"] or "unnamed").lower()


def _key(text: str) -> int:
    """Return an integer that depends only on ``text``; Python's own hash differs between processes."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


@dataclass(frozen=True)
class Source:
    """Source file with its package, module name, text and syntax tree."""

    package: str
    module: str
    text: str
    tree: ast.Module


def _sources(package: importlib.metadata.Distribution) -> Iterator[Source]:
    """Yield a part of the package's source files. The choice depends only on their paths."""
    paths = [
        path
        for path in package.files or []
        if path.suffix == ".py" and not path.name.startswith("test_") and not SKIPPED_FOLDERS & set(path.parts)
    ]
    chosen = sorted(paths, key=lambda path: _key(path.as_posix()))[:FILES_PER_PACKAGE]
    for path in sorted(chosen, key=lambda path: path.as_posix()):
        if read := _read(Path(str(package.locate_file(path)))):
            module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            yield Source(_name(package), module, *read)


def _read(path: Path) -> tuple[str, ast.Module] | None:
    """Return text and syntax tree of a source file; None if it is too short, too long or cannot be parsed."""
    try:
        if not FILE_BYTES[0] <= path.stat().st_size <= FILE_BYTES[1]:
            return None
        text = path.read_text(encoding="utf-8")
        return text, ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None


def _functions(source: Source) -> Iterator[Documented]:
    """Yield the short functions and methods of a source file that have a docstring."""
    lines = source.text.splitlines()
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (found := _documented(node, lines, source)):
            yield found


def _long_docstrings(source: Source) -> Iterator[str]:
    """Yield the docstrings of a source file's module and classes."""
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.Module, ast.ClassDef)) and (doc := ast.get_docstring(node)):
            yield doc


def _documented(node: Function, lines: list[str], source: Source) -> Documented | None:
    """Return the parts of a function; None if its docstring or its source is missing, too short or too long."""
    doc = (ast.get_docstring(node) or "").strip()
    if len(doc) > DOC_CHARS[1]:
        doc = doc.split("\n\n")[0].strip()
    if not _fits(doc, DOC_CHARS) or len(node.body) < 2:
        return None
    first, last = node.body[0], node.body[-1]
    if first.lineno == node.lineno or last.end_lineno is None or first.end_lineno is None:
        return None
    signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : first.lineno - 1])).rstrip()
    code_lines = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : last.end_lineno]
    code = textwrap.dedent("\n".join(line.rstrip() for line in code_lines if line.strip())).strip()
    if not _fits(code, CODE_CHARS) or not code.startswith(("def ", "async def ")):
        return None
    return Documented(source.package, source.module, signature, code, doc)


def _fits(text: str, limits: tuple[int, int]) -> bool:
    """Return whether the length of ``text`` is within ``limits`` and nearly all characters are ASCII."""
    return limits[0] <= len(text) <= limits[1] and sum(char > "\x7f" for char in text) < len(text) // 20


def _docs_to_code(item: Documented) -> Row:
    """Return a sample with the docstring as the prompt and the source as the answer."""
    prompt = f"# {item.module}\n{item.signature}\n" + textwrap.indent(f'"""{item.doc}"""', "    ")
    return Row("Write this Python function.", prompt, item.code, item.package)


def _code_to_docs(item: Documented) -> Row:
    """Return a sample with the source as the prompt and the docstring as the answer."""
    return Row("Write the docstring of this Python function.", f"# {item.module}\n{item.code}", item.doc, item.package)


def _prose(package: importlib.metadata.Distribution, texts: Iterable[str]) -> Iterator[Row]:
    """Yield a sample for each prose paragraph in ``texts``, divided at the end of a sentence or of a word."""
    name = package.metadata["Name"]
    for paragraph in (paragraph for text in texts for paragraph in _paragraphs(text)):
        beginning, rest = _cut(paragraph)
        if len(beginning) >= 50 and len(rest) >= 70:
            instruction = f"Continue this paragraph from the documentation of the Python package {name}."
            yield Row(instruction, beginning, rest, _name(package))


def _description(package: importlib.metadata.Distribution) -> str:
    """Return the README in the metadata of a distribution; empty if there is none."""
    return package.metadata["Description"] or "" if "Description" in package.metadata else ""


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of ``text`` that are prose, without code, tables, lists, badges and links."""
    for block in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", text.replace("\r\n", "\n"), flags=re.DOTALL)):
        if block.startswith((" ", "\t", "#", "|", "..", "<", "*", "-", "+", ">", "[", "!")) or "http" in block:
            continue
        paragraph = " ".join(block.split())
        letters = sum(char.isalpha() or char == " " for char in paragraph)
        if _fits(paragraph, PARAGRAPH_CHARS) and letters > 0.88 * len(paragraph):
            yield paragraph


def _cut(paragraph: str) -> tuple[str, str]:
    """Divide a paragraph at the end of a sentence near 40 % of its length, or else at the nearest end of a word."""
    wanted = 0.4 * len(paragraph)
    # The last 60 characters are not searched, so that enough of the paragraph remains as the answer.
    sentences = [match.end() for match in re.finditer(r"[.:;!?] ", paragraph[:-60])]
    words = [match.end() for match in re.finditer(" ", paragraph)]
    near = [place for place in sentences if abs(place - wanted) < 0.2 * len(paragraph)] or words
    place = min(near, key=lambda end: abs(end - wanted))
    return paragraph[:place].strip(), paragraph[place:].strip()


def _split(domain: str, pool: list[Row], rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
    """Return shuffled training rows and held-out rows from different packages, without repeated inputs or answers."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for index in rng.permutation(len(pool)):
        row = pool[index]
        texts = {_normal(row.input), _normal(row.output)}
        if counts[row.package] >= ROWS_PER_PACKAGE or texts & seen:
            continue
        seen |= texts
        counts[row.package] += 1
        # Divided by package, so that no text of a held-out package is trained on.
        sides[_key(row.package) % 6 == 0].append(row)
    train, held_out = sides[0][:TRAIN_ROWS], sides[1][:HELD_OUT_ROWS]
    if min(len(train), len(held_out)) < 20:
        raise ConfigError(
            f"the installed packages have too little documentation for the data set {domain!r} of asset:python-docs; "
            "install more Python packages, or use your own data (dataset_dir)"
        )
    return train, held_out


def _normal(text: str) -> str:
    """Return ``text`` in lower case without punctuation and extra spaces, so that near copies compare equal."""
    return re.sub(r"\W+", " ", text).lower()


def _spoil(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """Return the rows with a share of them made useless.

    Half of the useless rows get the answer of another one of them. The others get the words of their answer in random
    order. The useless rows are spread evenly, so that the first N rows contain the same share of them as all rows.
    """
    blocks = [np.arange(start, min(start + BLOCK, len(rows))) for start in range(0, len(rows), BLOCK)]
    chosen = [rng.permutation(block)[: round(USELESS_SHARE * len(block))] for block in blocks]
    swapped = np.concatenate([part[::2] for part in chosen])
    scrambled = np.concatenate([part[1::2] for part in chosen])
    spoilt = list(rows)
    cycle = rng.permutation(swapped)
    for index, other in zip(cycle, np.roll(cycle, 1), strict=True):
        spoilt[index] = replace(rows[index], output=rows[other].output, useless="swapped")
    for index in scrambled:
        words = rows[index].output.split()
        output = " ".join(words[place] for place in rng.permutation(len(words)))
        spoilt[index] = replace(rows[index], output=output, useless="scrambled")
    return spoilt


def _write_json(path: Path, content: object) -> None:
    """Write ``content`` as readable JSON."""
    path.write_text(json_text(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
