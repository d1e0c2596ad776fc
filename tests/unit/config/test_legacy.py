"""Flat keys of the earlier release, and the sections they are translated into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import earlier_release
from dataflex.api import registry
from dataflex.config.legacy import FLAT_KEYS
from dataflex.config.loading import RunConfig, split_config
from dataflex.errors import ConfigError

COMPONENTS = {
    "selectors": {
        "loss": {
            "name": "loss",
            "params": {"cache_dir": "../saves", "focus": "high", "focus_weight": 3, "score_batch_size": 8},
        },
        "random": {"params": {"seed": 7, "replacement": False}},
        "delta_loss": {"name": "delta_loss"},
        "less": {"params": {"gradient_type": "sgd", "proj_dim": 4096, "seed": 5, "save_interval": 16}},
        "cluster_less": {"params": {"gradient_type": "adam", "samples_per_cluster": 2, "embedding_layer": -1}},
        "nice": {"params": {"mc_samples": 4, "policy_model_path": "somewhere", "reward_model_path": "REWARD"}},
    },
    "mixers": {"static": {"params": {"proportions": [0.5, 0.5]}}, "random": {"params": {"seed": 5}}},
    "weighters": {"loss": {"params": {"strategy": "quadratic", "delta": 2.0}}},
    "reorders": {"sorting": {"params": {}}, "shuffle": {"params": {"seed": 9}}},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "components.yaml").write_text(yaml.safe_dump(COMPONENTS))
    return tmp_path


def split(base: Path, **keys: Any) -> RunConfig:
    return split_config({"stage": "sft", "dataset": "a,b", **keys}, source="run.yaml", base=base)


def section(config: RunConfig, *without: str) -> dict[str, Any]:
    """Return the translated section; every key is checked, those of ``without`` aside."""
    assert config.llamafactory == {"stage": "sft", "dataset": "a,b"}  # no flat key reaches LLaMA-Factory
    resolved = config.resolved()["dataflex"]
    assert resolved is not None
    return {
        key: value
        for key, value in resolved.items()
        if key not in {"plugins", "probe_batch_tokens", "fused_loss", "precompute_ref_log_probs", "ptx", *without}
    }


def problems(base: Path, **keys: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        split(base, **keys)
    return {problem.key: problem.message for problem in caught.value.problems}


def test_gradient_selectors_keep_their_meaning(base: Path, tmp_path: Path) -> None:
    path = base / "configs" / "components.yaml"
    path.write_text(path.read_text().replace("REWARD", str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")

    def chosen(method: str) -> dict[str, Any]:
        file = "configs/components.yaml"
        keys = {"train_type": "dynamic_select", "component_name": method, "components_cfg_file": file}
        resolved = split(base, **keys, warmup_step=2, update_step=4).resolved()["dataflex"]
        return resolved["select"]

    less = chosen("less")
    assert (less["preconditioner"], less["proj_dim"]) == ("none", 4096)
    clustered = chosen("cluster_less")
    assert (clustered["preconditioner"], clustered["representatives"]) == ("adam", 2)
    nice = chosen("nice")
    assert nice["samples"] == 4
    assert (nice["reward"]["type"], nice["reward"]["path"]) == ("model", str(tmp_path))


LOSS = {"method": "loss", "focus": "medium", "focus_weight": 5.0, "quantiles": [0.33, 0.66], "temperature": 1.0}


def test_dynamic_select_becomes_a_selector(base: Path) -> None:
    config = split(
        base,
        train_type="dynamic_select",
        component_name="loss",
        components_cfg_file="configs/components.yaml",
        warmup_step=10,
        update_step=20,
        update_times=3,
    )
    assert section(config) == {
        "warmup_steps": 10,
        "update_steps": 20,
        "updates": 3,
        "train_steps": None,
        "train_tokens": None,
        "train_seconds": None,
        "domain_column": None,
        "columns": [],
        "seed": 42,
        "select": {**LOSS, "focus": "high", "focus_weight": 3.0},
    }
    # what has no meaning here is said, not dropped in silence
    assert any("cache_dir" in note for note in config.notes)
    assert any("score_batch_size" in note for note in config.notes)


def test_flat_keys_equal_the_native_section(base: Path) -> None:
    schedule = {"warmup_step": 4, "update_step": 2, "update_times": -1}
    flat = split(base, train_type="dynamic_select", component_name="loss", **schedule)
    native = split(base, dataflex={"warmup_steps": 4, "update_steps": 2, "updates": -1, "select": {"method": "loss"}})
    assert flat.resolved() == native.resolved()


def test_train_type_static_is_a_plain_run(base: Path) -> None:
    for keys in ({"train_type": "static"}, {"warmup_step": 5, "components_cfg_file": "configs/components.yaml"}):
        config = split(base, **keys)
        assert config.dataflex is None
        assert config.llamafactory == {"stage": "sft", "dataset": "a,b"}


def test_train_step_and_the_seed_of_a_method_are_read(base: Path) -> None:
    config = split(
        base,
        train_type="dynamic_select",
        component_name="random",
        components_cfg_file="configs/components.yaml",
        update_step=5,
        update_times=-1,
        train_step=100,
    )
    assert section(config) == {
        "warmup_steps": 0,
        "update_steps": 5,
        "updates": -1,
        "train_steps": 100,
        "train_tokens": None,
        "train_seconds": None,
        "domain_column": None,
        "columns": [],
        "seed": 7,
        "select": {"method": "random"},
    }


def test_the_schedule_keys_have_the_earlier_defaults(base: Path) -> None:
    found = section(split(base, train_type="dynamic_select", component_name="loss", update_step=5, train_step=0))
    assert (found["warmup_steps"], found["updates"], found["train_steps"]) == (0, 1, None)
    found = section(split(base, train_type="dynamic_select", component_name="loss"))
    assert found["update_steps"] is None


def test_dynamic_weight_and_reorder_become_components(base: Path) -> None:
    file = {"components_cfg_file": "configs/components.yaml"}
    weight = section(split(base, train_type="dynamic_weight", component_name="loss", **file))["weight"]
    assert (weight["method"], weight["strategy"], weight["delta"]) == ("loss", "quadratic", 2.0)
    order = section(split(base, train_type="dynamic_reorder", component_name="sorting", **file))["order"]
    assert {key: order[key] for key in ("method", "by", "descending")} == {
        "method": "sort",
        "by": "loss",
        "descending": False,
    }
    shuffled = section(split(base, train_type="dynamic_reorder", component_name="shuffle", **file))
    assert shuffled["order"] == {"method": "shuffle"}
    assert shuffled["seed"] == 9


STATIC = {"train_type": "dynamic_mix", "component_name": "odm", "static_mix": True}


@pytest.mark.parametrize(
    "keys, mix",
    [
        (
            {"component_name": "random", "init_mixture_proportions": [0.7, 0.3]},
            {"method": "random", "initial_proportions": [0.7, 0.3], "concentration": 1.0},
        ),
        (
            {"component_name": "random", "init_mixture_proportions": "0.7, 0.3", "mixture_sample_rule": "mixture"},
            {"method": "random", "initial_proportions": [0.7, 0.3], "concentration": 1.0},
        ),
        ({"component_name": "random"}, {"method": "random", "initial_proportions": None, "concentration": 1.0}),
        (
            {"component_name": "static", "init_mixture_proportions": "[0.7,0.3]"},
            {"method": "static", "proportions": [0.7, 0.3]},
        ),
        ({**STATIC, "init_mixture_proportions": [0.9, 0.1]}, {"method": "static", "proportions": [0.9, 0.1]}),
        (
            {**STATIC, "init_mixture_proportions": [0.9, 0.1], "mixture_sample_rule": "mixture"},
            {"method": "static", "proportions": [0.9, 0.1]},
        ),
        (
            {**STATIC, "components_cfg_file": "configs/components.yaml"},
            {"method": "static", "proportions": [0.5, 0.5]},
        ),
        (STATIC, {"method": "uniform", "initial_proportions": None}),
        ({**STATIC, "mixture_sample_rule": "uniform"}, {"method": "uniform", "initial_proportions": None}),
        (
            {**STATIC, "mixture_sample_rule": "stratified", "init_mixture_proportions": [0.9, 0.1]},
            {"method": "proportional", "initial_proportions": None, "temperature": 1.0, "size": "samples"},
        ),
    ],
)
def test_dynamic_mix_becomes_a_mixer(base: Path, keys: dict[str, Any], mix: dict[str, Any]) -> None:
    assert section(split(base, **{"train_type": "dynamic_mix", **keys}))["mix"] == {
        "max_epochs_per_domain": None,
        **({"unit": "samples"} if mix["method"] == "static" else {}),
        **mix,
    }


@pytest.mark.parametrize(
    "keys, word",
    [
        ({"mixer_eval_dataset": "held"}, "mixer_eval_dataset"),
        ({"mixture_sample_rule": "uniform"}, "mixture_sample_rule"),
        ({"freeze_gate": True}, "freeze_gate"),
        ({"early_stopping_min_delta": 0.1}, "early_stopping_min_delta"),
        ({"components_cfg_file": "configs/absent.yaml"}, "configs/absent.yaml"),
        ({"components_cfg_file": "configs/components.yaml", "component_name": "proportional"}, "mixers.proportional"),
    ],
)
def test_a_key_without_effect_leaves_a_note(base: Path, keys: dict[str, Any], word: str) -> None:
    config = split(base, **{"train_type": "dynamic_mix", "component_name": "random", **keys})
    assert len(config.notes) == 1
    assert word in config.notes[0]


def test_initial_proportions_that_a_rule_makes_useless_leave_a_note(base: Path) -> None:
    config = split(
        base,
        train_type="dynamic_mix",
        component_name="random",
        mixture_sample_rule="uniform",
        init_mixture_proportions=[0.9, 0.1],
    )
    assert section(config)["mix"]["initial_proportions"] is None
    assert any("init_mixture_proportions" in note for note in config.notes)


def test_mixture_keys_of_another_family_leave_a_note(base: Path) -> None:
    config = split(
        base,
        train_type="dynamic_select",
        component_name="loss",
        init_mixture_proportions=[1, 1],
        mixture_sample_rule="mixture",
        mixer_eval_dataset="held",
    )
    for name in ("init_mixture_proportions", "mixture_sample_rule", "mixer_eval_dataset"):
        assert any(name in note for note in config.notes)


@pytest.mark.parametrize(
    "keys, key, text",
    [
        ({"train_type": "dynamic_selct"}, "train_type", "did you mean 'dynamic_select'"),
        ({"train_type": "dynamic_legos"}, "train_type", "did you mean 'dynamic_lego'"),
        ({"train_type": "dynamic_lego"}, "component_name", "must be the name of a pipeline"),
        ({"train_type": "dynamic_select"}, "component_name", "needed"),
        ({"train_type": "dynamic_select", "component_name": "Loss"}, "dataflex.select.method", "did you mean 'loss'"),
        ({"train_type": "dynamic_select", "component_name": "custom"}, "component_name",
         "dataflex: {plugins: [my_selector.py], select: {method: my_selector}, warmup_steps: 0, updates: 1}"),
        ({"train_type": "dynamic_weight", "component_name": "custom"}, "component_name",
         '@register("weighter", "my_weighter")'),
        ({"train_type": "dynamic_select", "component_name": "loss", "update_step": 0}, "update_step", "at least 1"),
        ({"train_type": "dynamic_select", "component_name": "loss", "update_times": 0}, "dataflex.updates", "1, or -1"),
        ({"train_type": "dynamic_mix", "component_name": "random", "mixture_sample_rule": "mixtre"},
         "mixture_sample_rule", "did you mean 'mixture'"),
        ({"train_type": "dynamic_mix", "component_name": "random", "init_mixture_proportions": "a,b"},
         "init_mixture_proportions", "list of numbers"),
        ({"train_type": "dynamic_select", "component_name": "loss", "dataflex": {}}, "train_type", "be combined"),
    ],
)  # fmt: skip
def test_problems_name_the_key_the_user_wrote(base: Path, keys: dict[str, Any], key: str, text: str) -> None:
    found = problems(base, **keys)
    assert set(found) == {key}
    assert text in found[key]


@pytest.mark.parametrize(
    "bucket, method, name, value",
    [
        ("mixers", "doremi", "reference_model_path", "/path/to/dataflex_saves/Qwen2.5-0.5B/result/checkpoint-xxx"),
        ("mixers", "doremi", "reference_model_path", "saves/proxy/checkpoint-xxx"),
        ("selectors", "nice", "reward_model_path", "/path/to/your/reward_model"),
    ],
)
def test_placeholders_of_the_template_are_named(base: Path, bucket: str, method: str, name: str, value: str) -> None:
    (base / "own.yaml").write_text(yaml.safe_dump({bucket: {method: {"params": {name: value}}}}))
    kind = "dynamic_mix" if bucket == "mixers" else "dynamic_select"
    found = problems(base, train_type=kind, component_name=method, components_cfg_file="own.yaml")
    assert set(found) == {"components_cfg_file"}
    assert (
        f"{bucket}.{method}.params.{name} is still the template's placeholder {value!r}" in found["components_cfg_file"]
    )


def test_parameters_of_the_shipped_template_give_a_note_or_name_the_missing_key(base: Path) -> None:
    shipped = {
        "selectors": {"nice": {"params": {"reward_model_backend": "local_vllm", "reward_backend_params": {"api": {}}}}},
        "mixers": {"odm": {"params": {"alpha": 0.9, "num_eval_samples": 500, "eval_batch_size": 8}}},
    }
    (base / "own.yaml").write_text(yaml.safe_dump(shipped))
    given = {"components_cfg_file": "own.yaml"}
    found = problems(base, train_type="dynamic_select", component_name="nice", **given)
    assert set(found) == {"dataflex.select.reward"}
    config = split(base, train_type="dynamic_mix", component_name="odm", **given)
    assert any("num_eval_samples" in note for note in config.notes)


def test_a_registered_method_of_the_name_of_the_template_is_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type("Own", (registry.get("selector", "random"),), {"name": "custom"})
    monkeypatch.setitem(registry._registered, ("selector", "custom"), cls)
    found = section(split(base, train_type="dynamic_select", component_name="custom"))
    assert found["select"] == {"method": "custom"}


def test_problems_of_flat_keys_are_reported_together(base: Path) -> None:
    (base / "bad.yaml").write_text("a: [")
    found = problems(
        base,
        train_type="dynamic_mix",
        component_name="random",
        components_cfg_file="bad.yaml",
        update_step=0,
        mixture_sample_rule="mixtre",
    )
    assert set(found) == {"components_cfg_file", "update_step", "mixture_sample_rule"}


def test_unknown_parameters_in_the_components_file_are_problems(base: Path) -> None:
    (base / "own.yaml").write_text(yaml.safe_dump({"selectors": {"loss": {"params": {"focus_wieght": 3}}}}))
    found = problems(base, train_type="dynamic_select", component_name="loss", components_cfg_file="own.yaml")
    assert "did you mean 'focus_weight'" in found["dataflex.select.focus_wieght"]


def test_no_flat_key_is_passed_to_llamafactory() -> None:
    raw = {"stage": "sft", **dict.fromkeys(FLAT_KEYS), "train_type": "static"}
    assert split_config(raw).llamafactory == {"stage": "sft"}


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """Return a folder with the earlier release's components file, and the files that it names."""
    text = yaml.safe_dump(earlier_release.components()).replace("REFERENCE", "reference")
    for name in ("top_indices.npy", "tsds_probs.npy"):
        np.save(tmp_path / name, np.zeros((1, 1)))
        text = text.replace(f" {name}", f" {tmp_path / name}")
    (tmp_path / "components.yaml").write_text(text)
    return tmp_path


def given(shipped: Path, name: str, **keys: Any) -> RunConfig:
    return split(shipped, **{**earlier_release.FILES[name], "components_cfg_file": "components.yaml", **keys})


@pytest.mark.parametrize("name", earlier_release.FILES)
def test_every_example_of_the_earlier_release_is_understood(shipped: Path, name: str) -> None:
    config = given(shipped, name)
    assert set(config.llamafactory) == {"stage", "dataset"}
    assert config.resolved()["dataflex"] is not None
    config.build_components()


def test_selectors_that_read_precomputed_files_keep_their_meaning(shipped: Path) -> None:
    near, tsds = (given(shipped, f"selectors/{name}").resolved()["dataflex"]["select"] for name in ("near", "tsds"))
    assert (near["method"], near["indices_path"]) == ("near", str(shipped / "top_indices.npy"))
    assert (tsds["method"], tsds["probs_path"]) == ("tsds", str(shipped / "tsds_probs.npy"))


def test_coincide_keeps_its_meaning(shipped: Path) -> None:
    config = given(shipped, "selectors/coincide")
    found = config.resolved()["dataflex"]
    select = found["select"]
    assert (select["clusters"], select["cluster_iterations"], select["tau"], found["seed"]) == (10000, 10, 1.0, 42)
    for name in ("density_chunk", "single_member_density", "clustering_batch_size"):
        assert any(f"selectors.coincide.params.{name}" in note for note in config.notes)


def test_weighters_have_the_defaults_of_their_release(shipped: Path) -> None:
    adapt = given(shipped, "weighters/adapt").resolved()["dataflex"]["weight"]
    assert (adapt["tau"], adapt["anchor_every"], adapt["center_samples"], adapt["anchors"]) == (1.0, 50, 0, None)
    joint = given(shipped, "weighters/joint_update_aware").resolved()["dataflex"]["weight"]
    wanted = {
        "beta": 0.1,
        "tau": 0.05,
        "iterations": 5,
        "damping": 1.0,
        "anchors": 1,
        "pooling": "last",
        "mode": "full",
    }
    assert {key: joint[key] for key in wanted} == wanted
    assert (joint["anchor_every"], joint["center_samples"], joint["layer"]) == (50, 0, -1)
    bare = split(shipped, train_type="dynamic_weight", component_name="adapt").resolved()["dataflex"]["weight"]
    assert bare["tau"] == 1.0
    own = {"weighters": {"joint_update_aware": {"params": {"mode": "uniform", "tau": 1, "normalize": False}}}}
    (shipped / "own.yaml").write_text(yaml.safe_dump(own))
    config = given(shipped, "weighters/joint_update_aware", components_cfg_file="own.yaml")
    assert config.resolved()["dataflex"]["weight"]["method"] == "uniform"


def nice(shipped: Path, **params: Any) -> RunConfig:
    own = {"selectors": {"nice": {"params": {"reward_backend_params": earlier_release.BACKENDS, **params}}}}
    (shipped / "own.yaml").write_text(yaml.safe_dump(own))
    return given(shipped, "selectors/nice", components_cfg_file="own.yaml")


def test_reward_backends_of_nice_become_judges(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DF_API_KEY", "key")
    config = nice(shipped, reward_model_backend="local_vllm")
    reward = config.resolved()["dataflex"]["select"]["reward"]
    assert (reward["type"], reward["base_url"]) == ("judge", "http://localhost:8000/v1")
    assert reward["model"] == "meta-llama/Llama-3.1-8B"
    assert reward["options"] == {"temperature": 0.0, "top_p": 0.9, "max_tokens": 512, "top_k": 40, "seed": 42}
    (note,) = [note for note in config.notes if "local_vllm" in note]
    assert "vllm serve meta-llama/Llama-3.1-8B --tensor-parallel-size 1 --gpu-memory-utilization 0.9" in note
    reward = nice(shipped, reward_model_backend="api").resolved()["dataflex"]["select"]["reward"]
    assert (reward["type"], reward["base_url"]) == ("judge", "https://api.openai.com/v1")
    assert (reward["model"], reward["api_key_env"], reward["options"]) == ("gpt-4o", "DF_API_KEY", {"temperature": 0.0})
    (shipped / "config.json").write_text("{}")
    model = nice(shipped, reward_model_backend="api", reward_model_path=str(shipped))
    assert any("reward_model_backend is accepted and has no effect" in note for note in model.notes)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"reward_model_backend": "locl_vllm"}, "did you mean 'local_vllm'"),
        (
            {
                "reward_model_backend": "api",
                "reward_backend_params": {"api": {"api_url": "u", "model_name": "m", "api_key": "sk-123"}},
            },
            "name of an environment variable",
        ),
    ],
)
def test_reward_backends_of_nice_without_an_equivalent_are_refused(
    shipped: Path, params: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        nice(shipped, **params)


def test_train_step_overrides_max_steps(shipped: Path) -> None:
    config = given(shipped, "mixers/dynamic_moe")
    assert "max_steps" not in config.llamafactory
    assert config.resolved()["dataflex"]["train_steps"] == 2000
    assert any(note.startswith("max_steps: 2000 has no effect: train_step") for note in config.notes)
    kept = given(shipped, "mixers/dynamic_moe", train_step=0)
    assert kept.llamafactory["max_steps"] == 2000


def test_a_pipeline_becomes_a_section_of_several_families(shipped: Path) -> None:
    config = given(shipped, "pipelines/hierarchical")
    found = config.resolved()["dataflex"]
    assert (found["warmup_steps"], found["update_steps"], found["updates"], found["train_steps"]) == (100, 50, -1, 500)
    first, second = found["select"]
    assert (first["method"], first["keep"], first["every"], second["method"]) == ("loss", 0.5, 4, "random")
    assert (found["mix"]["method"], found["order"]["method"]) == ("odm", "saw")
    assert found["weight"]["method"] == "loss"
    found = given(shipped, "pipelines/select_then_reorder").resolved()["dataflex"]
    assert (found["select"]["method"], found["select"].get("keep")) == ("less", None)


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([], "must be the name of a pipeline"),
        ([{"family": "selectr", "component": "loss"}], "did you mean 'selector'"),
        ([{"family": "selector"}], "must be the name of a method"),
        ([{"family": "selector", "component": "loss", "evry": 3}], "did you mean 'every'"),
        ([{"family": "mixer", "component": "odm"}] * 2, "several stages of family mix"),
        ([{"family": "mixer", "component": "odm", "enabled": False}], "no stage is enabled"),
        ([{"family": "selector", "component": "loss", "mode": "drew"}], "unknown mode 'drew'"),
        ([{"family": "selector", "component": name} for name in ("loss", "random")], "must be the last selector"),
        (["loss"], "must be a mapping"),
    ],
)
def test_pipelines_without_an_equivalent_are_refused(shipped: Path, stages: list[Any], text: str) -> None:
    (shipped / "own.yaml").write_text(yaml.safe_dump({"pipelines": {"mine": {"stages": stages}}}))
    keys = {"train_type": "dynamic_lego", "component_name": "mine", "components_cfg_file": "own.yaml"}
    found = problems(shipped, **keys)
    assert any(text in message for message in found.values()), found


def test_stages_may_begin_and_act_at_times_of_their_own(shipped: Path) -> None:
    stages = [
        {"family": "selector", "component": "loss", "warmup_step": 4, "every": 6},
        {"family": "mixer", "component": "random", "warmup_step": 8, "every": 4, "params": {"seed": 5}},
        {"family": "weighter", "component": "loss", "every": 3},
    ]
    (shipped / "own.yaml").write_text(yaml.safe_dump({"pipelines": {"mine": stages}}))
    keys = {"train_type": "dynamic_lego", "component_name": "mine", "components_cfg_file": "own.yaml"}
    config = split(shipped, **keys)
    found = config.resolved()["dataflex"]
    assert (found["warmup_steps"], found["update_steps"], found["seed"]) == (8, 2, 5)
    assert (found["select"]["every"], found["weight"]["every"]) == (3, 3)
    assert any("all stages begin after 8" in note for note in config.notes)
    assert any("mix decides in every round, every 2 steps" in note for note in config.notes)
