"""The recipes of examples/paper: they equal the tables, and ``check`` accepts each with tiny models and data."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from dataflex.api import registry
from dataflex.cli import main

FOLDER = Path(__file__).parents[2] / "examples" / "paper"
spec = importlib.util.spec_from_file_location("paper", FOLDER / "write.py")
assert spec is not None
assert spec.loader is not None
paper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper)
FILES = paper.files()
RECIPES = sorted(name for name in FILES if name.endswith(".yaml"))
DATA_SETS = ("openhermes", "mmlu_valid", *paper.DOMAINS, "prose")


def test_the_files_equal_those_written_from_the_tables() -> None:
    written = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {path.relative_to(FOLDER).as_posix(): path.read_text() for path in written} == FILES


def test_every_large_recipe_has_a_small_twin() -> None:
    large = {name for name in RECIPES if not name.endswith("_small.yaml")}
    assert {name.replace(".yaml", "_small.yaml") for name in large} == set(RECIPES) - large
    assert len(large) >= 7


@pytest.mark.parametrize(("key", "family"), [("select", "selector"), ("weight", "weighter")])
def test_every_method_has_a_variant_or_a_reason(key: str, family: str) -> None:
    registry.load_components([])
    ours = {name for name, cls in registry.available(family).items() if cls.__module__.startswith("dataflex.")}
    shown = set(paper.SELECTORS if key == "select" else paper.WEIGHTERS)
    assert shown | set(paper.LEFT_OUT[key]) == ours
    page = (FOLDER.parents[1] / "docs" / "paper.md").read_text()
    assert all(f"`{name}`" in page for name in paper.LEFT_OUT[key])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    tiny.make_model(folder / "model")
    names = [*DATA_SETS, "docs_to_code", "code_to_docs", "docs_to_code_val", "code_to_docs_val"]
    tiny.make_data(folder / "data", dict.fromkeys(names, 900))
    (folder / "ds.json").write_text((FOLDER / "ds_z3_config.json").read_text())
    return folder


def replaced(content: dict[str, Any], inputs: Path) -> dict[str, Any]:
    """Return the keys of a run with the model, the data and the machine of a test."""
    here = {"model_name_or_path": str(inputs / "model"), "dataset_dir": str(inputs / "data")}
    found = {**content, **here, "template": "default"}
    machine = {"deepspeed": str(inputs / "ds.json"), "flash_attn": "sdpa"}
    return found | {key: value for key, value in machine.items() if key in content}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_accepted(name: str, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(FILES[name])
    if "variants" in content:
        content |= {"base": replaced(content["base"], inputs), "output_dir": str(inputs / "out")}
        for variant in content["variants"].values():
            if "encoder" in (variant.get("dataflex.select") or {}):
                variant["dataflex.select"]["encoder"] = str(inputs / "model")
        command = ["compare", "--dry-run"]
    elif "proxy" in content:
        content |= {"base": replaced(content["base"], inputs), "output_dir": str(inputs / "doremi")}
        small = {"model_config": {"num_hidden_layers": 1}}
        content |= {"reference": small, "proxy": small}
        command = ["doremi", "--dry-run"]
    else:
        content = replaced(content, inputs) | {"output_dir": str(inputs / "run")}
        command = ["check"]
    path = inputs / name
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    status = main([command[0], str(path), *command[1:]])
    assert status == 0, capsys.readouterr()
