"""The recipes of examples/paper: they equal the tables, and ``check`` accepts each with tiny models and data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from dataflex.api import registry
from dataflex.cli import main
from dataflex.compare.experiment import samples_per_step

FOLDER = Path(__file__).parents[2] / "examples" / "paper"
spec = importlib.util.spec_from_file_location("paper", FOLDER / "write.py")
assert spec is not None
assert spec.loader is not None
paper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper)
FILES = paper.files()
RECIPES = sorted(name for name in FILES if name.endswith(".yaml"))
DATA_SETS = ("openhermes", "mmlu_valid", *paper.DOMAINS, *paper.SMALL_DOMAINS)


def test_the_files_equal_those_written_from_the_tables() -> None:
    written = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {path.relative_to(FOLDER).as_posix(): path.read_text() for path in written} == FILES


def test_every_form_of_recipe_has_a_small_twin_of_the_same_form() -> None:
    recipes = {name: yaml.safe_load(FILES[name]) for name in RECIPES}
    twins = {
        "openhermes_small.yaml": ["openhermes_mistral_7b.yaml", "openhermes_llama_3_2_3b.yaml"],
        "slimpajama_small.yaml": ["slimpajama_6b.yaml", "slimpajama_30b.yaml"],
        "slimpajama_doremi_small.yaml": ["slimpajama_doremi.yaml"],
    }
    assert {*twins, *(name for names in twins.values() for name in names)} == set(RECIPES)
    for twin, names in twins.items():
        for name in names:
            assert recipes[name].keys() == recipes[twin].keys()
            assert recipes[name].get("variants", {}).keys() == recipes[twin].get("variants", {}).keys()


def test_the_sizes_are_those_of_the_paper() -> None:
    tuned = [yaml.safe_load(FILES[f"openhermes_{model}.yaml"]) for model in paper.MODELS]
    assert [content["equal"] for content in tuned] == [{"steps": 1600}] * 2
    for content in tuned:
        assert (content["base"]["lora_rank"], content["base"]["lora_alpha"]) == (32, 64)
        assert samples_per_step(content["base"], content["processes"]) == 8
    for length, devices in (("6b", 8), ("30b", 32)):
        content = yaml.safe_load(FILES[f"slimpajama_{length}.yaml"])
        assert content["equal"] == {"tokens": int(length[:-1]) * 10**9}
        assert samples_per_step(content["base"], content["processes"]) == 8 * devices
    large = [
        content for name in RECIPES if "_small" not in name and "variants" in (content := yaml.safe_load(FILES[name]))
    ]
    assert {tuple(content["seeds"]) for content in large} == {(42, 43, 44)}


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
    held_out = [f"{name}_val" for name in (*paper.DOMAINS, *paper.SMALL_DOMAINS)]
    tiny.make_data(folder / "data", dict.fromkeys([*DATA_SETS, *held_out], 900))
    (folder.parent / "compare").mkdir(exist_ok=True)
    for file in ("tasks.yaml", "questions.jsonl"):
        (folder.parent / "compare" / file).write_text((FOLDER.parent / "compare" / file).read_text())
    (folder / "ds.json").write_text((FOLDER / "ds_z3_config.json").read_text())
    return folder


def replaced(content: dict[str, Any], inputs: Path) -> dict[str, Any]:
    """Return the keys of a run with the model, the data and the machine of a test."""
    here = {"model_name_or_path": str(inputs / "model"), "dataset_dir": str(inputs / "data")}
    found = {**content, **here, "template": "default"}
    machine = {"deepspeed": str(inputs / "ds.json"), "flash_attn": "sdpa"}
    return found | {key: value for key, value in machine.items() if key in content}


def weights(domains: list[str], inputs: Path) -> Path:
    """Write equal weights in the form of the file that the proxy of DoReMi writes."""
    file = inputs / "domain_weights.json"
    file.write_text(json.dumps(dict.fromkeys(domains, 1.0)))
    return file


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_accepted(name: str, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(FILES[name])
    content |= {"base": replaced(content["base"], inputs), "output_dir": str(inputs / "out")}
    for variant in content.get("variants", {}).values():
        section = variant["dataflex"]
        if "encoder" in section.get("select", {}):
            section["select"]["encoder"] = str(inputs / "model")
        if isinstance(section.get("mix", {}).get("proportions"), str):
            section["mix"]["proportions"] = str(weights(content["base"]["dataset"].split(","), inputs))
    if name == "openhermes_llama_3_2_3b.yaml":  # one recipe is enough to read the long list of the harness's tasks
        questions = inputs.parent / "compare" / "questions.jsonl"
        content["evaluate"] = {"tasks": [{"file": str(questions), "name": "mmlu"}]}
    if "proxy" in content:
        small = {"model_config": {"num_hidden_layers": 1}}
        content |= {"reference": small, "proxy": small}
    path = inputs / name
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    status = main(["doremi" if "proxy" in content else "compare", str(path), "--dry-run"])
    said = capsys.readouterr()
    assert status == 0, said
    assert "has no effect" not in said.err
