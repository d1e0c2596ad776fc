"""The JSON schema of a configuration accepts the files of the loader, and refuses misspelt keys and types."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from dataflex import cli
from dataflex.api import registry
from dataflex.commands.schema import schema
from dataflex.config.loading import DataFlexConfig, split_config

ROOT = Path(__file__).parents[3]
PLUGIN = """
from typing import Any
from pydantic import ConfigDict, Field
import numpy as np
from dataflex import MixerParams, Mixer, register

class Own:
    pass

class OwnParams(MixerParams):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    strength: float = Field(1.0, gt=0, description="How strong.")
    own: Own | None = None

@register("mixer", "own/{name}")
class OwnMixer(Mixer[OwnParams]):
    '''Own shares.'''

    def mix(self, ctx):
        return np.ones(len(ctx.pool.domains))
"""


def sections(path: Path) -> list[dict[str, Any]]:
    """Return the YAML blocks of a page that are configurations with a section."""
    found = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", path.read_text(), flags=re.DOTALL)]
    return [each for each in found if isinstance(each, dict) and isinstance(each.get("dataflex"), dict)]


PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if sections(path))


@pytest.fixture(scope="module")
def validator() -> Draft7Validator:
    made = json.loads(json.dumps(schema([])))
    Draft7Validator.check_schema(made)
    return Draft7Validator(made)


def problems(validator: Draft7Validator, section: str) -> list[str]:
    return [error.message for error in validator.iter_errors({"dataset": "a", "dataflex": yaml.safe_load(section)})]


def test_every_method_has_an_example() -> None:
    pages = {path.stem for path in PAGES if path.parent.name == "methods"}
    methods = {(key, name) for key, kind in registry.CONFIG_KEYS.items() for name in registry.available(kind)}
    built_in = {
        (key, name) for key, name in methods if not registry.file_of(registry.get(registry.CONFIG_KEYS[key], name))
    }
    assert {f"{key}-{name}" for key, name in built_in} <= pages


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_example_of_the_documentation_validates(validator: Draft7Validator, path: Path) -> None:
    for example in sections(path):
        if not example["dataflex"].get("plugins"):
            assert [error.message for error in validator.iter_errors(example)] == []


def test_every_key_has_a_description_and_its_default(validator: Draft7Validator) -> None:
    section = validator.schema["properties"]["dataflex"]["properties"]
    assert set(section) == set(DataFlexConfig.model_fields)
    for name, field in DataFlexConfig.model_fields.items():
        assert section[name]["description"] == field.description
        assert section[name]["default"] == field.get_default(call_default_factory=True)
    for kind in registry.CONFIG_KEYS.values():
        for condition in validator.schema["definitions"][kind]["allOf"]:
            cls = registry.get(kind, condition["if"]["properties"]["method"]["const"])
            for name, field in cls.Params.model_fields.items():
                found = condition["then"]["properties"][name]
                assert field.description is None or found["description"] == field.description
                assert field.is_required() or "default" in found, (cls, name)


@pytest.mark.parametrize(
    "section",
    [
        "",
        "{}",
        "{updates: -1}",
        "{select: null, seed: 0}",
        "{select: {method: random, every: 2}}",
        "{select: [{method: el2n, keep: 0.5, every: 4}, {method: dsir, keep: 100, validation: a}, {method: less}]}",
        "{select: {method: less, validation: 'a, b'}}",
        "{select: {method: nice, reward: exact_match}}",
        "{select: {method: nice, reward: {type: judge, base_url: 'http://a/v1', model: b, scale: [0, 5]}}}",
        "{mix: {method: static, proportions: shares.json}}",
        "{mix: {method: static, proportions: {a: 1, b: 0.5}}}",
        "{mix: {method: schedule, points: [{step: 0, proportions: [1, 2]}]}}",
        "{order: {method: stages, stages: [{domains: 'a, b', share: 0.5}, {domains: [1]}]}}",
        "{weight: [{method: loss}, {method: uniform, every: 3}]}",
    ],
)
def test_other_forms_validate_as_they_load(validator: Draft7Validator, section: str) -> None:
    assert problems(validator, section) == []
    split_config({"dataset": "a", "dataflex": yaml.safe_load(section)})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{warmup_step: 3}", "'warmup_step' was unexpected"),
        ("{warmup_steps: many}", "'many' is not of type 'integer'"),
        ("{warmup_steps: true}", "True is not of type 'integer'"),
        ("{update_steps: 0}", "0 is not valid under any of the given schemas"),
        ("{updates: 0}", "0 is not valid under any of the given schemas"),
        ("{columns: quality}", "'quality' is not of type 'array'"),
        ("{select: less}", "'less' is not of type 'object', 'array', 'null'"),
        ("{select: {}}", "'method' is a required property"),
        ("{select: []}", "[] should be non-empty"),
        ("{select: {method: les}}", "'les' is not one of"),
        ("{select: {method: loss, focuss: low}}", "'focuss' was unexpected"),
        ("{select: {method: loss, focus: lowest}}", "'lowest' is not one of"),
        ("{select: {method: loss, keep: 0.5}}", "False schema does not allow 0.5"),
        ("{select: [{method: loss, keep: 1.5}, {method: less}]}", "1.5 is not valid under any of the given schemas"),
        ("{select: [{method: loss, foccus: low}, {method: less}]}", "'foccus' was unexpected"),
        ("{select: {method: nice, reward: judge}}", "'judge' is not valid under any of the given schemas"),
        ("{mix: [{method: uniform}]}", "[{'method': 'uniform'}] is not of type 'object', 'null'"),
        ("{mix: {method: static}}", "'proportions' is a required property"),
        ("{mix: {method: uniform, every: 2}}", "'every' was unexpected"),
        ("{mix: {method: proportional, temperature: '2'}}", "'2' is not of type 'number'"),
        ("{order: {method: sort, by: size}}", "'size' is not one of"),
        ("{weight: {method: loss, keep: 0.5}}", "'keep' was unexpected"),
    ],
)
def test_mistakes_do_not_validate_and_do_not_load(validator: Draft7Validator, section: str, message: str) -> None:
    found = problems(validator, section)
    assert any(message in each for each in found), found
    if "'2'" not in section:  # the loader also takes a number in quotes
        with pytest.raises(cli.DataFlexError):
            split_config({"dataset": "a", "dataflex": yaml.safe_load(section)})


def test_one_mistake_in_a_method_is_one_problem(validator: Draft7Validator) -> None:
    assert len(problems(validator, "{select: {method: loss, focuss: low}}")) == 1
    assert len(problems(validator, "{select: [{method: less, proj_dim: big}]}")) == 1


def test_keys_of_llamafactory_are_free(validator: Draft7Validator) -> None:
    assert validator.is_valid({"learning_rate": 1e-4, "anything": [1]})


def test_the_command_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(schema([])))


def test_the_command_writes_a_file_with_the_methods_of_plug_ins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin, output = tmp_path / "own.py", tmp_path / "folder" / "dataflex.schema.json"
    plugin.write_text(PLUGIN.replace("{name}", "shares"))
    try:
        assert cli.main(["schema", "--plugins", str(plugin), "--output", str(output)]) == 0
    finally:
        registry._registered.pop(("mixer", "own/shares"), None)
    assert capsys.readouterr().out == f"schema: {output}\n"
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    validator = Draft7Validator(json.loads(output.read_text()))
    assert problems(validator, "{mix: {method: own/shares, strength: 2, own: 3}}") == []
    assert problems(validator, "{mix: {method: own/shares, strength: 0}}") != []


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "--output", str(tmp_path)]) == 2
    assert f"--output: {tmp_path} cannot be written" in capsys.readouterr().err
