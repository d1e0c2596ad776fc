"""``dataflex-cli check`` and ``train``: files that belong to another command are recognised before other problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataflex import cli

FILES = {
    "compare": "base: base.yaml\noutput_dir: out\nbaseline: a\nvariants: {a: {}, b: {}}\nseeds: [1]\n",
    "doremi": "base: base.yaml\noutput_dir: out\nproxy: {learning_rate: 1.0e-4}\nfinal: {}\n",
    "hard-pairs": "base: base.yaml\noutput_dir: out\nseeds: [1, 2]\nkeep: 0.4\nfinal: {}\n",
    "regmix": "base: base.yaml\noutput_dir: out\nproxies: {count: 8}\nfinal: {}\n",
}


@pytest.mark.parametrize("command", ["check", "train", "score"])
@pytest.mark.parametrize("owner", FILES)
def test_a_file_for_another_command_is_named_with_the_command_to_run(
    command: str, owner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(FILES[owner])
    output = ["--output", str(tmp_path / "scores"), "--fraction", "0.5"] if command == "score" else []
    assert cli.main([command, str(file), *output]) == 2
    assert capsys.readouterr().err == (
        f"dataflex: {file} is a file for `dataflex-cli {owner}`: run `dataflex-cli {owner} {file} --dry-run`.\n"
    )


def test_a_key_base_alone_is_an_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("base: base.yaml\noutput_dir: out\n")
    assert cli.main(["check", str(file)]) == 2
    assert "base: not a LLaMA-Factory argument" in capsys.readouterr().err
