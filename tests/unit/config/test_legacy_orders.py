"""The reorders of the earlier release: what each becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.config.legacy_orders import parameters_of
from dataflex.config.loading import RunConfig, parse_config, split_config
from dataflex.errors import ConfigError

SHIPPED = {
    "sorting": {"score_field": "score", "polarity": "higher_later", "window": 0},
    "shuffle": {"seed": 9, "window": 0},
    "segment": {"score_field": "score", "x": 10, "y": 10, "polarity": "higher_later"},
    "folding": {"score_field": "score", "layers": 3, "window": 0, "polarity": "higher_later"},
    "zigzag": {"score_field": "score", "layers": 3, "polarity": "higher_later"},
    "stair": {"score_field": "score", "Z": 2, "rho": 0.225, "L": 3},
    "saw": {"score_field": "quality", "Z": 3, "rho": 0.075, "L": 2, "window": 5000, "polarity": "higher_earlier"},
    "dynamic_saw": {"score_source": "model_loss", "batch_size": 8, "max_samples": 20000, "reorder_every": 1},
    "dynamic_folding": {"score_source": "model_loss", "consume_once": False, "polarity": "higher_later"},
    "reuse_selector_scores": {"score_source": "cached_selection", "metric_key": "loss"},
}
BY_COLUMN = {"by": "column", "column": "score", "scope": "run"}
EXPECTED: dict[str, dict[str, Any]] = {
    "sorting": {"method": "sort", **BY_COLUMN, "descending": False, "ties": "input"},
    "shuffle": {"method": "shuffle"},
    "segment": {"method": "segment", **BY_COLUMN, "front": 10, "back": 10, "front_from": "low", "back_from": "high"},
    "folding": {"method": "fold", **BY_COLUMN, "layers": 3, "descending": False},
    "zigzag": {"method": "zigzag", **BY_COLUMN, "layers": 3, "descending": False},
    "stair": {"method": "stair", **BY_COLUMN, "sections": 2, "radius": 0.225, "layers": 3, "descending": False},
    "saw": {"method": "saw", **BY_COLUMN, "column": "quality", "radius": 0.075, "jit": 5000, "descending": True},
    "dynamic_saw": {"method": "saw", "by": "loss", "scope": "run", "passes": "rest", "descending": True},
    "dynamic_folding": {"method": "fold", "by": "loss", "scope": "round", "layers": 3, "descending": False},
    "reuse_selector_scores": {"method": "sort", "by": "loss", "scope": "round", "descending": False},
}


def split(folder: Path, name: str, **keys: Any) -> RunConfig:
    (folder / "components.yaml").write_text(
        yaml.safe_dump({"reorders": {key: {"name": key, "params": value} for key, value in SHIPPED.items()}})
    )
    flat = {"train_type": "dynamic_reorder", "component_name": name, "components_cfg_file": "components.yaml", **keys}
    return split_config({"stage": "sft", "dataset": "a", **flat}, base=folder)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_reorders(tmp_path: Path, name: str) -> None:
    config = split(tmp_path, name, update_times=-1)
    found = config.resolved()["dataflex"]["order"]
    assert {key: found[key] for key in EXPECTED[name]} == EXPECTED[name]
    if name == "shuffle":
        assert config.resolved()["dataflex"]["seed"] == 9
    notes = " ".join(config.notes)
    assert ("max_samples is accepted and has no effect: every sample is scored" in notes) == (name == "dynamic_saw")
    assert ("begins with the largest loss" in notes) == (name == "dynamic_saw")
    assert ("this run has no selector" in notes) == (name == "reuse_selector_scores")
    assert "reorder_every" not in notes


def translated(reorder: str, selects: bool = False, **given: Any) -> tuple[dict[str, Any], list[str], list[str]]:
    notes: list[str] = []
    problems: list[Any] = []
    found = parameters_of(reorder, given, "here", notes, problems, selects=selects)
    return found, notes, [str(problem) for problem in problems]


def test_times_scores_and_directions() -> None:
    assert translated("folding", apply_at="update", score_field="q")[0] == {"layers": 3, "by": "column", "column": "q"}
    assert translated("stair", apply_at="start")[0] == {"by": "loss", "scope": "run"}
    assert translated("reuse_selector_scores", selects=True) == ({"by": "selection"}, [], [])
    assert translated("sorting", ascending=False)[0]["descending"] is True
    reverse = translated("segment", polarity="lower_is_better", x=30, y=20)[0]
    assert (reverse["front_from"], reverse["back_from"]) == ("high", "low")
    both = translated("segment", front_is_high=True, back_is_high=True)[0]
    assert (both["front_from"], both["back_from"]) == ("high", "high")
    assert "q is" not in translated("folding", score_field="q", score_source="model_loss")[0]
    assert translated("folding", score_field="q", score_source="model_loss")[1] == [
        "here.score_field is accepted and has no effect: score_source is model_loss, which reads no column."
    ]
    assert "polarity: accepted and without effect" in translated("shuffle", polarity="higher_later")[1][0]
    assert "reorder_every is accepted" in translated("dynamic_saw", reorder_every=3)[1][0]


def test_words_that_nobody_knows_are_told_with_those_that_are_known() -> None:
    (problem,) = translated("stair", score_source="modelloss")[2]
    assert "unknown score_source 'modelloss'; did you mean 'model_loss'" in problem
    (problem,) = translated("stair", apply_at="statics")[2]
    assert "unknown apply_at 'statics'; did you mean 'static'" in problem


def test_without_a_components_file_the_earlier_defaults_hold(tmp_path: Path) -> None:
    flat = {"train_type": "dynamic_reorder", "component_name": "dynamic_folding", "update_times": -1}
    order = split_config({"stage": "sft", "dataset": "a", **flat}, base=tmp_path).resolved()["dataflex"]["order"]
    assert (order["method"], order["layers"], order["passes"], order["descending"]) == ("fold", 3, "rest", True)


def test_a_parameter_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"reorders": {"saw": {"params": {"teeth": 3}}}}))
    flat = {"train_type": "dynamic_reorder", "component_name": "saw", "components_cfg_file": "c.yaml"}
    with pytest.raises(ConfigError, match="teeth"):
        split_config({"stage": "sft", "dataset": "a", **flat}, base=tmp_path)
    flat["component_name"] = "foldng"
    assert "did you mean 'fold'" in str(parse_config({"stage": "sft", **flat}, base=tmp_path)[1][0])
