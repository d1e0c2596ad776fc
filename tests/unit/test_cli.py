"""The help of every command, messages about arguments, and the scripts that complete them."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dataflex import cli
from dataflex.commands import llamafactory
from dataflex.commands.completion import script


def commands() -> dict[str, argparse.ArgumentParser]:
    [found] = [each for each in cli._parser()._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(found.choices)


def test_every_command_has_a_parser() -> None:
    assert commands().keys() == cli._COMMANDS.keys()


@pytest.mark.parametrize("name", sorted(cli._COMMANDS))
def test_the_help_has_a_description_and_one_example_that_can_be_parsed(name: str) -> None:
    command = commands()[name]
    assert command.description
    assert len(command.description) > 60
    assert command.epilog is not None
    [example] = re.findall(rf"dataflex-cli ({name}.*)", command.epilog)
    words = example.split('"')[0].replace(")", "").split()
    assert cli._parser().parse_known_args(words)[0].command == name
    assert all(action.help for action in command._actions), "every argument is explained"


@pytest.mark.parametrize("name", ["train", "check", "features", "score", "embed"])
def test_usage_lines_show_overrides_as_optional(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].endswith("the following arguments are required: config")
    assert "[KEY=VALUE ...]" in said


def test_overrides_may_stand_on_both_sides_of_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setitem(cli._COMMANDS, "score", lambda options: seen.append(options.overrides) or 0)  # type: ignore[func-returns-value]
    assert cli.main(["score", "a.yaml", "--count", "3", "seed=1"]) == 0
    assert cli.main(["score", "a.yaml", "x=1", "--count", "3", "seed=1"]) == 0
    assert cli.main(["score", "a.yaml"]) == 0
    assert seen == [["seed=1"], ["x=1", "seed=1"], []]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score", "a.yaml", "--fraction", "0"], r"--fraction: must be a number in \(0, 1\], got '0'"),
        (["score", "a.yaml", "--fraction", "half"], r"--fraction: must be a number in \(0, 1\], got 'half'"),
        (["score", "a.yaml", "--count", "2.5"], "--count: must be a whole number of at least 1, got '2.5'"),
        (["explain", "run", "--index", "-1"], "--index: expected at least one argument|must be a whole number"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
    ],
)
def test_a_wrong_value_is_named_with_the_values_that_are_allowed(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_names_every_command_and_is_read_by_its_shell(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert text.rstrip() == script(cli._parser(completing=True), shell).rstrip()
    assert all(name in text for name in (*cli._COMMANDS, *llamafactory.COMMANDS))
    assert "--fewshot-file" in text if shell != "fish" else "fewshot-file" in text
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_bash_completes_commands_options_and_files(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    (tmp_path / "run.yaml").touch()
    (tmp_path / "script").write_text(script(cli._parser(completing=True), "bash"))

    def completed(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in ("dataflex-cli", *words))
        steps = f"source ./script; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_dataflex_cli dataflex-cli"
        steps += f" '{words[-1]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run([bash, "-c", steps], cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("ex") == {"explain", "export"}
    assert completed("compare", "--dry") == {"--dry-run"}
    assert completed("train", "run.") == {"run.yaml"}
    assert completed("web") == {"webchat", "webui"}
    assert completed("chat", "run.") == {"run.yaml"}
