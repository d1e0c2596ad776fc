"""A board with a method of a plug-in, added by one line: two steps of every run, stopped, and continued elsewhere."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "benchmarks" / "leaderboard"
sys.path.insert(0, str(BOARD))

import page  # noqa: E402

pytestmark = pytest.mark.launch

LONGEST = '''
import numpy as np
from dataflex import Selector, SelectorParams, register


class Params(SelectorParams):
    """No parameters."""


@register("selector", "longest")
class Longest(Selector[Params]):
    """Prefers the longest samples."""

    Params = Params

    def score(self, ctx, candidates):
        return ctx.pool.lengths[candidates].astype(np.float64)
'''


def rows(name: str, count: int) -> list[dict[str, str]]:
    rng = random.Random(name)
    return [
        {"instruction": tiny.sentence(rng), "input": "", "output": tiny.sentence(rng, 2, 12), "source": source}
        for source in ("birds", "trees")
        for _ in range(count)
    ]


def written(folder: Path, name: str, content: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, the files of a pool and of a target, a plug-in, and a board that names them."""
    folder = tmp_path_factory.mktemp("board")
    tiny.make_model(folder / "model")
    written(folder / "files", "pool.jsonl", rows("pool", 40))
    written(folder / "files", "target.jsonl", rows("target", 20))
    (folder / "longest.py").write_text(LONGEST)
    board = {
        "models": {
            "tiny": {"about": "a tiny model", "settings": {"model_name_or_path": "model", "template": "default"}}
        },
        "pools": {"clean": {"about": "birds and trees", "file": "pool.jsonl", "spoilt": 0.25}},
        "targets": {
            "birdsong": {
                "about": "sentences on birds",
                "validation": "target.jsonl",
                "held_out": "target.jsonl",
                "sources": ["birds"],
                "answer": "(.*)",
                "task": {},
            }
        },
        "methods": {
            "every_tier": {
                "random": {"select": {"method": "random"}},
                "longest": {"plugins": ["longest.py"], "select": {"method": "longest"}},
            }
        },
        "orders": {},
        "tiers": {
            "small": {
                "about": "two steps",
                "selection": {
                    "methods": ["every_tier"],
                    "tables": [{"model": "tiny", "pool": "clean", "targets": ["birdsong"]}],
                    "baselines": ["random"],
                    "seeds": [1],
                    "tokens": 120,
                    "rounds": {"warmup_steps": 1, "update_steps": 4},
                    "rows": 48,
                    "sample_tokens": [8, 96],
                    "validation_rows": 4,
                    "held_out_rows": 8,
                    "other_rows": 8,
                    "training": {
                        "per_device_train_batch_size": 4,
                        "finetuning_type": "full",
                        "learning_rate": 1.0e-3,
                        "use_cpu": True,
                        "logging_steps": 1,
                    },
                },
            }
        },
        "claims": [{"text": "Long samples are better", "track": "A", "baseline": "random", "variants": ["longest"]}],
    }
    (folder / "board.yaml").write_text(yaml.safe_dump(board))
    return folder


def called(place: Path, *more: str, data: str = "files") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BOARD / "run.py"), "--board", "board.yaml", "--tier", "small", "--data", data]
    return subprocess.run(
        [*command, "--only", "A", "--results", "result.json", *more],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def pages(place: Path) -> str:
    """Write the pages of the result and return the Markdown."""
    (place / "docs").mkdir(exist_ok=True)
    written = page.write_pages([place / "result.json"], place / "docs")
    assert [file.name for file in written] == ["results.md", "results.html"]
    return (place / "docs" / "results.md").read_text()


def table(place: Path) -> dict[str, Any]:
    (found,) = json.loads((place / "result.json").read_text())["tables"]
    return dict(found)


def test_a_board_with_a_plug_in_stops_continues_and_is_taken_elsewhere(place: Path) -> None:
    """One test, because every run starts LLaMA-Factory: the steps build on each other."""
    stopped = called(place, "--time-limit", "1s")
    assert stopped.returncode == 124, stopped.stderr
    assert json.loads((place / "result.json").read_text())["tables"] == []
    assert "not been run" in pages(place)

    done = called(place, "--jobs", "2", "--kept", "kept")
    assert done.returncode == 0, done.stderr + done.stdout
    found = table(place)
    comparison = found["comparison"]
    assert found["name"] == "tiny-clean-birdsong-vs-random"
    assert [run["status"] for run in comparison["runs"]] == ["compared"] * 2
    (difference,) = comparison["differences"]
    assert (difference["variant"], difference["metric"]) == ("longest", "birdsong_held_out_loss")
    assert len(difference["differences"]) == 1
    assert set(json.loads((place / "leaderboard/small/data-clean/dataset_info.json").read_text())) == {
        "birds", "birds_spoilt", "trees", "trees_spoilt", "others_held_out", "birdsong_validation", "birdsong_held_out"
    }  # fmt: skip

    text = pages(place)
    assert "Long samples are better" in text
    assert "longest" in text

    logs = {log: log.stat().st_mtime_ns for log in place.glob("leaderboard/small/*/runs/*/*/log.txt")}
    assert len(logs) == 2
    again = called(place)
    assert again.returncode == 0, again.stderr
    assert {log: log.stat().st_mtime_ns for log in logs} == logs  # no run was made again

    # In another folder, with the small files alone, nothing is left to do.
    other_place = place.parent / "elsewhere"
    shutil.copytree(place, other_place, ignore=shutil.ignore_patterns("leaderboard", "result.json"))
    elsewhere = called(other_place, "--kept", "kept")
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert not list(other_place.glob("leaderboard/small/*/runs/*/*/log.txt"))
    for own, other in zip(comparison["runs"], table(other_place)["comparison"]["runs"], strict=True):
        assert (own["key"], own["metrics"]) == (other["key"], other["metrics"])


def test_a_missing_file_is_named_before_anything_runs(place: Path) -> None:
    found = called(place, "--work", "unmade", data="nowhere")
    assert found.returncode == 2
    assert "nowhere/pool.jsonl" in found.stderr
    assert not (place / "unmade").exists()


def test_a_misspelt_method_is_named_before_anything_runs(place: Path) -> None:
    board = yaml.safe_load((place / "board.yaml").read_text())
    board["methods"]["every_tier"]["longest"]["select"]["method"] = "longst"
    (place / "misspelt.yaml").write_text(yaml.safe_dump(board))
    found = called(place, "--board", "misspelt.yaml", "--work", "none")
    assert found.returncode == 1
    (line,) = [line for line in found.stderr.splitlines() if "misspelt.yaml" in line]
    assert line.startswith("misspelt.yaml: methods.every_tier.longest: select.method: unknown selector 'longst'")
    assert "Traceback" not in found.stderr
    assert not list((place / "none" / "small").glob("*/runs"))
    accepted = called(place, "--check", "--work", "none")
    assert accepted.returncode == 0, accepted.stderr
    assert not list((place / "none" / "small").glob("*/runs"))
