"""LLaMA-Factory's own parsing: errors name keys, a dry run leaves no trace, ``train`` and ``check`` agree."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest

import tiny
from dataflex.config.loading import split_config
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory import parsing


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    tiny.make_data(tmp_path / "data", {"alpha": 8})
    return tiny.arguments(tmp_path / "model", tmp_path / "data", tmp_path / "out")


def error(keys: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parsing.dry_run(split_config({**keys, **changes}, source="run.yaml"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named", "said"),
    [
        # The message names the key, the condition does, or only what is given without which it does not occur.
        ({"finetuning_type": "full", "pissa_init": True}, "pissa_init", "only valid for LoRA"),
        ({"use_galore": True}, "use_galore, finetuning_type", "Cannot use LoRA with GaLore"),
        ({"quantization_device_map": "auto"}, "quantization_device_map", "device map"),
        ({"fsdp_config": {"min_num_params": "many"}}, "fsdp_config", "TypeError"),
        ({"accelerator_config": {"nope": 1}}, "accelerator_config", "nope"),
    ],
)
def test_an_error_names_the_keys_it_is_about(
    keys: dict[str, Any], changes: dict[str, Any], named: str, said: str
) -> None:
    text = error(keys, **changes)
    prefix, _, rest = text.partition(": LLaMA-Factory does not accept")
    assert prefix.startswith("run.yaml: ")
    assert set(named.split(", ")) <= set(prefix.removeprefix("run.yaml: ").split(", "))
    assert len(prefix.split(", ")) <= 4
    assert said in rest


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"rate": 1}}, "lr_scheduler_kwargs"),
        ({"optim_args": "momentum"}, "optim_args"),
        ({"optim": "sgd", "optim_args": "momentum=high"}, "optim_args"),
        ({"optim": "ademamix", "optim_args": "alpha=high"}, "optim_args"),
    ],
)
def test_a_schedule_or_optimizer_that_cannot_be_built_names_its_key(
    keys: dict[str, Any], changes: dict[str, Any], key: str
) -> None:
    assert error(keys, **changes).startswith(f"run.yaml: {key}: ")


def test_schedules_and_optimizers_with_fitting_arguments_are_accepted(keys: dict[str, Any]) -> None:
    for changes in (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "val_size": 0.1},
        {"optim": "ademamix", "optim_args": "alpha=4.0"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
    ):
        parsing.dry_run(split_config({**keys, **changes}))


def test_a_dry_run_leaves_no_trace(
    keys: dict[str, Any], capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    parsing.dry_run(split_config(keys))  # importing is not what is looked at
    capfd.readouterr()
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "INFO")
    before = dict(os.environ), logging.root.manager.disable, transformers.utils.logging.get_verbosity()
    states = random.getstate(), torch.get_rng_state()
    files = sorted(tmp_path.rglob("*"))
    spread = {"deepspeed": {"zero_optimization": {"stage": 3}}, "fsdp": "full_shard", "bf16": True, "seed": 9}
    for changes in ({}, {**spread, "fsdp": ""}, {"fsdp": "full_shard"}, {"tf32": True}):
        parsing.dry_run(split_config({**keys, **changes}))
    error(keys, interleave_probs="1")
    assert (dict(os.environ), logging.root.manager.disable, transformers.utils.logging.get_verbosity()) == before
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert not torch.distributed.is_initialized()
    assert sorted(tmp_path.rglob("*")) == files
    assert capfd.readouterr() == ("", "")


def test_a_missing_capability_of_the_machine_is_a_note(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has an accelerator")
    monkeypatch.delenv("FORCE_TORCHRUN", raising=False)
    for key in ("bf16", "fp16", "tf32", "pure_bf16"):
        (note,) = parsing.dry_run(split_config({**keys, key: True}))
        assert note.startswith(f"{key}: ")
    for changes in ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {"fsdp": "full_shard"}):
        (note,) = parsing.dry_run(split_config({**keys, **changes}))
        assert "FORCE_TORCHRUN=1" in note
        monkeypatch.setenv("FORCE_TORCHRUN", "1")
        assert parsing.dry_run(split_config({**keys, **changes})) == []
        monkeypatch.delenv("FORCE_TORCHRUN")
    assert parsing.dry_run(split_config({**keys, "bf16": True, "use_cpu": True})) == []


def test_train_refuses_bad_arguments_before_the_model_is_loaded(keys: dict[str, Any]) -> None:
    from llamafactory.hparams import get_train_args

    def refused(**changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            parsing.parse_to_train(get_train_args, {**keys, "use_cpu": True, **changes}, "run.yaml")
        return str(caught.value)

    assert refused(optim_args="momentum") == error(keys, optim_args="momentum")
    assert refused(mask_history=True, train_on_prompt=True) == error(keys, mask_history=True, train_on_prompt=True)
    assert "FORCE_TORCHRUN=1" in refused(fsdp="full_shard")
