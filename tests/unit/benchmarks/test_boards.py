"""The board: every experiment of every tier is accepted, and its data sets are those that it says."""

from __future__ import annotations

import json
import random
import string
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from dataflex.compare.experiment import load

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks" / "leaderboard"))

import boards  # noqa: E402
import instruct  # noqa: E402

FILE = ROOT / "benchmarks" / "leaderboard" / "board.yaml"
BOARD = boards.read(FILE)
SMALLER = {"rows": 64, "validation_rows": 4, "held_out_rows": 6, "other_rows": 8, "reference_rows": 8}


def instruction(rng: random.Random) -> dict[str, Any]:
    return {"instruction": tiny.sentence(rng), "input": "", "output": tiny.sentence(rng)}


def question(rng: random.Random) -> dict[str, Any]:
    choices = [tiny.sentence(rng, 2, 4) for _ in range(4)]
    return {"subject": "birds", "question": tiny.sentence(rng), "choices": choices, "answer": rng.choice("ABCD")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and small files of the names that the board lists."""
    folder = tmp_path_factory.mktemp("boards")
    tiny.make_model(folder / "model")
    for pool in BOARD.pools.values():
        rng = random.Random(pool.file)
        sources = ["gsm8k", *string.ascii_lowercase[:4]]
        write(
            folder / "files" / pool.file, [{**instruction(rng), "source": name} for name in sources for _ in range(24)]
        )
    for target in BOARD.targets.values():
        for name in target.files:
            rng = random.Random(name)
            write(folder / "files" / name, [(question if target.has_choices else instruction)(rng) for _ in range(20)])
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def groups() -> list[tuple[str, int]]:
    return [
        (name, number)
        for name, tier in BOARD.tiers.items()
        if tier.selection is not None
        for number in range(len(tier.selection.tables))
    ]


@pytest.mark.parametrize(("tier_name", "number"), groups())
def test_the_experiments_of_a_tier_are_accepted(place: Path, tier_name: str, number: int) -> None:
    tier = BOARD.tiers[tier_name]
    assert tier.selection is not None
    asked = tier.selection.tables[number]
    settings = tier.selection.model_copy(update={**SMALLER, "sample_tokens": (16, 128)})
    tier = tier.model_copy(update={"selection": settings})
    folder = place / f"{tier_name}-{number}"
    targets = {name: BOARD.targets[name] for name in asked.targets}
    model = BOARD.models[asked.model]
    model = model.model_copy(update={"settings": {**model.settings, "model_name_or_path": str(place / "model")}})
    places = boards.Places(folder / "data", folder / "embeddings", place / "model", folder)
    pool = BOARD.pools[asked.pool]
    domains = instruct.write_data(place / "files", places.data, pool, targets, settings, str(place / "model"))
    evaluated = [*(instruct.held_out(name) for name in targets), instruct.OTHERS]
    base = boards.selection_base(model, domains, evaluated, settings, places) | {"use_cpu": True}
    tables = list(boards.selection_tables(BOARD, tier, asked, base, places, [], SMALLER["rows"]))
    assert {(table.pool_samples, table.step_samples) for table in tables} == {(64, base["per_device_train_batch_size"])}
    assert len(tables) == len(targets) * (len(settings.baselines) + settings.orders)
    first = tables[0]
    checked = [first]
    if settings.orders:
        orders = next(table for table in tables if table.best_of is not None)
        checked.append(boards.of_orders(orders, "near", BOARD.orders))
    for table in checked:
        text = yaml.safe_dump(table.experiment, sort_keys=False)
        file = folder / f"{table.name}.yaml"
        file.write_text(text.replace("asset:all-minilm-l6-v2", str(place / "model")))
        experiment = load(file)
        assert not [note for note in experiment.notes if "no effect" in note]
        assert len(experiment.runs) == len(settings.seeds) * len(table.experiment["variants"])


def test_spoilt_answers_change_places_within_their_source(place: Path) -> None:
    tier = BOARD.tiers["small"].selection
    assert tier is not None
    settings = tier.model_copy(update={**SMALLER, "sample_tokens": (16, 128)})
    rows: dict[str, list[dict[str, str]]] = {}
    for name in ("clean", "spoilt"):
        folder = place / f"pool-{name}"
        given = (BOARD.targets, settings, str(place / "model"))
        names = instruct.write_data(place / "files", folder, BOARD.pools[name], *given)
        rows |= {f"{name}/{each}": json.loads((folder / f"{each}.json").read_text()) for each in names}
    sources = {name.partition("/")[2] for name in rows if name.startswith("clean/")}
    share = BOARD.pools["spoilt"].spoilt
    for source in sources:
        clean, kept, spoilt = rows[f"clean/{source}"], rows[f"spoilt/{source}"], rows[f"spoilt/{source}_spoilt"]
        assert len(spoilt) == round(share * len(clean))
        answers = {row["instruction"]: row["output"] for row in clean}
        assert all(answers[row["instruction"]] == row["output"] for row in kept)
        assert all(answers[row["instruction"]] != row["output"] for row in spoilt)
        assert sorted(row["output"] for row in [*kept, *spoilt]) == sorted(answers.values())


def test_no_held_out_sample_is_trained_or_validated_on(place: Path) -> None:
    tier = BOARD.tiers["small"].selection
    assert tier is not None
    settings = tier.model_copy(update={**SMALLER, "sample_tokens": (16, 128)})
    folder = place / "pool-apart"
    model = str(place / "model")
    names = instruct.write_data(place / "files", folder, BOARD.pools["clean"], BOARD.targets, settings, model)
    read = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    trained = {json.dumps(row) for name in names for row in read[name]}
    for target in BOARD.targets:
        held_out = {json.dumps(row) for row in read[instruct.held_out(target)]}
        assert len(held_out) == settings.held_out_rows
        assert not held_out & trained
        assert not held_out & {json.dumps(row) for row in read[instruct.validation(target)]}
    assert not {json.dumps(row) for row in read[instruct.OTHERS]} & trained
    assert len(read[instruct.OTHERS]) == settings.other_rows


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": ["gsm9k"]}, "there is no target 'gsm9k'"),
        ({"pool": "dirty"}, "there is no pool 'dirty'"),
        ({"model": "smol"}, "there is no model 'smol'"),
    ],
)
def test_an_unknown_name_is_an_error(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    content = yaml.safe_load(FILE.read_text())
    content["tiers"]["small"]["selection"]["tables"][0] |= change
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match=said):
        boards.read(tmp_path / "board.yaml")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            "{method: less, validation: '{validation}'}",
            "{method: less, validation: '{validaton}'}",
            r"methods\.every_tier\.less: there is no word in braces 'validaton'.*did you mean 'validation'",
        ),
        ("variants: [doremi, odm]", "variants: [doremi, omd]", r"claims\.2: there is no method of track B 'omd'"),
        ("baseline: by_size, seeds", "baseline: by_sise, seeds", "there is no mixer 'by_sise'"),
        ("models:", "models: [", "is not YAML"),
    ],
)
def test_a_misspelt_board_is_one_line(tmp_path: Path, before: str, after: str, said: str) -> None:
    text = FILE.read_text()
    assert before in text
    (tmp_path / "board.yaml").write_text(text.replace(before, after, 1))
    with pytest.raises(SystemExit, match=said) as error:
        boards.read(tmp_path / "board.yaml")
    assert "\n" not in str(error.value)


def test_a_board_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--board: .*nope\.yaml cannot be read"):
        boards.read(tmp_path / "nope.yaml")


def test_claims_on_dynamic_and_static_methods_have_all_methods_but_the_controls() -> None:
    selecting = [claim for claim in BOARD.claims if claim.track == "A"]
    judged = [name for claim in selecting for name in claim.variants or []]
    assert len(judged) == len(set(judged))
    known = {name for group in BOARD.methods.values() for name in group}
    assert set(judged) == known - {"random", "full"}
