"""Differences between two configurations at a resume, and the effect of each."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.arguments import llamafactory_keys
from dataflex.config.changes import Change, differences, effect_of, snapshot
from dataflex.config.loading import split_config

MIX = {"mix": {"method": "static", "proportions": [0.5, 0.5]}, "update_steps": 4}
KEYS: dict[str, Any] = {"stage": "sft", "learning_rate": 1e-4, "dataset": "a,b", "dataflex": MIX}


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Return the differences as they are after the first one went through a checkpoint's JSON."""
    kept, given = (snapshot(split_config({**KEYS, **changes})) for changes in (before, now))
    return differences(json.loads(json.dumps(kept)), given)


def one(before: dict[str, Any], now: dict[str, Any]) -> Change:
    (change,) = changed(before, now)
    return change


def test_every_key_of_the_installed_release_is_in_the_table() -> None:
    unknown = [key for key in llamafactory_keys() if "does not know" in effect_of(key)[1]]
    assert not unknown


@pytest.mark.parametrize(
    ("before", "now", "effect"),
    [
        ({}, {"train_on_prompt": True}, "fixed"),
        ({}, {"finetuning_type": "full"}, "fixed"),
        ({}, {"optim": "sgd"}, "fixed"),
        ({}, {"cutoff_len": 64}, "fixed"),
        ({}, {"lora_rank": 16}, "fixed"),
        ({}, {"dataset": "a"}, "fixed"),
        ({"pure_bf16": True}, {}, "fixed"),
        ({}, {"learning_rate": 1e-3}, "kept"),
        ({}, {"weight_decay": 0.1}, "kept"),
        ({}, {"adam_beta2": 0.95}, "kept"),
        ({}, {"seed": 1}, "kept"),
        ({}, {"lr_scheduler_type": "cosine"}, "from here"),
        ({}, {"lr_scheduler_type": "reduce_lr_on_plateau"}, "fixed"),
        ({"lr_scheduler_type": "greedy"}, {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"a": 1}}, "kept"),
        ({}, {"warmup_steps": 10}, "from here"),
        ({"warmup_ratio": 0.1}, {"warmup_ratio": 0.2}, "from here"),
        ({}, {"warmup_ratio": 0.2}, "from here"),
        ({"warmup_ratio": 0.1}, {}, "from here"),
        ({}, {"max_steps": 10}, "from here"),
        ({}, {"save_steps": 10}, "from here"),
        ({}, {"max_grad_norm": 0.5}, "from here"),
        ({}, {"eval_dataset": "held"}, "from here"),
        ({}, {"a_key_of_a_later_release": 1}, "fixed"),
        ({}, {"dataflex": {**MIX, "seed": 1}}, "fixed"),
        ({}, {"dataflex": {**MIX, "update_steps": 5}}, "fixed"),
        ({}, {"dataflex": {**MIX, "warmup_steps": 5}}, "fixed"),
        ({}, {"dataflex": {**MIX, "train_steps": 5}}, "from here"),
        ({}, {"dataflex": {**MIX, "mix": {"method": "static", "proportions": [0.9, 0.1]}}}, "from here"),
        ({}, {"dataflex": {**MIX, "mix": {"method": "odm"}}}, "from here"),
        ({}, {"dataflex": {**MIX, "weight": {"method": "loss"}}}, "from here"),
    ],
)
def test_every_difference_has_its_effect(before: dict[str, Any], now: dict[str, Any], effect: str) -> None:
    assert one(before, now).effect == effect


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"learning_rate": "1e-4"}),  # YAML reads it as text
        ({}, {"dataset": ["a", "b"]}),
        ({}, {"dataset": "a, b"}),
        ({}, {"weight_decay": 0.0, "cutoff_len": 2048, "optim": "adamw_torch_fused", "flash_attn": "auto"}),
        ({}, {"val_size": 0, "eval_strategy": False, "report_to": "none", "packing": False, "warmup_ratio": 0.0}),
        ({"lora_rank": 4}, {"lora_rank": 4, "lora_alpha": 8}),
        ({}, {"lora_alpha": 16}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"stage": "pt"}, {"stage": "pt", "packing": True}),
        ({"eval_strategy": "steps"}, {"eval_strategy": "steps", "eval_steps": 500, "do_eval": True}),
        (
            {},
            {"output_dir": "elsewhere", "overwrite_output_dir": True, "hub_token": "hf_1", "dataloader_num_workers": 4},
        ),
        ({}, {"dataflex": {**MIX, "update_steps": None}}),  # that of the checkpoint
        ({}, {"dataflex": {**MIX, "updates": -1, "seed": 42}}),
    ],
)
def test_a_written_default_and_another_spelling_are_no_difference(before: dict[str, Any], now: dict[str, Any]) -> None:
    assert changed(before, now) == []
    if "update_steps" not in str(now):
        assert changed(now, before) == []


def test_another_method_is_one_difference() -> None:
    change = one({}, {"dataflex": {**MIX, "mix": {"method": "odm"}}})
    assert (change.key, change.before, change.now) == ("dataflex.mix.method", "static", "odm")
    change = one({}, {"dataflex": {"update_steps": 4, "select": {"method": "loss"}, "mix": MIX["mix"]}})
    assert (change.key, change.before, change.now) == ("dataflex.select.method", None, "loss")


def test_a_deepspeed_file_is_compared_by_its_content(tmp_path: Path) -> None:
    def file(name: str, **config: Any) -> dict[str, str]:
        (tmp_path / name).write_text(
            json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, **config})
        )
        return {"deepspeed": str(tmp_path / name)}

    first = file("a.json")
    assert changed(first, file("b.json")) == []
    assert one(first, file("c.json", zero_optimization={"stage": 3})).key == "deepspeed.zero_optimization.stage"
    clipping = one(first, file("d.json", gradient_clipping=0.5))
    assert (clipping.key, clipping.effect) == ("deepspeed.gradient_clipping", "from here")
    assert "deepspeed" in {change.key for change in changed(first, {}) if change.effect == "fixed"}


def test_a_model_is_compared_by_its_files(tmp_path: Path) -> None:
    def model(name: str, layers: int) -> dict[str, str]:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
        return {"model_name_or_path": str(tmp_path / name)}

    before = model("here", 2)
    assert changed(before, model("moved", 2)) == []
    assert one(before, model("other", 3)).effect == "fixed"
    kept = snapshot(split_config({**KEYS, **before}))
    (change,) = differences(kept, snapshot(split_config({**KEYS, **model("here", 4)})))
    assert "with other content" in change.values
    assert one({"model_name_or_path": "org/a"}, {"model_name_or_path": "org/b"}).effect == "fixed"


def test_a_snapshot_holds_no_secret() -> None:
    secrets = {"hub_token": "hf_secret", "hf_hub_token": "hf_secret", "swanlab_api_key": "hf_secret"}
    assert "hf_secret" not in json.dumps(snapshot(split_config({**KEYS, **secrets})))


def test_a_plugin_is_compared_by_its_source(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataflex import Weighter, register\n\n@register('weighter', 'mine_of_changes')\nclass Mine(Weighter):\n"
        "    def weigh(self, batch):\n        return batch.losses\n"
    )
    config = split_config({**KEYS, "dataflex": {**MIX, "plugins": [str(tmp_path / "mine.py")]}})
    before = snapshot(config)
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(tmp_path / "mine.py", tmp_path / "moved")
    section = config.dataflex.model_copy(update={"plugins": [str(moved)]})
    assert differences(before, snapshot(replace(config, dataflex=section))) == []
    with (tmp_path / "mine.py").open("a") as stream:
        stream.write("# another rule\n")
    (change,) = differences(before, snapshot(config))
    assert (change.key, change.effect) == ("dataflex.plugins", "from here")
    assert change.values == "mine.py up to the checkpoint, mine.py with other content now"
