"""A comparison at an equal wall clock, with real runs of two methods whose decisions cost unequally much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from dataflex.commands.compare import compare
from dataflex.compare import page
from dataflex.compare.experiment import load
from dataflex.compare.importing import search
from dataflex.compare.result import state_of
from dataflex.compare.runner import Workers

SECONDS = 2.0


@pytest.mark.launch
def test_methods_of_unequal_cost_spend_the_same_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_data(tmp_path / "data", {"alpha": 400, "held": 12})
    base = tiny.arguments(model, data, tmp_path, eval_dataset="held")
    rounds = {"update_steps": 2}
    settings = {
        "base": base,
        "output_dir": str(tmp_path / "out"),
        "baseline": "random",
        "variants": {
            "random": {"dataflex": {**rounds, "select": {"method": "random"}}},
            "loss": {"dataflex": {**rounds, "select": {"method": "loss"}}},
        },
        "seeds": [1],
        "equal": {"wall_clock": SECONDS},
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(settings))
    with monkeypatch.context() as patch:
        patch.setattr(page, "write", lambda outcome: None)  # it takes seconds
        assert compare(file, at_once=Workers(1)) == 0
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    costs: dict[str, dict[str, float]] = {}
    for run in result["runs"]:
        assert run["status"] == "compared"
        costs[run["variant"]] = run["costs"]
        assert_the_last_step_ended_it(Path(run["folder"]), run["costs"])
    assert costs["loss"]["decision_seconds"] > 5 * costs["random"]["decision_seconds"]
    assert costs["loss"]["steps"] < 0.8 * costs["random"]["steps"]
    assert costs["loss"]["tokens"] < costs["random"]["tokens"]
    assert "at 2 seconds of training and decisions" in capsys.readouterr().out

    # Elsewhere the runs are taken over without their models. Trained again, they do not trip over what was copied.
    file.write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / "new")}))
    assert compare(file, at_once=Workers(1), merge=[tmp_path / "out"]) == 0
    experiment = load(file)
    assert "Comparison with random" in (tmp_path / "new" / "comparison.html").read_text()
    run = experiment.of("random")[0]
    assert not (run.folder / "adapter_model.safetensors").exists()
    (run.folder / "complete.json").unlink()
    assert state_of(run, experiment) == "to run"
    assert search(experiment, [tmp_path / "out"]).runs.keys() == {run}
    monkeypatch.setattr(page, "write", lambda outcome: None)
    assert compare(file, at_once=Workers(1)) == 0
    assert (run.folder / "adapter_model.safetensors").is_file()


def assert_the_last_step_ended_it(folder: Path, costs: dict[str, Any]) -> None:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    spent = [each["dataflex/train_seconds"] + each["dataflex/decision_seconds"] for each in history if "loss" in each]
    assert len(spent) == costs["steps"]
    assert spent[-2] < SECONDS + 0.01  # the seconds on record are rounded
    assert spent[-1] >= SECONDS - 0.01
    assert abs(costs["train_seconds"] + costs["decision_seconds"] - spent[-1]) < 0.1
