"""Checks of ``dataflex.ptx`` before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pairs
import tiny
from dataflex.config import checks
from dataflex.config.changes import differences, snapshot
from dataflex.config.checks.plan import planned
from dataflex.config.loading import RunConfig, parse_config

PTX = {"dataset": "texts", "coefficient": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ptx")
    tiny.make_model(root / "model")
    pairs.make_pairs(tiny.make_data(root / "data"))
    return root


def read(folder: Path, ptx: Any, **changes: Any) -> tuple[RunConfig, dict[str, str]]:
    """Return the configuration, and the problems by key."""
    given = tiny.arguments(folder / "model", folder / "data", folder / "out", **{**pairs.DPO, **changes})
    config, problems = parse_config({**given, "dataflex": {"ptx": ptx}})
    return config, {each.key: each.message for each in problems or checks.problems_of(config)}


@pytest.mark.parametrize("stage", [pairs.DPO, pairs.RM, pairs.KTO], ids=["dpo", "rm", "kto"])
@pytest.mark.parametrize(
    "ptx", [PTX, {**PTX, "dataset": ["texts", "pages"]}, {**PTX, "dataset": "alpha", "stage": "sft"}]
)
def test_settings_of_preference_stages_are_accepted(folder: Path, stage: dict[str, Any], ptx: dict[str, Any]) -> None:
    config, problems = read(folder, ptx, **stage)
    assert problems == {}
    assert not any("trains like LLaMA-Factory" in note for note in config.notes)
    names = ", ".join([ptx["dataset"]] if isinstance(ptx["dataset"], str) else ptx["dataset"])
    (line,) = [each for each in planned(config).lines() if each.split()[0] == "text"]
    assert line.split(maxsplit=1)[1] == f"{names} (stage {ptx.get('stage', 'pt')}) in every step, its loss times 0.1"


@pytest.mark.parametrize(
    ("ptx", "key", "said"),
    [
        ({**PTX, "coefficient": 0}, "dataflex.ptx.coefficient", "must be greater than 0, got 0"),
        ({**PTX, "coefficient": -1}, "dataflex.ptx.coefficient", "must be greater than 0, got -1"),
        ({"dataset": "texts"}, "dataflex.ptx.coefficient", "needed"),
        ({"coefficient": 0.1}, "dataflex.ptx.dataset", "needed"),
        ({**PTX, "dataset": " , "}, "dataflex.ptx.dataset", "must name a data set"),
        ({**PTX, "dataset": "text"}, "dataflex.ptx.dataset", "did you mean 'texts'"),
        ({**PTX, "dataset": "first"}, "dataflex.ptx.dataset", "first"),
        ({**PTX, "stage": "dpo"}, "dataflex.ptx.stage", "got 'dpo'"),
        ({**PTX, "batch_size": 0}, "dataflex.ptx.batch_size", "must be greater than or equal to 1"),
        ({**PTX, "gamma": 1}, "dataflex.ptx.gamma", "unknown key 'gamma'"),
        (0.1, "dataflex.ptx", "mapping"),
    ],
)
def test_a_wrong_setting_is_named(folder: Path, ptx: Any, key: str, said: str) -> None:
    _, problems = read(folder, ptx)
    assert list(problems) == [key]
    assert said in problems[key]


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_stages_of_tokens_mix_the_data_as_a_domain(folder: Path, stage: str) -> None:
    _, problems = read(folder, PTX, stage=stage, dataset="alpha" if stage == "sft" else "pages")
    assert list(problems) == ["dataflex.ptx"]
    assert "add texts to dataset, and set its share with dataflex.mix" in problems["dataflex.ptx"]


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("galore_layerwise", {"use_galore": True, "galore_layerwise": True}),
        ("optim", {"optim": "adalomo"}),
    ],
)
def test_optimizers_that_step_in_the_backward_pass_are_refused(folder: Path, key: str, changes: dict[str, Any]) -> None:
    _, problems = read(folder, PTX, **changes)
    assert "dataflex.ptx makes two of them" in problems[key]


def test_only_the_coefficient_may_change_at_a_resume(folder: Path) -> None:
    before = snapshot(read(folder, PTX)[0])
    assert differences(before, snapshot(read(folder, {**PTX, "dataset": ["texts"]})[0])) == []
    effects = {
        change.key: change.effect
        for ptx in ({**PTX, "dataset": "pages", "coefficient": 0.2}, {**PTX, "stage": "sft", "batch_size": 4}, None)
        for change in differences(before, snapshot(read(folder, ptx)[0]))
    }
    assert effects == {
        "dataflex.ptx.coefficient": "from here",
        "dataflex.ptx.dataset": "fixed",
        "dataflex.ptx.stage": "fixed",
        "dataflex.ptx.batch_size": "fixed",
    }
