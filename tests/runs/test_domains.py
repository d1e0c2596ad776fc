"""Domains from a column of the raw data, through LLaMA-Factory: each equals a data set of its rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import tiny
from launch import run_script
from records import round_lines

HERE = Path(__file__).parent
TOPICS = {"zebra": 37, "ant": 130, "bee hive": 29}

DRIVER = """
import json, sys, tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import tiny
from dataflex.integrations.llamafactory import loading
from dataflex.integrations.llamafactory.pool_only import pool_of
from dataflex.integrations.llamafactory.run import run
from dataflex.config.loading import RunConfig, split_config
from dataflex.errors import DataFlexError
from dataflex.weighters.score_column import ScoreColumnWeighter

job = json.load(open(sys.argv[1]))
results = {"pools": {}, "runs": {}}
for name, (args, column) in job["pools"].items():
    pool, _ = pool_of(RunConfig(args, None), column)
    sizes = dict(zip(pool.domains, pool.domain_sizes.tolist()))
    results["pools"][name] = {"sizes": sizes, "rows": list(pool.dataset)}
load_pool, weigh = loading.load_pool, ScoreColumnWeighter.weigh


def loss_of(args, row):
    model = AutoModelForCausalLM.from_pretrained(args["model_name_or_path"])
    given = {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}
    return model(**given).loss.item()


for name, args in job["runs"].items():
    found, samples = {"first": None, "weighed": []}, []

    def noting(get_dataset, session, *args, **kwargs):
        module = load_pool(get_dataset, session, *args, **kwargs)
        data = session.data
        if data.pool is not None:
            found["pool"] = data.sizes
        for key, targets in data.validation.items():
            found[key] = dict(zip(targets.domains, targets.domain_sizes.tolist()))
        if data.evaluation is not None:
            found["evaluation"] = dict(zip(data.evaluation.domains, data.evaluation.domain_sizes.tolist()))
        samples.append(data.samples)
        return module

    def noting_weights(weighter, batch):
        weights = weigh(weighter, batch)
        if not found["first"]:  # of the model as it was
            rows = [batch.pool.dataset[place] for place in batch.places.tolist()]
            found["first"] = [batch.losses.tolist(), [loss_of(args, row) for row in rows]]
        found["weighed"].append([batch.places.tolist(), weights.tolist()])
        return weights

    loading.load_pool, ScoreColumnWeighter.weigh = noting, noting_weights
    ScoreColumnWeighter.reads_losses = True  # so that it is shown the losses
    try:
        run(split_config({**args, "disable_tqdm": True}))
        found["error"] = None
    except DataFlexError as error:
        found["error"] = str(error)
    if name.startswith("scored"):
        found["texts"] = [samples[0].text(place) for place in range(samples[0].size)]
    results["runs"][name] = found
Path(sys.argv[2]).write_text(json.dumps(results))
"""

PLUGIN = """
import numpy as np
from dataflex import Losses, Mixer, MixerParams, Needs, ValidationParams, register


class LookingParams(MixerParams, ValidationParams):
    pass


@register("mixer", "test_looking")
class LookingMixer(Mixer[LookingParams]):
    '''Gives every domain the loss of the validation samples of its number.'''

    def needs(self, run):
        return Needs(measurements=(Losses(),), validation=self.params)

    def mix(self, ctx):
        losses = ctx.probe.measure(Losses(), np.arange(ctx.validation.size), ctx.validation)
        bounds = ctx.validation.offsets
        return np.array([losses[low:high].mean() for low, high in zip(bounds, bounds[1:])])
"""

SCORED = {
    "warmup_steps": 0,
    "select": {"method": "score_column", "column": "quality", "direction": "low"},
    "order": {"method": "score_column", "column": "level", "descending": True},
    "weight": {"method": "score_column", "column": "weight", "normalized": True},
}

LOADING: dict[str, dict[str, Any]] = {
    "sft": {},
    "packed": {"packing": True},
    "workers": {"preprocessing_num_workers": 2},
    "split": {"val_size": 0.25},
    "small batches": {"packing": True, "preprocessing_batch_size": 16},
    "pt": {"stage": "pt", "cutoff_len": 24},
    "pt unpacked": {"stage": "pt", "packing": False},
}


def write_data(data: Path) -> None:
    """Write rows of three topics mixed up, and those of each topic in the same order as a data set of their own."""
    rng = random.Random(5)
    rows = [
        {
            "instruction": tiny.sentence(rng),
            "input": "",
            "output": tiny.sentence(rng, 2, 10),
            "topic": topic,
            "level": n % 3,
            "quality": rng.random(),
            "weight": (1 + n % 4) / 2,
        }
        for topic, size in TOPICS.items()
        for n in range(size)
    ]
    rng.shuffle(rows)
    texts = [{"text": f"{row['instruction']} {row['output']}", "topic": row["topic"]} for row in rows]
    for prefix, given, columns in (("", rows, {}), ("pt ", texts, {"columns": {"prompt": "text"}})):
        for name, kept in {
            "mixed": given,
            **{topic: [row for row in given if row["topic"] == topic] for topic in TOPICS},
        }.items():
            tiny.add_data(data, prefix + name, kept, **columns)
    holed = [{**row, "topic": None if number in (3, 5) else row["topic"]} for number, row in enumerate(rows)]
    tiny.add_data(data, "holed", holed)
    tiny.add_data(data, "minus", [*rows[:7], {**rows[7], "weight": -1}, *rows[8:]])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("domains")


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    model, data = tiny.make_model(root / "model"), tiny.make_data(root / "data")
    write_data(data)
    (root / "looking.py").write_text(PLUGIN)
    base = tiny.arguments(model, data, root / "unused")
    pools = {}
    for name, changes in LOADING.items():
        prefix = "pt " if changes.get("stage") == "pt" else ""
        pools[name] = ({**base, **changes, "dataset": f"{prefix}mixed"}, "topic")
        pools[f"{name}, apart"] = (
            {**base, **changes, "dataset": ",".join(prefix + topic for topic in sorted(TOPICS))},
            None,
        )
    pools["numbers"] = ({**base, "dataset": "mixed,ant"}, "level")
    pools["some"] = ({**base, "dataset": "mixed", "max_samples": 60}, "topic")

    def run(
        name: str, dataset: str = "mixed", column: str = "topic", mix: Any = None, **changes: Any
    ) -> dict[str, Any]:
        section = {"update_steps": 2, "domain_column": column, "mix": mix or {"method": "uniform"}}
        section |= changes.pop("section", {})
        return {
            **base,
            "dataset": dataset,
            "output_dir": str(root / name),
            "max_steps": 4,
            **changes,
            "dataflex": section,
        }

    looking = {"method": "test_looking", "validation": "mixed", "subtask_column": "topic"}
    less = {"method": "less", "validation": ["held"], "proj_dim": 64}
    plugins = {"plugins": [str(root / "looking.py")]}
    by_column = {"update_steps": 2, "weight": {"method": "score_column", "column": "weight"}}
    weights = run("weights", "ant,mixed", max_steps=3) | {"dataflex": by_column}
    runs = {
        "static": run("static", mix={"method": "static", "proportions": {"ant": 2, "bee hive": 1, "zebra": 1}}),
        "split": run("split", val_size=0.25, do_eval=True),
        "looking": run("looking", mix=looking, section={**plugins, "warmup_steps": 1, "select": less}),
        "capped": run("capped", max_steps=60, mix={"method": "uniform", "max_epochs_per_domain": 1}),
        "unknown column": run("x1", column="topics"),
        "missing values": run("x2", "holed"),
        "a name too many": run("x3", mix={"method": "static", "proportions": {"ant": 1, "bee hives": 1}}),
        "too many epochs": run("x4", max_steps=200, mix={"method": "uniform", "max_epochs_per_domain": 0.5}),
        "scored": run("scored", section={**SCORED, "domain_column": None, "mix": None}),
        "scored weights": weights,
        "scored tokens": {**weights, "output_dir": str(root / "tokens"), "tokenized_path": str(root / "tokenized")},
        "scored tokens again": {
            **weights,
            "output_dir": str(root / "again"),
            "tokenized_path": str(root / "tokenized"),
        },
        "no column": {**weights, "dataset": "mixed,alpha", "output_dir": str(root / "x6")},
        "no weight": {**weights, "dataset": "minus", "output_dir": str(root / "x7")},
        "a split of nothing": run("x5", column="instruction", val_size=0.25),
    }
    (root / "job.json").write_text(json.dumps({"pools": pools, "runs": runs}))
    (root / "driver.py").write_text(DRIVER)
    run_script(root / "driver.py", root / "job.json", root / "results.json", log=root / "log", cwd=root)
    return json.loads((root / "results.json").read_text())


@pytest.mark.parametrize("name", LOADING)
def test_a_domain_equals_a_data_set_of_its_rows(found: dict[str, Any], name: str) -> None:
    one, apart = found["pools"][name], found["pools"][f"{name}, apart"]
    assert list(one["sizes"]) == sorted(TOPICS)
    assert list(one["sizes"].values()) == list(apart["sizes"].values())
    assert one["rows"] == apart["rows"]


def test_values_of_a_column_divide_several_data_sets_and_may_be_numbers(found: dict[str, Any]) -> None:
    sizes = found["pools"]["numbers"]["sizes"]
    assert list(sizes) == ["mixed/0", "mixed/1", "mixed/2", "ant/0", "ant/1", "ant/2"]
    assert sum(sizes.values()) == sum(TOPICS.values()) + TOPICS["ant"]
    assert sum(found["pools"]["some"]["sizes"].values()) == 60


def rounds(root: Path, name: str) -> list[dict[str, Any]]:
    return round_lines(root / name)


def test_a_mixer_mixes_the_values_of_a_column(found: dict[str, Any], root: Path) -> None:
    assert found["runs"]["static"]["error"] is None
    made = rounds(root, "static")
    assert [line["pool"] for line in made] == [dict(sorted(TOPICS.items()))] * 2
    assert [line["domains"] for line in made] == [{"ant": 2, "bee hive": 1, "zebra": 1}] * 2
    assert made[1]["epochs"] == {"ant": 4 / 130, "bee hive": 2 / 29, "zebra": 2 / 37}


def test_samples_that_are_split_off_keep_their_domains(found: dict[str, Any]) -> None:
    run = found["runs"]["split"]
    assert run["error"] is None
    assert {name: run["pool"][name] + run["evaluation"][name] for name in TOPICS} == TOPICS
    assert run["evaluation"] == {"ant": 33, "bee hive": 8, "zebra": 10}  # a quarter of each, rounded up


def test_a_mixer_and_a_selector_each_have_their_validation_samples(found: dict[str, Any], root: Path) -> None:
    run = found["runs"]["looking"]
    assert run["error"] is None
    assert run["mix"] == dict(sorted(TOPICS.items()))
    assert run["select"] == {"held": 12}
    shares = rounds(root, "looking")[1]["proportions"]
    assert len({round(share, 6) for share in shares.values()}) == 3  # the losses of three topics are not the same
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0.2 < share < 0.5 for share in shares.values())


def test_capped_domains_are_recorded(found: dict[str, Any], root: Path) -> None:
    assert found["runs"]["capped"]["error"] is None
    made = rounds(root, "capped")
    assert made[-1]["epochs"]["bee hive"] == 1
    assert all(count <= 1 for count in made[-1]["epochs"].values())
    cut = [line for line in made if line["clipped_shares"]]
    assert cut
    assert cut[0]["clipped_shares"] == {"bee hive": pytest.approx(1 / 3)}
    assert made[-1]["proportions"]["bee hive"] == 0


@pytest.mark.parametrize(
    "name, parts",
    [
        ("unknown column", ["dataflex.domain_column", "'topics'; did you mean 'topic'", "'mixed'"]),
        ("missing values", ["dataflex.domain_column", "2 of 196 rows of 'holed'", "rows 3, 5"]),
        ("a name too many", ["dataflex.mix.proportions", "'bee hives'; did you mean 'bee hive'"]),
        ("too many epochs", ["dataflex.mix.max_epochs_per_domain", "97 samples", "48 steps", "400"]),
        ("no column", ["dataflex.weight", "'alpha' has no column 'weight'", "'instruction', 'input', 'output'"]),
        ("no weight", ["dataflex.weight", "minus.json, line 1, row 7 (counted from 0)", "'weight' is -1"]),
        ("a split of nothing", ["val_size", "'instruction'", "1 rows"]),
    ],
)
def test_a_column_that_cannot_divide_the_data_is_refused_before_the_model_is_loaded(
    found: dict[str, Any], name: str, parts: list[str]
) -> None:
    error = found["runs"][name]["error"]
    assert error is not None
    for part in parts:
        assert part in error, (part, error)


def raw(root: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((root / "data" / f"{name}.json").read_text())


def test_columns_choose_sort_and_weigh_samples(found: dict[str, Any], root: Path) -> None:
    run, rows = found["runs"]["scored"], raw(root, "mixed")
    assert run["error"] is None
    best = sorted(range(len(rows)), key=lambda number: rows[number]["quality"])[:4]
    mean = sum(row["weight"] for row in rows) / len(rows)
    trained = [place for places, _ in run["weighed"] for place in places]
    assert sorted(trained[:4]) == sorted(trained[4:]) == sorted(best)  # two rounds of two steps
    for places in (trained[:4], trained[4:]):
        levels = [rows[place]["level"] for place in places]
        assert levels == sorted(levels, reverse=True)
    for places, weights in run["weighed"]:
        assert weights == pytest.approx([rows[place]["weight"] / mean for place in places])
    assert all(row["output"] in text for row, text in zip(rows, run["texts"], strict=True))


@pytest.mark.parametrize("name", ["scored weights", "scored tokens", "scored tokens again"])
def test_a_weighter_alone_weighs_the_rows_that_llamafactory_draws(found: dict[str, Any], root: Path, name: str) -> None:
    run, rows = found["runs"][name], [*raw(root, "ant"), *raw(root, "mixed")]
    assert run["error"] is None
    losses, again = run["first"]
    assert losses == pytest.approx(again, rel=1e-4)  # the samples are those that are said to be trained on
    assert len(set(losses)) == len(losses) == 2
    for places, weights in run["weighed"]:
        assert weights == [rows[place]["weight"] for place in places]
    assert len({place for places, _ in run["weighed"] for place in places}) == 6
    assert all(row["output"] in text for row, text in zip(rows, run["texts"], strict=True))
