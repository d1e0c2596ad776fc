"""LLaMA-Factory's commands through ``dataflex-cli``: which are passed on, and with which arguments."""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex import cli
from dataflex.commands import llamafactory
from dataflex.commands.inference_file import keys_for_inference
from dataflex.errors import ConfigError

SECTION = "dataflex:\n  select: {method: loss}\n"
TRAINING = "stage: sft\ndo_train: true\nmax_steps: 3\nlearning_rate: 1.0e-4\nlora_rank: 4\ntemplate: default\n"


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any] | None]]:
    """Return a list that fills with the arguments that reach LLaMA-Factory, and the content of their file."""
    import llamafactory.cli

    seen: list[tuple[list[str], dict[str, Any] | None]] = []

    def main() -> None:
        file = Path(sys.argv[2]) if len(sys.argv) > 2 else None
        seen.append((list(sys.argv), yaml.safe_load(file.read_text()) if file is not None and file.is_file() else None))

    monkeypatch.setattr(llamafactory.cli, "main", main)
    return seen


def test_the_commands_are_those_of_the_installed_launcher() -> None:
    spec = find_spec("llamafactory")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "launcher.py").read_text())
    compared = [
        node for node in ast.walk(tree) if isinstance(node, ast.Compare) and ast.unparse(node.left) == "command"
    ]
    names = {each.value for node in compared for each in node.comparators if isinstance(each, ast.Constant)}
    assert names == {*llamafactory.COMMANDS, "train", "export", "eval", "version", "help"}


@pytest.mark.parametrize(
    "words",
    [
        ["chat", "--model_name_or_path", "model", "--template", "default"],
        ["chat", "-h"],
        ["api"],
        ["webui"],
        ["webui", "dataflex.yaml"],
        ["env", "more", "--words"],
        ["export", "merge.yaml", "export_dir=a b", "x=${y}"],
        ["export", "--model_name_or_path", "model", "--export_dir=out"],
        ["chat", "missing.yaml"],
        ["webchat", "merge.yaml", "template=qwen"],
    ],
)
def test_arguments_reach_llamafactory_unchanged(
    words: list[str], passed: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("merge.yaml").write_text("model_name_or_path: models/dataflex\nexport_dir: out/dataflex/merged\nlr: ${y}\n")
    before = list(sys.argv)
    assert cli.main(words) == 0
    assert [arguments for arguments, _ in passed] == [["llamafactory-cli", *words]]
    assert sys.argv == before


@pytest.mark.parametrize(
    "words", [["export", "saves/first", "--output", "x"], ["export", "run.yaml", "--output", "x"], ["eval", "m"]]
)
def test_commands_of_both_with_a_run_are_those_of_dataflex(
    words: list[str], passed: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").mkdir()
    assert not llamafactory.is_passed_on(words)


def test_an_end_of_llamafactory_is_the_end_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import llamafactory.cli

    def leave() -> None:
        sys.exit(3)

    def fail() -> None:
        raise ValueError("an error of LLaMA-Factory")

    monkeypatch.setattr(llamafactory.cli, "main", leave)
    with pytest.raises(SystemExit) as stop:
        cli.main(["chat"])
    assert stop.value.code == 3
    monkeypatch.setattr(llamafactory.cli, "main", fail)
    with pytest.raises(ValueError, match="an error of LLaMA-Factory"):
        cli.main(["chat"])


def test_a_file_with_a_section_is_passed_on_without_the_section_and_with_the_trained_adapter(
    passed: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").touch()
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: model\n{TRAINING}output_dir: {out}\nstrange: 1\n{SECTION}")
    assert cli.main(["chat", str(file), "dataflex.select.method=random", "temperature=0.5"]) == 0
    [(words, keys)] = passed
    assert words[:2] == ["llamafactory-cli", "chat"]
    assert len(words) == 3
    assert keys == {
        "model_name_or_path": "model",
        "stage": "sft",
        "lora_rank": 4,
        "template": "default",
        "strange": 1,  # LLaMA-Factory names it
        "temperature": 0.5,
        "adapter_name_or_path": str(out),
    }
    assert not Path(words[2]).exists(), "the temporary file is deleted"
    said = capsys.readouterr().err
    assert f"Left out of {file}: dataflex, do_train, max_steps, learning_rate, output_dir." in said
    assert f"the model is the result of the training: adapter_name_or_path={out}" in said


def test_an_override_names_the_model(passed: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: model\n{TRAINING}output_dir: {tmp_path / 'none'}\n{SECTION}")
    assert cli.main(["chat", str(file), "adapter_name_or_path=checkpoint-5"]) == 0
    assert cli.main(["chat", str(file), "model_name_or_path=other"]) == 0
    assert [keys.get("adapter_name_or_path") for _, keys in passed] == ["checkpoint-5", None]
    assert [keys["model_name_or_path"] for _, keys in passed] == ["model", "other"]


@pytest.mark.parametrize(
    "keys, file, trained",
    [
        ({}, "adapter_config.json", {"adapter_name_or_path": "OUT"}),
        ({"finetuning_type": "oft"}, "adapter_config.json", {"adapter_name_or_path": "OUT"}),
        ({"finetuning_type": "full"}, "config.json", {"model_name_or_path": "OUT"}),
        ({"finetuning_type": "freeze"}, "config.json", {"model_name_or_path": "OUT"}),
        ({"adapter_name_or_path": "a,b"}, "adapter_config.json", {"adapter_name_or_path": "a,OUT"}),
        (
            {"adapter_name_or_path": "a,b", "create_new_adapter": True},
            "adapter_config.json",
            {"adapter_name_or_path": "a,b,OUT"},
        ),
    ],
)
def test_the_model_is_the_result_of_the_training(
    keys: dict[str, Any], file: str, trained: dict[str, str], tmp_path: Path
) -> None:
    raw = {"model_name_or_path": "model", "do_train": True, "output_dir": str(tmp_path), **keys, "dataflex": {}}
    with pytest.raises(ConfigError, match=r"has no trained (adapter|model)\. Train it with `dataflex-cli train`"):
        keys_for_inference(raw, set(), "run.yaml")
    (tmp_path / file).touch()
    found, _ = keys_for_inference(raw, set(), "run.yaml")
    assert {key: found[key] for key in trained} == {
        key: value.replace("OUT", str(tmp_path)) for key, value in trained.items()
    }


def test_assets_are_named_by_their_folders(passed: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflex.assets.resolve", lambda name: f"cache/{name.removeprefix('asset:')}")
    file = tmp_path / "chat.yaml"
    file.write_text("model_name_or_path: asset:tiny\ntemplate: default\n")
    assert cli.main(["chat", str(file)]) == 0
    assert passed[0][1] == {"model_name_or_path": "cache/tiny", "template": "default"}


def test_eval_with_a_file_names_the_commands_that_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "run.yaml"]) == 2
    said = capsys.readouterr().err
    assert "LLaMA-Factory's eval command cannot evaluate" in said
    assert "dataflex-cli eval MODEL_OR_RUN --tasks NAME" in said


def test_an_unknown_command_is_compared_with_the_commands_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["webchta"]) == 2
    assert cli.main(["trian"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "did you mean 'webchat'?" in said[0]
    assert "did you mean 'train'?" in said[1]
    assert {*llamafactory.COMMANDS, *cli._COMMANDS} <= set(said[0].rstrip(".").replace(",", "").split())


def test_the_help_lists_the_commands_of_llamafactory(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
        _, listed = capsys.readouterr().out.split("commands of LLaMA-Factory")
        assert {*llamafactory.COMMANDS, "export"} <= {line.split()[0] for line in listed.splitlines()[1:-2]}
    with pytest.raises(SystemExit):
        cli.main(["help", "train"])
    assert capsys.readouterr().out.startswith("usage: dataflex-cli train")
