"""Loading one YAML: splitting, validating, overriding, and finding every problem at once."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import dataflex
from dataflex.api import registry
from dataflex.api.mixer import Mixer
from dataflex.api.selector import Selector
from dataflex.config.loading import RunConfig, load_config, split_config
from dataflex.config.yaml_file import read_yaml
from dataflex.errors import ConfigError

FLAT = {"model_name_or_path": "some/model", "learning_rate": 1e-4, "dataset": "a,b"}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a test registers."""
    registry.load_components([])
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def load(folder: Path, section: Any, *overrides: str, **keys: Any) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**FLAT, **keys, "dataflex": section}))
    return load_config(path, list(overrides))


def problems(folder: Path, section: Any, *overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, section, *overrides)
    assert "run.yaml" in str(caught.value)
    return {problem.key: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("word", ["no", "No", "NO", "off", "false", '"no"'])
@pytest.mark.parametrize("key", ["eval_strategy", "save_strategy", "logging_strategy"])
@pytest.mark.parametrize("form", ["file", "command line", "plain run"])
def test_a_strategy_written_no_is_read_as_the_word(tmp_path: Path, key: str, word: str, form: str) -> None:
    path = tmp_path / "run.yaml"
    section = "" if form == "plain run" else "dataflex: {select: {method: random}}\n"
    path.write_text(section + (f"{key}: {word}\n" if form != "command line" else f"{key}: steps\n"))
    config = load_config(path, [f"{key}={word}"] if form == "command line" else [])
    assert config.llamafactory[key] == "no"


def test_only_keys_that_take_words_read_true_and_false_as_words(tmp_path: Path) -> None:
    given = {"do_train": False, "include_num_input_tokens_seen": False, "run_name": False, "hub_strategy": False}
    config = load(tmp_path, {"select": {"method": "random"}}, **given, eval_strategy=True)
    assert config.llamafactory == {**FLAT, **given, "eval_strategy": True}


def test_a_section_becomes_settings_and_components(tmp_path: Path) -> None:
    section = {
        "warmup_steps": 20,
        "update_steps": 50,
        "updates": 4,
        "train_steps": 300,
        "seed": 7,
        "select": {"method": "loss", "focus": "high"},
        "mix": {"method": "static", "proportions": [0.7, 0.3]},
        "order": {"method": "sort", "by": "length"},
        "weight": {"method": "loss", "temperature": 0.4},
    }
    config = load(tmp_path, section)
    assert config.llamafactory == FLAT
    assert config.dataflex is not None
    ours = config.dataflex
    assert (ours.warmup_steps, ours.update_steps, ours.updates, ours.train_steps, ours.seed) == (20, 50, 4, 300, 7)
    built = config.build_components()
    assert [(key, component.name) for key, component in built.items()] == [
        ("select", "loss"),
        ("mix", "static"),
        ("order", "sort"),
        ("weight", "loss"),
    ]
    assert built.select[0].component.params.focus == "high"
    assert built.select[0].component.params.focus_weight == 5
    assert built.mix.params.proportions == [0.7, 0.3]
    assert built.weight[0].component.params.temperature == 0.4
    assert built.plans_data
    assert (
        config.build_components().select[0].component is not built.select[0].component
    )  # fresh ones, with no state in common


def test_a_section_has_its_default_schedule(tmp_path: Path) -> None:
    ours = load(tmp_path, {"select": {"method": "random"}}).dataflex
    assert ours is not None
    assert ours.model_dump(include={"warmup_steps", "update_steps", "updates", "train_steps", "seed"}) == {
        "warmup_steps": 0,
        "update_steps": None,
        "updates": -1,
        "train_steps": None,
        "seed": 42,
    }


def test_weight_alone_leaves_the_data_path(tmp_path: Path) -> None:
    assert not load(tmp_path, {"weight": {"method": "loss"}}).build_components().plans_data


def test_a_file_without_a_section_is_a_plain_run() -> None:
    config = split_config(dict(FLAT))
    assert config.dataflex is None
    assert config.llamafactory == FLAT
    assert config.resolved() == {**FLAT, "dataflex": None}


def test_a_section_without_components_gives_a_note(tmp_path: Path) -> None:
    config = load(tmp_path, {"warmup_steps": 3})
    assert config.dataflex is not None
    assert config.params == {}
    assert "select, mix, order and weight" in config.notes[0]


def test_a_section_without_a_value_is_noted() -> None:
    config = split_config({"stage": "sft", "dataflex": None})
    assert config.dataflex is None
    assert config.notes == (
        "dataflex: has no value, so the run is LLaMA-Factory's own and writes no record; dataflex: {} writes one.",
    )
    assert split_config({"stage": "sft"}).notes == ()


def test_overrides_reach_nested_keys(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        {"select": {"method": "random"}, "updates": 2},
        "dataflex.select.method=loss",
        "dataflex.select.focus=low",
        "dataflex.update_steps=5",
        "dataflex.mix.method=static",
        "dataflex.mix.proportions=[0.2,0.8]",
        "learning_rate=3e-5",
        "new_key=true",
    )
    built = config.build_components()
    assert built.select[0].component.name == "loss"
    assert built.select[0].component.params.focus == "low"
    assert built.mix.params.proportions == [0.2, 0.8]
    assert config.dataflex.update_steps == 5
    assert config.dataflex.updates == 2
    assert config.llamafactory["learning_rate"] == 3e-5
    assert config.llamafactory["new_key"] is True


def test_resolved_has_every_default_and_loads_again(tmp_path: Path) -> None:
    section = {"select": {"method": "loss"}, "mix": {"method": "proportional", "temperature": 2.0}}
    resolved = load(tmp_path, section).resolved()
    assert resolved["dataflex"]["select"] == {
        "method": "loss",
        "focus": "medium",
        "focus_weight": 5.0,
        "quantiles": [0.33, 0.66],
        "temperature": 1.0,
    }
    assert resolved["dataflex"]["seed"] == 42
    assert split_config(yaml.safe_load(yaml.safe_dump(resolved))).resolved() == resolved


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        {
            "warmup_steps": -1,
            "update_step": 50,
            "updates": 0,
            "seed": "many",
            "select": {"method": "los"},
            "mix": {"method": "static"},
            "order": {"by": "length"},
            "weight": {"method": "loss", "methd": "uniform", "temperatures": 1, "delta": 0},
        },
    )
    assert set(found) == {
        "dataflex.warmup_steps",
        "dataflex.update_step",
        "dataflex.updates",
        "dataflex.seed",
        "dataflex.select.method",
        "dataflex.mix.proportions",
        "dataflex.order.method",
        "dataflex.weight.methd",
        "dataflex.weight.temperatures",
        "dataflex.weight.delta",
    }
    assert "did you mean 'update_steps'?" in found["dataflex.update_step"]
    assert "did you mean 'loss'?" in found["dataflex.select.method"]
    assert "delta_loss" in found["dataflex.select.method"]  # all known names
    assert "did you mean 'method'?" in found["dataflex.weight.methd"]
    assert "did you mean 'temperature'?" in found["dataflex.weight.temperatures"]
    assert "at least 1, or -1" in found["dataflex.updates"]
    assert "0" in found["dataflex.weight.delta"]
    assert "sort" in found["dataflex.order.method"]


@pytest.mark.parametrize("updates", [-2, 0, 1.5])
def test_updates_are_positive_or_open(tmp_path: Path, updates: float) -> None:
    assert set(problems(tmp_path, {"updates": updates, "select": {"method": "loss"}})) == {"dataflex.updates"}


@pytest.mark.parametrize("section", [[1, 2], "select", 3])
def test_a_section_that_is_no_mapping_is_refused(tmp_path: Path, section: Any) -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        load(tmp_path, section)


@pytest.mark.parametrize("given", ["loss", ["loss"], {}, {"method": None}, {"method": 3}])
def test_a_component_without_a_method_lists_the_known_ones(tmp_path: Path, given: Any) -> None:
    found = problems(tmp_path, {"select": given})
    assert any("delta_loss" in message and "random" in message for message in found.values())


def test_values_that_are_no_number_are_refused(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        section = {"select": {"method": "loss", "focus_weight": value}}
        assert set(problems(tmp_path, section)) == {"dataflex.select.focus_weight"}


# Reading the file


def test_missing_files_and_bad_overrides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file: .*nothing\.yaml"):
        read_yaml(tmp_path / "nothing.yaml", [])
    with pytest.raises(ConfigError, match=r"\.yaml, \.yml or \.json"):
        read_yaml(tmp_path / "run.toml", [])
    path = tmp_path / "run.yaml"
    path.write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"'dataflex.seed' is not of the form key=value"):
        read_yaml(path, ["dataflex.seed"])
    assert read_yaml(path, ["a=2", "b.c=x"]) == {"a": 2, "b": {"c": "x"}}


@pytest.mark.parametrize("text", ["a: [1\n", "a: 1\n  b: 2\n", "- 1\n- 2\n", "a: ${b}\n", "\x00"])
def test_unreadable_yaml_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_yaml(path, [])


def test_json_is_read_like_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**FLAT, "dataflex": {"select": {"method": "loss"}}}))
    config = load_config(path, ["dataflex.seed=1"])
    assert config.llamafactory == FLAT
    assert config.dataflex.seed == 1
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json, line 1, column 2: Expecting"):
        read_yaml(path, [])


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-5\n")
    assert read_yaml(path, ["x=2e-3"]) == {"learning_rate": 1e-5, "x": 2e-3}


# Components from elsewhere

PLUGIN = """
from dataflex import Selector, SelectorParams, register

class Params(SelectorParams):
    sign: int = 1

@register("selector", "{name}")
class Mine(Selector):
    Params = Params

    def score(self, ctx, candidates):
        return self.params.sign * candidates
"""


def test_a_plugin_file_is_found_beside_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_plugin.py").write_text(PLUGIN.format(name="beside"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    section = {"plugins": ["beside_plugin.py"], "select": {"method": "beside", "sign": -1, "rule": "sample"}}
    component = load(tmp_path, section).build_components().select[0].component
    assert component.name == "beside"
    assert component.family == "selector"
    assert component.params.sign == -1
    assert load(tmp_path, section).build_components().select[0].component.name == "beside"  # loading twice is no clash


def test_a_plugin_file_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "here_plugin.py").write_text(PLUGIN.format(name="here"))
    monkeypatch.chdir(here)
    section = {"plugins": ["here_plugin.py"], "select": {"method": "here"}}
    assert load(tmp_path, section).build_components().select[0].component.name == "here"


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no file 'broken_plugin.py'"),
        ("import nothing_of_that_name", "ModuleNotFoundError.*nothing_of_that_name"),
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
        (PLUGIN.format(name="loss"), "selector 'loss' is already registered by dataflex.selectors.loss.LossSelector"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "broken_plugin.py").write_text(text)
    for _ in range(2):  # and again: a failed import leaves nothing behind
        found = problems(tmp_path, {"plugins": ["broken_plugin.py"], "select": {"method": "loss"}})
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(found)


def test_entry_points_of_installed_packages_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_package() -> None:
        @registry.register("mixer", "packaged")
        class Packaged(Mixer):
            def mix(self, ctx):
                return ctx.pool.domain_sizes

    asked = []

    def points(group: str) -> list[SimpleNamespace]:
        asked.append(group)
        return [SimpleNamespace(name="x", value="package.module", load=load_package)]

    monkeypatch.setattr(registry, "entry_points", points)
    config = load(tmp_path, {"mix": {"method": "packaged", "initial_proportions": [1, 2]}})
    assert config.build_components().mix.params.initial_proportions == [1, 2]
    assert set(asked) == {"dataflex.components"}


def test_an_entry_point_that_cannot_be_loaded_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("their_methods", "their_package.methods", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    found = problems(tmp_path, {"select": {"method": "loss"}})
    assert "their_methods" in str(found)
    assert "No module named 'their_package'" in str(found)


def test_registering_needs_a_fitting_class() -> None:
    with pytest.raises(ConfigError, match=r"'selectr'; did you mean 'selector'\?"):
        registry.register("selectr", "x")
    with pytest.raises(ConfigError, match=r"Wrong is registered as mixer but does not extend Mixer"):

        @registry.register("mixer", "wrong")
        class Wrong(Selector):
            pass

    with pytest.raises(ConfigError, match="Params must extend"):

        @registry.register("selector", "bare")
        class Bare(Selector):
            class Params:
                pass

    assert "wrong" not in registry.available("mixer")
    assert "bare" not in registry.available("selector")


def test_a_name_can_be_registered_once_per_family() -> None:
    @registry.register("selector", "mine")
    class First(Selector):
        def score(self, ctx, candidates):
            return candidates

    registry.register("selector", "mine")(First)  # the same class again is fine
    with pytest.raises(ConfigError, match=r"selector 'mine' is already registered by .*First"):

        @registry.register("selector", "mine")
        class Second(Selector):
            def score(self, ctx, candidates):
                return -candidates

    assert registry.get("selector", "mine") is First

    @registry.register("mixer", "mine")
    class Other(Mixer):
        def mix(self, ctx):
            return ctx.pool.domain_sizes

    assert registry.get("mixer", "mine") is Other


def test_an_unknown_method_is_named_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"mixer 'proportionl'; did you mean 'proportional'\?.*random.*static"):
        registry.get("mixer", "proportionl")


def test_every_module_of_a_family_registers_the_method_of_its_name() -> None:
    for family in registry.FAMILIES:
        folder = Path(dataflex.__file__).parent / f"{family}s"
        modules = {path.stem for path in folder.glob("*.py") if not path.stem.startswith(("_", "base_"))}
        built_in = {name for name, cls in registry.available(family).items() if cls.__module__.startswith("dataflex.")}
        assert built_in == modules


def test_the_nearest_of_a_few_values_is_named() -> None:
    with pytest.raises(ConfigError, match=r"select\.projection: .*'count'.* got 'cout'; did you mean 'count'\?"):
        split_config({"dataflex": {"select": {"method": "less", "projection": "cout"}}})


def test_another_method_drops_the_parameters_of_the_old_method(tmp_path: Path) -> None:
    section = {"select": {"method": "loss", "focus": "low"}, "mix": {"method": "proportional", "temperature": 2.0}}
    config = load(tmp_path, section, "dataflex.select.method=random")
    assert config.dataflex is not None
    assert config.dataflex.select == {"method": "random"}
    assert config.dataflex.mix == {"method": "proportional", "temperature": 2.0}
    same = load(tmp_path, section, "dataflex.select.method=loss", "dataflex.select.focus_weight=2")
    assert same.dataflex is not None
    assert same.dataflex.select == {"method": "loss", "focus": "low", "focus_weight": 2}


def test_a_parameter_of_an_earlier_name_is_read_with_a_note() -> None:
    for select in ({"method": "less", "sketch": "rademacher"}, [{"method": "less", "sketch": "rademacher"}]):
        config = split_config({"dataflex": {"select": select, "warmup_steps": 2}})
        (params,) = [params for _, params in config.params.values()]
        assert params.projection == "rademacher"
        assert [
            note
            for note in config.notes
            if note.endswith("sketch is the earlier name of projection and is still accepted; write projection.")
        ]
    assert not split_config({"dataflex": {"select": {"method": "less", "projection": "count"}}}).notes
    with pytest.raises(
        ConfigError, match=r"dataflex.select.sketch: is the earlier name of projection, and both are given"
    ):
        split_config({"dataflex": {"select": {"method": "less", "sketch": "count", "projection": "count"}}})
    with pytest.raises(ConfigError, match="sketch"):  # loss never had it
        split_config({"dataflex": {"select": {"method": "loss", "sketch": "count"}}})


@pytest.mark.parametrize(
    "section, key, message",
    [
        (
            {"mix": {"method": "static"}},
            "dataflex.mix.proportions",
            "needed: share of each domain, any scale: list in domain order, mapping by name, or JSON file. "
            "For example: {code: 0.7, docs: 0.3}.",
        ),
        (
            {"mix": {"method": "schedule", "points": [{"step": 0}]}},
            "dataflex.mix.points.0.proportions",
            "needed: share of each domain, any scale: list, mapping or JSON file. For example: {code: 0.7, docs: 0.3}.",
        ),
        (
            {"ptx": {"dataset": "wiki"}},
            "dataflex.ptx.coefficient",
            "needed: factor of the text's token-mean loss. For example: 0.1.",
        ),
        (
            {"mix": {"method": "regmix", "losses": __file__}},
            "dataflex.mix.mixtures",
            "needed: CSV file: one row of weights for each small model, one column for each domain.",
        ),
    ],
)
def test_a_missing_required_parameter_is_named_with_its_description(
    section: dict[str, Any], key: str, message: str, tmp_path: Path
) -> None:
    assert problems(tmp_path, section) == {key: message}


def test_every_required_parameter_says_which_value_is_needed(tmp_path: Path) -> None:
    registry.load_components([])
    required = 0
    for family, kind in registry.CONFIG_KEYS.items():
        for method, cls in registry.available(kind).items():
            names = [name for name, field in cls.Params.model_fields.items() if field.is_required()]
            if not names:
                continue
            found = problems(tmp_path, {family: {"method": method}})
            for name in names:
                required += 1
                assert len(found[f"dataflex.{family}.{name}"]) > len("needed: ") + 10, (method, name)
    assert required > 5


@pytest.mark.parametrize("listed", [False, True])
def test_a_parameter_of_other_methods_is_named_with_those_methods(listed: bool, tmp_path: Path) -> None:
    entry = {"method": "loss", "max_overhead": 0.1}
    found = problems(tmp_path, {"select": [entry] if listed else entry})["dataflex.select.max_overhead"]
    assert found.startswith("loss has no max_overhead; these have: dpo_gap, el2n, external_margin, grand, ")
    assert found.endswith(" Parameters of loss: focus, focus_weight, quantiles, temperature.")
