"""Runs of other comparisons: which are taken over, and why others are not; keys that other machines share."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from dataflex.compare import experiment as plans
from dataflex.compare import page
from dataflex.compare.experiment import Experiment, load
from dataflex.compare.importing import search
from dataflex.compare.result import needs_overwriting, read_result, state_of
from dataflex.compare.tasks import task_key
from dataflex.errors import ConfigError
from unit.compare.test_compare import RANDOM, Lab, question, tasks, variants


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(page, "write", lambda outcome: None)  # it takes a second
    lab = Lab(tmp_path)
    lab.write(seeds=[1, 2], **variants(better=RANDOM))
    assert lab.compare() == 0
    lab.launches()
    return lab


@pytest.fixture
def elsewhere(lab: Lab) -> Path:
    """Give the lab another output_dir, and return the folder of the runs that were made."""
    made, lab.output = lab.output, lab.folder / "new"
    lab.write(output_dir=str(lab.output))
    return made


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_complete_runs_of_another_folder_are_taken_over(
    lab: Lab, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = json.loads((elsewhere / "comparison.json").read_text())
    # A sibling: a variant of another name, another baseline, another metric, and a third seed, which is made here.
    lab.write(
        variants={"first": RANDOM, "plain": {"dataflex": {}}}, baseline="first", metrics=["held_loss"], seeds=[1, 2, 3]
    )
    assert lab.compare(dry_run=True, merge=[elsewhere]) == 0
    said = capsys.readouterr()
    assert f"4 runs to take over from {elsewhere}" in said.err
    assert len(re.findall(r"\d +complete ", said.out)) == 4
    assert len(re.findall(r"\d +to run ", said.out)) == 2
    assert not lab.output.exists()

    assert lab.compare(merge=[elsewhere]) == 0
    assert sorted(lab.launches()) == [("train", "first", 3), ("train", "plain", 3)]
    folder = lab.folder_of("first", 1)
    assert files_in(folder) == {"complete.json", "key.json", "run.yaml", "dataflex/summary.json"}
    assert yaml.safe_load((folder / "run.yaml").read_text())["output_dir"] == str(folder)
    result = lab.result()
    losses = {(run["variant"], run["seed"]): run["metrics"]["held_loss"] for run in result["runs"]}
    for run in there["runs"]:
        name = {"better": "first", "plain": "plain"}[run["variant"]]
        assert losses[name, run["seed"]] == run["metrics"]["held_loss"]
    assert {(run["seed"], run["taken_over_from"] is None) for run in result["runs"]} == {
        (1, False), (2, False), (3, True),
    }  # fmt: skip
    assert any(note.startswith("4 of 6 complete runs were taken over from ") for note in result["notes"])
    # Seconds of another machine say nothing about the time that is left here.
    experiment = load(lab.file)
    found = {run.seed: read_result(run, experiment) for run in experiment.of("plain")}
    assert [found[seed] is not None and found[seed].seconds is None for seed in (1, 2, 3)] == [True, True, False]

    capsys.readouterr()
    assert lab.compare(merge=[elsewhere]) == 0  # they are here already
    assert lab.launches() == []
    assert f"0 runs to take over from {elsewhere}" in capsys.readouterr().err


def test_a_run_that_was_taken_over_is_trained_for_a_task_that_is_added(lab: Lab, elsewhere: Path) -> None:
    assert lab.compare(merge=[elsewhere]) == 0
    assert lab.launches() == []
    (lab.folder / "mmlu.jsonl").write_text(question("who ?"))
    lab.write(**tasks({"file": "mmlu.jsonl"}))
    experiment = load(lab.file)
    for run in experiment.runs:
        assert state_of(run, experiment) == "to run"
        assert not needs_overwriting(run)
    assert lab.compare() == 0
    runs = [(variant, seed) for variant in ("better", "plain") for seed in (1, 2)]
    assert sorted(lab.launches()) == [("eval", *run) for run in runs] + [("train", *run) for run in runs]
    assert {run["taken_over_from"] for run in lab.result()["runs"]} == {None}


def test_a_run_without_a_task_is_not_taken_over_and_one_that_is_trained_here_stays(lab: Lab, elsewhere: Path) -> None:
    lab.write(seeds=[1])
    assert lab.compare() == 0  # seed 1 is trained here
    (lab.folder / "mmlu.jsonl").write_text(question("who ?"))
    lab.write(seeds=[1, 2], **tasks({"file": "mmlu.jsonl"}))
    found = search(load(lab.file), [elsewhere])
    assert found.runs == {}
    assert found.notes[1:] == (
        f"{elsewhere}: not taken over: plain/seed 2, better/seed 2: not complete there, or without a result of each "
        "task.",
    )


def edited_key(folder: Path, **changes: Any) -> None:
    file = folder / "key.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_runs_with_another_key_are_named_with_the_reason(
    lab: Lab, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reasons(experiment: Experiment) -> str:
        return " ".join(search(experiment, [elsewhere]).notes[1:])

    lab.write(variants={"plain": {"dataflex": {}}, "better": {**RANDOM, "learning_rate": 0.5}})
    said = "not taken over: better/seed 1, better/seed 2: another run there: learning_rate is 0.01 there and 0.5 here."
    assert said in reasons(load(lab.file))
    lab.write(**variants(better={"dataflex.select": {"method": "loss", "focus": "low"}}))
    assert "dataflex.select.method is 'random' there and 'loss' here; dataflex.select.focus is missing there and" in (
        reasons(load(lab.file))
    )
    lab.write(**variants(better={**RANDOM, "dataset": "beta"}))
    found = reasons(load(lab.file))
    assert "base:data/alpha.json counts only there" in found
    assert "dataset is 'alpha' there and 'beta' here" in found
    # Then nothing there is of this experiment, and that is an error.
    lab.write(**variants(better=RANDOM))
    now = dict(plans.installed_versions())
    with monkeypatch.context() as patch:
        patch.setattr(plans, "installed_versions", lambda: {**now, "torch": "99"})
        with pytest.raises(ConfigError) as error:
            search(load(lab.file), [elsewhere])
    assert f"{elsewhere} has no run of this experiment." in str(error.value)
    assert f"better/seed 2: another run there: torch is '{now['torch']}' there and '99' here." in str(error.value)
    (lab.data / "alpha.json").write_text(json.dumps(tiny.rows_of(lab.data, "alpha")[:-1]))
    with pytest.raises(ConfigError, match=r"another run there: base:data/alpha.json has another content\."):
        lab.compare(merge=[elsewhere])
    for file in elsewhere.rglob("key.json"):
        edited_key(file.parent, format=1)
    with pytest.raises(ConfigError, match=r"another run there: key.json has format 1 there and 2 here\."):
        lab.compare(merge=[elsewhere])
    assert lab.launches() == []


def test_folders_without_runs_are_errors_before_anything_runs(lab: Lab, elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere has no runs \(no runs/VARIANT/SEED/key.json in it\)"):
        lab.compare(merge=[elsewhere, lab.folder / "nowhere"])
    with pytest.raises(ConfigError, match=r"is the output_dir of this experiment"):
        lab.compare(merge=[lab.output])
    shutil.copytree(elsewhere, lab.folder / "other")
    for folder in (lab.folder / "other" / "runs").glob("*/*"):
        edited_key(folder, key="x", variant="y")
    with pytest.raises(ConfigError, match=r"has no run of this experiment. It has no run of the same variants and see"):
        lab.compare(merge=[elsewhere, lab.folder / "other"])
    assert lab.launches() == []
    assert not lab.output.exists()


def test_a_run_is_taken_from_the_first_folder_that_has_it(lab: Lab, elsewhere: Path) -> None:
    second = lab.folder / "second"
    shutil.copytree(elsewhere, second)
    (next((elsewhere / "runs" / "plain").glob("seed-2-*")) / "complete.json").unlink()
    assert lab.compare(merge=[elsewhere, second]) == 0
    assert lab.launches() == []
    origins = {(run["variant"], run["seed"]): Path(run["taken_over_from"]).name for run in lab.result()["runs"]}
    assert origins.pop(("plain", 2)) == "second"
    assert set(origins.values()) == {"out"}


# Keys that do not depend on the place of the clone.


def clone(folder: Path, home: Path) -> Path:
    """Write a clone with an experiment below it, and the cache and the home of its machine."""
    tiny.make_data(folder / "data")
    for name in ("adapter", "model"):
        (folder / name).mkdir()
        (folder / name / ("config.json" if name == "model" else "adapter_config.json")).write_text("{}")
    for name in ("cache/python-docs", "cache/smollm2-135m-instruct", "kept"):
        (home / name).mkdir(parents=True)
    (home / "cache" / "smollm2-135m-instruct" / "config.json").write_text("{}")
    (home / "kept" / "adapter_config.json").write_text("{}")
    tiny.make_data(home / "cache" / "python-docs")
    (folder / "experiments").mkdir()
    (folder / "experiments" / "reward.py").write_text("def ones(prompt, response, reference):\n    return 1.0\n")
    return folder


BASES: dict[str, dict[str, Any]] = {
    "relative": {"model_name_or_path": "model", "dataset_dir": "data"},
    "assets": {"model_name_or_path": "asset:smollm2-135m-instruct", "dataset_dir": "asset:python-docs"},
    "home": {"model_name_or_path": "model", "dataset_dir": "data", "adapter_name_or_path": "~/kept"},
    "file": {  # its path is made absolute when the configuration is read
        "model_name_or_path": "model",
        "dataset_dir": "data",
        "dataflex": {
            "warmup_steps": 1,
            "update_steps": 2,
            "select": {
                "method": "nice",
                "validation": "held",
                "reward": {"type": "python", "path": "reward.py", "function": "ones"},
            },
        },
    },
}


def keys_in(folder: Path, home: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DATAFLEX_CACHE", str(home / "cache"))
    keys = {**tiny.arguments(Path("model"), Path("data"), Path("unused"), eval_dataset="held"), **base}
    settings = {
        "base": keys,
        "output_dir": str(folder / "out"),
        "baseline": "plain",
        "variants": {"plain": {"dataflex.update_steps": 2}, "fast": {"dataflex.update_steps": 2, "learning_rate": 0.5}},
        "seeds": [1],
        "equal": {"steps": 4},
    }
    file = folder / "experiments" / "experiment.yaml"
    file.write_text(yaml.safe_dump(settings))
    experiment = load(file)
    for run in experiment.runs:
        text = json.dumps(plans.inputs_of(run, experiment))
        assert str(folder) not in text
        assert str(home) not in text
    return {run.variant: run.key for run in experiment.runs}


@pytest.mark.parametrize("name", BASES)
def test_keys_are_those_of_a_clone_at_another_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(tmp_path / "a", tmp_path / "home" / "b"), (tmp_path / "deep" / "er" / "c", tmp_path / "d")]
    for folder, home in places:
        clone(folder, home)
    keys = [keys_in(folder, home, BASES[name], monkeypatch) for folder, home in places]
    assert keys[0] == keys[1]
    # What counts is still counted.
    folder, home = places[1]
    changed = {
        "relative": [folder / "model" / "config.json", folder / "data" / "alpha.json"],
        "assets": [home / "cache" / "smollm2-135m-instruct" / "config.json", home / "cache/python-docs/held.json"],
        "home": [home / "kept" / "adapter_config.json"],
        "file": [folder / "experiments" / "reward.py"],
    }[name]
    for file in changed:
        file.write_text(file.read_text() + "\n")
        keys.append(keys_in(folder, home, BASES[name], monkeypatch))
        assert not set(keys[-1].values()) & {key for each in keys[:-1] for key in each.values()}, file


def test_absolute_paths_in_the_clone_are_as_relative_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, home = clone(tmp_path / "a", tmp_path / "b"), tmp_path / "b"
    absolute = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder / "data")}
    assert keys_in(folder, home, absolute, monkeypatch) == keys_in(folder, home, BASES["relative"], monkeypatch)


def test_the_key_of_a_task_is_that_of_its_content(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "tasks.jsonl", tmp_path / "b" / "renamed.jsonl"]
    for file in files:
        file.parent.mkdir()
        file.write_text(question("who ?"))
    keys = [task_key({"name": "x", "file": str(file)}) for file in files]
    assert keys[0] == keys[1]
    assert task_key({"name": "x", "fewshot_file": str(files[0])}) != keys[0]
    files[1].write_text(question("what ?"))
    assert task_key({"name": "x", "file": str(files[1])}) != keys[0]
