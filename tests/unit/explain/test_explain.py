"""Explaining a run: every answer equals the raw plans, and every text equals the raw data."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import tiny
from dataflex.api.schedule import Schedule
from dataflex.cli import main
from dataflex.data.pool import Rows
from dataflex.explain.explain import Record
from dataflex.mixers.static import StaticMixer
from dataflex.orders.shuffle import ShuffleOrder
from dataflex.planning.planner import Planner
from dataflex.record.schema import Cost, Summary
from dataflex.selectors.loss import LossSelector
from unit.fakes import FakeProbe, as_version_1, begin_record, build, in_chains, make_pool, raw_plans

SIZES = {"alpha": 30, "beta": 20}
LOSSES = np.random.default_rng(0).integers(0, 9, 50).astype(np.float32)
COMPONENTS: dict[str, dict[str, Any]] = {
    "select": {"select": build(LossSelector, focus="high")},
    "unranked": {"select": build(LossSelector)},
    "order": {"order": build(ShuffleOrder)},
    "mix": {"mix": build(StaticMixer, proportions=[1, 3])},
    # 5 of the 30 samples of alpha, and of beta all 20 once and 5 of them twice
    "all": {
        "select": build(LossSelector, focus="low"),
        "mix": build(StaticMixer, proportions=[1, 5]),
        "order": build(ShuffleOrder),
    },
}
STEPS = 17
"""A warm-up round of 2 steps and three rounds of 5, with 6 samples in each step."""


def write_run(
    path: Path,
    components: dict[str, Any],
    reached: int | None = None,
    rows: dict[str, Rows] | None = None,
    **llamafactory: Any,
) -> Path:
    """Write the record of a run of 17 steps, or of one stopped after ``reached`` of them; ``rows`` of its domains."""
    pool = make_pool(SIZES)
    pool.rows_of = rows or {}
    planner = Planner(pool, in_chains(components), Schedule(2, 5, -1, STEPS), seed=3, global_batch_size=6)
    methods = {key: each.name for key, each in components.items()}
    section = {key: {"method": name} for key, name in methods.items()}
    writer = begin_record(path, pool, methods, {**llamafactory, "dataflex": section})
    step = 0
    while step < STEPS:
        slot = planner.schedule.slot_at(step)
        if reached is not None and step > reached:
            break
        plan = planner.plan(slot, FakeProbe(LOSSES))
        writer.round(plan, pool, Cost())
        step = slot.start_step + slot.steps
    log = [{"current_steps": done, "total_steps": STEPS, "loss": 1.0} for done in range(1, (reached or STEPS) + 1)]
    (path / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if reached is None:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "log_history": []}))
        numbers = {"train_seconds": 9.0, "decision_seconds": 1.0, "overhead_fraction": 0.1, "tokens": 100}
        writer.summary(Summary(**numbers, rounds=4, steps=STEPS))
    return path


@dataclass(frozen=True)
class Row:
    """A row of a plan as it is in the file."""

    round: int
    start_step: int
    steps: int
    position: int
    index: int
    domain: str
    score: float | None
    rank: int | None


def raw_rows(run: Path) -> list[Row]:
    lines = [json.loads(line) for line in (run / "dataflex" / "rounds.jsonl").read_text().splitlines()]
    found = []
    for line, table in zip(lines, raw_plans(run), strict=True):
        for row in table.drop_columns("row").to_pylist():
            found.append(Row(start_step=line["start_step"], steps=line["steps"], **row))
    return found


def ask(capsys: pytest.CaptureFixture[str], run: Path, *words: str, text: bool = False) -> dict[str, Any]:
    """Return the answer as JSON; nothing else may be printed."""
    capsys.readouterr()
    assert main(["explain", str(run), *([] if text else ["--no-text"]), "--json", *words]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def told(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> str:
    capsys.readouterr()
    assert main(["explain", str(run), "--no-text", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> str:
    capsys.readouterr()
    try:
        status = main(["explain", str(run), *words])
    except SystemExit as stopped:  # argparse
        status = stopped.code
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def share_of(run: Path, number: int, domain: str) -> float:
    domains = [row.domain for row in raw_rows(run) if row.round == number]
    return domains.count(domain) / len(domains)


# Rows


def test_the_row_and_the_data_set_are_named(tmp_path: Path, capsys: Any) -> None:
    """Domains of one data set divided by a column: alpha is its even rows, beta rows that are not known."""
    rows = {"alpha": Rows("chat", None, np.arange(0, 60, 2))}  # type: ignore[arg-type]
    run = write_run(tmp_path / "run", COMPONENTS["select"], rows=rows, dataset="chat")
    plans = [table.to_pylist() for table in raw_plans(run)]
    for line in [line for plan in plans for line in plan]:
        assert line["row"] == (2 * line["index"] if line["domain"] == "alpha" else None)
    planned = next(line["index"] for line in plans[1] if line["domain"] == "alpha")
    (sample,) = ask(capsys, run, "--index", str(planned))["samples"]
    assert (sample["domain"], sample["dataset"], sample["row"]) == ("alpha", "chat", 2 * planned)
    assert {place["row"] for place in sample["placements"]} == {2 * planned}
    assert f"Sample {planned} (alpha: chat row {2 * planned}): planned" in told(capsys, run, "--index", str(planned))
    top = told(capsys, run, "--top", "30", "--round", "1")
    assert re.findall(r"Sample (\d+) \(alpha: chat row (\d+)\)", top)
    assert all(int(row) == 2 * int(index) for index, row in re.findall(r"Sample (\d+) \(alpha: chat row (\d+)\)", top))
    assert re.search(r"Sample \d+ \(beta\), ", top)
    often = ask(capsys, run)["most_often"]
    assert all(each["row"] == (2 * each["index"] if each["domain"] == "alpha" else None) for each in often)


@pytest.mark.parametrize(
    "dataset, domain, expected",
    [
        ("alpha,beta", "beta", "beta"),
        (["alpha", "beta"], "alpha/easy", "alpha"),  # domain_column over several data sets
        ("chat", "easy", "chat"),
        ("alpha,beta", None, None),
        ("alpha,beta", "gone/easy", None),
    ],
)
def test_the_data_set_of_a_domain_is_found(
    dataset: Any, domain: str | None, expected: str | None, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", COMPONENTS["order"], dataset=dataset)
    assert Record(run).dataset_of(domain) == expected


# One sample


@pytest.mark.parametrize("name, reached", [*((name, None) for name in COMPONENTS), ("all", 9)])
def test_every_sample_is_explained_according_to_the_plans(
    name: str, reached: int | None, tmp_path: Path, capsys: Any
) -> None:
    run = write_run(tmp_path / "run", COMPONENTS[name], reached)
    rows = raw_rows(run)
    done, rounds = reached or STEPS, sorted({row.round for row in rows})
    answer = ask(capsys, run, "--index", *map(str, range(50)))
    assert answer["run"]["steps"] == done
    assert answer["run"]["finished"] == (reached is None)
    assert [sample["index"] for sample in answer["samples"]] == list(range(50))
    for sample in answer["samples"]:
        own = [row for row in rows if row.index == sample["index"]]
        assert sample["planned"] == len(own)
        assert sample["domain"] == ("alpha" if sample["index"] < 30 else "beta")
        assert sample["trained"] == sum(row.start_step + row.position // 6 < done for row in own)
        assert sample["not_in"] == [number for number in rounds if number not in {row.round for row in own}]
        for row, place in zip(own, sample["placements"], strict=True):
            assert place["round"] == row.round
            assert place["position"] == row.position
            assert place["steps"] == [row.start_step + 1, row.start_step + row.steps]
            assert place["step"] == row.start_step + row.position // 6 + 1
            assert place["trained"] == (place["step"] <= done)
            assert (place["score"], place["rank"]) == (row.score, row.rank)
            assert place["domain"] == row.domain
            assert place["share"] == pytest.approx(share_of(run, row.round, row.domain))
            if row.rank is not None:
                assert place["candidates"] == {"select": 50, "all": SIZES[row.domain]}[name]
    assert ask(capsys, as_version_1(run), "--index", *map(str, range(50))) == answer


def test_a_rank_counts_all_candidates(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", COMPONENTS["all"])
    ranked = 0
    for sample in ask(capsys, run, "--index", *map(str, range(50)))["samples"]:
        for place in sample["placements"]:
            start, stop = (0, 30) if sample["index"] < 30 else (30, 50)
            if place["rank"] is None:
                continue
            ranked += 1
            better = [i for i in range(start, stop) if (LOSSES[i], i) < (LOSSES[sample["index"]], sample["index"])]
            assert place["rank"] == len(better) + 1
            assert place["candidates"] == stop - start
    assert ranked == 3 * 10  # 5 of alpha and 5 of beta, of which all are there once more, in each round


def test_steps_of_an_abandoned_attempt_do_not_count_as_trained(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", COMPONENTS["select"], reached=11)
    with (run / "trainer_log.jsonl").open("a") as stream:
        stream.write(json.dumps({"current_steps": 8, "loss": 1.0}) + "\n")  # resumed from step 7
    rows = raw_rows(run)
    answer = ask(capsys, run)
    assert answer["run"]["steps"] == 8
    assert answer["trained"] == sum(row.start_step + row.position // 6 < 8 for row in rows)


@pytest.mark.parametrize(
    "name, warm, chosen",
    [
        ("select", "uniform draw (warm-up)", {"loss"}),
        ("order", "uniform draw (warm-up)", {"draw in passes"}),
        ("mix", "draw, initial shares of static (warm-up)", {"draw in passes (mix static)"}),
        ("all", "draw, initial shares of static (warm-up)", {"loss", "loss (every sample of beta)"}),
    ],
)
def test_the_method_that_chose_a_sample_is_named(
    name: str, warm: str, chosen: set[str], tmp_path: Path, capsys: Any
) -> None:
    run = write_run(tmp_path / "run", COMPONENTS[name])
    places = [place for s in ask(capsys, run, "--index", *map(str, range(50)))["samples"] for place in s["placements"]]
    assert {place["chosen_by"] for place in places if place["round"] == 0} == {warm}
    assert {place["chosen_by"] for place in places if place["round"] > 0} == chosen
    assert all(place["domain"] == "beta" for place in places if "every sample" in place["chosen_by"])


def test_a_sample_is_explained_in_words(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", COMPONENTS["select"], reached=9)
    index, times = Counter(row.index for row in raw_rows(run)).most_common(1)[0]
    own = [row for row in raw_rows(run) if row.index == index]
    printed = told(capsys, run, "--index", str(index))
    assert f"Sample {index} ({own[0].domain}): planned {times} times" in printed.replace("twice", "2 times")
    assert "The plans end at step 12; training reached step 9 as far as the logs show." in printed
    for row in own:
        line = next(line for line in printed.splitlines() if line.startswith(f"{row.round} "))
        assert str(row.position) in line.split()
        assert row.rank is None or f"{row.rank} of 50" in line
    never = next(i for i in range(50) if all(row.index != i for row in raw_rows(run)))
    assert f"Sample {never} ({'alpha' if never < 30 else 'beta'}): never planned" in told(
        capsys, run, "--index", str(never)
    )


# The best of a round


@pytest.mark.parametrize("name, by", [("select", "rank"), ("unranked", "score"), ("order", "position")])
def test_the_best_samples_of_a_round_are_listed(name: str, by: str, tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", COMPONENTS[name])
    rows = [row for row in raw_rows(run) if row.round == 2]
    keys = {
        "rank": lambda row: row.rank,
        "score": lambda row: (-row.score, row.position),
        "position": lambda row: row.position,
    }
    expected = [row.index for row in sorted(rows, key=keys[by])]
    answer = ask(capsys, run, "--top", "7", "--round", "2")
    assert (answer["by"], answer["round"], answer["size"]) == (by, 2, 30)
    assert [sample["index"] for sample in answer["samples"]] == expected[:7]
    assert len(ask(capsys, run, "--top", "99", "--round", "2")["samples"]) == 30
    assert ask(capsys, run, "--top", "1")["round"] == 3  # the last one
    sentence = {"rank": "best first by rank", "score": "highest score first", "position": "has no scores"}[by]
    assert sentence in told(capsys, run, "--top", "2")


def test_ranked_samples_come_before_those_of_a_whole_pass(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", COMPONENTS["all"])
    ranks = [sample["rank"] for sample in ask(capsys, run, "--top", "30", "--round", "1")["samples"]]
    known = [rank for rank in ranks if rank is not None]
    assert ranks == sorted(known) + [None] * 20


# All rounds


@pytest.mark.parametrize("name", ["select", "all"])
def test_the_overview_equals_counts_of_the_plans(name: str, tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", COMPONENTS[name], reached=9)
    rows = raw_rows(run)
    counts = Counter(row.index for row in rows)
    answer = ask(capsys, run)
    assert answer["planned"] == len(rows)
    assert answer["trained"] == sum(row.start_step + row.position // 6 < 9 for row in rows)
    assert answer["distinct"] == len(counts)
    for use in answer["domains"]:
        own = [row.index for row in rows if row.domain == use["domain"]]
        assert (use["pool"], use["planned"], use["distinct"]) == (SIZES[use["domain"]], len(own), len(set(own)))
        assert use["never"] == SIZES[use["domain"]] - len(set(own))
        assert use["share"] == pytest.approx(len(own) / len(rows))
    expected = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
    assert [(often["index"], often["planned"]) for often in answer["most_often"]] == expected
    assert answer["as_often_as_the_last"] == list(counts.values()).count(expected[-1][1])
    assert f"Sample {expected[0][0]} " in told(capsys, run)


def test_a_record_without_ranks_and_sizes_is_explained_as_far_as_it_goes(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", COMPONENTS["select"])
    rows = raw_rows(run)
    as_version_1(run)
    file = run / "dataflex" / "rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    new = ("pool", "candidates")
    file.write_text("".join(json.dumps({k: v for k, v in line.items() if k not in new}) + "\n" for line in lines))
    for plan in (run / "dataflex" / "plans").iterdir():
        table = pq.read_table(plan)
        pq.write_table(table.drop_columns("rank") if "rank" in table.column_names else table, plan)
    sample = ask(capsys, run, "--index", str(rows[-1].index))["samples"][0]
    assert sample["planned"] == sum(row.index == rows[-1].index for row in rows)
    assert sample["domain"] == rows[-1].domain
    assert (sample["placements"][-1]["score"], sample["placements"][-1]["rank"]) == (rows[-1].score, None)
    assert ask(capsys, run, "--index", "1000")["samples"][0]["planned"] == 0
    assert ask(capsys, run, "--top", "3")["by"] == "score"
    answer = ask(capsys, run)
    assert answer["distinct"] == len({row.index for row in rows})
    assert [(use["pool"], use["never"]) for use in answer["domains"]] == [(None, None)] * 2
    told(capsys, run)


# What cannot be asked


def broken(run: Path, how: str) -> None:
    plan = run / "dataflex" / "plans" / "round-00002.parquet"
    rounds = run / "dataflex" / "rounds.jsonl"
    table = pq.read_table(plan)
    if how == "cut":
        plan.write_bytes(plan.read_bytes()[:-30])
    elif how == "missing":
        plan.unlink()
    elif how == "no plans":
        shutil.rmtree(plan.parent)
    elif how == "no rounds":
        rounds.unlink()
    elif how == "no index":
        pq.write_table(table.drop_columns("index"), plan)
    elif how == "other index":
        pq.write_table(table.set_column(1, "index", pa.array(["x"] * table.num_rows)), plan)
    elif how == "outside":
        pq.write_table(table.set_column(1, "index", pa.array([777] * table.num_rows)), plan)
    elif how == "short":
        pq.write_table(table.slice(0, 4), plan)
    elif how == "candidates":
        rounds.write_text(rounds.read_text().replace('"candidates": {"pool": 50}', '"candidates": [50]'))
    elif how == "config":
        (run / "dataflex" / "config.yaml").write_text("- 1")


@pytest.mark.parametrize(
    "how, words, text",
    [
        ("cut", [], r"round-00002\.parquet is not readable Parquet .*half written"),
        ("cut", ["--index", "3"], r"round-00002\.parquet is not readable"),
        ("cut", ["--top", "3", "--round", "2"], r"round-00002\.parquet is not readable"),
        ("missing", [], r"round-00002\.parquet is missing"),
        ("no plans", [], r"plans has no plan"),
        ("no rounds", [], r"the record has no round"),
        ("no index", ["--index", "3"], r"has no column 'index'"),
        ("other index", [], r"'index' must hold numbers"),
        ("outside", [], r"has sample 777, but the pool on record has only 50"),
        ("short", ["--index", *map(str, range(50))], r"00002\.parquet has 4 samples, but rounds\.jsonl says 30"),
        ("candidates", ["--top", "1"], r"rounds\.jsonl, line 2: 'candidates'"),
        ("config", [], r"config\.yaml: expected a run's configuration"),
        ("whole", ["--index", "50"], r"--index: 50 is not in the pool; give an index from 0 to 49"),
        ("whole", ["--index", "-1"], r"--index: must be a whole number of at least 0, got '-1'"),
        ("whole", ["--index", "many"], r"--index: must be a whole number of at least 0, got 'many'"),
        ("whole", ["--top", "3", "--round", "4"], r"--round: 4 is not on record; the record has rounds 0-3"),
        ("whole", ["--top", "0"], r"--top: must be a whole number of at least 1"),
        ("whole", ["--round", "1"], r"--round: only has an effect with --top"),
        ("whole", ["--round", "9"], r"--round: 9 is not on record; the record has rounds 0-3"),
        ("whole", ["--index", "3", "--round", "1"], r"--round: only has an effect with --top"),
        ("whole", ["--index", "3", "--top", "1"], r"not allowed with"),
        ("whole", ["--text", " "], r"--text: must be a phrase"),
        ("whole", ["--text", "x", "--no-text"], r"--no-text: --text needs the texts"),
        ("whole", ["--full"], r"--no-text: --full needs the texts"),
    ],
)
def test_a_request_that_cannot_be_explained_is_refused_with_the_reason(
    how: str, words: list[str], text: str, tmp_path: Path, capsys: Any
) -> None:
    run = as_version_1(write_run(tmp_path / "run", COMPONENTS["select"]))
    broken(run, how)
    found = refused(capsys, run, *(words if "--no-text" in words or "--text" in words else ["--no-text", *words]))
    assert re.search(text, found), found


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert "is not a folder" in refused(capsys, tmp_path / "nowhere")
    assert "config.yaml is missing" in refused(capsys, tmp_path)


# Texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on data and a tokenizer that LLaMA-Factory loads; it was trained on hardware that is not here."""
    root = tmp_path_factory.mktemp("texts")
    model = tiny.make_model(root / "model")
    for weights in model.glob("*.safetensors"):
        weights.unlink()  # the model is not loaded
    data = tiny.make_data(root / "data", {**SIZES, "held": 4})
    keys = tiny.arguments(model, data, root / "run", dataset="alpha,beta", eval_dataset="held", eval_strategy="steps")
    keys |= {"bf16": True, "deepspeed": "ds_z3.json", "quantization_bit": 4, "report_to": "wandb"}
    keys |= {"tokenized_path": str(root / "tokenized"), "adapter_name_or_path": str(root / "nowhere")}
    yield write_run(root / "run", COMPONENTS["select"], **keys)
    assert not (root / "tokenized").exists()


def raw_data(run: Path) -> list[dict[str, str]]:
    data = run.parent / "data"
    return [row for name in SIZES for row in json.loads((data / f"{name}.json").read_text())]


def joined(parts: list[dict[str, str]], kind: str) -> str:
    return " ".join(part["text"] for part in parts if part["kind"] == kind)


def test_texts_are_read_from_the_data(texts: Path, capsys: Any) -> None:
    raw = raw_data(texts)
    for words in ([], ["--full"]):
        answer = ask(capsys, texts, "--index", *map(str, range(50)), *words, text=True)
        assert answer["no_text"] is None
        for row, sample in zip(raw, answer["samples"], strict=True):
            assert [part["kind"] for part in sample["text"]] == ["prompt", "trained"]
            prompt, trained = (joined(sample["text"], kind) for kind in ("prompt", "trained"))
            assert row["instruction"] in prompt
            assert trained.replace("</s>", "").strip() == row["output"]
            assert ("</s>" in trained) == bool(words)
    top = ask(capsys, texts, "--top", "5", text=True)
    assert all(raw[s["index"]]["output"] == joined(s["text"], "trained") for s in top["samples"])
    often = ask(capsys, texts, text=True)["most_often"]
    assert [often[0]["text"] is None, often[9]["text"] is None] == [False, True]


def test_samples_are_found_by_their_text(texts: Path, capsys: Any) -> None:
    raw = raw_data(texts)
    for phrase in ("Red  Tree", "sun", "no such words"):
        wanted = " ".join(phrase.lower().split())
        expected = [i for i, row in enumerate(raw) if wanted in row["instruction"] or wanted in row["output"]]
        answer = ask(capsys, texts, "--text", phrase, text=True)
        assert answer["matches"] == expected
        assert [sample["index"] for sample in answer["samples"]] == expected[:3]
    assert main(["explain", str(texts), "--text", "no such words"]) == 0
    assert "No sample of the pool contains the phrase." in capsys.readouterr().out
    assert main(["explain", str(texts), "--text", "sun", "--full"]) == 0
    printed = capsys.readouterr().out
    assert "The first 3 of them:" in printed
    assert "  trained | " in printed


@pytest.mark.parametrize("case", ["sizes", "sets", "data", "tokenizer"])
def test_a_run_without_its_data_is_explained_without_texts(case: str, texts: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(texts, run)
    data = shutil.copytree(texts.parent / "data", tmp_path / "data")
    file = run / "dataflex" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    keys = config
    keys["dataset_dir"] = str(data)
    if case == "sizes":
        rows = json.loads((data / "beta.json").read_text())
        (data / "beta.json").write_text(json.dumps(rows[:-1]))
    elif case == "sets":
        keys["dataset"] = "beta"
    elif case == "data":
        (data / "alpha.json").unlink()
    else:
        keys["model_name_or_path"] = str(tmp_path / "gone")
    file.write_text(yaml.safe_dump(config))
    reason = {
        "sizes": "beta has 19 samples, 20 on record",
        "sets": "the data sets are beta",
        "data": "'alpha' cannot be used",
        "tokenizer": "cannot be loaded",
    }[case]
    answer = ask(capsys, run, "--index", "3", text=True)
    assert reason in answer["no_text"]
    assert answer["samples"][0]["text"] is None
    assert main(["explain", str(run)]) == 0
    assert "Without texts: the " in capsys.readouterr().out
    found = refused(capsys, run, "--text", "sun")
    assert "--text: " in found
    assert reason in found


def test_unrecorded_rounds_of_an_earlier_run_are_reported_as_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on from another folder's checkpoint may have trained on a sample before its record begins."""
    run = write_run(tmp_path / "run", COMPONENTS["select"])
    rows = raw_rows(run)
    later = {row.index for row in rows if row.round >= 2}
    before, never = ({row.index for row in rows} - later), set(range(50)) - {row.index for row in rows}
    sample = min(before)
    lines = (run / "dataflex" / "rounds.jsonl").read_text().splitlines(keepends=True)
    assert "never planned" in told(capsys, run, "--index", str(min(never)))
    (run / "dataflex" / "rounds.jsonl").write_text("".join(lines[2:]))
    change = {"resumed_at": 7, "step": 7, "key": "dataflex.select.focus", "from": "low", "to": "high"}
    kept = {**change, "key": "learning_rate", "effect": "none, the earlier value stays"}
    changes = [{**change, "effect": "from this step on"}, kept]
    (run / "dataflex" / "changes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changes))
    text = told(capsys, run, "--index", str(sample))
    assert "not planned in the rounds on record" in text
    assert "never planned" not in text
    missing = "Not on record here: rounds 0-1. This run continues an earlier run, whose record has them."
    assert missing in " ".join(text.split())  # the lines are as wide as the terminal
    assert 'From step 8 on: dataflex.select.focus is "high", before "low".' in text
    assert "learning_rate" not in text
    facts = ask(capsys, run, "--index", str(sample))["run"]
    assert facts["rounds_missing"] == [0, 1]
    assert [(each["before"], each["now"], each["effect"]) for each in facts["changes"]] == [
        ("low", "high", each["effect"]) for each in changes
    ]
