"""Track B of the leaderboard: its data, its models, and settings that the commands accept."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml

from dataflex.cli import main

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "leaderboard"))

import boards
import pretraining
from pretraining import DOMAINS, SIZES

BOARD = boards.read(Path(__file__).parents[3] / "benchmarks" / "leaderboard" / "board.yaml")
MIXERS = {
    tier.mixtures.size: BOARD.mixers_of(tier.mixtures) for tier in BOARD.tiers.values() if tier.mixtures is not None
}

TEXTS = ["the lowest cat, the newest cat\n", "  def f(x):\n    return x  # é 漢", "a b c " * 30, "cats and cats"]


def write_source(folder: Path, repeats: int = 1) -> Path:
    (folder / "pretrain").mkdir(parents=True)
    for number, file in enumerate(pretraining.files()):
        rows = [{"text": f"{number} {text}" * repeats, "domain": "any"} for text in TEXTS]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folder ``work`` of a prepared track of few texts and a small vocabulary."""
    monkeypatch.chdir(tmp_path)
    for name, size in SIZES.items():
        monkeypatch.setitem(SIZES, name, dataclasses.replace(size, vocabulary=300))
    write_source(tmp_path / "source")
    return tmp_path


def test_documents_are_cut_at_equal_distances() -> None:
    texts = ["aaaaaaaa", "bbbbbbbb", "cc", "dddddddd", "eeeeeeee"]
    assert pretraining.cut(texts, 2, 10) == ["aaaaa", "cc"]
    assert pretraining.cut(texts, 3, 12) == ["aaaa", "bbbb", "dddd"]
    assert pretraining.cut(texts[:2], 16, 6) == ["aaa", "bbb"]
    assert pretraining.cut(texts, 5, 1000) == texts


@pytest.mark.parametrize("size", SIZES)
def test_the_source_may_lie_anywhere(size: str, prepared: Path) -> None:
    pretraining.prepare(Path("source"), Path("one"), size)
    pretraining.prepare(write_source(prepared / "elsewhere"), Path("two"), size)
    assert contents(Path("one")) == contents(Path("two"))
    info = json.loads(Path("one/data/dataset_info.json").read_text())
    assert set(info) == {*DOMAINS, *(f"{name}_val" for name in DOMAINS)}
    for number, name in enumerate(info):
        rows = [json.loads(line) for line in Path("one/data", info[name]["file_name"]).read_text().splitlines()]
        whole = [{"text": f"{number} {text}"} for text in TEXTS]
        assert rows == whole  # these texts are too short to be cut


@pytest.mark.parametrize("size", SIZES)
def test_the_model_is_as_large_as_its_size_says(size: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    found = dataclasses.replace(SIZES[size], vocabulary=300)
    pretraining.write_model(iter(TEXTS), tmp_path, found)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "unseen: \x07 ß 😀"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    width, inner = found.width, found.inner
    of_a_layer = 4 * width**2 + 3 * width * inner + 2 * width
    assert model.num_parameters() == 300 * width + found.layers * of_a_layer + width
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
    assert tokenizer.eos_token_id == model.config.eos_token_id == 1


@pytest.mark.parametrize("size", SIZES)
def test_the_commands_accept_the_settings(size: str, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("work")
    pretraining.prepare(Path("source"), folder, size)
    shares = json.dumps({"proportions": {name: 1 / len(DOMAINS) for name in DOMAINS}})
    for run in ("doremi/proxy", "doge"):
        (folder / run / "dataflex").mkdir(parents=True)
        (folder / run / "dataflex" / "domain_weights.json").write_text(shares)
    (folder / "regmix").mkdir()
    for table, ending in (("mixtures", ""), ("losses", "_val")):
        rows = [[int(number % len(DOMAINS) == at) for at in range(len(DOMAINS))] for number in range(64)]
        lines = [[f"{name}{ending}" for name in DOMAINS], *rows]
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
        (folder / "regmix" / f"{table}.csv").write_text(text)
    experiment = pretraining.experiment_settings(folder, Path("compare"), size, [1, 2], MIXERS[size], "by_size")
    assert not any(str(prepared) in text for text in (str(experiment), str(pretraining.doremi_settings(folder, size))))
    Path("compare.yaml").write_text(yaml.safe_dump(experiment))
    assert main(["compare", "compare.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for name in MIXERS[size]:
        assert said.count(f"runs/{name}/seed-") == 2
    (folder / "doremi").rename("found")  # the command refuses a folder that it did not make
    Path("doremi.yaml").write_text(yaml.safe_dump(pretraining.doremi_settings(folder, size)))
    assert main(["doremi", "doremi.yaml", "--dry-run"]) == 0


def test_the_commands_of_the_large_size_accept_their_settings(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("work")
    monkeypatch.setitem(SIZES, "large", dataclasses.replace(SIZES["large"], tokens=1_000_000))  # there are few texts
    pretraining.prepare(write_source(prepared / "long", repeats=300), folder, "large")
    on_a_processor = {"bf16": False, "use_cpu": True}
    Path("doge.yaml").write_text(yaml.safe_dump(pretraining.doge_settings(folder, "large") | on_a_processor))
    assert main(["check", "doge.yaml"]) == 0
    regmix = pretraining.regmix_settings(folder, "large")
    Path("regmix.yaml").write_text(yaml.safe_dump({**regmix, "base": regmix["base"] | on_a_processor}))
    assert main(["regmix", "regmix.yaml", "--dry-run"]) == 0
