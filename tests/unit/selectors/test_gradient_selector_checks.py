"""Checks of gradient selectors before loading: checkpoints, validation sets, overhead limits and parameters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.checks import problems_of
from dataflex.config.loading import split_config
from dataflex.errors import ConfigError
from dataflex.selectors import nice

pytestmark = pytest.mark.usefixtures("all_packages")

HELD = {"validation": "held"}
KEYS = {"model_name_or_path": "org/model", "stage": "sft", "do_train": True, "dataset": "a", "output_dir": "out"}


def problems(
    method: str, select: dict[str, Any], warmup_steps: int = 1, offline: bool = False, **changes: Any
) -> dict[str, str]:
    section = {"warmup_steps": warmup_steps, "select": {"method": method, **select}}
    config = split_config({**KEYS, "dataset_dir": "ONLINE", **changes, "dataflex": section})
    return {problem.key: problem.message for problem in problems_of(replace(config, offline=offline))}


def checkpoint(root: Path, name: str, *files: str) -> str:
    folder = root / name
    folder.mkdir()
    for file in files:
        (folder / file).write_text("{}")
    return str(folder)


STATE, MOMENTS = "trainer_state.json", "optimizer.pt"


@pytest.mark.parametrize("method", ["less", "tracin", "cluster_less"])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", "model.safetensors"])
def test_good_checkpoints_are_accepted(tmp_path: Path, method: str, weights: str) -> None:
    folder = checkpoint(tmp_path, "one", weights, STATE, MOMENTS)
    for preconditioner in ("none", "adam", "adam_less"):
        select = {**HELD, "checkpoints": [folder], "preconditioner": preconditioner}
        # Their moments are read from the checkpoints, so this run needs neither a step nor an Adam.
        assert problems(method, select, warmup_steps=0, optim="sgd") == {}


@pytest.mark.parametrize("method", ["less", "tracin", "cluster_less"])
def test_bad_checkpoints_are_refused(tmp_path: Path, method: str) -> None:
    good = checkpoint(tmp_path, "good", "adapter_model.safetensors", STATE, MOMENTS)
    empty = checkpoint(tmp_path, "empty", STATE, MOMENTS)
    unweighted = checkpoint(tmp_path, "unweighted", "model.safetensors", MOMENTS)
    bare = checkpoint(tmp_path, "bare", "model.safetensors", STATE)

    def message(*folders: str, **more: Any) -> str:
        given = {**HELD, "preconditioner": "adam", "checkpoints": list(folders), **more}
        return problems(method, given).get("dataflex.select.checkpoints", "")

    assert "no folder 'gone'" in message(good, "gone")
    assert "holds no model and no adapter" in message(good, empty)
    assert "no trainer_state.json" in message(good, unweighted)
    assert "Set checkpoint_weights" in message(unweighted)
    assert message(good, unweighted, checkpoint_weights=[1.0, 0.0]) == ""
    assert "no optimizer.pt" in message(good, bare)
    assert message(good, bare, preconditioner="none") == ""


@pytest.mark.parametrize(
    "weights, text",
    [
        ([1.0], "1 numbers for 2 checkpoints"),
        ([1.0, 1.0, 1.0], "3 numbers for 2 checkpoints"),
        ([2.0, -1.0], "must be 0 or more"),
        ([0.0, 0.0], "not all 0"),
        ([], "0 numbers for 2 checkpoints"),
        ([1.0, float("nan")], "finite"),
    ],
)
@pytest.mark.parametrize("method", ["less", "tracin"])
def test_bad_checkpoint_weights_are_refused(method: str, weights: list[float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        problems(method, {**HELD, "checkpoints": ["a", "b"], "checkpoint_weights": weights})


def test_weights_without_checkpoints_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 numbers for 0 checkpoints"):
        problems("less", {**HELD, "checkpoint_weights": [1.0]})
    with pytest.raises(ConfigError, match=r"dataflex\.select\.checkpoints"):
        problems("tracin", {**HELD, "checkpoints": []})


@pytest.mark.parametrize("method", ["less", "icons", "cluster_less", "greats"])
def test_validation_samples_are_needed(method: str) -> None:
    select = {} if method == "greats" else {"preconditioner": "none"}
    assert method in problems(method, select)["dataflex.select.validation"]
    assert problems(method, select, eval_dataset="held") == {}
    assert problems(method, select, val_size=0.2) == {}
    # What is split off for generation has no answers.
    assert "answers" in problems(method, select, val_size=0.2, predict_with_generate=True)["predict_with_generate"]
    assert problems(method, {**select, **HELD}, val_size=0.2, predict_with_generate=True) == {}


@pytest.mark.parametrize("validation", [["x", 3], 7, {"x": 1}, ["  "], ","])
def test_validation_must_be_a_list_of_names(validation: Any) -> None:
    if validation == ["x", 3]:
        assert problems("less", {"validation": validation}) == {}  # a data set may be called 3
        return
    with pytest.raises(ConfigError, match=r"dataflex\.select\.validation"):
        problems("less", {"validation": validation})


def test_scoring_without_training_needs_no_warmup() -> None:
    assert "dataflex.select.preconditioner" in problems("less", HELD, warmup_steps=0)
    assert problems("less", HELD, warmup_steps=0, offline=True) == {}


@pytest.mark.parametrize("cap", [0, -0.1, "much"])
@pytest.mark.parametrize("method", ["less", "icons", "el2n", "grand"])
def test_a_cap_must_be_positive(method: str, cap: Any) -> None:
    select = HELD if method in ("less", "icons") else {}
    with pytest.raises(ConfigError, match=r"dataflex\.select\.max_overhead"):
        problems(method, {**select, "max_overhead": cap})
    assert problems(method, {**select, "max_overhead": 0.25}) == {}


def test_cluster_less_takes_no_cap() -> None:
    found = problems("cluster_less", {**HELD, "max_overhead": 0.5})
    assert "representatives" in found["dataflex.select.max_overhead"]


@pytest.mark.parametrize(
    "method, wrong",
    [
        ("greats", {"candidate_factor": 1.0}),
        ("greats", {"group_size": 0}),
        ("greats", {"validation_size": 0}),
        ("greats", {"learning_rate": 0.0}),
        ("greats", {"max_overhead": 0.5}),
        ("cluster_less", {"cluster_size": 0}),
        ("cluster_less", {"representatives": 0}),
        ("cluster_less", {"cluster_iterations": 0}),
        ("less", {"rule": "best"}),
        ("less", {"temperature": 0}),
        ("tracin", {"checkpoints": "saves/warm"}),
    ],
)
def test_bad_parameters_are_named(method: str, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"dataflex\.select\.{name}"):
        problems(method, {**HELD, **({"checkpoints": ["a"]} if method == "tracin" else {}), **wrong})


def deepspeed_file(root: Path, stage: int, **more: Any) -> str:
    path = root / f"ds_z{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}, **more}))
    return str(path)


@pytest.mark.parametrize("method", ["less", "tracin", "cluster_less"])
def test_checkpoints_are_refused_with_a_sharded_model(tmp_path: Path, method: str) -> None:
    folder = checkpoint(tmp_path, "one", "adapter_model.safetensors", STATE, MOMENTS)

    def message(preconditioner: str, **changes: Any) -> str:
        given = {**HELD, "checkpoints": [folder], "preconditioner": preconditioner}
        return problems(method, given, **changes).get("dataflex.select.checkpoints", "")

    stages = [{"deepspeed": deepspeed_file(tmp_path, stage)} for stage in range(4)]
    for preconditioner in ("none", "adam", "adam_less"):
        for spread in (stages[3], {"fsdp": "full_shard auto_wrap"}, {"deepspeed": {"zero_optimization": {"stage": 3}}}):
            text = message(preconditioner, **spread)
            assert "DDP" in text
            assert "dataflex-cli score" in text
            assert ("fsdp" if "fsdp" in spread else "ZeRO-3") + " spreads" in text
            assert ("ZeRO-2" in text) == (preconditioner == "none")
    for stage in stages[:3]:
        assert message("none", **stage) == ""
        for preconditioner in ("adam", "adam_less"):
            text = message(preconditioner, **stage)
            assert "DDP" in text
            assert "preconditioner: none" in text
            assert "dataflex-cli score" in text
    for changes in ({}, {"fsdp": ""}, {"deepspeed": None}):
        assert message("adam", **changes) == ""
    # Scoring without training refuses deepspeed and fsdp by itself.
    assert message("adam", offline=True, **stages[2]) == ""


def test_deepspeed_without_checkpoints_is_accepted(tmp_path: Path) -> None:
    for stage in range(4):
        for preconditioner in ("none", "adam"):
            select = {**HELD, "preconditioner": preconditioner}
            assert problems("less", select, deepspeed=deepspeed_file(tmp_path, stage)) == {}
    inline = json.dumps({"zero_optimization": {"stage": 2}})
    assert problems("less", {**HELD, "preconditioner": "adam"}, deepspeed=inline) == {}
    assert problems("less", {**HELD, "preconditioner": "adam"}, deepspeed={"zero_optimization": "auto"}) == {}
    # Of a configuration that cannot be read only that is said.
    (tmp_path / "broken.json").write_text("{")
    for given in (str(tmp_path / "gone.json"), str(tmp_path / "broken.json")):
        assert set(problems("less", {**HELD, "preconditioner": "adam"}, deepspeed=given)) == {"deepspeed"}


READABLE = [
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_apex_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
]


def test_optimizers_without_readable_moments_are_refused(tmp_path: Path) -> None:
    from transformers.training_args import OptimizerNames

    names = [name.value for name in OptimizerNames]
    assert set(READABLE) <= set(names)
    for name in names:
        found = problems("less", {**HELD, "preconditioner": "adam"}, optim=name)
        assert set(found) == (set() if name in READABLE else {"dataflex.select.preconditioner"}), name
        assert problems("less", {**HELD, "preconditioner": "none"}, optim=name) == {}
        flattened = problems(
            "less", {**HELD, "preconditioner": "adam"}, optim=name, deepspeed=deepspeed_file(tmp_path, 2)
        )
        assert bool(flattened) == (name not in ("adamw_torch", "adamw_torch_fused")), name
    message = problems("less", {**HELD, "preconditioner": "adam"}, optim="adamw_torch_8bit")
    assert "optim: adamw_torch_8bit" in message["dataflex.select.preconditioner"]
    assert "paged_adamw_8bit" in message["dataflex.select.preconditioner"]


@pytest.mark.parametrize("kind, fine", [("AdamW", True), ("Adam", True), ("OneBitAdam", False), ("Lion", False)])
def test_an_optimizer_in_the_deepspeed_file_overrides_optim(tmp_path: Path, kind: str, fine: bool) -> None:
    given = deepspeed_file(tmp_path, 2, optimizer={"type": kind, "params": {"lr": "auto"}})
    found = problems("less", {**HELD, "preconditioner": "adam"}, deepspeed=given, optim="sgd")
    assert set(found) == (set() if fine else {"dataflex.select.preconditioner"})


def test_checkpoint_problems_do_not_hide_other_problems(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "one", "adapter_model.safetensors", STATE, MOMENTS)
    select = {**HELD, "checkpoints": [folder], "preconditioner": "adam"}
    for changes in ({"use_galore": True}, {"use_badam": True}, {"use_muon": True}, {"optim": "galore_adamw"}):
        (key,) = changes
        found = problems("less", select, **changes)
        assert set(found) == {"dataflex.select.preconditioner"}
        assert key in found["dataflex.select.preconditioner"]
        assert problems("less", {**select, "preconditioner": "none"}, **changes) == {}
    assert set(problems("less", {**select, "projection": "kronecker"})) == {"dataflex.select.projection"}


NICE = {**HELD, "reward": "exact_match", "generation_backend": "vllm"}


def test_a_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nice, "find_spec", lambda name: None)
    assert "pip install vllm" in problems("nice", NICE)["dataflex.select.generation_backend"]
    assert problems("nice", {**NICE, "generation_backend": "hf"}) == {}
    monkeypatch.setattr(nice, "find_spec", lambda name: object())
    assert problems("nice", NICE) == {}


def test_vllm_is_refused_with_a_sharded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nice, "find_spec", lambda name: object())
    for spread in ({"fsdp": "full_shard"}, {"deepspeed": deepspeed_file(tmp_path, 3)}):
        assert "generation_backend: hf" in problems("nice", NICE, **spread)["dataflex.select.generation_backend"]
        assert problems("nice", {**NICE, "generation_backend": "hf"}, **spread) == {}
    assert problems("nice", NICE, deepspeed=deepspeed_file(tmp_path, 2)) == {}


@pytest.mark.parametrize("method", ["less", "icons", "cluster_less", "greats", "nice"])
@pytest.mark.parametrize("key", ["packing", "neat_packing"])
def test_packed_validation_samples_are_refused(method: str, key: str) -> None:
    select: dict[str, Any] = {"reward": "exact_match"} if method == "nice" else {}
    found = problems(method, select, val_size=0.2, **{key: True})
    assert set(found) == {key}
    assert "eval_dataset" in found[key]
    assert "dataflex.select.validation" in found[key]
    assert problems(method, select, val_size=0.2, **{key: False}) == {}
    assert problems(method, select, eval_dataset="held", **{key: True}) == {}
    assert problems(method, {**select, **HELD}, val_size=0.2, **{key: True}) == {}
    if key == "packing":  # packs are what is trained on there
        assert problems(method, select, val_size=0.2, packing=True, stage="pt") == {}


def test_packing_matters_only_to_validation_samples() -> None:
    for method in ("loss", "grand", "el2n"):
        assert problems(method, {}, val_size=0.2, packing=True) == {}
