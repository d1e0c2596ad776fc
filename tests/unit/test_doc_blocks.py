"""The YAML blocks and the commands of the documentation are accepted."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from dataflex.cli import _parser
from dataflex.commands.llamafactory import is_passed_on
from dataflex.compare.merging import merged
from dataflex.compare.settings import ExperimentSettings
from dataflex.config.checks.keys import problems_of_keys
from dataflex.config.loading import split_config
from dataflex.errors import ConfigError
from dataflex.evaluation.tasks import TaskSettings
from dataflex.workflows.doremi import DoremiSettings
from dataflex.workflows.hard_pairs import HardPairsSettings
from dataflex.workflows.regmix import RegmixSettings
from example_files import plugins_forgotten

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md"))
)

NOT_A_FILE = {
    ("docs/tutorials/8-from-the-earlier-release.md", "# components.yaml"): "the flat keys of the page are read with it",
    ("docs/mixing.md", "reference: {max_steps: 2000, model_config:"): "two keys of the file for doremi above it",
}
"""Page and beginning of a YAML block -> why no loader of a whole file reads the block."""

PLACEHOLDERS = {"...": "", "RUN...": "", "I": "1", "N": "2", "R": "1"}
"""Word of a command -> the word that a user would write."""


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in a language; without a language ``""``."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def yaml_blocks() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in blocks(page, "yaml"):
            yield page, block


@pytest.fixture
def plugins(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with the plug-in files that the pages show."""
    for path in (ROOT / "tests" / "plugins").glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    for page in PAGES:
        for block in blocks(page, "python"):
            if named := re.match(r"# (\w+\.py)\n", block):
                (tmp_path / named[1]).write_text(block)
    with plugins_forgotten():
        yield tmp_path


def read(content: Any, folder: Path) -> None:
    """Have the loader of a block's kind of file read it; raises an error if it refuses."""
    keys = set(content) if isinstance(content, dict) else set()
    if isinstance(content, list):
        TypeAdapter(list[TaskSettings]).validate_python([_named(entry) for entry in content])
    elif "variants" in keys:
        for change in ExperimentSettings.model_validate(content).variants.values():
            split_config(merged({}, change), base=folder)
    elif "proxies" in keys:
        RegmixSettings.model_validate(content)
    elif "halves" in keys:
        HardPairsSettings.model_validate(content)
    elif "proxy" in keys:
        DoremiSettings.model_validate(content)
    else:
        assert keys, "the block holds no mapping"
        assert not list(problems_of_keys(split_config(content, base=folder)))


def _named(entry: dict[str, Any]) -> dict[str, Any]:
    return {"name": entry.get("task") or Path(entry["file"]).stem, **entry}


def whole_files() -> list[Any]:
    """Return the blocks that are files or parts of a run's file, as parameters of a test."""
    found = [
        (page, block)
        for page, block in yaml_blocks()
        if not any(of == page and block.startswith(begin) for of, begin in NOT_A_FILE)
    ]
    return [pytest.param(*each, id=f"{each[0]}-{number}") for number, each in enumerate(found)]


@pytest.mark.parametrize(("page", "block"), whole_files())
def test_every_yaml_block_is_accepted(page: str, block: str, plugins: Path) -> None:
    for each in blocks(page, "yaml"):
        if named := re.match(r"# ([\w.-]+\.yaml)\n", each):
            (plugins / named[1]).write_text(each)
    content = yaml.safe_load(block)
    if "components_cfg_file" in content and not (plugins / content["components_cfg_file"]).exists():
        del content["components_cfg_file"]  # the page does not show the file
    read(content, plugins)


@pytest.mark.parametrize(
    "content",
    [
        {"dataflex": {"select": {"method": "los"}}},
        {"dataflex": {"selct": {"method": "loss"}}},
        {"selct": {"method": "loss"}},
        {"base": "run.yaml", "output_dir": "saves", "variants": {"a": {}}, "baseline": "a"},
        {
            "base": "run.yaml",
            "output_dir": "saves",
            "variants": {"a": {}, "b": {"dataflex.select": {"method": "los"}}},
            "baseline": "a",
            "seeds": [1],
            "equal": {"steps": 8},
        },
        {"base": "run.yaml", "output_dir": "saves", "proxy": {}, "finl": {}},
        [{"file": "questions.jsonl", "choice": "text"}],
    ],
)
def test_a_block_with_a_mistake_is_refused(content: Any, plugins: Path) -> None:
    with pytest.raises((ConfigError, ValidationError, AssertionError)):
        read(content, plugins)


def test_every_listed_exception_names_an_existing_block() -> None:
    found = list(yaml_blocks())
    for page, begin in NOT_A_FILE:
        assert any(of == page and block.startswith(begin) for of, block in found), (page, begin)


def commands(page: str) -> Iterator[str]:
    """Yield the ``dataflex-cli`` commands of a page.

    They are lines of the fenced blocks that are a shell's or have no language, indented lines, and code in tables that
    has arguments: a table that says ``dataflex-cli score`` alone names the command.
    """
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [line for line in prose.splitlines() if line.startswith("    ")]
    cells = [cell for line in prose.splitlines() if line.startswith("|") for cell in re.findall(r"`([^`]*)`", line)]
    for line in (*lines, *(cell for cell in cells if re.search(r"dataflex-cli \w+ ", cell))):
        if match := re.fullmatch(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(dataflex-cli(?: .*)?)", line.strip()):
            yield match[1]


SHELL = ("|", ">", ">>", "&&", "&", ";")
"""Words of a shell that end the arguments of a command."""

OPTIONAL = re.compile(r"(?<!\S)\[((?:[^\[\]]|\[[^\[\]]*\])*)\](?!\S)")
"""A part in brackets, as usage lines have it, with up to one level of brackets in it."""


def written_out(usage: str) -> list[list[str]]:
    """Return the words of a command; of a usage line, ``[--a | --b N] [--c]``, those of all combinations."""
    command = re.split(r"\s#", usage)[0]
    optional = OPTIONAL.search(command)
    if optional is None:
        words = list(takewhile(lambda word: word not in SHELL, shlex.split(command)[1:]))
        return [[PLACEHOLDERS.get(word, word) for word in words if PLACEHOLDERS.get(word) != ""]]
    before, after = command[: optional.start()], command[optional.end() :]
    choices = ["", *re.split(r"\s\|\s(?![^\[]*\])", optional[1])]
    return [words for choice in choices for words in written_out(f"{before}{choice}{after}")]


def all_commands() -> list[tuple[str, str]]:
    return [(page, command) for page in PAGES for command in dict.fromkeys(commands(page))]


@pytest.mark.parametrize(("page", "command"), all_commands())
def test_every_command_parses(page: str, command: str) -> None:
    for words in written_out(command):
        if is_passed_on(words):
            assert words[1].startswith("--") or all("=" in word for word in words[2:]), words
            continue
        options, further = _parser().parse_known_args(words)  # it exits with an error if the command is wrong
        assert not [word for word in further if word.startswith("-")], words
        assert not further or options.overrides is not None, words
        assert all("=" in word for word in (*(options.overrides or ()), *further)), words


def test_the_optional_parts_of_a_usage_line_are_expanded() -> None:
    found = written_out("dataflex-cli explain RUN [--index I ... | --top N [--round R]] [--json]  # a comment")
    assert found == [
        ["explain", "RUN"],
        ["explain", "RUN", "--json"],
        ["explain", "RUN", "--index", "1"],
        ["explain", "RUN", "--index", "1", "--json"],
        ["explain", "RUN", "--top", "2"],
        ["explain", "RUN", "--top", "2", "--json"],
        ["explain", "RUN", "--top", "2", "--round", "1"],
        ["explain", "RUN", "--top", "2", "--round", "1", "--json"],
    ]


def test_enough_blocks_and_commands_are_found() -> None:
    assert len(list(yaml_blocks())) > 70
    assert len(all_commands()) > 100
    assert {command.split()[1] for _, command in all_commands()} >= _verbs()


def _verbs() -> set[str]:
    """Return the commands that a reader must find somewhere; ``version`` and ``list`` are in running text."""
    (choices,) = (each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction))
    return set(choices.choices) - {"version", "list", "assets"}


def test_files_named_in_commands_of_the_examples_exist() -> None:
    named = {
        word
        for _, command in all_commands()
        for word in re.findall(r"(?<![\w/])examples/[\w./-]+\.(?:yaml|py)", command)
    }
    assert len(named) > 60
    assert not [name for name in named if not (ROOT / name).is_file()]
