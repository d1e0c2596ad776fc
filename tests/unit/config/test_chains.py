"""Chains of selectors and weighters in the configuration: entries, cadences, overrides, changes at a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.config.changes import differences, snapshot
from dataflex.config.checks.chains import problems_of_chains
from dataflex.config.loading import RunConfig, load_config, split_config
from dataflex.errors import ConfigError
from dataflex.record.configuration import recorded

CHAIN = [{"method": "el2n", "keep": 0.5}, {"method": "loss", "every": 4, "focus": "low"}]


def loaded(tmp_path: Path, *overrides: str, **section: Any) -> RunConfig:
    """Return the configuration of a file with that section, under overrides."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"output_dir": "out", "dataflex": section}))
    return load_config(file, list(overrides))


def problem(tmp_path: Path, *overrides: str, **section: Any) -> str:
    """Return what is said of a section that is wrong."""
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, *overrides, **section)
    return str(caught.value)


def test_a_list_is_a_chain_and_a_mapping_a_chain_of_one(tmp_path: Path) -> None:
    components = loaded(tmp_path, select=CHAIN, weight=[{"method": "uniform"}, {"method": "loss"}]).build_components()
    found = [(entry.key, entry.component.name, entry.every, entry.keep) for entry in components.select]
    assert found == [("select.0", "el2n", 1, 0.5), ("select.1", "loss", 4, None)]
    assert [entry.key for entry in components.weight] == ["weight.0", "weight.1"]
    assert components.select[1].component.params.focus == "low"
    assert [key for key, _ in components.items()] == ["select.0", "select.1", "weight.0", "weight.1"]
    assert components.names() == {"select": "el2n, loss", "weight": "uniform, loss"}
    for one in ({"method": "loss", "every": 3}, [{"method": "loss", "every": 3}]):
        (entry,) = loaded(tmp_path, select=one).build_components().select
        assert (entry.key, entry.every, entry.keep) == ("select", 3, None)


def test_what_a_filter_leaves() -> None:
    def kept(keep: float, candidates: int) -> int:
        section = {"select": [{"method": "el2n", "keep": keep}, {"method": "loss"}]}
        return split_config({"dataflex": section}).build_components().select[0].kept_of(candidates)

    assert [kept(0.3, 10), kept(0.3, 1), kept(0.999, 5), kept(4, 10), kept(40, 10), kept(1, 10)] == [3, 1, 5, 4, 10, 1]


@pytest.mark.parametrize("keep", [0, 0.0, 1.0, 1.5, -1, -0.5, True, "half"], ids=lambda value: f"keep={value!r}")
def test_a_share_that_is_none(tmp_path: Path, keep: Any) -> None:
    said = problem(tmp_path, select=[{"method": "el2n", "keep": keep}, {"method": "loss"}])
    assert "dataflex.select.0.keep: must be" in said
    assert ("got true" if keep is True else f"got {keep!r}") in said


def test_keep_is_for_filters_and_needed_there(tmp_path: Path) -> None:
    assert "dataflex.select.0.keep: needed" in problem(tmp_path, select=[{"method": "el2n"}, {"method": "loss"}])
    last = [{"method": "el2n", "keep": 0.5}, {"method": "loss", "keep": 0.5}]
    assert "dataflex.select.1.keep: the last selector chooses" in problem(tmp_path, select=last)
    assert "dataflex.select.keep: the last selector chooses" in problem(tmp_path, select={"method": "loss", "keep": 3})
    weight = [{"method": "loss", "keep": 0.5}, {"method": "loss"}]
    assert "dataflex.weight.0.keep: is only for selectors" in problem(tmp_path, weight=weight)
    assert "dataflex.mix.keep: is only for select" in problem(tmp_path, mix={"method": "uniform", "keep": 0.5})
    assert "dataflex.order.every: is only for select" in problem(tmp_path, order={"method": "shuffle", "every": 2})


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "often"])
def test_a_cadence_that_is_none(tmp_path: Path, every: Any) -> None:
    assert "dataflex.select.every: must be" in problem(tmp_path, select={"method": "loss", "every": every})


def test_what_is_no_chain(tmp_path: Path) -> None:
    assert "dataflex.select: must be" in problem(tmp_path, select=[])
    assert "dataflex.select.1.method: unknown selector 'lss'; did you mean 'loss'?" in problem(
        tmp_path, select=[{"method": "el2n", "keep": 0.5}, {"method": "lss"}]
    )
    assert "dataflex.select.1.focs: unknown key 'focs'; did you mean 'focus'?" in problem(
        tmp_path, select=[{"method": "el2n", "keep": 0.5}, {"method": "loss", "focs": "low"}]
    )
    assert "dataflex.mix: must be a mapping" in problem(tmp_path, mix=[{"method": "uniform"}])


@pytest.mark.parametrize("key", ["dataflex.select.0.keep", "dataflex.select[0].keep"])
def test_an_override_of_one_entry(tmp_path: Path, key: str) -> None:
    first, second = loaded(tmp_path, f"{key}=0.3", "dataflex.select.1.every=2", select=CHAIN).build_components().select
    assert (first.keep, second.every, second.component.params.focus) == (0.3, 2, "low")


def test_another_method_in_one_entry_drops_the_parameters_but_not_the_place(tmp_path: Path) -> None:
    _, second = loaded(tmp_path, "dataflex.select.1.method=grand", select=CHAIN).build_components().select
    assert (second.component.name, second.every) == ("grand", 4)
    config = loaded(tmp_path, "dataflex.select.method=grand", select={"method": "loss", "every": 4, "focus": "low"})
    assert config.build_components().select[0].every == 4


def test_overrides_that_do_not_fit_a_chain(tmp_path: Path) -> None:
    said = problem(tmp_path, "dataflex.select.method=loss", select=CHAIN)
    assert "dataflex.select is a list in the file. Name one of its entries by number" in said
    assert "Entries: 0 (el2n), 1 (loss)" in problem(tmp_path, "dataflex.select.2.keep=0.5", select=CHAIN)
    whole = loaded(tmp_path, "dataflex.select={method: grand}", select=CHAIN)
    assert whole.build_components().names() == {"select": "grand"}
    other = loaded(tmp_path, "dataflex.select=[{method: grand, keep: 9}, {method: loss}]", select={"method": "less"})
    assert other.build_components().names() == {"select": "grand, loss"}


def test_a_chain_on_record_is_read_back(tmp_path: Path) -> None:
    config = loaded(tmp_path, select=CHAIN)
    kept = recorded(config).configuration
    assert [(each["method"], each.get("keep"), each.get("every")) for each in kept["dataflex"]["select"]] == [
        ("el2n", 0.5, None),
        ("loss", None, 4),
    ]
    again = split_config(kept)
    assert again.params == config.params
    assert again.options == config.options
    counted = recorded(loaded(tmp_path, "dataflex.select.0.keep=7", select=CHAIN)).configuration
    assert split_config(counted).build_components().select[0].keep == 7


def test_changes_of_a_chain_at_a_resume(tmp_path: Path) -> None:
    before = snapshot(loaded(tmp_path, select=CHAIN))

    def changed(*overrides: str, select: Any = CHAIN) -> list[tuple[str, str, bool]]:
        now = snapshot(loaded(tmp_path, *overrides, select=select))
        return [(change.key, change.effect, change.is_method) for change in differences(before, now)]

    assert changed() == []
    assert changed("dataflex.select.0.keep=0.25") == [("dataflex.select.0.keep", "from here", False)]
    assert changed("dataflex.select.1.every=1") == [("dataflex.select.1.every", "from here", False)]
    assert changed("dataflex.select.1.focus=high") == [("dataflex.select.1.focus", "from here", False)]
    assert changed("dataflex.select.1.method=grand") == [("dataflex.select.1.method", "from here", True)]
    one = changed(select={"method": "loss"})
    assert sorted(key for key, _, is_method in one if is_method) == [
        "dataflex.select.0.method",
        "dataflex.select.1.method",
        "dataflex.select.method",
    ]


PLUGIN = """
from dataflex import ComponentParams, Selection, Selector, SelectorParams, register


@register("selector", "pairs")
class Pairs(Selector[SelectorParams]):
    def choose(self, ctx, candidates, count):
        return Selection(candidates[:count])


@register("selector", "passing")
class Passing(Selector[SelectorParams]):
    def select(self, ctx, group):
        return group.draw_passes()
"""


def refused(tmp_path: Path, select: Any) -> dict[str, str]:
    """Return what selectors are told and cannot do."""
    (tmp_path / "pairs.py").write_text(PLUGIN)
    config = loaded(tmp_path, select=select, plugins=["pairs.py"])
    return {each.key.removeprefix("dataflex.select."): each.message for each in problems_of_chains(config)}


def test_what_chooses_samples_together_takes_no_rule_and_no_limit(tmp_path: Path) -> None:
    assert refused(tmp_path, {"method": "pairs", "rule": "top_k", "temperature": 1.0}) == {}  # as a record says
    found = refused(tmp_path, {"method": "pairs", "rule": "sample", "temperature": 2.0, "max_overhead": 0.01})
    assert set(found) == {"rule", "temperature", "max_overhead"}
    assert all("pairs chooses a set of samples with its own choose()" in message for message in found.values())
    assert "has to decide in every round" in refused(tmp_path, {"method": "pairs", "every": 2})["every"]


def test_what_draws_from_passes_compares_nothing_within_domains(tmp_path: Path) -> None:
    assert "does not compare them" in refused(tmp_path, {"method": "passing", "within": "domain"})["within"]
    for method in ("pairs", "el2n"):
        assert refused(tmp_path, {"method": method, "within": "domain"}) == {}


def test_a_limit_is_that_of_the_last_selector(tmp_path: Path) -> None:
    chain = [{"method": "el2n", "keep": 0.5, "max_overhead": 0.1}, {"method": "grand"}]
    assert "Set it for the last selector (select.1)" in refused(tmp_path, chain)["0.max_overhead"]
    assert refused(tmp_path, [{"method": "el2n", "keep": 0.5}, {"method": "grand", "max_overhead": 0.1}]) == {}


@pytest.mark.parametrize("method", ["full", "greats"])
def test_what_draws_from_passes_stands_alone(tmp_path: Path, method: str) -> None:
    chain = [{"method": "el2n", "keep": 0.5}, {"method": method}]
    assert "draws its samples in passes" in refused(tmp_path, chain)["1.method"]
    assert refused(tmp_path, {"method": method}) == {}


def test_a_filter_is_not_asked_more_often_than_what_follows_it(tmp_path: Path) -> None:
    def chain(first: int, second: int) -> list[dict[str, Any]]:
        return [{"method": "el2n", "keep": 0.5, "every": first}, {"method": "grand", "every": second}]

    assert "is less than every of select.1 (4)" in refused(tmp_path, chain(2, 4))["0.every"]
    assert refused(tmp_path, chain(4, 4)) == refused(tmp_path, chain(6, 4)) == {}
