"""Settings and methods that a preference stage cannot follow, and the losses that LLaMA-Factory does not compute."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.config import checks
from dataflex.config.checks import preference
from dataflex.config.checks.plan import planned
from dataflex.config.loading import split_config

SELECT = {"select": {"method": "loss"}}
MIX = {"mix": {"method": "uniform"}}
WEIGHT = {"weight": {"method": "loss"}}
PAIR = {"instruction": "a", "chosen": "b", "rejected": "c", "quality": 1.0}
LIKED = {"instruction": "a", "output": "b", "good": True}


@pytest.fixture
def keys(tmp_path: Path, all_packages: None) -> dict[str, Any]:
    data = tmp_path / "data"
    data.mkdir()
    sides = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": sides},
        "likes": {
            "file_name": "likes.json",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"},
        },
    }
    (data / "dataset_info.json").write_text(json.dumps(info))
    (data / "pairs.json").write_text(json.dumps([PAIR] * 400))
    (data / "likes.json").write_text(json.dumps([LIKED, {**LIKED, "good": False}] * 200))
    return {
        "model_name_or_path": "org/model",
        "stage": "dpo",
        "do_train": True,
        "dataset": "pairs",
        "dataset_dir": str(data),
        "output_dir": str(tmp_path / "out"),
    }


def found(keys: dict[str, Any], section: dict[str, Any] | None, **changes: Any) -> dict[str, str]:
    raw = {**keys, **({"dataset": "likes"} if changes.get("stage") == "kto" else {}), **changes}
    config = split_config({**raw, "dataflex": section} if section is not None else raw)
    return {problem.key: problem.message for problem in checks.problems_of(config)}


@pytest.mark.parametrize("stage", ["dpo", "rm", "kto"])
@pytest.mark.parametrize("section", [None, SELECT, MIX, WEIGHT, {"order": {"method": "shuffle"}}])
def test_a_good_run_has_no_problem_and_a_plan(keys: dict[str, Any], stage: str, section: dict[str, Any] | None) -> None:
    assert found(keys, section, stage=stage) == {}
    data = "likes" if stage == "kto" else "pairs"
    config = split_config({**keys, "stage": stage, "dataset": data, "val_size": 0.1, "dataflex": SELECT})
    plan = planned(config)
    assert plan.data is not None
    assert plan.data.domains == {data: 360}  # one sample for each row


@pytest.mark.parametrize("stage", ["dpo", "rm", "kto"])
@pytest.mark.parametrize(
    "key", ["packing", "use_dft_loss", "use_asft_loss", "use_eaft_loss", "label_smoothing_factor", "compute_accuracy"]
)
def test_a_key_of_another_stage_is_refused_with_a_section(keys: dict[str, Any], stage: str, key: str) -> None:
    value = 0.1 if key == "label_smoothing_factor" else True
    for section in (SELECT, WEIGHT):
        problems = found(keys, section, stage=stage, **{key: value})
        assert set(problems) == {key}
        assert f"no effect in stage {stage}" in problems[key]
    assert found(keys, None, stage=stage, **{key: value}) == {}  # as it is in LLaMA-Factory


@pytest.mark.parametrize("loss", ["hinge", "ipo", "kto_pair"])
def test_a_loss_that_the_trainer_does_not_compute_is_refused(
    keys: dict[str, Any], loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Use sigmoid, orpo or simpo" in found(keys, SELECT, pref_loss=loss)["pref_loss"]
    assert found(keys, None, pref_loss=loss) == {}
    assert found(keys, SELECT, pref_loss="orpo") == {}
    # A release of TRL whose loss follows the trainer's setting.
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "dpo_trainer.py").write_text("def dpo_loss(self, chosen_logps) -> tuple: ...")
    monkeypatch.setattr(
        preference, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    preference._is_always_sigmoid.cache_clear()
    try:
        assert found(keys, SELECT, pref_loss=loss) == {}
    finally:
        preference._is_always_sigmoid.cache_clear()


def test_the_trainer_computes_the_sigmoid_loss_for_every_name() -> None:
    """The reason for the check. If this fails, the installed releases compute these losses, and the check can go."""
    import torch
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    logps = [torch.tensor([-3.0, -2.0]), torch.tensor([-4.0, -1.0]), torch.tensor([-2.0, -2.5]), torch.zeros(2)]
    losses = {}
    for loss in ("sigmoid", "hinge", "ipo", "kto_pair"):
        trainer = CustomDPOTrainer.__new__(CustomDPOTrainer)
        trainer.finetuning_args = SimpleNamespace(use_ref_model=True)
        trainer.accelerator = SimpleNamespace(device="cpu")
        trainer.loss_type, trainer.beta, trainer.label_smoothing, trainer.bco_gemma = loss, 0.1, 0.0, 0.0
        trainer.reference_free, trainer.f_divergence_type = False, "reverse_kl"
        losses[loss] = trainer.compute_preference_loss(*logps)[0].tolist()
    assert losses["sigmoid"] == losses["hinge"] == losses["ipo"] == losses["kto_pair"]


@pytest.mark.parametrize("stage", ["dpo", "rm", "kto"])
@pytest.mark.parametrize(
    "section, text",
    [
        ({"weight": {"method": "rho1", "reference_model": "org/model"}}, "compares with the token losses"),
        ({"weight": {"method": "ss_token", "gamma": 0}}, "reads the attention of each token"),
        ({"select": {"method": "rho_loss", "reference_model": "org/model"}}, "compares with the token losses"),
        ({"select": {"method": "perplexity"}}, "reads means of token losses"),
        (
            {"select": {"method": "nice", "validation": ["pairs"], "reward": "exact_match"}},
            "reads means of token losses",
        ),
    ],
)
def test_methods_that_read_tokens_are_refused(
    keys: dict[str, Any], stage: str, section: dict[str, Any], text: str
) -> None:
    (key,) = section
    problems = found(keys, section, stage=stage)
    message = problems[f"dataflex.{key}.method"]
    assert text in message
    assert f"in stage {stage} a sample has one loss" in message
    assert "Use stage sft or pt" in message


def test_a_weighter_of_margins_needs_pairs(keys: dict[str, Any]) -> None:
    section = {"weight": {"method": "beta_dpo"}}
    for stage in ("dpo", "rm"):
        assert found(keys, section, stage=stage) == {}
    ((key, message),) = found(keys, section, stage="kto").items()
    assert key == "dataflex.weight.method"
    assert message == "'beta_dpo' reads the margins of pairs, and stage kto has no pairs; use stage dpo or rm."
    assert "stage sft has no pairs" in found(keys, section, stage="sft")["dataflex.weight.method"]


def test_ifd_needs_stage_sft(keys: dict[str, Any]) -> None:
    assert "use stage sft" in found(keys, {"select": {"method": "ifd"}})["dataflex.select.method"]


def test_a_fused_loss_is_refused_and_kernels_are_not(keys: dict[str, Any]) -> None:
    assert "single loss" in found(keys, {**WEIGHT, "fused_loss": True})["dataflex.fused_loss"]
    assert found(keys, WEIGHT, enable_liger_kernel=True) == {}
    for stage, fused in (("dpo", False), ("sft", True)):
        config = split_config({**keys, "stage": stage, "enable_liger_kernel": True, "dataflex": WEIGHT})
        assert config.fused_loss is fused


@pytest.mark.parametrize("stage", ["rm", "kto"])
def test_the_loss_of_pairs_can_be_set_in_dpo_alone(keys: dict[str, Any], stage: str) -> None:
    assert found(keys, WEIGHT, stage=stage, pref_loss="orpo") == {
        "pref_loss": f"has no effect in stage {stage}; remove it."
    }
    assert found(keys, WEIGHT, stage="dpo", pref_loss="orpo") == {}


def test_a_mean_over_desired_responses_cannot_be_weighed(keys: dict[str, Any]) -> None:
    assert "dataflex.weight cannot" in found(keys, WEIGHT, stage="kto", pref_ftx=0.1)["pref_ftx"]
    assert found(keys, SELECT, stage="kto", pref_ftx=0.1) == {}
    assert found(keys, WEIGHT, stage="dpo", pref_ftx=0.1) == {}


def test_a_responses_embedding_needs_labels(keys: dict[str, Any]) -> None:
    section = {"select": {"method": "rds_plus", "validation": ["pairs"], "embedding_text": "response"}}
    assert found(keys, section) == {}


def test_an_unknown_stage_names_those_that_work(keys: dict[str, Any]) -> None:
    problems = found(keys, SELECT, stage="ppo", reward_model="org/reward")
    assert problems == {"stage": "'ppo' is not supported with dataflex:; use one of sft, pt, dpo, rm, kto."}


def test_a_wrong_column_of_margins_is_named_with_those_of_the_pairs(keys: dict[str, Any]) -> None:
    section = {"select": {"method": "score_column", "column": "qualty"}}
    (message,) = found(keys, section).values()
    assert "the data set 'pairs' has no column 'qualty'; did you mean 'quality'" in message


@pytest.mark.parametrize(
    ("stage", "more", "named"),
    [("rm", {}, "stage rm"), ("sft", {}, "stage sft"), ("dpo", {"pref_loss": "simpo"}, "pref_loss: simpo")],
)
def test_values_of_a_reference_need_a_stage_with_a_reference(
    keys: dict[str, Any], stage: str, more: dict[str, Any], named: str
) -> None:
    section, key = {**WEIGHT, "precompute_ref_log_probs": True}, "dataflex.precompute_ref_log_probs"
    assert f"{named} has no reference model" in found(keys, section, stage=stage, **more)[key]
    for works in ("dpo", "kto"):
        assert found(keys, section, stage=works) == {}
