"""Domain names from columns of numbers or booleans, as YAML and JSON write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from dataflex.api.params import shares_of, shares_problem
from dataflex.config.yaml_file import read_yaml
from dataflex.data.columns import values_of
from dataflex.data.domain_names import by_domain
from dataflex.errors import ConfigError
from dataflex.mixers.regmix import RegMixMixer
from dataflex.mixers.schedule import ScheduleMixer
from dataflex.mixers.skill_it import read_graph
from dataflex.mixers.static import StaticMixer
from dataflex.mixers.uniform import UniformMixer
from unit.fakes import build, context, make_pool


def names_of(values: list[Any]) -> tuple[str, ...]:
    """Return the domains that a column of these values makes."""
    names, _ = values_of(datasets.Dataset.from_dict({"kind": values}), "kind", "dataflex.domain_column", "set")
    return tuple(names)


def shares_in(folder: Path, text: str) -> Any:
    """Return the proportions of a YAML file as the configuration has them."""
    file = folder / "run.yaml"
    file.write_text(f"dataflex: {{mix: {{method: static, proportions: {text}}}}}\n")
    return read_yaml(file, [])["dataflex"]["mix"]["proportions"]


@pytest.mark.parametrize(
    ("values", "text", "expected"),
    [
        ([2, 1, 10], "{1: 0.3, 2: 0.5, 10: 0.2}", [0.3, 0.5, 0.2]),
        ([2, 1, -3], '{"1": 0.3, "2": 0.5, "-3": 0.2}', [0.2, 0.3, 0.5]),
        ([0.5, 1.0], "{0.5: 1, 1: 2}", [1, 2]),
        ([0.5, 1.0], "{.5: 1, 1.0: 2}", [1, 2]),
        ([True, False], "{true: 0.7, false: 0.3}", [0.3, 0.7]),
        ([True, False], "{True: 0.7, 'False': 0.3}", [0.3, 0.7]),
        ([True, False], "{'true': 0.7, no: 0.3}", [0.3, 0.7]),
        (["true", "false"], "{true: 0.7, false: 0.3}", [0.3, 0.7]),
        (["no", "en"], "{en: 0.7, no: 0.3}", [0.7, 0.3]),
        (["1", "2"], "{1: 0.7, 2: 0.3}", [0.7, 0.3]),
        (["1", "1.0"], "{'1': 0.7, '1.0': 0.3}", [0.7, 0.3]),
    ],
)
def test_shares_by_name_reach_the_domain_of_that_value(
    values: list[Any], text: str, expected: list[float], tmp_path: Path
) -> None:
    pool = make_pool(dict.fromkeys(names_of(values), 4))
    mixer = build(StaticMixer, proportions=shares_in(tmp_path, text))
    assert mixer.check_domains(pool.domains) is None
    np.testing.assert_allclose(mixer.mix(context(pool)), expected)
    warmup = build(UniformMixer, initial_proportions=shares_in(tmp_path, text))
    np.testing.assert_allclose(warmup.initial(context(pool)), expected)
    points = [{"step": 0, "proportions": shares_in(tmp_path, text)}]
    schedule = build(ScheduleMixer, points=points)
    assert schedule.check_domains(pool.domains) is None
    again = StaticMixer.Params(**yaml.safe_load(yaml.safe_dump(mixer.params.model_dump(mode="json"))))
    assert again == mixer.params  # as the record has it


def test_json_files_have_text_for_every_name(tmp_path: Path) -> None:
    file = tmp_path / "shares.json"
    file.write_text(json.dumps({"proportions": {"true": 0.25, "false": 0.75}}))
    assert shares_of(str(file), ("False", "True")).tolist() == [0.75, 0.25]
    file.write_text('{"1": 0.5, "2": 0.25, "1": 0.25}')
    assert "twice" in str(shares_problem(str(file), ("1", "2")))
    file.write_text('{"1": true, "2": 0.25}')
    assert "numbers" in str(shares_problem(str(file), ("1", "2")))


def test_a_name_that_no_domain_has_is_refused(tmp_path: Path) -> None:
    assert "'3'" in str(shares_problem({"1": 0.5, "3": 0.5}, ("1", "2")))
    assert "'1.0'" in str(shares_problem({"1": 0.5, "1.0": 0.5}, ("1", "2")))  # the domain has a share already
    assert "'yes'" in str(shares_problem({"yes": 0.5, "1": 0.5}, ("1", "2")))  # a word is no number
    with pytest.raises(ValidationError, match="two entries for '1'"):
        StaticMixer.Params(proportions={1: 0.5, "1": 0.5})


def test_a_value_that_two_domains_have_must_be_written_as_one_of_them() -> None:
    assert by_domain({"yes": 1, "TRUE": 2}, ("yes", "true")) == {"yes": 1, "true": 2}
    assert by_domain({"on": 1}, ("yes", "true")) == {"on": 1}


def test_graphs_and_tables_are_read_by_domain_name(tmp_path: Path) -> None:
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps({"false": {"1.0": 0.1, "2.0": 0.2}, "true": {"1.0": 0.3, "2.0": 0.4}}))
    assert read_graph(str(graph), ("False", "True"), ("1", "2")).tolist() == [[0.1, 0.2], [0.3, 0.4]]
    mixtures, losses = tmp_path / "mixtures.csv", tmp_path / "losses.csv"
    mixtures.write_text("index,true,false\n0,0.2,0.8\n1,0.5,0.5\n2,0.9,0.1\n3,0.4,0.6\n")
    losses.write_text("index,a\n0,1.0\n1,2.0\n2,3.0\n3,1.5\n")
    mixer = build(RegMixMixer, mixtures=str(mixtures), losses=str(losses), regressor="linear")
    assert mixer.check_domains(("False", "True")) is None
    found, _ = mixer._runs(("False", "True"))
    assert found[0].tolist() == [0.8, 0.2]


def test_shares_of_unknown_domains_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'mats'.*did you mean 'math'"):
        shares_of({"mats": 1.0, "code": 1.0}, ("math", "code"))
