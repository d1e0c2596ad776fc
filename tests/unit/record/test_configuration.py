"""The recorded configuration: it loads from any folder, gives the same run, and holds no secret."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from dataflex.config.loading import RunConfig, load_config, split_config
from dataflex.errors import ConfigError
from dataflex.record.configuration import read_configuration, recorded
from dataflex.record.environment import differences, environment, repeated_start
from dataflex.record.schema import Environment, Start, from_json, to_json

PLUGIN = """
from dataflex import ComponentParams, InputPath, OutputPath, Selection, Selector, register


class Params(ComponentParams):
    table: InputPath
    tables: list[InputPath] = []
    cache: OutputPath = "cache"
    word: str = "data"


@register("selector", "test_paths")
class Paths(Selector):
    Params = Params

    def choose(self, ctx, candidates, count):
        return Selection(candidates[:count])
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything that a configuration names by relative paths."""
    work = tmp_path / "work"
    for folder in ("model", "adapter", "data", "wandb"):
        (work / folder).mkdir(parents=True)
    (work / "model" / "config.json").write_text("{}")
    (work / "data" / "dataset_info.json").write_text('{"chat": {"file_name": "chat.json"}}')
    (work / "data" / "chat.json").write_text("[]")
    (work / "ds.json").write_text("{}")
    (work / "shares.json").write_text('{"chat": 1.0}')
    (work / "mine.py").write_text(PLUGIN)
    (work / "t.csv").write_text("1")
    monkeypatch.chdir(work)
    return work


def written(config: RunConfig, run: Path) -> Path:
    """Write what is kept of a configuration, as a run does."""
    kept = recorded(config)
    folder = run / "dataflex"
    (folder / "plugins").mkdir(parents=True)
    for name, text in kept.plugins.items():
        (folder / "plugins" / name).write_bytes(text)
    (folder / "config.yaml").write_text(yaml.safe_dump(kept.configuration, sort_keys=False))
    return folder / "config.yaml"


KEYS: dict[str, Any] = {
    "model_name_or_path": "model",
    "adapter_name_or_path": "adapter,org/name",
    "dataset": "chat",
    "report_to": "wandb",
    "deepspeed": "ds.json",
    "output_dir": "out",
    "overwrite_output_dir": True,
    "resume_from_checkpoint": "out/checkpoint-3",
    "dataflex": {
        "plugins": ["mine.py"],
        "select": {"method": "test_paths", "table": "t.csv", "tables": ["t.csv", "no/such"]},
        "mix": {"method": "static", "proportions": "shares.json"},
    },
}


def test_recorded_paths_work_from_another_working_directory(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(split_config(KEYS, base=place), tmp_path / "run")
    kept = yaml.safe_load(file.read_text())
    assert kept["model_name_or_path"] == str(place / "model")
    assert kept["adapter_name_or_path"] == f"{place / 'adapter'},org/name"
    assert kept["dataset"] == "chat"
    assert kept["report_to"] == "wandb"  # no path, though there is such a folder
    assert kept["dataset_dir"] == str(place / "data")  # LLaMA-Factory's default, looked for where one is
    assert kept["deepspeed"] == str(place / "ds.json")
    assert kept["output_dir"] == str(place / "out")
    assert "overwrite_output_dir" not in kept
    assert "resume_from_checkpoint" not in kept
    assert kept["dataflex"]["select"] == {
        "method": "test_paths",
        "table": str(place / "t.csv"),
        "tables": [str(place / "t.csv"), "no/such"],
        "cache": str(place / "cache"),
        "word": "data",
    }
    assert kept["dataflex"]["mix"]["proportions"] == str(place / "shares.json")
    (plugin,) = kept["dataflex"]["plugins"]
    assert hashlib.sha256(PLUGIN.encode()).hexdigest()[:12] in plugin

    (place / "mine.py").write_text("raise SystemExit")  # the record has the one that was used
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = load_config(file)
    assert again.params["select"][1].model_dump()["table"] == str(place / "t.csv")
    assert recorded(again).configuration == kept  # a record of a record is the same, names included


def test_a_checkpoint_of_another_run_is_recorded_as_an_input(place: Path) -> None:
    kept = recorded(split_config({**KEYS, "resume_from_checkpoint": "elsewhere/checkpoint-3"}, base=place))
    assert kept.configuration["resume_from_checkpoint"] == "elsewhere/checkpoint-3"  # nothing is there
    (place / "elsewhere" / "checkpoint-3").mkdir(parents=True)
    kept = recorded(split_config({**KEYS, "resume_from_checkpoint": "elsewhere/checkpoint-3"}, base=place))
    assert kept.configuration["resume_from_checkpoint"] == str(place / "elsewhere" / "checkpoint-3")


def test_assets_keep_their_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflex.assets.fetch", lambda name: place / name)
    given = {**KEYS, "model_name_or_path": "asset:smollm2-135m-instruct", "dataset_dir": "asset:python-docs"}
    config = split_config(given, base=place).with_assets()
    assert config.llamafactory["model_name_or_path"] == str(place / "smollm2-135m-instruct")
    kept = recorded(config).configuration
    assert kept["model_name_or_path"] == "asset:smollm2-135m-instruct"
    assert kept["dataset_dir"] == "asset:python-docs"


def test_records_of_the_first_release_are_read(tmp_path: Path) -> None:
    file = tmp_path / "dataflex" / "config.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump({"llamafactory": {"stage": "sft"}, "dataflex": {"seed": 1}, "versions": {}}))
    assert read_configuration(tmp_path) == {"stage": "sft", "dataflex": {"seed": 1}}
    file.write_text("stage: sft\n")
    with pytest.raises(ConfigError, match="a section dataflex"):
        read_configuration(tmp_path)


def test_the_environment_lists_versions_hardware_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_data(tmp_path / "data")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setattr("sys.argv", ["dataflex-cli", "train", "run.yaml", "hf_hub_token=hf_secret", "max_steps=3"])
    shares = tmp_path / "shares.json"
    shares.write_text('{"alpha": 1, "beta": 1}')
    keys = tiny.arguments(model, data, tmp_path / "out", dataset="alpha,beta", eval_dataset="held")
    mix = {"method": "static", "proportions": str(shares)}
    config = split_config({**keys, "dataflex": {"update_steps": 2, "mix": mix}}, source="run.yaml")
    written_start = environment(config, recorded(config), 2, 4)
    found = json.loads(json.dumps(to_json(written_start)))
    assert from_json(Start, found, "here") == written_start
    assert found["processes"] == 2
    assert found["step"] == 4
    assert found["environment"]["NPROC_PER_NODE"] == "2"
    assert found["working_directory"] == str(Path.cwd())
    assert found["command"] == [
        "dataflex-cli", "train", "run.yaml", "hf_hub_token=<not recorded: hf_hub_token>", "max_steps=3",
    ]  # fmt: skip
    assert set(found["datasets"]) == {"alpha", "beta", "held"}
    assert found["datasets"]["held"]["entry"] == {"file_name": "held.json"}
    text = (data / "held.json").read_bytes()
    assert found["datasets"]["held"]["files"] == {
        str(data / "held.json"): {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    }
    assert found["files"] == {str(shares): {"bytes": 23, "sha256": hashlib.sha256(shares.read_bytes()).hexdigest()}}
    weights = (model / "model.safetensors").read_bytes()
    ends = hashlib.sha256(weights[: 2**20] + weights[-(2**20) :] + str(len(weights)).encode()).hexdigest()
    assert found["model"]["files"]["model.safetensors"] == {"bytes": len(weights), "sha256_of_ends": ends}
    config_json = (model / "config.json").read_bytes()
    assert found["model"]["files"]["config.json"]["sha256"] == hashlib.sha256(config_json).hexdigest()


def test_a_model_of_the_hub_is_named_with_its_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("a" * 40)
    keys = {"model_name_or_path": "org/name", "cache_dir": str(tmp_path), "output_dir": "out"}
    config = split_config({**keys, "dataflex": {}})
    assert environment(config, recorded(config), 1, 0).model == {"name": "org/name", "commit": "a" * 40}


def test_differences_from_the_repeated_run_are_named(tmp_path: Path) -> None:
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_data(tmp_path / "data")
    keys = {**tiny.arguments(model, data, tmp_path / "out"), "dataflex": {}}
    config = split_config(keys)
    first = replace(environment(config, recorded(config), 1, 0), fingerprints={"dataset": "ab"})
    file = written(config, tmp_path / "run")
    assert repeated_start(load_config(file)) is None  # a record without it
    (file.parent / "environment.json").write_text(json.dumps(to_json(Environment([Start(0), first]))))
    then = repeated_start(load_config(file))
    assert then is not None
    assert differences(then, first) == []
    (data / "alpha.json").write_text("[]")
    (file.parent / "changes.jsonl").write_text(
        json.dumps({"resumed_at": 1, "step": 1, "key": "k", "from": 1, "to": 2, "effect": "from this step on"}) + "\n"
    )
    then = repeated_start(load_config(file))
    assert then is not None
    earlier = replace(then.start, versions={**then.start.versions, "torch": "1.0"}, devices=["A", "A"])
    now = replace(environment(config, recorded(config), 2, 0), fingerprints={"dataset": "cd"})
    other = differences(replace(then, start=earlier), now)
    assert all(
        any(word in text for text in other) for word in ("changes.jsonl", "1 processes", "A, this", "torch was 1.0")
    )
    assert other[-1] == "data set 'alpha' has another content"
    assert len(other) == 5
    assert repeated_start(split_config(keys, source=str(tmp_path / "run.yaml"))) is None
