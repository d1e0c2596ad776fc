"""Every bad input gives one clear paragraph, exit status 2 and no traceback, and no existing file is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import tiny
from dataflex import cli
from launch import run_script
from unit.data.test_raw import FAULTS, GOOD

HERE = Path(__file__).parent
FAULTY = {name: (file, content, "sft", entry) for name, (file, content, entry, _) in FAULTS.items()}
SELECT = {"update_steps": 2, "select": {"method": "loss"}}
TWO = {"dataset": "alpha,beta"}


def mix(**params: Any) -> dict[str, Any]:
    return {**TWO, "dataflex": {"update_steps": 2, "mix": params}}


def influence(method: str = "less", *, warmup_steps: int = 1, **params: Any) -> dict[str, Any]:
    select = {"method": method, "validation": "held", "proj_dim": 64, **params}
    return {"dataflex": {"warmup_steps": warmup_steps, "update_steps": 2, "select": select}}


# name -> (changes to a good configuration, words that the message must contain)
BEFORE_LOADING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key of ours": ({"dataflex": {**SELECT, "update_step": 3}}, ["update_step", "'update_steps'"]),
    "unknown key of LLaMA-Factory": ({"lerning_rate": 1}, ["lerning_rate", "'learning_rate'"]),
    "unknown value of LLaMA-Factory": ({"finetuning_type": "lorra"}, ["finetuning_type", "'lorra'", "'lora'"]),
    "no number for LLaMA-Factory": ({"cutoff_len": "many"}, ["cutoff_len", "number", "'many'"]),
    "unknown template": ({"template": "defualt"}, ["template", "'defualt'", "'default'"]),
    "a finished run's folder": ({"output_dir": "FINISHED", "dataflex": SELECT}, ["output_dir", "overwrite_output_dir"]),
    "section misspelt": ({"datafex": SELECT}, ["datafex", "'dataflex'"]),
    "wrong type": (
        {"dataflex": {**SELECT, "update_steps": "many"}},
        ["dataflex.update_steps", "whole number", "'many'"],
    ),
    "section is no mapping": ({"dataflex": "loss"}, ["dataflex", "mapping", "'loss'"]),
    "unknown method": ({"dataflex": {"select": {"method": "los"}}}, ["dataflex.select.method", "'loss'"]),
    "no method": ({"dataflex": {"select": {"focus": "high"}}}, ["dataflex.select.method", "needed", "delta_loss"]),
    "unknown parameter": (
        {"dataflex": {"select": {"method": "loss", "fokus": "high"}}},
        ["dataflex.select.fokus", "'focus'"],
    ),
    "wrong choice": (
        {"dataflex": {"select": {"method": "loss", "focus": "hi"}}},
        ["dataflex.select.focus", "'high'", "'medium'", "'low'"],
    ),
    "no file of lists": (
        {"dataflex": {"select": {"method": "near", "indices_path": "nowhere.npy"}}},
        ["dataflex.select.indices_path", "no file 'nowhere.npy'"],
    ),
    "a width without a use": (
        {"dataflex": {"select": {"method": "tsds", "variant": "uniform", "sigma": 0.5, "validation": "held"}}},
        ["dataflex.select", "sigma has no use with variant uniform"],
    ),
    "quantiles descend": (
        {"dataflex": {"select": {"method": "loss", "quantiles": [0.7, 0.3]}}},
        ["dataflex.select", "quantiles"],
    ),
    "update_steps 0": ({"dataflex": {**SELECT, "update_steps": 0}}, ["dataflex.update_steps", "1", "got 0"]),
    "updates 0": ({"dataflex": {**SELECT, "updates": 0}}, ["dataflex.updates", "-1", "got 0"]),
    "negative warm-up": ({"dataflex": {**SELECT, "warmup_steps": -1}}, ["dataflex.warmup_steps", "got -1"]),
    "missing data set": ({"dataset": "alpa", "dataflex": SELECT}, ["dataset", "'alpa'", "'alpha'"]),
    "missing data file": ({"dataset": "gone", "dataflex": SELECT}, ["dataset", "gone.json", "does not exist"]),
    "no dataset_info": ({"dataset_dir": "/nowhere", "dataflex": SELECT}, ["dataset_dir", "dataset_info.json"]),
    "missing model": ({"model_name_or_path": "/nowhere/model"}, ["model_name_or_path", "config.json"]),
    "unknown asset": ({"model_name_or_path": "asset:smolm2"}, ["model_name_or_path", "smollm2-135m-instruct"]),
    "too few proportions": (mix(method="static", proportions=[1.0]), ["dataflex.mix.proportions", "1", "2 domains"]),
    "proportions sum to zero": (mix(method="static", proportions=[0, 0]), ["dataflex.mix.proportions", "positive sum"]),
    "negative proportion": (mix(method="static", proportions=[2, -1]), ["dataflex.mix.proportions", "negative"]),
    "no proportions": (mix(method="static"), ["dataflex.mix.proportions", "needed"]),
    "initial proportions": (
        mix(method="random", initial_proportions=[1, 1, 1]),
        ["dataflex.mix.initial_proportions", "3", "2 domains"],
    ),
    "stage": ({"stage": "ppo", "reward_model": "org/reward", "dataflex": SELECT}, ["stage", "'ppo'", "sft"]),
    "streaming": ({"streaming": True, "dataflex": SELECT}, ["streaming", "pool"]),
    "interleave": ({**TWO, "mix_strategy": "interleave_over", "dataflex": SELECT}, ["mix_strategy", "dataflex.mix"]),
    "mixture in order": ({**mix(method="uniform"), "disable_shuffling": True}, ["disable_shuffling", "mixture"]),
    "two orders": (
        {"disable_shuffling": True, "dataflex": {"order": {"method": "sort"}}},
        ["disable_shuffling", "dataflex.order"],
    ),
    "two totals": ({"max_steps": 5, "dataflex": {**SELECT, "train_steps": 5}}, ["train_steps", "max_steps"]),
    "weights and asft": (
        {"use_asft_loss": True, "dataflex": {"weight": {"method": "loss"}}},
        ["use_asft_loss", "weight"],
    ),
    "weights and smoothing": (
        {"label_smoothing_factor": 0.1, "dataflex": {"weight": {"method": "loss"}}},
        ["label_smoothing_factor", "weight"],
    ),
    "held-out count over data sets": ({**TWO, "val_size": 10, "dataflex": SELECT}, ["val_size", "fraction"]),
    "output is a file": ({"output_dir": "FILE/run", "dataflex": SELECT}, ["output_dir", "is a file"]),
    "plugin missing": ({"dataflex": {**SELECT, "plugins": ["gone.py"]}}, ["plugins", "gone.py"]),
    "plugin broken": ({"dataflex": {**SELECT, "plugins": ["broken.py"]}}, ["broken.py", "ZeroDivisionError"]),
    "no validation set": (influence(validation=None), ["dataflex.select.validation", "'less'", "eval_dataset"]),
    "validation names nothing": (influence(validation=""), ["dataflex.select.validation", "name a data set"]),
    "unknown validation set": (influence(validation="hold"), ["dataflex.select.validation", "'hold'", "'held'"]),
    "validation file missing": (influence(validation="gone"), ["dataflex.select.validation", "gone.json"]),
    "adam before the first step": (
        influence(warmup_steps=0),
        ["dataflex.select.preconditioner", "'adam'", "warmup_steps"],
    ),
    "adam with sgd": ({"optim": "sgd", **influence()}, ["dataflex.select.preconditioner", "optim: sgd"]),
    "adam with another optimizer": (
        {"use_muon": True, **influence("icons", preconditioner="adam_less")},
        ["dataflex.select.preconditioner", "'adam_less'", "use_muon"],
    ),
    "no checkpoints for tracin": (influence("tracin"), ["dataflex.select.checkpoints"]),
    "missing checkpoint": (
        influence("tracin", checkpoints=["nowhere/checkpoint-1"]),
        ["dataflex.select.checkpoints", "nowhere/checkpoint-1"],
    ),
    "checkpoint without weights": (
        influence(checkpoints=["/proc"]),
        ["dataflex.select.checkpoints", "'/proc'", "no adapter"],
    ),
    "a weight too many": (
        influence(checkpoints=["data"], checkpoint_weights=[0.5, 0.5]),
        ["dataflex.select", "2 numbers for 1 checkpoints"],
    ),
    "proj_dim 0": (influence(proj_dim=0), ["dataflex.select.proj_dim", "got 0"]),
    "nothing is trained": (
        {"do_train": False, "do_eval": True, "eval_dataset": "held", "dataflex": SELECT},
        ["do_train", "never decide"],
    ),
    "nothing is done": ({"do_train": None}, ["do_train", "nothing would be done"]),
    "no epoch": ({"num_train_epochs": 0, "dataflex": SELECT}, ["num_train_epochs", "0", "above 0"]),
    "nothing but warm-up": (
        {"dataflex": {"warmup_steps": 1000, "weight": {"method": "loss"}}},
        ["dataflex.warmup_steps", "8 steps", "1000", "weight loss"],
    ),
    "a round longer than the data": (
        {"dataflex": {"update_steps": 40, "select": {"method": "loss"}}, "max_steps": 40},
        ["dataflex.update_steps", "80 samples", "pool has 48", "23"],
    ),
    "flat keys and section": ({"train_type": "dynamic_select", "dataflex": SELECT}, ["train_type", "dataflex"]),
    "unknown train_type": ({"train_type": "dynamic_weighting"}, ["train_type", "'dynamic_weight'"]),
    "flat without component": ({"train_type": "dynamic_mix", "update_step": 2}, ["component_name"]),
    "flat update_step 0": (
        {"train_type": "dynamic_select", "component_name": "loss", "update_step": 0},
        ["update_step", "at least 1"],
    ),
}

# The ones that show only when the data or the model is there.
WHILE_RUNNING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "round longer than the packed data": (
        {"packing": True, "dataflex": {"update_steps": 40, "select": {"method": "loss"}}, "max_steps": 40},
        ["dataflex.update_steps", "80 samples", "the pool has", "nothing to choose"],
    ),
    "an empty data set": ({"dataset": "alpha,empty", "dataflex": SELECT}, ["dataset", "'empty'"]),
    "a malformed data file": ({"dataset": "alpha,malformed", "dataflex": SELECT}, ["dataset", "'malformed'"]),
    **{
        f"a diverged run, {name}": ({"learning_rate": 1e30, **changes}, ["step 2 is nan: has training diverged?"])
        for name, changes in {
            "weight": {"dataflex": {"weight": {"method": "loss"}}},
            "full": {"dataflex": {"select": {"method": "full"}}},
            "sort": {"dataflex": {"order": {"method": "sort"}}},
            "mix": {**TWO, "dataflex": {"mix": {"method": "odm"}}},
            "nothing": {"dataflex": {}},
            "a special loss": {"use_dft_loss": True, "dataflex": {"order": {"method": "shuffle"}}},
        }.items()
    },
    "a diverged run, select": (
        {"learning_rate": 1e30, "dataflex": {"update_steps": 1, "select": {"method": "loss"}}},
        ["in the decision of round 1, after step 1, the loss of pool index", "is not finite: has training diverged?"],
    ),
    "a diverged run, evaluated": (
        {"learning_rate": 1e30, "eval_dataset": "held", "eval_strategy": "steps", "eval_steps": 1, "dataflex": {}},
        ["loss of evaluation set 'held' after step 1 is nan: has training diverged?"],
    ),
    "a diverged run, before its checkpoint": (
        {"learning_rate": 1e39, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "dataflex": {}},
        ["weights after step 1 are not finite: has training diverged?"],
    ),
    "a diverged run, in its last step": (
        {"learning_rate": 1e39, "max_steps": 1, "dataflex": {}},
        ["weights after step 1 are not finite: has training diverged?"],
    ),
    "NaN scores": (
        {"dataflex": {"update_steps": 2, "select": {"method": "test_nan"}, "plugins": ["bad_plugin.py"]}},
        ["selector 'test_nan' (NanSelector.score, ", "bad_plugin.py, line 8)", "NaN", "pool indices"],
    ),
    "scores of the wrong shape": (
        {"dataflex": {"update_steps": 2, "select": {"method": "test_short"}, "plugins": ["bad_plugin.py"]}},
        ["selector 'test_short'", "shape", "48"],
    ),
    "proportions that are NaN": (
        {**TWO, "dataflex": {"update_steps": 2, "mix": {"method": "test_nan"}, "plugins": ["bad_plugin.py"]}},
        ["mixer 'test_nan'", "nan", "alpha, beta"],
    ),
    "an error in a selector": (
        {"dataflex": {"update_steps": 2, "select": {"method": "test_key"}, "plugins": ["bad_plugin.py"]}},
        ["selector 'test_key' failed in score", "bad_plugin.py, line 33", "KeyError: 'x'", "traceback.txt"],
    ),
    "an error in a weighter": (
        {"dataflex": {"weight": {"method": "test_key"}, "plugins": ["bad_plugin.py"]}},
        ["weighter 'test_key' failed in weigh", "bad_plugin.py, line 39", "(raised in ", "traceback.txt"],
    ),
    "what a selector did not ask for": (
        {"dataflex": {"update_steps": 2, "select": {"method": "test_unasked"}, "plugins": ["bad_plugin.py"]}},
        ["selector 'test_unasked', in score (", "bad_plugin.py, line 51)", "Needs(validation=self.params)"],
    ),
    "a list for a selection": (
        {"dataflex": {"update_steps": 2, "select": {"method": "test_list"}, "plugins": ["bad_plugin.py"]}},
        ["selector 'test_list' (ListSelector.choose, ", "bad_plugin.py, line 44", "a list", "Selection"],
    ),
    "negative weights": (
        {"dataflex": {"weight": {"method": "test_negative"}, "plugins": ["bad_plugin.py"]}},
        ["weighter 'test_negative' (NegativeWeighter.weigh, ", "negative"],
    ),
    "an empty validation set": (influence(validation="empty"), ["dataflex.select.validation", "'empty'"]),
    "a malformed validation set": (
        influence(validation="malformed"),
        ["dataflex.select.validation", "'malformed'"],
    ),
    "validation pairs of answers": (influence(validation="pairs"), ["dataflex.select.validation", "'pairs'"]),
    "unknown sub-task column": (
        influence(subtask_column="topic"),
        ["dataflex.select.subtask_column", "'topic'", "instruction", "'held'"],
    ),
    "sub-tasks of a split": (
        {"val_size": 0.2, **influence(validation=None, subtask_column="task")},
        ["dataflex.select.subtask_column", "val_size"],
    ),
    "a feature longer than the gradient": (
        influence(proj_dim=1_000_000),
        ["proj_dim", "1000000", "trainable parameter"],
    ),
    "kronecker with adam": (influence(projection="kronecker"), ["projection: kronecker", "preconditioner: none"]),
    "lists of another pool": (
        {"dataflex": {"update_steps": 2, "select": {"method": "near", "indices_path": "far.npy"}}},
        ["dataflex.select.indices_path", "'far.npy'", "from 0 to 48", "0 to 47"],
    ),
    "probabilities of another pool": (
        {"dataflex": {"update_steps": 2, "select": {"method": "tsds", "probs_path": "few.npy"}}},
        ["dataflex.select.probs_path", "'few.npy'", "47 numbers", "48 samples"],
    ),
    "a value LLaMA-Factory refuses": (
        {**{"stage": "pt", "dataset": "texts", "neat_packing": True}, "dataflex": SELECT},
        ["LLaMA-Factory", "neat_packing"],
    ),
    "a corrupt checkpoint": (
        {"resume_from_checkpoint": "CORRUPT", "dataflex": SELECT},
        ["resume_from_checkpoint", "another size", "last complete checkpoint"],
    ),
    "a checkpoint of other data": (
        {"resume_from_checkpoint": "GOOD", "dataset": "beta", "dataflex": SELECT},
        ["dataset", "cannot change at a resume", '"alpha"', '"beta"', "samples"],
    ),
    "a checkpoint of other labels": (
        {"resume_from_checkpoint": "GOOD", "train_on_prompt": True, "dataflex": SELECT},
        ["train_on_prompt", "cannot change at a resume", "labels"],
    ),
    "a checkpoint of another optimizer": (
        {"resume_from_checkpoint": "GOOD", "optim": "sgd", "dataflex": SELECT},
        ["optim", "cannot change at a resume", '"sgd" now'],
    ),
    "a checkpoint of another adapter": (
        {"resume_from_checkpoint": "GOOD", "lora_rank": 8, "dataflex": SELECT},
        ["lora_rank", "cannot change at a resume", "4 up to the checkpoint, 8 now"],
    ),
    "a checkpoint of another batch size": (
        {"resume_from_checkpoint": "GOOD", "per_device_train_batch_size": 4, "dataflex": SELECT},
        ["global batch size", "2", "4"],
    ),
    "no such checkpoint": ({"resume_from_checkpoint": "nowhere/checkpoint-1", "dataflex": SELECT}, ["no such folder"]),
    "a read-only output folder": ({"output_dir": "/proc/dataflex/run", "dataflex": SELECT}, ["output_dir", "/proc"]),
}

# Data that cannot be loaded, in every kind of run; the checks before, which find some of it, are left out.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"dataflex": {"weight": {"method": "loss"}}},
    "empty": {"dataflex": {}},
    "select": {"dataflex": SELECT},
}
LOADED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a cut line": ({"dataset": "alpha,cut"}, ["dataset: 'cut'", "cut.jsonl, line 3", "cut off"]),
    "a cut line of evaluation data": ({"eval_dataset": "cut"}, ["eval_dataset: 'cut'", "cut.jsonl, line 3"]),
    "too much held out": ({"val_size": 48}, ["val_size: 48", "48 rows of 'alpha'", "below 48"]),
    "no room for a pack": (
        {"stage": "pt", "dataset": "texts", "packing": True, "cutoff_len": 4000},
        ["dataset: 'texts' has no sample left", "cutoff_len", "packing: false"],
    ),
    "no row": ({"max_samples": 0}, ["max_samples: 0", "'alpha'"]),
    "nothing on the hub": ({"dataset_dir": "ONLINE", "dataset": "no/where"}, ["dataset: 'no/where'"]),
}

BAD_PLUGIN = """
import numpy as np
from dataflex import Mixer, Selector, Weighter, register


@register("selector", "test_nan")
class NanSelector(Selector):
    def score(self, ctx, candidates):
        return np.full(candidates.size, np.nan)


@register("selector", "test_short")
class ShortSelector(Selector):
    def score(self, ctx, candidates):
        return np.zeros(3)


@register("mixer", "test_nan")
class NanMixer(Mixer):
    def mix(self, ctx):
        return np.array([np.nan, 1.0])


@register("weighter", "test_negative")
class NegativeWeighter(Weighter):
    def weigh(self, batch):
        return -batch.losses


@register("selector", "test_key")
class KeySelector(Selector):
    def score(self, ctx, candidates):
        return {}["x"]


@register("weighter", "test_key")
class KeyWeighter(Weighter):
    def weigh(self, batch):
        return np.testing.assert_equal(1, 2)


@register("selector", "test_list")
class ListSelector(Selector):
    def choose(self, ctx, candidates, count):
        return candidates[:count].tolist()


@register("selector", "test_unasked")
class UnaskedSelector(Selector):
    def score(self, ctx, candidates):
        return np.full(candidates.size, ctx.validation.size)
"""


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    tiny.make_model(root / "model")
    tiny.make_data(root / "data")
    tiny.add_data(root / "data", "empty", [])
    (root / "data" / "malformed.json").write_text('[{"instruction": ')
    tiny.add_entries(root / "data", {name: {"file_name": f"{name}.json"} for name in ("malformed", "gone")})
    row = json.dumps({"instruction": "the cat", "input": "", "output": "sees"})
    (root / "data" / "cut.jsonl").write_text(f"{row}\n{row}\n{row[:-9]}")
    tiny.add_entries(root / "data", {"cut": {"file_name": "cut.jsonl"}})
    pairs = [{"instruction": "the cat", "input": "", "chosen": "sees", "rejected": "likes"}] * 4
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    tiny.add_data(root / "data", "pairs", pairs, ranking=True, columns=columns)
    np.save(root / "far.npy", np.arange(49).reshape(7, 7))
    np.save(root / "few.npy", np.ones(47))
    (root / "broken.py").write_text("1 / 0\n")
    (root / "bad_plugin.py").write_text(BAD_PLUGIN)
    (root / "FILE").write_text("precious")
    (root / "FINISHED").mkdir()
    (root / "FINISHED" / "adapter_model.safetensors").write_text("precious")
    return root


def write(root: Path, name: str, changes: dict[str, Any]) -> Path:
    stem = name.replace(" ", "-").replace("/", "-")
    args = tiny.arguments(root / "model", root / "data", root / "out" / stem, **changes)
    if "train_steps" in str(changes) or "num_train_epochs" in changes:
        args["max_steps"] = changes.get("max_steps", -1)
    if str(args["output_dir"]).startswith(("FILE", "FINISHED")):
        args["output_dir"] = str(root / args["output_dir"])
    path = root / f"{stem}.yaml"
    path.write_text(yaml.safe_dump(args))
    return path


@pytest.mark.parametrize("name", BEFORE_LOADING)
def test_a_bad_configuration_is_refused_before_anything_is_loaded(
    inputs: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = BEFORE_LOADING[name]
    path = write(inputs, name, changes)
    assert cli.main(["check", str(path)]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.count("\n") == 1, text  # one problem, one paragraph
    for word in [path.name, *words]:
        assert word in text, text
    assert (inputs / "FILE").read_text() == "precious"


def test_all_problems_are_reported_together(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"lerning_rate": 1, "dataset": "alpa", "dataflex": {"update_steps": 0, "select": {"method": "los"}}}
    assert cli.main(["check", str(write(inputs, "several", changes))]) == 2
    text = capsys.readouterr().err
    assert "4 problems" in text
    for key in ("lerning_rate", "dataset", "dataflex.update_steps", "dataflex.select.method"):
        assert f"  {key}: " in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chekc", "run.yaml"], ["chekc", "'check'"]),
        (["check", "nowhere.yaml"], ["no such file", "nowhere.yaml"]),
        (["check", "run.txt"], [".yaml", "run.txt"]),
        (["list", "los"], ["'los'", "'loss'"]),
        (["report", "nowhere"], ["nowhere"]),
        (["assets", "smolm2"], ["smolm2"]),
    ],
)
def test_bad_arguments_of_the_command_line_are_refused(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    for word in words:
        assert word in text


def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("a: [1, 2\nb: {")
    assert cli.main(["check", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml, line 2, column 2: did not find expected ',' or ']'" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    assert cli.main(["check", str(tmp_path / "list.yaml")]) == 2
    assert "mapping" in capsys.readouterr().err


RUN_ALL = """
import contextlib, gc, io, json, os, sys
os.environ["LLAMAFACTORY_VERBOSITY"] = "WARN"
from pathlib import Path
from dataflex import cli
from dataflex.config.loading import load_config
from dataflex.errors import DataFlexError

def unchecked(path):
    from dataflex.integrations.llamafactory.run import run
    run(load_config(Path(path)))
    return 0

def pool(path):
    from dataflex.integrations.llamafactory.pool_only import pool_of
    return pool_of(load_config(Path(path)))[0].size - 1000  # below any status

DIRECT = {"unchecked": unchecked, "pool": pool}
results = {}
for name, arguments in json.load(open(sys.argv[1])).items():
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        try:
            status = DIRECT[arguments[0]](arguments[1]) if arguments[0] in DIRECT else cli.main(arguments)
        except DataFlexError as error:
            status = 2
            print(f"dataflex: {error}", file=stream)
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
    results[name] = [status, stream.getvalue()]
    if name == "good":  # damage its last checkpoint
        corrupt = Path(sys.argv[3])
        corrupt.write_bytes(corrupt.read_bytes()[:-100])
        gc.freeze()  # what the imports made need not be looked at in every run
json.dump(results, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="session")
def outcomes(inputs: Path) -> dict[str, tuple[Any, str]]:
    """Run a good training with checkpoints, damage one, then run every bad input, all in one process."""
    good = {"dataflex": SELECT, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    items = {"good": ["train", str(write(inputs, "good", good))]}
    for name, (changes, _) in LOADED.items():
        for kind, section in KINDS.items():
            items[f"{name} {kind}"] = ["unchecked", str(write(inputs, f"{name} {kind}", {**changes, **section}))]
    for name, (file, content, stage, entry) in {**FAULTY, **GOOD}.items():
        folder = tiny.make_data(inputs / "raw" / name.replace(" ", "-"), {})
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
        (folder / "dataset_info.json").write_text(json.dumps({"set": {"file_name": file, **entry}}))
        changes = {"dataset": "set", "dataset_dir": str(folder), "stage": stage, "packing": False}
        items[f"raw {name}"] = ["pool", str(write(inputs, f"raw {name}", changes))]
    folder = inputs / "out" / "good"
    for name, (changes, _) in WHILE_RUNNING.items():
        named = {"CORRUPT": str(folder / "checkpoint-4"), "GOOD": str(folder / "checkpoint-2")}
        filled = {key: named.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
        items[name] = ["train", str(write(inputs, name, filled))]
    script, spec, result = inputs / "run_all.py", inputs / "in.json", inputs / "out.json"
    script.write_text(RUN_ALL)
    spec.write_text(json.dumps(items))
    optimizer, environment = folder / "checkpoint-4" / "optimizer.pt", {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run_script(script, spec, result, optimizer, log=inputs / "log", cwd=inputs, environment=environment)
    found = json.loads(result.read_text())
    assert found["good"][0] == 0, found["good"][1]
    return found


@pytest.mark.launch
@pytest.mark.parametrize("name", WHILE_RUNNING)
def test_an_error_during_the_run_ends_it_with_one_paragraph(outcomes: dict[str, tuple[Any, str]], name: str) -> None:
    status, text = outcomes[name]
    assert status == 2, (status, text)
    assert "Traceback" not in text
    paragraph = text[text.index("dataflex: ") :]
    for word in WHILE_RUNNING[name][1]:
        assert word in paragraph, paragraph


@pytest.mark.launch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOADED)
def test_data_that_cannot_be_loaded_is_named(outcomes: dict[str, tuple[Any, str]], name: str, kind: str) -> None:
    status, text = outcomes[f"{name} {kind}"]
    assert status == 2, (status, text)
    for word in LOADED[name][1]:
        assert word in text[text.index("dataflex: ") :], text


@pytest.mark.launch
@pytest.mark.parametrize("name", [*FAULTY, *GOOD])
def test_raw_data_is_called_faulty_only_if_llamafactory_fails_on_it(
    outcomes: dict[str, tuple[Any, str]], name: str
) -> None:
    status, text = outcomes[f"raw {name}"]
    if name in GOOD:
        assert status > -1000, (status, text)
        return
    assert status == 2, (status, text)
    for word in ["dataset: 'set'", *FAULTS[name][3]]:
        assert word in text, text


@pytest.mark.launch
def test_a_model_with_weights_that_are_not_finite_is_not_saved_as_a_checkpoint(
    inputs: Path, outcomes: dict[str, tuple[Any, str]]
) -> None:
    assert outcomes["a diverged run, before its checkpoint"][0] == 2
    assert not list((inputs / "out" / "a-diverged-run,-before-its-checkpoint").glob("checkpoint-*"))


@pytest.mark.launch
@pytest.mark.parametrize("name", ["a feature longer than the gradient", "kronecker with adam"])
def test_settings_that_do_not_fit_the_model_end_the_run_before_the_first_round(
    inputs: Path, outcomes: dict[str, tuple[Any, str]], name: str
) -> None:
    assert outcomes[name][0] == 2
    assert not (inputs / "out" / name.replace(" ", "-") / "dataflex" / "rounds.jsonl").exists()
