"""The files around the package agree with it: version, image and workflow."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import dataflex

ROOT = Path(__file__).parents[2]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_version_is_the_same_everywhere() -> None:
    releases = re.findall(
        r"^## \[(\d[\d.]*)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    citation = read("CITATION.cff")
    assert releases[0] == (dataflex.__version__, str(citation["date-released"]))
    assert citation["version"] == dataflex.__version__


def test_every_file_that_the_image_copies_exists() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert copied
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / name).exists() for name in copied)
    assert 'ENTRYPOINT ["dataflex-cli"]' in lines


def test_the_workflow_runs_the_commands_of_the_makefile_on_the_versions_of_the_package() -> None:
    job = read(".github/workflows/test.yml")["jobs"]["test"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = {each.rpartition(" ")[2] for each in classifiers if re.search(r":: 3\.\d+$", each)}
    assert set(job["strategy"]["matrix"]["python"]) == named
    commands = [step["run"].split()[:2] for step in job["steps"] if "run" in step]
    assert commands == [["make", "test"], ["make", "docs"]]


@pytest.mark.parametrize("name", ["bug", "feature", "method"])
def test_the_issue_forms_ask_questions(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form.keys() >= {"name", "description", "body"}
    asked = [each["id"] for each in form["body"] if each["type"] != "markdown"]
    assert len(asked) == len(set(asked)) > 0
