"""The workflows of several trainings: what is trained, what is trained again, and what comes of it.

The trainings are made by a small program that leaves what a training leaves; one test trains DoReMi's three stages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from filelock import FileLock

import tiny
from dataflex.cli import main
from dataflex.compare.runner import Workers
from dataflex.config.loading import load_config
from dataflex.data.pool import Pool
from dataflex.errors import ConfigError
from dataflex.mixers.base_regression import read_table
from dataflex.workflows import regmix as regmix_module
from dataflex.workflows.doremi import doremi, load
from dataflex.workflows.regmix import regmix
from dataflex.workflows.small_model import small_model
from records import round_lines

PROGRAM = """
import json, os, sys, time
from pathlib import Path

import yaml

assert sys.argv[1] == "train"
folder = Path(sys.argv[2]).parent
config = yaml.safe_load((folder / "run.yaml").read_text())
data = Path(config["dataset_dir"])
mix = config["dataflex"]["mix"]
name = folder.parent.name if folder.name.startswith("seed") else folder.name
environment = {key: os.environ.get(key) for key in ("FORCE_TORCHRUN", "NPROC_PER_NODE")}
resumed = any(folder.glob("checkpoint-*"))
with (data / "launches.txt").open("a") as stream:
    stream.write(json.dumps([name, resumed, environment]) + "\\n")
behaviour = json.loads((data / "behaviour.json").read_text()).get(name, "")
assert (Path(config["model_name_or_path"]) / "config.json").is_file()
if mix["method"] == "doremi":
    assert (Path(mix["reference_model"]) / "model.safetensors").is_file()
if isinstance(mix.get("proportions"), str):
    assert json.loads(Path(mix["proportions"]).read_text())["proportions"]
record = folder / "dataflex"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


write(record / "config.yaml", {})
if behaviour == "crash":
    print("RuntimeError: out of luck")
    sys.exit(1)
if behaviour in ("interrupt", "cut") and not resumed:
    names = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    files = dict.fromkeys([*names, "dataflex_state.npz"], 1)
    for name in files:
        write(folder / "checkpoint-2" / name, 0)
    marker = {"run": "id", "step": 2, "config": {}, "local_processes": 1, "has_scaler": False, "files": files}
    write(folder / "checkpoint-2" / "dataflex_complete.json", marker)
    write(record / "run.json", {"id": "id"})
    if behaviour == "cut":
        sys.exit("dataflex: cut off")
    os.kill(os.getppid(), 2)
    time.sleep(60)
shares = mix.get("proportions") if isinstance(mix.get("proportions"), dict) else {}
# The loss on each set falls along the share of alpha, as a line with another slope for each.
values = {"held": 3.0 - 2.0 * shares.get("alpha", 0.0), "beta": 2.0 + shares.get("alpha", 0.0)}
values = {key: float("nan") if behaviour == "diverges" else value for key, value in values.items()}
numbers = {key: {"loss": v, "perplexity": 2.0, "bits_per_byte": 1.0, "tokens": 9} for key, v in values.items()}
mean = {"loss": 2.5, "perplexity": 2.0, "bits_per_byte": 1.0}
evaluation = {"step": 4, "fingerprint": "x", "domains": numbers, "token_weighted": mean, "unweighted": mean}
costs = {"train_seconds": 8.0, "decision_seconds": 1.0, "evaluate_seconds": 0.5, "tokens": 100, "steps": 4}
write(folder / "config.json", {})
write(folder / "model.safetensors", str(config.get("learning_rate")))
domains = {"dataflex/domain_tokens/alpha": 300, "dataflex/domain_tokens/beta": 100}
write(folder / "trainer_state.json", {"log_history": [{"step": 4, **domains}], "global_step": 4})
if mix["method"] == "doremi" and behaviour != "finds nothing":
    write(record / "domain_weights.json", {"method": "doremi", "proportions": {"alpha": 0.25, "beta": 0.75}})
write(record / "summary.json", {**costs, "evaluation": evaluation, "saved": ["model"]})
"""


class Lab:
    """A folder with a workflow's file, and the program that stands for a training."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.data = tiny.make_data(folder / "data")
        (folder / "model").mkdir()
        config = {"model_type": "llama", "vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4}
        (folder / "model" / "config.json").write_text(json.dumps(config))
        (folder / "model" / "tokenizer_config.json").write_text('{"model_max_length": 7}')
        (folder / "model" / "model.safetensors").write_text("weights")
        (folder / "program.py").write_text(PROGRAM)
        self.program = (sys.executable, str(folder / "program.py"))
        self.base = tiny.arguments(folder / "model", self.data, folder / "unused", finetuning_type="full")
        self.base |= {"dataset": "alpha,beta", "eval_dataset": "held,beta", "do_eval": True}
        self.output = folder / "out"
        self.file = folder / "workflow.yaml"
        self.settings = {"base": "base.yaml", "output_dir": str(self.output), **settings}
        self.behave({})
        self.write()

    def write(self, **changes: Any) -> None:
        self.settings |= changes
        (self.folder / "base.yaml").write_text(yaml.safe_dump(self.base))
        self.file.write_text(yaml.safe_dump(self.settings, sort_keys=False))

    def behave(self, behaviour: dict[str, str]) -> None:
        (self.data / "behaviour.json").write_text(json.dumps(behaviour))

    def doremi(self, **options: Any) -> int:
        return doremi(self.file, program=self.program, **options)

    def regmix(self, **options: Any) -> int:
        return regmix(self.file, program=self.program, at_once=Workers(2), **options)

    def launches(self) -> list[str]:
        """Return the names of the trainings since the last call; those that went on from a checkpoint with a +."""
        file = self.data / "launches.txt"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        file.unlink(missing_ok=True)
        self.environments = [line[2] for line in lines]
        return [f"{name}{'+' if resumed else ''}" for name, resumed, _ in lines]

    def problems(self) -> dict[str, str]:
        """Return what is said of each key when the file is checked."""
        with pytest.raises(ConfigError) as error:
            self.doremi() if "proxies" not in self.settings else self.regmix()
        assert not self.output.exists()
        return {problem.key: problem.message for problem in error.value.problems}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, {"reference": {"max_steps": 4}, "proxy": {"dataflex.mix.reweight_eta": 0.1}})


# DoReMi.


def test_three_stages_are_trained_once(lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert lab.doremi() == 0
    assert lab.launches() == ["reference", "proxy", "final"]
    assert lab.environments == [{"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}] * 3
    trained = {name: yaml.safe_load((lab.output / name / "run.yaml").read_text()) for name in lab_stages}
    assert [trained[name]["max_steps"] for name in lab_stages] == [4, 8, 8]
    mixes = [trained[name]["dataflex"]["mix"] for name in lab_stages]
    assert [mix["method"] for mix in mixes] == ["proportional", "doremi", "static"]
    assert (mixes[1]["reference_model"], mixes[1]["reweight_eta"]) == (str(lab.output / "reference"), 0.1)
    assert (mixes[2]["proportions"], mixes[2]["unit"]) == (
        str(lab.output / "proxy" / "dataflex" / "domain_weights.json"),
        "tokens",
    )
    out = capsys.readouterr().out
    places = [f"stage {number} of 3: {name}" for number, name in enumerate(lab_stages, 1)]
    assert [line for line in out.splitlines() if line.startswith("stage ")] == places
    said = [line.split() for line in out.splitlines()]
    assert ["alpha", "0.7500", "0.2500", "-"] in said
    assert ["beta", "0.2500", "0.7500", "2.0000"] in said
    assert ["held", "-", "-", "3.0000"] in said

    assert lab.doremi() == 0
    assert lab.launches() == []


lab_stages = ("reference", "proxy", "final")


def test_what_fails_or_is_cut_off_goes_on(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.behave({"proxy": "crash"})
    assert lab.doremi() == 1
    assert "proxy failed: training: RuntimeError: out of luck" in capsys.readouterr().err
    assert lab.launches() == ["reference", "proxy"]
    lab.behave({"proxy": "finds nothing"})
    assert lab.doremi() == 1
    assert "domain_weights.json is missing" in capsys.readouterr().err
    assert lab.launches() == ["proxy"]
    (lab.output / "proxy" / "complete.json").unlink()
    (lab.output / "proxy" / "dataflex" / "summary.json").unlink()
    (lab.output / "proxy" / "model.safetensors").unlink()
    lab.behave({"proxy": "cut"})
    assert lab.doremi() == 1
    assert lab.doremi(dry_run=True) == 0
    assert "proxy      to resume" in capsys.readouterr().out
    lab.behave({"final": "interrupt"})
    assert lab.doremi() == 130
    assert lab.launches() == ["proxy", "proxy+", "final"]
    assert lab.doremi() == 0
    assert lab.launches() == ["final+"]


def test_a_change_makes_a_stage_and_the_later_ones_anew(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.doremi() == 0
    lab.launches()
    lab.write(final={"learning_rate": 0.5})
    assert lab.doremi() == 0
    assert lab.launches() == ["final"]
    assert yaml.safe_load((lab.output / "final-changed-1" / "run.yaml").read_text())["learning_rate"] == 0.01
    lab.write(reference={"learning_rate": 0.25})
    capsys.readouterr()
    assert lab.doremi(dry_run=True) == 0
    said = capsys.readouterr().out
    assert "reference  changed: will be set aside and trained again" in said
    assert "after reference" in said
    assert "after proxy" in said
    assert lab.launches() == []
    assert lab.doremi() == 0
    assert lab.launches() == ["reference", "proxy", "final"]
    names = {path.name for path in lab.output.iterdir() if path.is_dir()}
    assert names == {*lab_stages, *(f"{name}-changed-1" for name in lab_stages), "final-changed-2"}
    rows = json.loads((lab.data / "beta.json").read_text())
    (lab.data / "beta.json").write_text(json.dumps(rows[1:]))
    assert lab.doremi() == 0
    assert lab.launches() == ["reference", "proxy", "final"]


def test_another_result_of_the_proxy_makes_the_final_training_anew(lab: Lab) -> None:
    assert lab.doremi() == 0
    lab.launches()
    (lab.output / "proxy" / "dataflex" / "domain_weights.json").write_text('{"proportions": {"alpha": 1, "beta": 2}}')
    assert lab.doremi() == 0
    assert lab.launches() == ["final"]


def test_a_dry_run_writes_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.write(proxy={"model_config": {"hidden_size": 16}})
    assert lab.doremi(dry_run=True) == 0
    assert "reference  to run" in capsys.readouterr().out
    assert not lab.output.exists()
    assert not lab.launches()


def test_print_writes_nothing_and_says_all_three(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    (lab.folder / "plugin.py").write_text(
        "from dataflex import Order, register\n\n\n@register('order', 'workflow_test')\nclass Mine(Order):\n"
        "    def arrange(self, ctx, selection):\n        return ctx.rng.permutation(selection.indices.size)\n"
    )
    lab.base["dataflex"] = {"plugins": ["plugin.py"]}
    lab.write()
    assert lab.doremi(print_only=True) == 0
    assert not lab.output.exists()
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("#")] == [f"# {name}.yaml" for name in lab_stages]
    documents = list(yaml.safe_load_all(said))
    assert [each["output_dir"] for each in documents] == [str(lab.output / name) for name in lab_stages]
    assert all(each["dataflex"]["plugins"] == [str(lab.folder / "plugin.py")] for each in documents)
    assert documents[1]["dataflex"]["mix"] == {
        "method": "doremi",
        "reference_model": str(lab.output / "reference"),
        "reweight_eta": 0.1,
    }
    lab.write(final={"model_config": {"hidden_size": 16}})  # by hand too it has to be there
    assert lab.doremi(print_only=True) == 0
    folder = Path(list(yaml.safe_load_all(capsys.readouterr().out))[2]["model_name_or_path"])
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 16


def test_doremi_weighs_the_values_of_a_column(lab: Lab) -> None:
    lab.base |= {"dataset": "alpha", "dataflex": {"domain_column": "instruction"}}
    lab.write()
    assert lab.doremi() == 0
    trained = [yaml.safe_load((lab.output / name / "run.yaml").read_text()) for name in lab_stages]
    assert [each["dataflex"]["domain_column"] for each in trained] == ["instruction"] * 3
    lab.write(final={"dataflex.domain_column": "output"}, output_dir=str(lab.folder / "other"))
    with pytest.raises(ConfigError, match=r"final.dataflex.domain_column: must be the same in all trainings"):
        lab.doremi()


def test_what_a_stage_takes_away_must_be_there(lab: Lab) -> None:
    lab.base["dataflex"] = {"select": {"method": "random"}}
    lab.write(reference={"dataflex.selct": None}, final={"dataflex.mix.proportion": None, "learning_rate.x": 1})
    assert lab.problems() == {
        "reference.dataflex.selct": "removes a key that the base does not have; did you mean 'dataflex.select'?",
        "final.dataflex.mix.proportion": "removes a key that the base does not have; did you mean "
        "'dataflex.mix.proportions'?",
        "final.learning_rate.x": "leads through 'learning_rate', which is 0.01 in the base and not a mapping.",
    }


@pytest.mark.parametrize("proportions", [[1, 2], {"alpha": 1, "beta": 2}])
def test_the_mixture_of_the_base_is_replaced(lab: Lab, proportions: Any) -> None:
    mix = {"method": "static", "proportions": proportions, "max_epochs_per_domain": 3}
    lab.base["dataflex"] = {"mix": mix, "seed": 5}
    lab.write()
    stages, (note,) = load(lab.file)
    assert "the command sets or removes these keys itself and ignores their values in the base: " in note
    assert "dataflex.mix" in note
    mixes = [stage.raw["dataflex"]["mix"] for stage in stages]
    assert mixes[0] == {"method": "proportional"}
    weights = str(lab.output / "proxy" / "dataflex" / "domain_weights.json")
    assert mixes[2] == {"method": "static", "proportions": weights, "unit": "tokens", "max_epochs_per_domain": 3}
    assert all(stage.raw["dataflex"]["seed"] == 5 for stage in stages)


def test_problems_of_all_stages_come_together(lab: Lab) -> None:
    lab.base |= {"learning_rat": 1, "dataflex": {"select": {"method": "loss"}, "mix": {"method": "odd"}}}
    lab.write(
        reference={"dataflex.mix": {"method": "random"}},
        proxy={"dataflex.mix.reweight_etta": 0.1, "dataflex.select": None},
        final={"dataflex.mix.unit": "samples", "dataset": "gamma", "output_dir": "x"},
    )
    found = lab.problems()
    assert "did you mean 'learning_rate'" in found["reference.learning_rat"]
    assert "did you mean 'reweight_eta'" in found["proxy.dataflex.mix.reweight_etta"]
    assert "trained without 'random'" in found["reference.dataflex.mix"]
    assert "trained without 'loss'" in found["reference.dataflex.select"]
    assert found["final.dataflex.mix.unit"] == found["final.output_dir"] == "is set by the command itself; remove it."
    assert "must be the same in all trainings" in found["final.dataset"]


@pytest.mark.parametrize(
    "base, changes, key, said",
    [
        ({"dataset": "alpha"}, {}, "base.dataset", "name two or more"),
        ({"cutoff_len": "x"}, {}, "base.cutoff_len", "must be a number"),
        ({}, {"finale": {}}, "finale", "did you mean 'final'"),
        ({}, {"base": "none.yaml"}, "base", "no such file"),
        ({}, {"proxy": {"dataflex.mix": None}}, "proxy.dataflex.mix", "is set by the command itself"),
        ({}, {"proxy": {"model_config": {"hiden_size": 8}}}, "proxy.model_config.hiden_size", "mean 'hidden_size'"),
        ({}, {"proxy": {"model_config": {"hidden_size": 30}}}, "proxy.model_config", "not a multiple of the number"),
        (
            {},
            {"proxy": {"model_config": {"vocab_size": 30}}},
            "proxy.model_config.vocab_size",
            "must be at least the 60",
        ),
        ({}, {"proxy": {"model_config": 3}}, "proxy.model_config", "must be a mapping"),
        (
            {"finetuning_type": "lora"},
            {"final": {"model_config": {"hidden_size": 8}}},
            "final.finetuning_type",
            "must be full with model_config, got 'lora'",
        ),
    ],
)
def test_a_problem_is_told_before_anything_runs(
    lab: Lab, base: dict[str, Any], changes: dict[str, Any], key: str, said: str
) -> None:
    lab.base |= base
    lab.write(**changes)
    assert said in lab.problems()[key]


def test_what_the_command_did_not_make_is_left_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (lab.output / "reference").mkdir(parents=True)
    (lab.output / "reference" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"reference holds files that this command did not write"):
        lab.doremi()
    assert (lab.output / "reference" / "thesis.txt").read_text() == "mine"
    with FileLock(lab.output / ".lock"), pytest.raises(ConfigError, match="another command is at work"):
        lab.doremi()
    monkeypatch.setenv("NNODES", "2")
    with pytest.raises(ConfigError, match="several machines"):
        lab.doremi()
    assert lab.launches() == []


def test_a_stage_may_have_a_model_of_its_own(lab: Lab) -> None:
    change = {"model_config": {"hidden_size": 16, "num_hidden_layers": 1}}
    lab.write(reference=change, proxy=change)
    assert lab.doremi() == 0
    folders = {}
    for name in lab_stages:
        trained = yaml.safe_load((lab.output / name / "run.yaml").read_text())
        folders[name] = Path(trained["model_name_or_path"])
        assert trained.get("train_from_scratch") is (None if name == "final" else True)
    assert folders["final"] == lab.folder / "model"
    config = json.loads((folders["proxy"] / "config.json").read_text())
    assert config == {
        "model_type": "llama",
        "vocab_size": 60,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    }
    assert {file.name for file in folders["proxy"].iterdir()} == {"config.json", "tokenizer_config.json"}
    lab.launches()
    (lab.folder / "model" / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    assert lab.doremi() == 0
    assert lab.launches() == ["reference", "proxy", "final"]
    (stage,) = [stage for stage in load(lab.file)[0] if stage.name == "proxy"]
    made = Path(stage.raw["model_name_or_path"])
    assert made != folders["proxy"]
    assert '"model_max_length": 8' in (made / "tokenizer_config.json").read_text()


def test_a_nested_configuration_is_changed_key_by_key(tmp_path: Path) -> None:
    config = {"model_type": "mine", "text_config": {"layers": 4, "width": 8}, "vocab_size": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = small_model(str(tmp_path), None, {"text_config": {"layers": 2}, "vocab_size": 6})
    assert made.config == {"model_type": "mine", "text_config": {"layers": 2, "width": 8}, "vocab_size": 6}
    with pytest.raises(ConfigError, match=r"text_config.layer: unknown key 'layer'; did you mean 'layers'"):
        small_model(str(tmp_path), None, {"text_config": {"layer": 2}})
    with pytest.raises(ConfigError, match=r"no model in"):
        small_model(str(tmp_path / "none"), None, {"vocab_size": 6})


# RegMix.


@pytest.fixture
def mixing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    sizes = ("alpha", "beta"), np.array([300.0, 100.0])
    monkeypatch.setattr(regmix_module, "_sizes", lambda plan: sizes)  # tokenizing needs a tokenizer
    proxies = {"count": 5, "max_steps": 4, "model_config": {"hidden_size": 16}, "max_epochs": None}
    return Lab(tmp_path, {"proxies": proxies, "target": "held", "regressor": "linear", "final": {"learning_rate": 0.5}})


def test_the_mixture_of_the_lowest_loss_is_found(mixing: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixing.regmix(dry_run=True) == 0
    assert not mixing.output.exists()
    assert "5 runs to go" in capsys.readouterr().out
    assert mixing.regmix() == 0
    said = capsys.readouterr().out
    assert sorted(mixing.launches()) == [f"mix-{number:04d}" for number in range(1, 6)]
    domains, mixtures = read_table(mixing.output / "mixtures.csv")
    names, losses = read_table(mixing.output / "losses.csv")
    assert (domains, names) == (("alpha", "beta"), ("held", "beta"))
    assert len(np.unique(mixtures.round(6), axis=0)) == 5
    np.testing.assert_allclose(losses[:, 0], 3.0 - 2.0 * mixtures[:, 0], rtol=1e-12)
    assert "held               1.000" in said  # the rank correlation of a loss that is a line
    final = yaml.safe_load((mixing.output / "final.yaml").read_text())
    mix = final["dataflex"]["mix"]
    assert (mix["method"], mix["unit"], final["learning_rate"]) == ("static", "tokens", 0.5)
    assert mix["proportions"]["alpha"] > 0.99  # the loss on held falls to the end
    assert final["model_name_or_path"] == str(mixing.folder / "model")
    assert f"dataflex-cli train {mixing.output / 'final.yaml'}" in said
    run = next((mixing.output / "proxies" / "runs" / "mix-0002").iterdir())
    trained = yaml.safe_load((run / "run.yaml").read_text())
    assert trained["dataflex"]["mix"]["unit"] == "tokens"
    np.testing.assert_allclose(list(trained["dataflex"]["mix"]["proportions"].values()), mixtures[1], rtol=1e-12)
    assert trained["train_from_scratch"] is True
    assert json.loads((Path(trained["model_name_or_path"]) / "config.json").read_text())["hidden_size"] == 16

    mixing.write(target=["beta"])  # on which alpha is worst: nothing is trained, another mixture is best
    assert mixing.regmix() == 0
    assert mixing.launches() == []
    final = yaml.safe_load((mixing.output / "final.yaml").read_text())
    assert final["dataflex"]["mix"]["proportions"]["alpha"] < 0.01
    before = yaml.safe_load((mixing.output / "final-changed-1.yaml").read_text())
    assert before["dataflex"]["mix"] == mix
    mixing.settings["proxies"]["count"] = 6
    mixing.write()
    assert mixing.regmix() == 0
    assert mixing.launches() == ["mix-0006"]
    np.testing.assert_array_equal(read_table(mixing.output / "mixtures.csv")[1][:5], mixtures)


def test_proxies_that_fail_are_left_out(mixing: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    mixing.behave({"mix-0001": "crash", "mix-0003": "diverges", "mix-0005": "crash"})
    with pytest.raises(ConfigError, match=r"2 of 5 proxies have usable losses, but linear needs 3"):
        mixing.regmix()
    assert not (mixing.output / "final.yaml").exists()
    said = capsys.readouterr().err
    assert "left out: mix-0001: training: RuntimeError: out of luck" in said
    assert "left out: mix-0003: the loss on held is not finite, so training diverged" in said
    mixing.launches()
    mixing.behave({"mix-0003": "diverges", "mix-0005": "crash"})
    assert mixing.regmix() == 0
    assert sorted(mixing.launches()) == ["mix-0001", "mix-0005"]
    assert len(read_table(mixing.output / "losses.csv")[1]) == 3
    mixing.behave({"mix-0005": "interrupt"})
    assert mixing.regmix() == 130


@pytest.mark.parametrize(
    "base, changes, key, said",
    [
        ({}, {"target": "hold"}, "target", "did you mean 'held'"),
        ({"eval_dataset": None}, {"target": None}, "base.eval_dataset", "needs evaluation data"),
        ({}, {"regressor": "lightgbm"}, "proxies.count", "must be at least 64 for lightgbm"),
        ({}, {"proxies": {"count": 2, "max_steps": 4}}, "proxies.count", "must be at least 3 for linear"),
        ({}, {"proxies": {"count": 4, "max_steps": None}}, "proxies", "the length of a proxy's training is missing"),
        ({}, {"proxies": {"count": 4, "strengths": 0}}, "proxies.strengths", "greater than or equal to 1"),
        ({}, {"proxies": {"count": 4, "dataflex.mix.unit": "samples"}}, "proxies.dataflex.mix.unit", "command itself"),
        ({}, {"proxies": {"count": 4, "temprature": 1}}, "proxies.temprature", "did you mean 'temperature'"),
        ({}, {"proxies": {"count": 4, "data_seed": 1}}, "proxies.data_seed", "not allowed in a comparison"),
        ({}, {"final": {"dataset": "alpha"}}, "final.dataset", "must be the same"),
        ({"dataset": "alpha"}, {}, "base.dataset", "two or more"),
        ({"dataset": None}, {}, "base.dataset", "two or more"),
        ({}, {"regressor": "forest"}, "regressor", "lightgbm"),
    ],
)
def test_a_problem_of_regmix_is_told_before_anything_runs(
    mixing: Lab, base: dict[str, Any], changes: dict[str, Any], key: str, said: str
) -> None:
    mixing.base |= base
    mixing.write(**changes)
    assert said in mixing.problems()[key]


def test_the_prior_is_the_share_of_tokens(tmp_path: Path) -> None:
    lab = Lab(tmp_path, {"proxies": {"count": 4}, "regressor": "linear"})
    tiny.make_model(tmp_path / "model")
    from dataflex.integrations.llamafactory.pool_only import pool_of

    plan = regmix_module.load(lab.file)
    pool, _ = pool_of(plan.proxy.source)
    assert isinstance(pool, Pool)
    tokens = [sum(len(row["input_ids"]) for row in pool.dataset.select(part)) for part in (range(48), range(48, 80))]
    assert regmix_module._with_domains(plan)[0] == plan
    names, found = regmix_module._sizes(plan)
    assert (names, found.tolist()) == (("alpha", "beta"), tokens)


def test_values_of_a_column_are_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab(tmp_path, {"proxies": {"count": 4, "max_epochs": None}, "target": "held", "regressor": "linear"})
    tiny.make_model(tmp_path / "model")
    info = json.loads((lab.data / "dataset_info.json").read_text())
    files = {"b.c": "beta.json", "alpha": "gamma.json"}
    whole = [
        {**row, "kind": value} for value, file in files.items() for row in json.loads((lab.data / file).read_text())
    ]
    (lab.data / "whole.json").write_text(json.dumps(whole))
    (lab.data / "dataset_info.json").write_text(json.dumps({**info, "whole": {"file_name": "whole.json"}}))
    lab.base |= {"dataset": "gamma,beta"}
    lab.write()
    names, separate = regmix_module._sizes(regmix_module.load(lab.file))
    assert names == ("gamma", "beta")

    lab.base |= {"dataset": "whole", "dataflex": {"domain_column": "kind"}}
    lab.write()
    names, together = regmix_module._sizes(regmix_module.load(lab.file))
    assert (names, together.tolist()) == (("alpha", "b.c"), separate.tolist())
    assert lab.regmix() == 0
    said = capsys.readouterr().out
    domains, mixtures = read_table(lab.output / "mixtures.csv")
    assert domains == names
    assert ["alpha", f"{together[0] / together.sum():.4f}"] in [line.split()[:2] for line in said.splitlines()]
    run = next((lab.output / "proxies" / "runs" / "mix-0002").iterdir())
    section = yaml.safe_load((run / "run.yaml").read_text())["dataflex"]
    assert section["domain_column"] == "kind"
    assert section["mix"]["proportions"] == dict(zip(names, mixtures[1].tolist(), strict=True))
    final = load_config(lab.output / "final.yaml")
    assert final.dataflex is not None
    assert (final.dataflex.domain_column, list(final.dataflex.mix["proportions"])) == ("kind", list(names))
    assert final.dataflex.mix["proportions"]["alpha"] > 0.99  # the loss on held falls to the end

    lab.write(proxies={"count": 4, "dataflex.domain_column": "output"}, output_dir=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"proxies.dataflex.domain_column: must be the same"):
        lab.regmix()
    lab.write(proxies={"count": 4, "dataflex.selct": None})
    with pytest.raises(ConfigError, match=r"proxies.dataflex.selct: removes a key that the base does not have"):
        lab.regmix()
    for row in whole:
        row["kind"] = "index"
    (lab.data / "whole.json").write_text(json.dumps(whole))
    lab.write(proxies={"count": 4})
    with pytest.raises(ConfigError) as error:
        lab.regmix()
    assert "two or more domains, got 1; dataflex.domain_column needs more values" in str(error.value)
    assert "'index' is the column of row numbers in mixtures.csv" in str(error.value)
    for number, row in enumerate(whole):
        row["kind"] = number % 4
    (lab.data / "whole.json").write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match=r"proxies.count: must be at least 5 for linear with 4 domains, got 4"):
        lab.regmix()
    assert not (tmp_path / "other").exists()


# Real trainings.


@pytest.mark.launch
def test_doremi_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_data(tmp_path / "data")
    base = tiny.arguments(model, data, tmp_path, stage="pt", finetuning_type="full", dataset="texts,pages")
    base |= {"learning_rate": 1e-3, "max_steps": 4, "eval_dataset": "texts,pages", "do_eval": True}
    del base["template"]
    small = {"model_config": {"num_hidden_layers": 1}}
    settings = {"base": base, "output_dir": "out", "reference": small, "proxy": {**small, "max_steps": 3}}
    (tmp_path / "doremi.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    capsys.readouterr()
    status = main(["doremi", "doremi.yaml"])
    said = capsys.readouterr().out
    assert status == 0, "\n".join([said, *(path.read_text()[-2000:] for path in tmp_path.glob("out/*/log.txt"))])
    weights = json.loads((tmp_path / "out/proxy/dataflex/domain_weights.json").read_text())
    assert weights["steps"] == 3
    assert sum(weights["proportions"].values()) == pytest.approx(1)
    assert json.loads((tmp_path / "out/proxy/config.json").read_text())["num_hidden_layers"] == 1
    assert json.loads((tmp_path / "out/final/config.json").read_text())["num_hidden_layers"] == 2
    rows = {words[0]: words[1:] for line in said.splitlines() if len(words := line.split()) == 4}
    final = json.loads((tmp_path / "out/final/dataflex/summary.json").read_text())["evaluation"]["domains"]
    for name in ("texts", "pages"):
        assert rows[name][1:] == [f"{weights['proportions'][name]:.4f}", f"{final[name]['loss']:.4f}"]
    assert sum(float(rows[name][0]) for name in ("texts", "pages")) == pytest.approx(1, abs=2e-4)
    shares = round_lines(tmp_path / "out/final")[0]["proportions"]
    # Shares of tokens, divided by the mean lengths, are shares of samples: pt packs, so all samples are equally long.
    assert shares == pytest.approx(weights["proportions"], abs=0.05)
