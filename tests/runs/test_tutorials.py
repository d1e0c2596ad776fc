"""The pages of ``docs/tutorials`` run as they are written, on a tiny model and tiny data instead of the assets.

All commands of all pages run one after another in one process, in one folder, by the command line's own function. A
page is read by these rules:

- A ``yaml``, ``python`` or ``json`` block that names its file is written to that file: in its first line
  (``# NAME.yaml``), or in the text before it (``NAME.json`` in backquotes). A YAML that names plugins is a ``yml``
  block: the test of all examples in ``tests/unit/config`` reads ``yaml`` alone and does not have the plugins.
- Another ``yaml`` block is merged into the first training file of the page, or of page 1, and checked.
- Another ``python`` block is executed.
- A ``sh`` block is run line by line. A training of several processes runs as one process with the same global batch
  size, or is only checked, because other tests start several processes. Of commands that start a process for each run
  (``compare``, ``doremi``), the plan is made.
- A ``text`` block must be in the output of the commands before it. Each of its lines is compared up to its first digit.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from records import round_lines

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("[0-9]*.md"))
BLOCK = re.compile(
    r"(?:`(?P<json>[\w.]+\.json)`[^\n]*\n\n(?=```json))?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
SETTING_UP = {"pip", "git", "cd", "make"}
"""Programs of a page that prepare a machine and are not run."""

RUN_ALL = """
import contextlib, io, json, os, sys, traceback
os.environ["LLAMAFACTORY_VERBOSITY"] = "WARN"
from dataflex import cli
results = []
for item in json.load(open(sys.argv[1])):
    both = io.StringIO()
    before = dict(os.environ)
    os.environ.update(item["environment"])
    with contextlib.redirect_stdout(both), contextlib.redirect_stderr(both):
        try:
            if "code" in item:
                status = exec(item["code"], {"__name__": "tutorial"}) or 0
            else:
                status = cli.main(item["arguments"])
        except BaseException:
            status = traceback.format_exc()
    os.environ.clear()
    os.environ.update(before)
    results.append([status, both.getvalue()])
json.dump(results, open(sys.argv[2], "w"))
"""


@dataclass
class Item:
    """One thing that a page says, to be run.

    Attributes:
        page: name of the page.
        said: the command or code as it stands on the page.
        arguments: of ``dataflex-cli``; empty if code is executed.
        code: to execute.
        environment: variables set before the command.
        as_said: whether exactly the command of the page is run, so that its output can be compared.
        refused: whether the page shows the command's error.
    """

    page: str
    said: str
    arguments: list[str] = field(default_factory=list)
    code: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    as_said: bool = True
    refused: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the item for the process that runs all."""
        what: dict[str, Any] = {"code": self.code} if self.code else {"arguments": self.arguments}
        return what | {"environment": self.environment}


@dataclass
class Tutorials:
    """What all pages say, and what running it gave.

    Attributes:
        folder: the working folder of the pages.
        items: in the order of the pages.
        expected: pairs of the items before an output, and the output as the page shows it.
        suites: test files that a page runs with pytest.
        results: exit status and output of each item.
    """

    folder: Path
    items: list[Item] = field(default_factory=list)
    expected: list[tuple[list[int], str]] = field(default_factory=list)
    suites: list[str] = field(default_factory=list)
    results: list[tuple[Any, str]] = field(default_factory=list)

    def tiny_version(self, text: str) -> str:
        """Return the text of a YAML with the tiny model and data instead of the assets."""
        text = text.replace("asset:smollm2-135m-instruct", str(self.folder / "inputs" / "model"))
        text = text.replace("asset:python-docs", str(self.folder / "inputs" / "data"))
        return text.replace("template: smollm2", "template: default")

    def read(self, page: Path) -> None:
        """Take everything from a page: files, commands, code and outputs."""
        base = "run.yaml"
        named, latest = False, list[int]()
        for number, block in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8"))):
            kind, body = block["kind"], block["body"]
            name = block["json"] or (m[1] if (m := re.match(r"# (\w[\w.-]*\.(?:yaml|py))\n", body)) else None)
            if kind in ("yaml", "yml"):
                content = self.tiny_version(body)
                loaded = yaml.safe_load(content)
                if name is None:
                    self._check_part(page.stem, number, base, loaded)
                    continue
                (self.folder / name).write_text(content)
                if "dataset" in loaded and not named:
                    base, named = name, True
            elif kind in ("python", "json") and name is not None:
                (self.folder / name).write_text(body)
            elif kind == "python":
                self.items.append(Item(page.stem, body, code=body))
                latest = [len(self.items) - 1]
            elif kind == "sh":
                latest = self._commands(page.stem, body)
            elif kind == "text":
                self.expected.append((latest, body))
            else:
                assert kind in ("", "json"), f"{page.name}: a block of an unknown kind: {kind}"

    def _check_part(self, page: str, number: int, base: str, part: dict[str, Any]) -> None:
        """Add a check of a part of a YAML, merged into a whole one."""
        whole = yaml.safe_load((self.folder / base).read_text())
        name = f"part-{page}-{number}"
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({**whole, **part, "output_dir": f"saves/{name}"}))
        self.items.append(Item(page, yaml.safe_dump(part), ["check", f"{name}.yaml"]))

    def _commands(self, page: str, body: str) -> list[int]:
        """Add the commands of a block; return their numbers among the items."""
        begin = len(self.items)
        for line in body.splitlines():
            words = shlex.split(line, comments=True)
            environment = {}
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                key, _, value = words.pop(0).partition("=")
                environment[key] = value
            if not words or words[0] in SETTING_UP:
                continue
            program, *arguments = words
            if program == "pytest":
                self.suites += arguments
                continue
            assert program == "dataflex-cli", f"{page}: a program that is not known: {line}"
            item = Item(page, line, arguments, environment=environment)
            if arguments[0] == "train" and environment:
                item.arguments, item.environment = self._one_process(arguments, environment)
                item.as_said = False
            elif arguments[0] in ("compare", "doremi", "regmix") and "--dry-run" not in arguments:
                item.arguments, item.as_said = [*arguments, "--dry-run"], False
            self.items.append(item)
        return list(range(begin, len(self.items)))

    def _one_process(self, arguments: list[str], environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """Return a training of several processes as one of one process with the same global batch size.

        One of several machines, or under DeepSpeed, is checked instead.
        """
        if "NNODES" in environment or any("deepspeed" in argument for argument in arguments):
            given = any(argument.startswith("output_dir=") for argument in arguments)
            folder = [] if given else [f"output_dir=saves/checked-{len(self.items)}"]
            return ["check", *arguments[1:], *folder], environment
        return [*arguments, f"gradient_accumulation_steps={environment['NPROC_PER_NODE']}"], {}

    def run(self) -> None:
        """Run everything in one process."""
        for before, text in self.expected:
            for number in before if text.startswith("dataflex: run.yaml:") else ():
                self.items[number].refused = True
        spec, result, script = (self.folder / "inputs" / name for name in ("in.json", "out.json", "run_all.py"))
        spec.write_text(json.dumps([item.as_json() for item in self.items]))
        script.write_text(RUN_ALL)
        done = subprocess.run(
            [sys.executable, str(script), str(spec), str(result)],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu", "COLUMNS": "120"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        self.results = [tuple(each) for each in json.loads(result.read_text())]


@pytest.fixture(scope="module")
def tutorials(tmp_path_factory: pytest.TempPathFactory) -> Tutorials:
    folder = tmp_path_factory.mktemp("tutorials")
    tiny.make_model(folder / "inputs" / "model")
    sets = ("docs_to_code", "code_to_docs", "prose")
    tiny.make_data(folder / "inputs" / "data", {f"{name}{end}": 48 for name in sets for end in ("", "_val")})
    found = Tutorials(folder)
    for page in PAGES:
        found.read(page)
    found.run()
    return found


def test_the_index_names_every_page() -> None:
    text = (ROOT / "docs" / "tutorials" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d-[\w-]+\.md)\)", text)[: len(PAGES)] == [page.name for page in PAGES]


@pytest.mark.parametrize("page", [page.stem for page in PAGES])
def test_what_a_page_says_runs(tutorials: Tutorials, page: str) -> None:
    for item, (status, output) in zip(tutorials.items, tutorials.results, strict=True):
        if item.page == page:
            assert status == (2 if item.refused else 0), f"{item.said}\n{status}\n{output[-4000:]}"


def test_the_outputs_on_the_pages_are_those_of_the_commands(tutorials: Tutorials) -> None:
    compared, missing = 0, []
    for before, text in tutorials.expected:
        shown = [number for number in before if tutorials.items[number].as_said]
        if not shown:
            continue
        output = squeezed("\n".join(tutorials.results[number][1] for number in shown))
        for line in text.splitlines():
            start = squeezed(re.split(r"\d|\.\.\.|\|", line)[0])
            compared += len(start) > 0
            if start not in output:
                missing.append(f"{tutorials.items[shown[0]].page}: {line}")
    assert not missing, "\n".join(["lines that no command printed:", *missing])
    assert compared > 50


def squeezed(text: str) -> str:
    """Return a text with every stretch of white space as one space."""
    return " ".join(text.split())


def test_the_tests_on_the_pages_pass(tutorials: Tutorials) -> None:
    assert tutorials.suites
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tutorials.suites],
        cwd=tutorials.folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("first", "second"), [("old", "new"), ("mine", "mine-resumed"), ("several", "onward")])
def test_runs_that_a_page_calls_equal_have_equal_plans(tutorials: Tutorials, first: str, second: str) -> None:
    plans = [
        [line["plan_sha256"] for line in round_lines(tutorials.folder / "saves" / name)] for name in (first, second)
    ]
    assert plans[0] == plans[1]
    assert len(plans[0]) >= 3
