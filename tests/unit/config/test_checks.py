"""Checks before anything is loaded: LLaMA-Factory's keys, folders, data sets, and keys that exclude each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dataflex import Losses, Needs
from dataflex.api import registry
from dataflex.api.mixer import Mixer, MixerParams
from dataflex.config import checks
from dataflex.config.arguments import llamafactory_keys
from dataflex.config.loading import split_config
from dataflex.selectors.base_gradients import ValidationParams

SELECT = {"select": {"method": "loss"}}
MIX = {"mix": {"method": "uniform"}}
ORDER = {"order": {"method": "shuffle"}}
WEIGHT = {"weight": {"method": "loss"}}


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_packages: None) -> dict[str, Any]:
    """LLaMA-Factory's keys of a run without a problem."""
    for name in ("USE_RAY", "USE_MCA", "USE_V1", "ALLOW_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)
    data = tmp_path / "data"
    data.mkdir()
    info = {"a": {"file_name": "a.json"}, "b": {"file_name": "b.json"}, "hub": {"hf_hub_url": "x/y", "file_name": "z"}}
    (data / "dataset_info.json").write_text(json.dumps({**info, "lost": {"file_name": "lost.json"}}))
    for name in ("a.json", "b.json"):
        (data / name).write_text(json.dumps([{"instruction": "Say yes.", "input": "", "output": "Yes."}] * 400))
    return {
        "model_name_or_path": "org/model",
        "stage": "sft",
        "do_train": True,
        "dataset": "a, b",
        "dataset_dir": str(data),
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 1e-4,
    }


def found(keys: dict[str, Any], section: dict[str, Any] | None, **changes: Any) -> dict[str, str]:
    raw = {name: value for name, value in {**keys, **changes}.items() if value is not None}
    config = split_config({**raw, "dataflex": section} if section is not None else raw)
    return {problem.key: problem.message for problem in checks.problems_of(config)}


@pytest.mark.parametrize("section", [None, SELECT, MIX, ORDER, WEIGHT, {**SELECT, **MIX, **ORDER, **WEIGHT}])
def test_a_good_run_has_no_problem(keys: dict[str, Any], section: dict[str, Any] | None) -> None:
    assert found(keys, section) == {}


def test_a_word_that_yaml_reads_as_true_or_false_is_named(keys: dict[str, Any]) -> None:
    assert "reads no and off as false" in found(keys, SELECT, run_name=False)["run_name"]
    assert "reads yes and on as true" in found(keys, SELECT, run_name=True)["run_name"]
    assert "no, steps" in found(keys, SELECT, logging_strategy=True)["logging_strategy"]
    assert found(keys, SELECT, eval_strategy=False) == {}


def test_a_data_set_named_twice_is_refused(keys: dict[str, Any]) -> None:
    assert found(keys, SELECT, dataset="a,b,a") == {
        "dataset": "'a' is named 2 times; name it once, and set its share with dataflex.mix."
    }
    assert found(keys, WEIGHT, dataset="a,b,a") == {}  # the data path is LLaMA-Factory's own


def test_a_remote_data_set_needs_no_file(keys: dict[str, Any]) -> None:
    assert found(keys, SELECT, dataset="hub,a") == {}
    assert found(keys, SELECT, dataset_dir="ONLINE", dataset="org/data") == {}
    assert found(keys, SELECT, dataset_dir="/nowhere", tokenized_path="/tmp/tokens") == {}


def test_a_model_folder_without_a_config_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    assert "config.json" in found(keys, None, model_name_or_path=str(tmp_path))["model_name_or_path"]
    (tmp_path / "config.json").write_text("{}")
    assert found(keys, None, model_name_or_path=str(tmp_path)) == {}


@pytest.mark.parametrize(
    "changes, key, text",
    [
        ({"model_name_or_path": None}, "model_name_or_path", "needed"),
        ({"output_dir": None}, "output_dir", "needed"),
        ({"dataset": None}, "dataset", "needed"),
        ({"dataset": "a,c"}, "dataset", "unknown data set 'c'"),
        ({"dataset": "a,lost"}, "dataset", "lost.json"),
        ({"eval_dataset": "held"}, "eval_dataset", "unknown data set 'held'"),
        ({"dataset_dir": "/nowhere"}, "dataset_dir", "the folder '/nowhere' does not exist; name the folder"),
        ({"dataset_dir": "/"}, "dataset_dir", "there is no dataset_info.json in '/'"),
        ({"dataset_dir": "gone"}, "dataset_dir", f"the folder 'gone' does not exist in {str(Path.cwd())!r}"),
        ({"lerning_rate": 1}, "lerning_rate", "did you mean 'learning_rate'"),
        ({"dataflx": {}}, "dataflx", "did you mean 'dataflex'"),
    ],
)
def test_problems_of_runs_with_and_without_a_section_are_named(
    keys: dict[str, Any], changes: dict[str, Any], key: str, text: str
) -> None:
    for section in (None, SELECT):
        problems = found(keys, section, **changes)
        assert set(problems) == {key}
        assert text in problems[key]


def test_an_output_dir_below_a_file_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in found(keys, None, output_dir=str(tmp_path / "file" / "run"))["output_dir"]


def test_a_broken_dataset_info_is_named(keys: dict[str, Any]) -> None:
    (Path(keys["dataset_dir"]) / "dataset_info.json").write_text("{")
    assert "not valid JSON" in found(keys, SELECT)["dataset_dir"]


def test_extra_arguments_can_be_allowed(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    assert found(keys, None, lerning_rate=1) == {}


def test_keys_of_llamafactory_and_of_the_trainer_are_known() -> None:
    known = llamafactory_keys()
    assert {"cutoff_len", "lora_rank", "stage", "template", "num_beams", "per_device_train_batch_size", "seed"} <= known
    assert {"predict_with_generate", "model_name_or_path", "quantization_bit", "ray_num_workers"} <= known
    assert "dataflex" not in known


EVERY = [SELECT, MIX, ORDER, WEIGHT]
PLANNING = [SELECT, MIX, ORDER]


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({"stage": "ppo"}, EVERY),
        ({"stage": "pt"}, []),
        ({"use_hyper_parallel": True}, EVERY),
        ({"auto_find_batch_size": True}, EVERY),
        ({"auto_find_batch_size": False}, []),
        ({"streaming": True}, PLANNING),
        ({"mix_strategy": "interleave_under"}, PLANNING),
        ({"mix_strategy": "concat"}, []),
        ({"disable_shuffling": True}, [MIX, ORDER]),
        ({"train_sampling_strategy": "sequential"}, [MIX, ORDER]),
        ({"train_sampling_strategy": "group_by_length"}, [ORDER]),
        ({"train_sampling_strategy": "random"}, []),
        ({"val_size": 100}, PLANNING),
        ({"val_size": 0.1}, []),
        ({"val_size": 100, "dataset": "a"}, []),
        *[({key: True}, [WEIGHT]) for key in checks.SPECIAL_LOSSES if key != "label_smoothing_factor"],
        ({"label_smoothing_factor": 0.1}, [WEIGHT]),
        ({"label_smoothing_factor": 0.0}, []),
        ({"use_dft_loss": True}, []),
        ({"use_eaft_loss": True}, []),
        ({"enable_liger_kernel": True}, []),
    ],
)
def test_keys_that_do_not_go_together_are_refused(
    keys: dict[str, Any], changes: dict[str, Any], refused: list[dict[str, Any]]
) -> None:
    (name,) = [key for key in changes if key != "dataset"] or ["dataset"]
    assert found(keys, None, **changes) == {}
    for section in EVERY:
        problems = found(keys, section, **changes)
        assert set(problems) == ({name} if section in refused else set())


@pytest.mark.parametrize("name", ["USE_RAY", "USE_MCA", "USE_V1"])
def test_other_trainers_are_refused(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    for section in (SELECT, None):
        assert set(found(keys, section)) == {f"environment variable {name}"}
    monkeypatch.setenv(name, "0")
    assert found(keys, SELECT) == {}


def test_a_ray_launch_is_refused_with_the_reason_and_the_launch_to_use(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaMA-Factory's Ray workers would train without the section, because it acts in the process that starts them."""
    texts = [found(keys, SELECT, ray_num_workers=2)["ray_num_workers"]]
    monkeypatch.setenv("USE_RAY", "true")
    texts += found(keys, SELECT).values()
    assert len(texts) == 2
    for text in texts:
        assert "it trains in processes of Ray" in text
        assert {"NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(
            re.findall(r"[A-Z_]{6,}", text)
        )


def test_steps_set_in_two_places_are_refused(keys: dict[str, Any]) -> None:
    section = {**SELECT, "train_steps": 10}
    assert set(found(keys, section, max_steps=5)) == {"dataflex.train_steps"}
    assert found(keys, section, max_steps=-1) == {}
    assert found(keys, SELECT, max_steps=5) == {}


def test_proportions_must_fit_the_data_sets(keys: dict[str, Any]) -> None:
    static = {"mix": {"method": "static", "proportions": [1, 2, 3]}}
    assert "3 numbers for 2 domains (a, b)" in found(keys, static)["dataflex.mix.proportions"]
    assert found(keys, static, dataset="a,b,hub") == {}
    uniform = {"mix": {"method": "uniform", "initial_proportions": [0, 0]}}
    assert "positive sum" in found(keys, uniform)["dataflex.mix.initial_proportions"]


def test_all_problems_are_found_together(keys: dict[str, Any]) -> None:
    changes = {"stage": "ppo", "dataset": "c", "lerning_rate": 1, "streaming": True, "output_dir": None}
    assert set(found(keys, SELECT, **changes)) == {"stage", "dataset", "lerning_rate", "streaming", "output_dir"}


@pytest.mark.parametrize("key, value", [("max_steps", "many"), ("val_size", "a tenth")])
def test_a_value_that_is_no_number_is_named(keys: dict[str, Any], key: str, value: str) -> None:
    problems = found(keys, {**SELECT, "train_steps": 3}, **{key: value})
    assert set(problems) == {key}
    assert f"'{value}'" in problems[key]


def test_data_set_names_are_read_as_llamafactory_reads_them() -> None:
    for value in ("a,b", "a, b", " a ,b,", ["a", "b"], "a,b,a"):
        assert checks.dataset_names(split_config({"dataset": value})) == ("a", "b")
    assert checks.dataset_names(split_config({})) == ()
    assert checks.dataset_names(split_config({"eval_dataset": "x"}), "eval_dataset") == ("x",)


@pytest.mark.parametrize(
    "section, looks",
    [
        (SELECT, True),
        ({"select": {"method": "delta_loss"}}, True),
        ({"select": {"method": "el2n"}}, True),
        ({"select": {"method": "grand"}}, True),
        ({"select": {"method": "less", "preconditioner": "none", "validation": "b"}}, True),
        ({"select": {"method": "greats", "validation": "b"}}, True),
        ({"mix": {"method": "doge"}}, True),
        ({"mix": {"method": "moe_balance"}}, True),
        ({"mix": {"method": "odm"}}, False),
        ({"order": {"method": "sort", "by": "loss"}}, True),
        ({"order": {"method": "sort", "by": "length"}}, False),
        ({"select": {"method": "random"}}, False),
        ({"select": {"method": "full"}}, False),
        (MIX, False),
        (ORDER, False),
        (WEIGHT, False),
    ],
)
def test_batches_of_one_sample_cannot_be_measured(keys: dict[str, Any], section: dict[str, Any], looks: bool) -> None:
    problems = found(keys, section, neat_packing=True, flash_attn="fa2")
    assert set(problems) == ({"neat_packing"} if looks else set())
    if looks:
        (family,) = section
        assert f"dataflex.{family}" in problems["neat_packing"]
        assert "flash_attn: sdpa" in problems["neat_packing"]
        assert "packing: true" in problems["neat_packing"]
    assert found(keys, section, neat_packing=True, flash_attn="sdpa") == {}
    assert found(keys, section, neat_packing=True) == {}
    assert found(keys, section, packing=True, flash_attn="fa2") == {}
    assert found(keys, None, neat_packing=True, flash_attn="fa2") == {}


@pytest.mark.parametrize(
    ("stage", "metric", "known"),
    [
        ("sft", "a_perplexity", True),
        ("sft", "a_accuracy", False),
        ("dpo", "eval_a_accuracy", True),
        ("dpo", "token_weighted_margin", True),
        ("dpo", "eval_rewards/accuracies", True),
        ("dpo", "a_perplexity", False),
        ("rm", "accuracy", True),
        ("rm", "unweighted_accuracy", True),
        ("rm", "rewards/accuracies", False),
        ("kto", "a_loss", True),
        ("kto", "eval_rewards/margins", True),
        ("kto", "a_accuracy", False),
    ],
)
def test_each_stage_has_its_metrics_of_the_best_model(
    keys: dict[str, Any], stage: str, metric: str, known: bool
) -> None:
    evaluating = {"eval_dataset": "a", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"}
    given = {**evaluating, "metric_for_best_model": metric, "greater_is_better": not metric.endswith("perplexity")}
    problems = found(keys, SELECT, stage=stage, **given)
    assert ("metric_for_best_model" not in problems) == known


def test_llamafactory_refuses_neat_packed_batches_of_several_rows() -> None:
    collator = Path(find_spec("llamafactory").origin).parent / "data" / "collator.py"
    source = collator.read_text().split("class SFTDataCollatorWith4DAttentionMask")[1].split("\nclass ")[0]
    called = source.split("def __call__")[1]
    assert 'if self.neat_packing and self.attn_implementation == "flash_attention_2":' in called
    assert 'assert features["input_ids"].shape[0] == 1' in called


@pytest.mark.parametrize(
    ("changes", "section", "key", "text"),
    [
        ({}, {**SELECT, "train_steps": 5, "train_tokens": 9}, "dataflex.train_steps", "dataflex.train_tokens"),
        ({"max_steps": 5}, {"train_seconds": 9}, "dataflex.train_seconds", "max_steps"),
        ({"max_steps": 5}, {**SELECT, "train_steps": 9}, "dataflex.train_steps", "max_steps"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"train_tokens": 9}, "lr_scheduler_type", "train_tokens"),
        ({"galore_layerwise": True}, {"train_tokens": 9}, "galore_layerwise", "train_tokens"),
        ({"streaming": True}, {"train_tokens": 9}, "streaming", "lengths"),
        ({"deepspeed": {"scheduler": {"type": "WarmupLR"}}}, {"train_tokens": 9}, "deepspeed", "scheduler"),
        ({"metric_for_best_model": "code_perplexity"}, SELECT, "greater_is_better", "false"),
        (
            {"metric_for_best_model": "a_accuracy", "greater_is_better": False},
            SELECT,
            "greater_is_better",
            "must not be false",
        ),
    ],
)
def test_settings_that_give_a_run_two_ends_are_refused(
    keys: dict[str, Any], changes: dict[str, Any], section: dict[str, Any], key: str, text: str
) -> None:
    problems = found(keys, section, **changes)
    assert problems.keys() == {key}
    assert text in problems[key]


def test_a_finished_run_is_not_trained_into(keys: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "dataflex").mkdir(parents=True)
    (output / "checkpoint-4").mkdir()
    (output / "dataflex" / "config.yaml").write_text("{}")
    assert found(keys, SELECT) == {}  # cut off
    summary = output / "dataflex" / "summary.json"
    summary.write_text(json.dumps({"steps": 4, "saved": []}))
    assert found(keys, SELECT) == {}  # before the model was saved
    summary.write_text(json.dumps({"steps": 4, "saved": ["train", "model"]}))
    os.utime(summary, (0, 0))  # when a file was written says nothing: folders are copied
    assert "resume_from_checkpoint" in found(keys, SELECT)["output_dir"]
    assert found(keys, SELECT, resume_from_checkpoint=True) == {}
    assert found(keys, SELECT, overwrite_output_dir=True) == {}
    evaluating = {"do_eval": True, "eval_dataset": "b"}
    assert found(keys, SELECT, **evaluating) == {}  # the evaluation after training is missing
    summary.write_text(json.dumps({"steps": 4, "saved": ["train", "model", "eval"]}))
    assert "finished" in found(keys, SELECT, **evaluating)["output_dir"]
    assert found(keys, SELECT, **evaluating, do_predict=True, predict_with_generate=True) == {}


def test_a_model_that_another_program_trained_is_not_overwritten(keys: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "checkpoint-4").mkdir(parents=True)
    assert found(keys, SELECT) == {}  # nothing but a checkpoint, which the run moves to another folder
    (output / "adapter_model.safetensors").write_bytes(b"")
    assert "finished" in found(keys, SELECT)["output_dir"]
    assert found(keys, SELECT, overwrite_output_dir=True) == {}
    assert found(keys, None) == {}  # LLaMA-Factory's own run resumes from the checkpoint
    (output / "dataflex").mkdir()
    (output / "dataflex" / "run.json").write_text("{}")
    assert found(keys, SELECT) == {}  # DataFlex was interrupted while it saved the model


def test_keys_that_do_not_go_with_a_domain_column_are_refused(keys: dict[str, Any]) -> None:
    column = {"domain_column": "topic"}
    for section in (SELECT, MIX, ORDER):
        assert found(keys, {**section, **column}) == {}
        assert found(keys, {**section, **column}, val_size=0.1, packing=True) == {}
        assert set(found(keys, {**section, **column}, dataset="a", val_size=10)) == {"val_size"}
        assert set(found(keys, {**section, **column}, tokenized_path="/tmp/tokens")) == {"tokenized_path"}
    for section in (WEIGHT, {}):
        assert set(found(keys, {**section, **column})) == {"dataflex.domain_column"}
    static = {"method": "static", "proportions": {"x": 1, "y": 2, "z": 3}}
    assert set(found(keys, {"mix": static})) == {"dataflex.mix.proportions"}
    assert found(keys, {"mix": static, **column}) == {}  # the domains' names are not known yet


def test_columns_are_looked_for_at_the_head_of_the_files(keys: dict[str, Any]) -> None:
    folder = Path(keys["dataset_dir"])
    row = {"instruction": "Say yes.", "input": "", "output": "Yes.", "note": "x", "quality": 1.5}
    (folder / "a.json").write_text(json.dumps([row] * 400))
    wanted = {**SELECT, "columns": ["quality", "note"]}
    both = found(keys, wanted)
    assert set(both) == {"dataflex.columns"}
    assert "'b' has no column 'note'" in both["dataflex.columns"]
    assert "It has 'instruction', 'input', 'output'" in both["dataflex.columns"]
    (folder / "b.json").write_text(json.dumps([row] * 400))
    assert found(keys, wanted) == {}
    text = found(keys, wanted, packing=True)["dataflex.columns"]
    assert "'note' holds text" in text
    assert found(keys, {**SELECT, "columns": ["quality"]}, neat_packing=True) == {}
    misspelt = found(keys, {**SELECT, "columns": ["qualty"]})["dataflex.columns"]
    assert "'qualty'; did you mean 'quality'?" in misspelt
    # A text among numbers is one problem, of the data; null is no value of either kind.
    by_column = {"select": {"method": "score_column", "column": "quality"}}
    assert set(found(keys, {"select": {"method": "score_column", "column": "note"}})) == {"dataflex.select"}
    (folder / "a.json").write_text(json.dumps([row | {"quality": None}, row, row | {"quality": "high"}]))
    assert set(found(keys, by_column)) == {"dataset"}
    (folder / "a.json").write_text(json.dumps([row | {"quality": None}, row, row]))
    assert found(keys, by_column) == {}
    # A column may come after the head of a large JSON file.
    rows = [{key: row[key] for key in ("instruction", "input", "output")}] * 60_000
    (folder / "b.json").write_text(json.dumps([*rows, row]))
    assert found(keys, wanted) == {}


def test_a_column_of_spans_must_be_in_one_of_the_data_sets(keys: dict[str, Any]) -> None:
    weight = {"weight": {"method": "span", "spans_column": "spans"}}
    row = {"instruction": "sum", "input": "", "output": "5"}
    folder = Path(keys["dataset_dir"])
    for name in ("a", "b"):
        (folder / f"{name}.json").write_text(json.dumps([row] * 400))
    problem = found(keys, weight)["dataflex.weight.spans_column"]
    assert "no training data has a column 'spans'. There are 'instruction', 'input', 'output'." in problem
    (folder / "b.json").write_text(json.dumps([row | {"spans": [{"begin": 0, "end": 1, "weight": 2.0}]}] * 400))
    assert found(keys, weight) == {}


def test_columns_are_refused_if_samples_cannot_be_traced_to_rows(keys: dict[str, Any]) -> None:
    wanted = {**WEIGHT, "columns": ["output"]}
    assert found(keys, wanted) == {}
    assert "dataflex.columns keeps 'output'" in found(keys, wanted, streaming=True, max_steps=4)["streaming"]
    assert "use concat" in found(keys, wanted, mix_strategy="interleave_under")["mix_strategy"]


@pytest.mark.parametrize("form", ["list", "mapping", "file"])
def test_proportions_that_are_all_zero_are_refused(keys: dict[str, Any], tmp_path: Path, form: str) -> None:
    given: Any = {"list": [0, 0], "mapping": {"a": 0, "b": 0.0}, "file": str(tmp_path / "weights.json")}[form]
    (tmp_path / "weights.json").write_text(json.dumps({"proportions": {"a": 0, "b": 0}}))
    for mix, key in (
        ({"method": "static", "proportions": given}, "proportions"),
        ({"method": "uniform", "initial_proportions": given}, "initial_proportions"),
    ):
        problems = found(keys, {"mix": mix})
        assert set(problems) == {f"dataflex.mix.{key}"}
        assert "positive sum" in problems[f"dataflex.mix.{key}"]


class Looking(Mixer):
    """A mixer whose need of validation samples is a matter of its parameters."""

    family, name = "mixer", "test_looking"

    class Params(MixerParams, ValidationParams):
        looks: bool = True

    def needs(self, run):
        return Needs(measurements=(Losses(),), validation=self.params) if self.params.looks else Needs()


def test_validation_samples_of_a_mixer_are_checked(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, ("mixer", "test_looking"), Looking)
    mix = {"method": "test_looking"}
    assert found(keys, {"mix": {**mix, "looks": False}}) == {}
    assert set(found(keys, {"mix": mix})) == {"dataflex.mix.validation"}
    assert found(keys, {"mix": mix}, val_size=0.1) == {}
    assert set(found(keys, {"mix": mix}, val_size=0.1, packing=True)) == {"packing"}
    assert found(keys, {"mix": mix}, eval_dataset="a") == {}
    assert found(keys, {"mix": {**mix, "validation": "b"}}) == {}
    assert "'held'" in found(keys, {"mix": {**mix, "validation": "held"}})["dataflex.mix.validation"]
    both = {"mix": mix, "warmup_steps": 1, "select": {"method": "less"}}
    assert set(found(keys, both)) == {"dataflex.mix.validation", "dataflex.select.validation"}
    assert (
        "test_looking"
        in found(keys, {"mix": mix}, eval_dataset="a", neat_packing=True, flash_attn="fa2")["neat_packing"]
    )


@pytest.mark.parametrize("mix", [{"method": "group_dro"}, {"method": "doge"}])
def test_mixers_that_need_the_loss_of_a_step_are_refused_with_special_losses(
    keys: dict[str, Any], mix: dict[str, Any]
) -> None:
    assert found(keys, {"mix": mix}) == {}
    assert found(keys, {"mix": mix, "weight": {"method": "loss"}}) == {}
    for key in ("use_asft_loss", "use_unsloth"):
        assert mix["method"] in found(keys, {"mix": mix}, **{key: True})[key]
        assert "odm" in found(keys, {"mix": {"method": "odm"}}, **{key: True})[key]
        assert found(keys, {"mix": {"method": "uniform"}}, **{key: True}) == {}


def test_a_fused_loss_is_refused_with_losses_of_other_definitions(keys: dict[str, Any]) -> None:
    plain = {"order": {"method": "shuffle"}}
    for key, value in (("use_asft_loss", True), ("label_smoothing_factor", 0.1), ("use_unsloth", True)):
        assert "dataflex.fused_loss" in found(keys, {**plain, "fused_loss": True}, **{key: value})[key]
        assert "enable_liger_kernel" in found(keys, plain, **{key: value}, enable_liger_kernel=True)[key]
        assert found(keys, plain, **{key: value}) == {}
    for liger in ("enable_liger_kernel", "use_liger_kernel"):
        refused = found(keys, {**plain, **WEIGHT, "fused_loss": False}, **{liger: True})
        assert "Leave out dataflex.fused_loss" in refused[liger]
        assert found(keys, {**plain, "fused_loss": False}, **{liger: True}) == {}
        assert found(keys, {**plain, **WEIGHT}, **{liger: True}) == {}
    assert set(found(keys, plain, stage="pt", use_dft_loss=True)) == {"use_dft_loss"}
    assert found(keys, plain, stage="pt") == {}


def test_the_checks_need_no_torch(keys: dict[str, Any], tmp_path: Path) -> None:
    section = {**SELECT, **MIX, **ORDER, **WEIGHT}
    (tmp_path / "run.json").write_text(json.dumps({**keys, "dataset": "c", "dataflex": section}))
    code = """
import sys
from dataflex import cli
status = cli.main(["check", sys.argv[1]])
print(status, sorted({"torch", "transformers", "llamafactory", "scipy.stats", "pyarrow", "sklearn"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
    assert "unknown data set 'c'" in done.stderr


def test_a_weighter_that_measures_is_refused_with_streaming(keys: dict[str, Any]) -> None:
    weight = {"weight": {"method": "adapt", "validation": ["b"]}}
    message = found(keys, weight, dataset="a", streaming=True, max_steps=3)["streaming"]
    assert "dataflex.weight measures samples" in message
    assert "streaming" not in found(keys, weight, dataset="a", max_steps=3)
    missing = found(keys, {"weight": {"method": "joint_update_aware"}}, dataset="a")
    assert "needs validation samples" in missing["dataflex.weight.validation"]
