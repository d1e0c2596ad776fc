"""The examples: each is accepted, each registered method has one, and their table lists them all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import example_files
from dataflex.api import registry
from dataflex.cli import main
from dataflex.evaluation.tasks import load_task, read_settings
from example_files import EXAMPLES

YAMLS = example_files.of_ours(".yaml")
TASKS = "compare/tasks.yaml"
MADE_BY = {
    "select/rho_loss.yaml": "select/rho_loss_reference.yaml",
    "select/tracin.yaml": "select/tracin_checkpoints.yaml",
    "mix/doremi.yaml": "mix/doremi_reference.yaml",
    "weight/ss_token.yaml": "select/rho_loss_reference.yaml",
    "mix/moe_balance.yaml": "mix/make_experts.py",
    "vision/less.yaml": "vision/make_inputs.py",
    "offline/less_score.yaml": "offline/less_warmup.yaml",
    "offline/less_train.yaml": "offline/less_score.yaml",
}
"""Example -> the example that makes the files that the first one reads. Both top comment and README name it."""

registry.load_components([])
BUILT_IN = [
    (key, name)
    for key, family in registry.CONFIG_KEYS.items()
    for name, cls in registry.available(family).items()
    if cls.__module__.startswith("dataflex.")
]


@pytest.fixture(autouse=True)
def _no_plugins() -> Iterator[None]:
    with example_files.plugins_forgotten():
        yield


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of copies of the examples, with everything that earlier steps of them would make."""
    folder = tmp_path_factory.mktemp("examples")
    saves = folder / "saves"
    examples = example_files.copy(folder, saves)
    for name in ("select/rho_loss_reference", "mix/doremi_reference"):
        (saves / name).mkdir(parents=True)
        (saves / name / "adapter_config.json").write_text("{}")
    for run in ("select/tracin_checkpoints", "offline/less_warmup"):
        for step in (4, 8):
            _write_checkpoint(saves / run / f"checkpoint-{step}", step)
    selected = saves / "offline" / "less_score" / "scores" / "selected"
    selected.parent.mkdir(parents=True)
    selected.symlink_to(folder / "data")
    return examples


def _write_checkpoint(folder: Path, step: int) -> None:
    """Write the files of an adapter's checkpoint that checks look for."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        (folder / name).touch()
    log = [{"step": each, "learning_rate": 1e-4} for each in range(1, step + 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))


def content(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text())


def command(name: str) -> list[str]:
    """Return the command that checks an example without training."""
    keys = content(name)
    for key, workflow in (
        ("variants", "compare"),
        ("proxies", "regmix"),
        ("proxy", "doremi"),
        ("halves", "hard-pairs"),
    ):
        if key in keys:
            return [workflow, name, "--dry-run"]
    return ["check", name]


@pytest.mark.parametrize("name", [name for name in YAMLS if name != TASKS])
def test_every_example_is_accepted(name: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb, file, *options = command(name)
    status = main([verb, str(copied / file), *options])
    assert status == 0, capsys.readouterr().err


def test_the_task_file_is_accepted() -> None:
    (settings,) = read_settings([str(EXAMPLES / TASKS)])
    task, problems = load_task(settings)
    assert not problems
    assert task is not None


def test_every_registered_method_has_an_example() -> None:
    for key, name in BUILT_IN:
        methods = content(f"{key}/{name}.yaml")["dataflex"][key]
        assert methods["method"] == name


@pytest.mark.parametrize("name", YAMLS)
def test_every_example_begins_with_two_comment_lines(name: str) -> None:
    lines = (EXAMPLES / name).read_text().splitlines()
    assert re.fullmatch(r"# [A-Z].*\.", lines[0])
    assert re.match(r"# Takes about \d+ minutes? on two (CPU cores|GPUs)\.", lines[1])
    assert not lines[2].startswith("#")
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", YAMLS)
def test_runs_write_to_a_folder_with_the_name_of_their_file(name: str) -> None:
    if name != TASKS:
        assert content(name)["output_dir"] == f"saves/examples/{name.removesuffix('.yaml')}"


def test_examples_name_only_assets_and_files_of_the_examples() -> None:
    for name in YAMLS:
        keys = content(name)
        for base in (keys, keys.get("base", {})) if isinstance(keys, dict) else ():
            if not isinstance(base, dict) or "model_name_or_path" not in base:
                continue
            assert base["model_name_or_path"].startswith(("asset:", "saves/examples/")), name
            assert base["dataset_dir"].startswith(("asset:", "saves/examples/", "examples/")), name


def test_the_table_of_the_readme_lists_every_file_once() -> None:
    listed = re.findall(r"^\| \[`([^`]+)`\]\(([^)]+)\) \|", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert all(shown == target for shown, target in listed)
    scripts = [name for name in example_files.of_ours(".py") if name.startswith("any_trainer/")]
    assert sorted(shown for shown, _ in listed) == sorted([*YAMLS, *scripts])


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", (EXAMPLES / "README.md").read_text()):
        assert (EXAMPLES / target).exists(), target


def test_the_readme_and_the_comment_name_the_step_before() -> None:
    rows = {
        row.split("`")[1]: row for row in (EXAMPLES / "README.md").read_text().splitlines() if row.startswith("| [`")
    }
    for later, earlier in MADE_BY.items():
        name = Path(earlier).name
        assert name in (EXAMPLES / later).read_text().splitlines()[0], later
        assert name in rows[later] or name in rows[earlier], later


def test_the_data_file_has_the_columns_that_the_examples_name() -> None:
    rows = json.loads((EXAMPLES / "data" / "rated.json").read_text())
    assert {frozenset(row) for row in rows} == {
        frozenset({"instruction", "input", "output", "topic", "quality", "complexity", "difficulty", "weight"})
    }
    assert {row["topic"] for row in rows} == {"arithmetic", "python"}


def test_the_spans_of_the_data_file_are_the_answers() -> None:
    rows = json.loads((EXAMPLES / "data" / "reasoned.json").read_text())
    spans = [(row["messages"], span) for row in rows for span in row["spans"]]
    texts = [messages[span["message"]]["content"][span["begin"] : span["end"]] for messages, span in spans]
    assert texts == ["108", "0.9"]
