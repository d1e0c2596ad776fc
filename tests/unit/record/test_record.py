"""The run record: written files, the parts that a resumed run keeps, and that an earlier record is never lost."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from transformers import Trainer

from dataflex.api.schedule import RoundSlot
from dataflex.errors import ConfigError
from dataflex.planning.budget import LimitedDecision
from dataflex.planning.planner import Plan
from dataflex.record import plans
from dataflex.record.reader import read_run
from dataflex.record.schema import (
    Cost,
    DomainMeasures,
    Evaluation,
    Measures,
    Start,
    Summary,
    TokensOfSample,
    TokensOfStep,
    TokenWeights,
)
from dataflex.record.writer import RunWriter
from dataflex.trainer.mixin import DynamicTrainerMixin
from unit.fakes import as_version_1, begin_record, make_pool, raw_plans

POOL = make_pool({"a": 6, "b\u00e9": 4})
SIZES = {"a": 6, "b\u00e9": 4}
COST = Cost(1.5, 10, 70)


def plan(number: int, indices: list[int], scores: list[float] | None = None, **changes) -> Plan:
    slot = RoundSlot(number, 2 * number, 2, changes.pop("update", number))
    array = None if scores is None else np.array(scores, dtype=np.float32)
    return Plan(slot, np.array(indices), array, np.array([0.25, 0.75]), **changes)


def rounds(output: Path, folder: str = "dataflex") -> list[int]:
    lines = (output / folder / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line)["round"] for line in lines]


def write(output: Path, first: int, stop: int, kept: int | None) -> RunWriter:
    """Train rounds from ``first`` to ``stop`` in a run that was started or resumed."""
    writer = RunWriter(output)
    if kept is None:
        writer.open_new()
    writer.begin({"dataflex": {"seed": first}}, kept, domains=SIZES, methods={"select": "loss"})
    for number in range(first, stop):
        writer.round(plan(number, [number % 10, 9]), POOL, COST)
    return writer


def test_a_round_is_one_line_without_repetition_and_part_of_a_plan_file(tmp_path: Path) -> None:
    writer = begin_record(tmp_path, POOL, {"select": "loss"}, {"stage": "sft", "dataflex": {"seed": 3}})
    writer.round(plan(0, [3, 7, 7, 0], update=None), POOL, Cost())
    ranked = {"ranks": np.array([3, 0, 1, 7]), "candidates": {"pool": 7}}
    writer.round(plan(1, [9, 1, 1, 2], [0.5, np.nan, 2, -1], unscored=3, **ranked), POOL, COST)
    assert json.loads((tmp_path / "dataflex" / "record.json").read_text()) == {
        "version": 2, "domains": SIZES, "methods": [{"from_round": 0, "methods": {"select": "loss"}}]
    }  # fmt: skip
    first, second = map(json.loads, (tmp_path / "dataflex" / "rounds.jsonl").read_text().splitlines())
    assert first["warmup"] is True
    assert first["domains"] == [2, 2]
    assert not {"unscored", "candidates", "cost", "pool", "components"} & set(first)
    (file,) = (tmp_path / "dataflex" / "plans").iterdir()
    assert second == {
        "round": 1,
        "start_step": 2,
        "steps": 2,
        "size": 4,
        "plan_sha256": plan(1, [9, 1, 1, 2]).sha256,
        "plan": {"file": "from-round-00000.arrows", "begin": first["plan"]["end"], "end": file.stat().st_size},
        "domains": [3, 1],
        "proportions": [0.25, 0.75],
        "cost": {"seconds": 1.5, "samples": 10, "tokens": 70},
        "unscored": 3,
        "candidates": {"pool": 7},
    }
    drawn, chosen = raw_plans(tmp_path)
    assert chosen.drop_columns("row").to_pydict() == {
        "round": [1, 1, 1, 1],
        "position": [0, 1, 2, 3],
        "index": [9, 1, 1, 2],
        "domain": ["b\u00e9", "a", "a", "a"],
        "score": [0.5, None, 2.0, -1.0],
        "rank": [3, None, 1, 7],
    }
    assert [drawn.column(name).null_count for name in ("row", "score", "rank")] == [4, 4, 4]
    record = read_run(tmp_path)
    assert [each.components for each in record.rounds] == [{}, {"select": "loss"}]
    assert record.rounds[1].domains == {"a": 3, "b\u00e9": 1}
    assert record.rounds[1].pool == SIZES
    assert record.plan(1).equals(chosen)
    assert record.plan_scores(0) is None
    assert record.plan_scores(1).tolist() == [0.5, 2.0, -1.0]


def test_configuration_environment_and_summary_are_written(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.begin({"stage": "sft", "dataflex": {"mix": {"proportions": [0.5, 0.5]}}}, None, start=Start(step=4))
    record = tmp_path / "dataflex"
    written = yaml.safe_load((record / "config.yaml").read_text())
    assert written == {"stage": "sft", "dataflex": {"mix": {"proportions": [0.5, 0.5]}}}
    writer.summary(Summary(**SUMMARY))
    assert json.loads((record / "summary.json").read_text()) == SUMMARY
    (start,) = json.loads((record / "environment.json").read_text())["starts"]
    assert start["step"] == 4
    assert datetime.fromisoformat(start["finished"]).tzinfo is not None
    assert sorted(path.name for path in record.iterdir()) == [
        "config.yaml", "environment.json", "plans", "record.json", "summary.json",
    ]  # fmt: skip


def strict(text: str) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_metrics_of_pairs_are_recorded(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.begin({"dataflex": {}}, None)
    of_pairs = {"loss": 0.5, "perplexity": math.nan, "bits_per_byte": None, "accuracy": 0.0, "margin": -0.25}
    line = Evaluation(
        **EVALUATION,
        domains={"a": DomainMeasures(**of_pairs, tokens=None, bytes=None, samples=2)},
        token_weighted=Measures(**of_pairs),
        unweighted=Measures(**of_pairs),
    )
    writer.evaluation(line)
    writer.summary(Summary(**SUMMARY, evaluation=line))
    written = strict((tmp_path / "dataflex" / "evaluations.jsonl").read_text())
    assert written["domains"]["a"] == {**of_pairs, "perplexity": None, "tokens": None, "bytes": None, "samples": 2}
    (found,) = read_run(tmp_path).evaluations
    assert (found.domains["a"].accuracy, found.domains["a"].margin, found.domains["a"].tokens) == (0.0, -0.25, None)
    assert found.token_weighted.accuracy == 0.0


def test_values_that_are_not_finite_are_recorded_as_null(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.begin({"dataflex": {}}, None)
    nan = float("nan")
    empty = {"loss": nan, "perplexity": float("inf"), "bits_per_byte": None}
    line = Evaluation(
        **EVALUATION,
        domains={"a": DomainMeasures(**empty, tokens=0, bytes=0, samples=1)},
        token_weighted=Measures(**empty),
        unweighted=Measures(**empty),
    )
    writer.evaluation(line)
    writer.summary(Summary(**SUMMARY, evaluation=line))
    for name in ("evaluations.jsonl", "summary.json"):
        strict((tmp_path / "dataflex" / name).read_text())
    assert strict((tmp_path / "dataflex" / "evaluations.jsonl").read_text())["domains"]["a"]["loss"] is None
    read = read_run(tmp_path)
    assert read.summary is not None
    for found in (read.evaluations[0], read.summary.evaluation):
        assert found is not None
        assert math.isnan(found.domains["a"].loss)
        assert math.isnan(found.unweighted.perplexity)
        assert found.unweighted.bits_per_byte is None


EVALUATION: dict[str, Any] = {
    "step": 3, "tokens": 10, "train_seconds": 1.0, "decision_seconds": 1.0, "evaluate_seconds": 1.0, "fingerprint": "a",
}  # fmt: skip
SUMMARY: dict[str, Any] = {
    "train_seconds": 1.0, "decision_seconds": 1.0, "overhead_fraction": 1.0, "rounds": 1, "tokens": 1, "steps": 3,
}  # fmt: skip


def test_values_that_are_not_finite_are_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = {}

    def log(trainer: Trainer, logs: dict[str, float]) -> None:
        logged.update(logs)
        logs["epoch"] = 0.5

    monkeypatch.setattr(Trainer, "log", log)
    trainer = object.__new__(DynamicTrainerMixin)
    trainer.dataflex = SimpleNamespace(clock=SimpleNamespace(so_far=lambda: {"tokens": 5}))
    metrics = {"eval_loss": float("nan"), "eval_a_perplexity": float("inf"), "eval_b_loss": 2.0, "eval_name": "x"}
    trainer.log(metrics)
    assert logged == {"eval_b_loss": 2.0, "eval_name": "x", "dataflex/tokens": 5}
    assert math.isnan(metrics["eval_loss"])  # whoever asked for the evaluation still has it
    assert metrics["epoch"] == 0.5


def test_a_resumed_run_has_every_round_once(tmp_path: Path) -> None:
    write(tmp_path, 0, 5, None)
    write(tmp_path, 2, 7, 2)  # from a checkpoint in round 1
    assert rounds(tmp_path) == list(range(7))
    write(tmp_path, 7, 8, 7)  # from the last checkpoint
    assert rounds(tmp_path) == list(range(8))
    assert [table.column("index").to_pylist() for table in raw_plans(tmp_path)] == [[n, 9] for n in range(8)]
    assert [path.name for path in (tmp_path / "dataflex" / "plans").iterdir()] == ["from-round-00000.arrows"]
    assert yaml.safe_load((tmp_path / "dataflex" / "config.yaml").read_text())["dataflex"] == {"seed": 7}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataflex"]


def test_a_resumed_run_keeps_the_evaluations_so_far(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    assert writer.begin({"dataflex": {}}, None) is None
    measures = Measures(1.0, math.e, None)
    for step in (2, 4, 4, 6):
        told = {**EVALUATION, "step": step, "tokens": 10 * step}
        writer.evaluation(Evaluation(**told, domains={}, token_weighted=measures, unweighted=measures))
    last = writer.begin({"dataflex": {}}, 1, step=4)
    assert last is not None
    assert (last.step, last.tokens) == (4, 40)
    lines = (tmp_path / "dataflex" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 4]


def test_a_truncated_line_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, 3, None)
    path = tmp_path / "dataflex" / "rounds.jsonl"
    path.write_text(path.read_text()[:-20])
    write(tmp_path, 2, 4, 2)
    assert rounds(tmp_path) == list(range(4))


def test_a_run_resumed_into_a_new_folder_stays_without_duplicates(tmp_path: Path) -> None:
    write(tmp_path, 5, 9, 5)  # the checkpoint came from elsewhere: rounds 0 to 4 are recorded there
    assert rounds(tmp_path) == [5, 6, 7, 8]
    write(tmp_path, 7, 10, 7)
    assert rounds(tmp_path) == [5, 6, 7, 8, 9]


def test_a_new_run_sets_an_earlier_record_aside(tmp_path: Path) -> None:
    for count in (3, 2, 4):
        write(tmp_path, 0, count, None).summary(Summary(**{**SUMMARY, "rounds": count}))
    assert rounds(tmp_path) == [0, 1, 2, 3]
    assert rounds(tmp_path, "dataflex-earlier-1") == [0, 1, 2]
    assert rounds(tmp_path, "dataflex-earlier-2") == [0, 1]
    for name, count in [("dataflex", 4), ("dataflex-earlier-1", 3), ("dataflex-earlier-2", 2)]:
        assert len(list((tmp_path / name / "plans").iterdir())) == 1
        assert json.loads((tmp_path / name / "summary.json").read_text())["rounds"] == count


def test_a_resumed_run_has_no_summary_of_the_run_before(tmp_path: Path) -> None:
    write(tmp_path, 0, 3, None).summary(Summary(**SUMMARY))
    write(tmp_path, 3, 4, 3)
    assert not (tmp_path / "dataflex" / "summary.json").exists()


def test_task_results_of_the_model_before_are_set_aside(tmp_path: Path) -> None:
    tasks = tmp_path / "dataflex" / "tasks"
    write(tmp_path, 0, 3, None)
    for text in ("first", "second"):
        tasks.mkdir()
        (tasks / "quiz.json").write_text(text)
        write(tmp_path, 3, 4, 3)  # the finished run is trained for longer
        assert not tasks.exists()
    kept = sorted((tmp_path / "dataflex").glob("tasks-earlier-*/quiz.json"))
    assert [(path.parent.name, path.read_text()) for path in kept] == [
        ("tasks-earlier-1", "first"),
        ("tasks-earlier-2", "second"),
    ]
    tasks.mkdir()
    write(tmp_path, 0, 1, None)  # a new run
    assert sorted(path.name for path in (tmp_path / "dataflex-earlier-1").glob("tasks*")) == [
        "tasks",
        "tasks-earlier-1",
        "tasks-earlier-2",
    ]
    assert not list((tmp_path / "dataflex").glob("tasks*"))


def test_a_folder_that_cannot_be_written_to_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir: .*cannot be written to"):
        RunWriter(tmp_path / "file")


def test_loss_weights_continue_after_a_checkpoint(tmp_path: Path) -> None:
    names = ("plain", 'with "quotes", a comma', "two\nlines", "a\u2028b")
    writer = RunWriter(tmp_path)
    for step in range(1, 7):
        writer.loss_weights(step, names, np.full(4, step / 7))
    path = writer.folder / "loss_weights.csv"
    with path.open("a") as stream:
        stream.write("7,0.3")  # cut off
    writer.begin({}, 1, 4)
    writer.loss_weights(5, names, np.full(4, 0.5))
    with path.open(newline="") as stream:
        head, *rows = csv.reader(stream)
    assert head == ["step", *names]
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4, 5]
    assert [float(row[1]) for row in rows] == [1 / 7, 2 / 7, 3 / 7, 4 / 7, 0.5]
    path.write_bytes(b"")  # cut off before the header
    writer.begin({}, 1, 4)
    writer.loss_weights(5, names, np.full(4, 0.5))
    with path.open(newline="") as stream:
        assert next(csv.reader(stream)) == ["step", *names]


def weights_until(step: int, names: tuple[str, ...]) -> TokenWeights:
    count = dict.fromkeys(names, step)
    value = dict.fromkeys(names, step / 7)
    bins = {key: [step, *([0] * 13)] for key in names}
    return TokenWeights(step, 2, step / 3, count, count, value, value, value, bins)


def tokens_of(step: int) -> TokensOfStep:
    return TokensOfStep(step, [TokensOfSample(step, 2, [1.25, 0.5], [0.0, 2.0]), TokensOfSample(0, 3, [1.0], [0.5])])


@pytest.mark.parametrize("names", [tuple(SIZES), ("all",)])
def test_token_weights_and_tokens_continue_after_a_checkpoint(names: tuple[str, ...], tmp_path: Path) -> None:
    """By the domains of the pool, or as one group if the run plans no rounds."""
    sizes, kept = (SIZES, 1) if names == tuple(SIZES) else (None, 0)
    writer = RunWriter(tmp_path)
    writer.open_new()
    writer.begin({"dataflex": {}}, None, domains=sizes)
    assert writer.last_tokens is None
    for step in (2, 4, 6):
        writer.token_weights(weights_until(step, names))
        writer.token_samples(tokens_of(step))
    assert writer.last_tokens == 6
    for name in ("token_weights.jsonl", "token_samples.jsonl"):
        with (writer.folder / name).open("a") as stream:
            stream.write('{"step": 8, "st')  # cut off
    record = read_run(tmp_path)
    assert record.token_weights == [weights_until(step, names) for step in (2, 4, 6)]
    assert record.token_samples == [tokens_of(step) for step in (2, 4, 6)]
    assert record.token_samples[0].samples[1].token_weights == [0.5]
    again = RunWriter(tmp_path)
    again.begin({"dataflex": {}}, kept, 5, domains=sizes)
    assert again.last_tokens == 4
    again.token_weights(weights_until(7, names))
    again.token_samples(tokens_of(7))
    record = read_run(tmp_path)
    assert [each.step for each in record.token_weights] == [each.step for each in record.token_samples] == [2, 4, 7]


def test_a_run_in_a_new_folder_takes_the_token_weights_along(tmp_path: Path) -> None:
    names = tuple(SIZES)
    writer = RunWriter(tmp_path / "one")
    identity = writer.open_new()
    writer.begin({"dataflex": {}}, None, domains=SIZES)
    for step in (2, 4):
        writer.token_weights(weights_until(step, names))
        writer.token_samples(tokens_of(step))
    (checkpoint := tmp_path / "one" / "checkpoint-2").mkdir()
    other = RunWriter(tmp_path / "two")
    other.open_continued(checkpoint, identity, 2)
    other.begin({"dataflex": {}}, 1, 2, domains=SIZES)
    record = read_run(tmp_path / "two")
    assert record.token_weights == [weights_until(2, names)]
    assert record.token_samples == [tokens_of(2)]


def test_a_round_names_only_methods_that_decided(tmp_path: Path) -> None:
    undecided = {"select": "every sample is taken"}
    writer = begin_record(tmp_path, POOL, {"select": "loss", "mix": "odm"})
    writer.round(plan(0, [0, 1, 2, 3], undecided=undecided, not_chosen={"a": "it"}), POOL, COST)
    (line,) = read_run(tmp_path).rounds
    assert line.components == {"mix": "odm"}
    assert line.undecided == undecided
    assert line.not_chosen == {"a": "it"}


def indices(output: Path) -> list[list[int]]:
    record = read_run(output)
    return [record.plan_indices(each.round).tolist() for each in record.rounds]


def test_many_short_rounds_are_written_to_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "FULL", 2**17)
    write(tmp_path, 0, 1_000, None)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert 5 < len(files) < 50
    assert max(path.stat().st_size for path in files if path.suffix == ".arrows") < 1.1 * 2**17
    assert indices(tmp_path) == [[number % 10, 9] for number in range(1_000)]
    write(tmp_path, 100, 102, 100)  # back to an early checkpoint
    assert indices(tmp_path) == [[number % 10, 9] for number in range(102)]
    assert len(list((tmp_path / "dataflex" / "plans").iterdir())) == 1


@pytest.mark.parametrize("torn", ["half of a plan", "a plan without a line", "half of a line"])
def test_a_kill_between_plan_and_line_loses_no_earlier_round(tmp_path: Path, torn: str) -> None:
    write(tmp_path, 0, 5, None)
    (file,) = (tmp_path / "dataflex" / "plans").iterdir()
    lines, whole = tmp_path / "dataflex" / "rounds.jsonl", file.read_bytes()
    head, last = lines.read_text().splitlines(keepends=True)[:-1], lines.read_text().splitlines()[-1]
    begin = json.loads(last)["plan"]["begin"]
    lines.write_text("".join([*head, last[:20] if torn == "half of a line" else ""]))
    if torn == "half of a plan":
        file.write_bytes(whole[: (begin + len(whole)) // 2])
    assert indices(tmp_path) == [[number, 9] for number in range(4)]  # what a report of the running training sees
    write(tmp_path, 3, 6, 3)
    assert indices(tmp_path) == [[number, 9] for number in range(6)]
    assert [table.column("index").to_pylist() for table in raw_plans(tmp_path)] == [[n, 9] for n in range(6)]
    assert file.read_bytes()[: len(whole)] == whole


def test_plans_are_read_while_they_are_written(tmp_path: Path) -> None:
    writer = begin_record(tmp_path, POOL)
    for number in range(3):
        writer.round(plan(number, [number, 5]), POOL, COST)
        assert indices(tmp_path) == [[earlier, 5] for earlier in range(number + 1)]


def test_methods_changed_at_a_resume_are_recorded(tmp_path: Path) -> None:
    write(tmp_path, 0, 4, None)
    for kept, name in ((2, "odm"), (3, "odm"), (4, "ado"), (4, "loss")):
        writer = RunWriter(tmp_path)
        writer.begin({"dataflex": {}}, kept, domains=SIZES, methods={"mix": name})
        writer.round(plan(kept, [1]), POOL, COST)
    found = [each.components for each in read_run(tmp_path).rounds]
    assert found == [{"select": "loss"}, {"select": "loss"}, {"mix": "odm"}, {"mix": "odm"}, {"mix": "loss"}]
    header = json.loads((tmp_path / "dataflex" / "record.json").read_text())
    assert [each["from_round"] for each in header["methods"]] == [0, 2, 4]


def test_a_plan_that_differs_from_its_digest_is_named(tmp_path: Path) -> None:
    write(tmp_path, 0, 3, None)
    (file,) = (tmp_path / "dataflex" / "plans").iterdir()
    lines, whole = tmp_path / "dataflex" / "rounds.jsonl", file.read_bytes()
    places = [each.plan for each in read_run(tmp_path).rounds]
    assert places[1] is not None
    where = r"from-round-00000\.arrows, round 2"
    file.write_bytes(whole[:-9])
    with pytest.raises(ConfigError, match=rf"{where} is not all there"):
        indices(tmp_path)
    file.write_bytes(whole[: places[1].end] + whole[places[1].begin : places[1].end])
    with pytest.raises(ConfigError, match=rf"{where} (has 2 samples|is not all there)"):
        indices(tmp_path)
    file.write_bytes(whole[: places[1].end] + b"x" * (len(whole) - places[1].end))
    with pytest.raises(ConfigError, match=rf"{where} is not readable Arrow"):
        indices(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match=r"is missing; expected the plan of round 0 of rounds\.jsonl"):
        indices(tmp_path)
    lines.write_text(lines.read_text().replace('"domains": [1, 1]', '"domains": [1]'))
    with pytest.raises(ConfigError, match=r"rounds\.jsonl, line 1: 'domains' has 1 values, record\.json names 2"):
        read_run(tmp_path)


def test_a_record_of_a_later_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, None)
    (tmp_path / "dataflex" / "record.json").write_text('{"version": 3, "rounds": {}}')
    with pytest.raises(ConfigError, match=r"record\.json: the record is of version 3, .* reads up to 2"):
        read_run(tmp_path)


def test_a_record_of_the_first_version_gives_the_same_values(tmp_path: Path) -> None:
    writer = begin_record(tmp_path, POOL, {"select": "loss", "mix": "odm"})
    writer.round(plan(0, [3, 7, 7, 0], update=None), POOL, Cost())
    ranked = {"ranks": np.array([3, 0, 1, 7]), "candidates": {"a": 5, "b\u00e9": 4}, "epochs": np.array([1.5, 0.25])}
    clipped = {"clipped_shares": {"a": 0.75}, "undecided": {"mix": "why"}, "budget": LimitedDecision(8, 5, 6, 1, 0.5)}
    writer.round(plan(1, [9, 1, 1, 2], [0.5, np.nan, 2, -1], unscored=3, **ranked, **clipped), POOL, COST)
    new = read_run(tmp_path)
    tables = [new.plan(number).select(["index", "domain", "score", "rank"]).to_pydict() for number in range(2)]
    coverage = new.coverage()
    old = read_run(as_version_1(tmp_path))
    assert old.rounds == [replace(each, plan=None) for each in new.rounds]
    assert old.coverage() is not None
    assert str(old.coverage()) == str(coverage)
    assert old.plan_scores(1).tolist() == [0.5, 2.0, -1.0]
    assert old.plan(1).select(["index", "domain", "score", "rank"]).to_pydict() == tables[1]


def test_any_reader_of_arrow_streams_reads_the_plans(tmp_path: Path) -> None:
    write(tmp_path, 0, 3, None)
    (file,) = (tmp_path / "dataflex" / "plans").iterdir()
    table = pa.ipc.open_stream(file.read_bytes()).read_pandas()
    assert table["domain"].tolist() == ["a", "b\u00e9"] * 3
    assert table["round"].tolist() == [0, 0, 1, 1, 2, 2]
