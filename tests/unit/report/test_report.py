"""The report: run folders are read, tables are printed, the page is written."""

from __future__ import annotations

import base64
import csv
import gzip
import html
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from dataflex.errors import ConfigError
from dataflex.record.reader import read_run
from dataflex.record.schema import FROM_HERE, NO_EFFECT, Change
from dataflex.report.charts.chart import DOMAINS, Chart
from dataflex.report.charts.sections import charts
from dataflex.report.figure_text import data, legend
from dataflex.report.figures import Figure, figure, line, row_labels, smooth, style, thin
from dataflex.report.measure import MeasuredRun, evenly, measure
from dataflex.report.page import page
from dataflex.report.report import report, write_page
from dataflex.report.setup import setup_table
from dataflex.report.tables import (
    Table,
    domain_table,
    evaluation_table,
    run_table,
    score_table,
    tables,
    task_table,
    to_text,
)

# Three plans of six samples from a pool of ten: 8 distinct samples; consecutive sets share 2 of 10 and 5 of 6.
PLANS = ([0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 6, 7], [4, 5, 6, 7, 4, 4])
DOMAIN_OF = ["math"] * 5 + ["<script>"] * 5


def write_plan(run: Path, number: int, indices: Sequence[int], scores: Sequence[float | None] | None) -> None:
    columns: dict[str, Any] = {
        "position": pyarrow.array(range(len(indices)), pyarrow.int64()),
        "index": pyarrow.array(indices, pyarrow.int64()),
        "domain": pyarrow.array([DOMAIN_OF[i % 10] for i in indices]).dictionary_encode(),
    }
    if scores is not None:
        columns["score"] = pyarrow.array(scores, pyarrow.float32())
    folder = run / "dataflex" / "plans"
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"round-{number:05d}.parquet")


def round_line(number: int, domains: dict[str, int], **changes: Any) -> dict[str, Any]:
    size = sum(domains.values())
    return {
        "round": number,
        "start_step": 3 * number,
        "steps": 3,
        "size": size,
        "plan_sha256": "0" * 64,
        "domains": domains,
        "proportions": {name: count / size for name, count in domains.items()},
        "components": {"select": "loss", "mix": "odm"},
        "cost": {"seconds": 0.5 * number, "samples": 10, "tokens": 100},
        **({"warmup": True} if number == 0 else {}),
        **changes,
    }


def write_config(run: Path, **components: str) -> Path:
    (run / "dataflex").mkdir(parents=True)
    section = {family: {"method": method} for family, method in components.items()}
    config = {"stage": "sft", "dataflex": section}
    (run / "dataflex" / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def write_rounds(run: Path, lines: Sequence[dict[str, Any]], tail: str = "") -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "dataflex" / "rounds.jsonl").write_text(text + tail)


def write_state(folder: Path, history: Sequence[dict[str, Any]], global_step: int) -> None:
    folder.mkdir(exist_ok=True)
    state = {"global_step": global_step, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def history(steps: int, **extra: float) -> list[dict[str, Any]]:
    """Losses 2.9, 2.8, ...; an evaluation every third step, 1 above."""
    entries: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        entries.append({"step": step, "epoch": 0.1, "loss": 3 - step / 10, **extra})
        if step % 3 == 0:
            entries.append({"step": step, "eval_loss": 4 - step / 10, "eval_held_out_loss": 2.0 + (step == 9)})
    return entries


def write_summary(run: Path, **changes: Any) -> None:
    summary = {"train_seconds": 100.0, "decision_seconds": 1.5, "overhead_fraction": 0.015, "rounds": 3}
    (run / "dataflex" / "summary.json").write_text(json.dumps({**summary, "tokens": 123456, **changes}))


def finished_run(run: Path) -> Path:
    write_config(run, select="loss", mix="odm")
    counts = [{"math": 5, "<script>": 1}, {"math": 1, "<script>": 5}, {"math": 3, "<script>": 3}]
    write_rounds(run, [round_line(number, domains) for number, domains in enumerate(counts)])
    write_plan(run, 0, PLANS[0], None)
    write_plan(run, 1, PLANS[1], [1, 2, 3, 4, 5, None])
    write_plan(run, 2, PLANS[2], [0.5, 0.5, 0.5, 0.5, 0.5, float("nan")])
    write_state(run, history(9, **{"dataflex/loss/math": 1.0, "dataflex/loss/<script>": 2.0}), 9)
    write_summary(run)
    return run


def weight_run(run: Path) -> Path:
    write_config(run, weight="loss")
    write_state(run, history(9, **{"dataflex/weight_min": 0.5, "dataflex/weight_max": 1.5}), 9)
    write_summary(run, rounds=0, decision_seconds=0.0, overhead_fraction=0.0)
    return run


def measured(*paths: Path) -> list[MeasuredRun]:
    return measure([read_run(path) for path in paths])


def column(table: Table, name: str) -> list[str]:
    i = table.header.index(name)
    return [row[i] for row in table.rows]


def chart(found: Sequence[Chart], title: str) -> Chart:
    return next(each for each in found if each.title == title)


def costs(step: int, tokens: int) -> dict[str, float]:
    seconds = {f"dataflex/{name}_seconds": step * factor for name, factor in SECONDS.items()}
    return {"dataflex/tokens": tokens, **seconds}


SECONDS = {"train": 2.0, "decision": 0.5, "evaluate": 0.25}


def evaluation_line(step: int, losses: dict[str, float], **changes: Any) -> dict[str, Any]:
    mean = {"loss": sum(losses.values()) / len(losses), "perplexity": 2.0, "bits_per_byte": None}
    sizes = {"tokens": 10, "bytes": 40, "samples": 2}
    return {
        "step": step,
        "tokens": 7 * step,
        **{f"{name}_seconds": step * factor for name, factor in SECONDS.items()},
        "fingerprint": "ab",
        "domains": {
            name: {"loss": loss, "perplexity": 2.0, "bits_per_byte": loss / 3, **sizes} for name, loss in losses.items()
        },
        "token_weighted": {**mean, "bits_per_byte": 0.5},
        "unweighted": mean,
        **changes,
    }


def write_evaluations(run: Path, lines: Sequence[dict[str, Any]], tail: str = "") -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "dataflex" / "evaluations.jsonl").write_text(text + tail)


def write_task(run: Path, name: str, **changes: Any) -> None:
    metrics = {"acc": {"value": 0.3, "stderr": 0.03}, "acc_norm": {"value": 0.5, "stderr": 0.03}}
    task = {"task": name, "form": "multiple_choice", "file": "x", "samples": 200, "num_fewshot": 5, "metrics": metrics}
    folder = run / "dataflex" / "tasks"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**task, "chance": 0.25, "subjects": {}, **changes}))


# Reading


def test_reader_gives_the_curves_and_the_rounds(tmp_path: Path) -> None:
    record = read_run(finished_run(tmp_path / "run"))
    assert record.name == "run"
    assert record.components == {"select": "loss", "mix": "odm"}
    assert record.steps == 9
    assert record.train_loss == [(step, pytest.approx(3 - step / 10)) for step in range(1, 10)]
    assert record.eval_loss["held_out"] == [(3, 2.0), (6, 2.0), (9, 3.0)]
    assert set(record.domain_loss) == {"math", "<script>"}
    assert [each.warmup for each in record.rounds] == [True, False, False]
    assert record.rounds[1].shares == {"math": 1 / 6, "<script>": 5 / 6}


def test_plans_are_counted(tmp_path: Path) -> None:
    record = read_run(finished_run(tmp_path / "run"))
    coverage = record.coverage()
    assert coverage is not None
    assert (coverage.samples, coverage.distinct) == (18, 8)
    assert coverage.overlap == [(1, 2 / 8), (2, 4 / 4)]
    assert record.plan_indices(1).tolist() == PLANS[1]
    assert record.plan_scores(0) is None
    scores = record.plan_scores(1)
    assert scores is not None
    assert scores.tolist() == [1, 2, 3, 4, 5]


def test_sequence_of_plans_that_grows_is_counted(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", select="loss")
    write_rounds(run, [round_line(number, {"math": 2}) for number in range(3)])
    for number, indices in enumerate(([1, 2], [100, 2], [5000, 5001])):
        write_plan(run, number, indices, None)
    coverage = read_run(run).coverage()
    assert coverage is not None
    assert coverage.distinct == 5
    assert coverage.overlap == [(1, 1 / 3), (2, 0.0)]


def test_cut_off_last_line_is_ignored(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    lines = [round_line(number, {"math": 6}) for number in range(3)]
    write_rounds(run, lines, tail=json.dumps(round_line(3, {"m\u00e4th": 6}), ensure_ascii=False)[:75])
    assert len(read_run(run).rounds) == 3


def test_complete_last_line_without_newline_counts(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    write_rounds(run, [round_line(0, {"math": 6})], tail=json.dumps(round_line(1, {"math": 6})))
    assert len(read_run(run).rounds) == 2


def test_round_planned_again_counts_once(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    write_rounds(run, [round_line(0, {"math": 6}), round_line(1, {"math": 6}), round_line(1, {"math": 4})])
    assert [each.size for each in read_run(run).rounds] == [6, 4]


def test_broken_line_is_named(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    good = json.dumps(round_line(0, {"math": 6}))
    (run / "dataflex" / "rounds.jsonl").write_text(f"{good}\n{good[:20]}\n{good}\n")
    with pytest.raises(ConfigError, match=r"rounds\.jsonl, line 2 is not readable JSON"):
        read_run(run)


def test_wrong_value_in_a_line_is_named(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    write_rounds(run, [round_line(0, {"math": 6}), round_line(1, {"math": 6}, cost={"seconds": "long"})])
    with pytest.raises(ConfigError, match=r"line 2: 'cost\.seconds'"):
        read_run(run)


def test_unfinished_run_reads_the_newest_checkpoint_and_the_log_since(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (run / "dataflex" / "summary.json").unlink()
    write_state(run, [{"step": 500, "loss": 0.1}], 500)  # an earlier run's, in the same folder
    (run / "all_results.json").write_text(json.dumps({"eval_loss": 0.1}))
    write_state(run / "checkpoint-3", history(3), 3)
    write_state(run / "checkpoint-10", history(10), 10)
    (run / "checkpoint-11").mkdir()
    log = [{"current_steps": step, "total_steps": 30, "loss": 7.0, "lr": 0.1} for step in range(1, 13)]
    log.append({"current_steps": 12, "eval_loss": 6.0})
    (run / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"current_st')
    record = read_run(run)
    assert record.summary is None
    assert record.steps == 12
    assert record.train_loss[-3:] == [(10, 2.0), (11, 7.0), (12, 7.0)]
    assert record.eval_loss["eval"][-1] == (12, 6.0)
    assert record.decision_seconds == pytest.approx(1.5)


def write_log(run: Path, steps: Sequence[int], loss: float = 7.0) -> None:
    """Append to LLaMA-Factory's log, as every attempt does."""
    with (run / "trainer_log.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"current_steps": step, "loss": loss}) + "\n" for step in steps)


def test_abandoned_attempt_does_not_count(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", select="loss")
    write_log(run, range(1, 58), loss=7.0)
    write_state(run / "checkpoint-40", history(40), 40)
    write_log(run, range(41, 44), loss=5.0)
    write_log(run, range(42, 45), loss=4.0)
    record = read_run(run)
    assert record.steps == 44
    assert record.train_loss[-5:] == [(40, -1.0), (41, 5.0), (42, 4.0), (43, 4.0), (44, 4.0)]


def test_checkpoint_of_an_earlier_run_is_not_read(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", select="loss")
    write_state(run / "checkpoint-500", history(500), 500)
    assert (read_run(run).steps, read_run(run).train_loss) == (0, [])
    write_log(run, [1, 2])
    assert (read_run(run).steps, read_run(run).train_loss) == (2, [(1, 7.0), (2, 7.0)])


def test_files_of_an_earlier_run_are_not_read(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    write_summary(run, steps=4)  # trainer_state.json, written a little later, is still that of 9 steps
    write_log(run, range(1, 5))
    (run / "all_results.json").write_text(json.dumps({"eval_loss": 0.25}))
    record = read_run(run)
    assert (record.steps, record.train_loss) == (4, [(step, 7.0) for step in range(1, 5)])
    assert record.eval_loss == {"eval": [(4, 0.25)]}
    write_state(run, history(4), 4)
    assert read_run(run).train_loss == [(step, pytest.approx(3 - step / 10)) for step in range(1, 5)]


def test_seconds_of_a_training_loss_are_those_before_the_evaluation_of_its_step(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", select="loss")
    trained = [{"step": step, "loss": 1.0, **costs(step, step)} for step in (1, 2)]
    evaluated = {"step": 2, "eval_loss": 1.0, **costs(2, 2), "dataflex/evaluate_seconds": 60.0}
    write_state(run, [*trained, evaluated], 2)
    write_summary(run)
    assert read_run(run).seconds_at == {1: 2.75, 2: 5.5}


def test_run_that_has_just_begun_has_empty_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_config(tmp_path / "run", select="loss")
    record = read_run(run)
    assert (record.steps, record.train_loss, record.rounds) == (0, [], [])
    assert record.coverage() is None
    text = report([run]).read_text()
    assert "not finished" in capsys.readouterr().out
    assert "no training loss is logged yet" in text


def test_evaluation_after_training_is_the_last_point(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    write_state(run, [{"step": 8, "loss": 1.0, "eval_loss": 2.0}], 9)
    (run / "all_results.json").write_text(json.dumps({"train_loss": 1.5, "eval_loss": 1.25}))
    assert read_run(run).eval_loss == {"eval": [(8, 2.0), (9, 1.25)]}


def test_evaluations_are_read_by_step_and_a_cut_off_line_is_left_out(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    lines = [evaluation_line(3, {"a": 2.0, "b": 1.0}), evaluation_line(9, {"a": float("nan")})]
    last = evaluation_line(9, {"a": 1.5, "b": 1.0}, evaluate_seconds=4.0)
    write_evaluations(run, [*lines, last], tail=json.dumps(lines[0])[:50])
    found = read_run(run).evaluations
    assert [(each.step, each.tokens) for each in found] == [(3, 21), (9, 63)]
    assert found[1].domains["a"].loss == 1.5
    assert found[1].seconds == 9 * 2.5 + 4
    assert found[1].unweighted.bits_per_byte is None


def test_run_that_is_training_has_the_cost_and_tokens_of_its_last_evaluation(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    write_evaluations(run, [evaluation_line(4, {"a": 2.0})])
    (run / "dataflex" / "summary.json").unlink()
    record = read_run(run)
    assert (record.train_seconds, record.evaluate_seconds, record.tokens) == (8.0, 1.0, 28)
    assert record.trained == (4, 8.0)
    assert "known up to step 4." in run_table(measured(run)).notes[0]
    write_state(run / "checkpoint-6", [{"step": step, "loss": 1.0, **costs(step, 7 * step)} for step in (3, 6)], 6)
    write_log(run, range(1, 9))
    runs = measured(run)
    assert (runs[0].record.train_seconds, runs[0].record.trained) == (12.0, (6, 12.0))
    assert "seconds of training are known for run up to step 6." in chart(charts(runs), "Seconds by run").caption
    assert column(run_table(runs), "train s") == ["12.0"]


def test_summary_is_read_with_and_without_later_keys(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert read_run(run).evaluate_seconds is None
    write_summary(run, steps=9, evaluate_seconds=2.5, evaluation=evaluation_line(9, {"a": 1.0}))
    record = read_run(run)
    assert record.summary is not None
    assert record.summary.evaluation is not None
    assert (record.summary.steps, record.evaluate_seconds, record.summary.evaluation.domains["a"].loss) == (9, 2.5, 1.0)


@pytest.mark.parametrize(
    ("file", "key", "change"),
    [
        ("evaluations.jsonl, line 1", "domains.a.loss", lambda run: write_evaluations(run, [wrong_evaluation()])),
        ("evaluations.jsonl, line 1", "token_weighted", lambda run: write_evaluations(run, [{"step": 1}])),
        ("quiz.json", "metrics.acc.value", lambda run: write_task(run, "quiz", metrics={"acc": {"stderr": 1}})),
        ("quiz.json", "num_fewshot", lambda run: write_task(run, "quiz", num_fewshot="many")),
        ("summary.json", "evaluate_seconds", lambda run: write_summary(run, evaluate_seconds=-1)),
        ("rounds.jsonl, line 1", "pool.a", lambda run: write_rounds(run, [round_line(0, {"a": 1}, pool={"a": "x"})])),
    ],
)
def test_record_of_another_shape_is_named(tmp_path: Path, file: str, key: str, change: Callable[[Path], None]) -> None:
    run = finished_run(tmp_path / "run")
    change(run)
    with pytest.raises(ConfigError) as caught:
        read_run(run)
    assert file in str(caught.value)
    if key == "token_weighted":  # the first of several missing keys is named
        assert "'tokens'" in str(caught.value)
    else:
        assert f"'{key}'" in str(caught.value)


def wrong_evaluation() -> dict[str, Any]:
    line = evaluation_line(1, {"a": 1.0})
    line["domains"]["a"]["loss"] = "low"
    return line


def test_means_are_not_listed_as_evaluation_sets(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    means = {"eval_token_weighted_loss": 1.0, "eval_unweighted_loss": 2.0}
    write_state(run, [{"step": 3, "eval_loss": 3.0, **means}], 3)
    (run / "all_results.json").write_text(json.dumps({**means, "eval_loss": 3.0}))
    assert set(read_run(run).eval_loss) == {"eval"}
    write_state(run, [{"step": 3, "eval_unweighted_loss": 2.0}], 3)  # somebody's own set of that name
    (run / "all_results.json").unlink()
    assert set(read_run(run).eval_loss) == {"unweighted"}


def test_pool_of_many_rounds_is_stored_once(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", mix="odm")
    sizes = [{"math": 9}, {"math": 9}, {"math": 8}]
    write_rounds(run, [round_line(i, {"math": 6}, pool=pool) for i, pool in enumerate(sizes)])
    rounds = read_run(run).rounds
    assert [each.pool for each in rounds] == sizes
    assert rounds[0].pool is rounds[1].pool


def test_column_of_nulls_alone_has_no_numbers(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    path = run / "dataflex" / "plans" / "round-00001.parquet"
    table = pyarrow.parquet.read_table(path)
    nulls = pyarrow.nulls(6)
    pyarrow.parquet.write_table(table.set_column(3, "score", nulls), path)
    assert read_run(run).plan_scores(1) is None
    pyarrow.parquet.write_table(table.set_column(1, "index", nulls), path)
    with pytest.raises(ConfigError, match="has fractions or nulls"):
        read_run(run).plan_indices(1)


def test_repeats_and_first_sightings_are_counted(tmp_path: Path) -> None:
    coverage = read_run(finished_run(tmp_path / "run")).coverage()
    assert coverage is not None
    # Indices 0..3 are planned once, 4 and 5 five and three times, 6 and 7 three and three.
    assert coverage.times.tolist() == [0, 4, 0, 3, 0, 1]
    assert coverage.repeats == [(0, 0.0), (1, pytest.approx(4 / 6)), (2, 1.0)]
    assert coverage.seen == {"math": [(0, 5), (1, 5), (2, 5)], "<script>": [(0, 1), (1, 3), (2, 3)]}


@pytest.mark.parametrize("column", ["index", "domain"])
def test_plan_of_another_shape_is_named(tmp_path: Path, column: str) -> None:
    run = finished_run(tmp_path / "run")
    path = run / "dataflex" / "plans" / "round-00001.parquet"
    table = pyarrow.parquet.read_table(path)
    number = table.column_names.index(column)
    changes = {
        "has no column": table.drop_columns(column),
        "has fractions or nulls" if column == "index" else "must hold": table.set_column(
            number, column, pyarrow.array([0.5] * 6)
        ),
    }
    for message, changed in changes.items():
        pyarrow.parquet.write_table(changed, path)
        with pytest.raises(ConfigError, match=rf"round-00001\.parquet.*{message}"):
            read_run(run).coverage()


@pytest.mark.parametrize("name", ["trainer_state.json", "dataflex/summary.json", "all_results.json"])
def test_half_written_file_is_named(tmp_path: Path, name: str) -> None:
    run = finished_run(tmp_path / "run")
    (run / name).write_text('{"log_history": [{"step"')
    with pytest.raises(ConfigError, match=re.escape(name)):
        read_run(run)


def test_half_written_or_missing_plan_is_named(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    plan = run / "dataflex" / "plans" / "round-00001.parquet"
    plan.write_bytes(plan.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"round-00001\.parquet is not readable Parquet"):
        read_run(run).coverage()
    plan.unlink()
    with pytest.raises(ConfigError, match=r"round-00001\.parquet is missing"):
        read_run(run).coverage()


START = {
    "step": 0, "started": "2026-03-01T09:05:00+00:00", "versions": {"python": "3.11.7", "torch": "2.11.0", "peft": "1"},
    "platform": "Linux-x", "processes": 2, "devices": ["NVIDIA H100"], "model": {"name": "org/m", "commit": "a" * 40},
}  # fmt: skip
AGAIN = {**START, "step": 5, "started": "2026-03-02T09:05:00+00:00", "finished": "2026-03-02T10:05:00+00:00"}


def test_page_shows_methods_model_and_data(tmp_path: Path) -> None:
    run, plain = finished_run(tmp_path / "run"), finished_run(tmp_path / "plain")
    config = {
        "model_name_or_path": "org/m", "stage": "sft", "finetuning_type": "lora", "template": "qwen",
        "dataset": "chat, math", "eval_dataset": "held", "per_device_train_batch_size": 4, "learning_rate": 1e-4,
        "gradient_accumulation_steps": 8, "seed": 3, "hub_token": "hf_secret", "output_dir": "</pre><script>",
        "dataflex": {"select": {"method": "loss"}, "seed": 42},
    }  # fmt: skip
    (run / "dataflex" / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "dataflex" / "environment.json").write_text(json.dumps({"starts": [START, AGAIN]}))
    measured_runs = measured(run, plain)
    table = setup_table(measured_runs)
    assert table.header == ["", "run", "plain"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["model"] == ["org/m, commit aaaaaaaaaaaa", "-"]
    assert rows["training"] == ["sft, lora, template qwen, learning rate 0.0001", "sft"]
    assert rows["evaluated on"] == ["held", "-"]
    assert rows["samples of a step"] == ["4 per device x 8 accumulated x 2 processes", "-"]
    assert rows["seeds"][0] == "training 3, decisions 42"
    assert rows["began"][0] == "2026-03-01 09:05 UTC"
    assert rows["ended"][0] == "2026-03-02 10:05 UTC"
    assert rows["started"] == ["2 times, again from step 5", "-"]
    assert rows["versions"][0] == "torch 2.11.0, python 3.11.7"
    assert rows["processes"][0] == "2 (NVIDIA H100), Linux-x"
    output = report([run, plain], tmp_path / "page.html")
    text = output.read_text()
    for part in ("What was run", "org/m", "2026-03-01 09:05 UTC", "Configuration: run", "Environment: run", "H100"):
        assert part in text
    assert "hf_secret" not in text
    assert "</pre><script>" not in text
    assert "&lt;not recorded: hub_token&gt;" in text


def test_data_sets_are_shown_with_their_samples_or_their_column(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (record,) = (each.record for each in measured(run))
    line = replace(record.rounds[-1], pool={f"d{number}": 1000 + number for number in range(10)})
    config = {"dataset": "chat", "dataflex": {"domain_column": "topic"}}
    record = replace(record, rounds=[line], config=config)
    (each,) = measured(run)
    (row,) = (row for row in setup_table([replace(each, record=record)]).rows if row[0] == "data sets")
    assert row[1].startswith("chat by topic: d0 (1,000), d1 (1,001)")
    assert row[1].endswith("d7 (1,007), and 2 more")


def test_page_shows_changed_settings_and_rounds_in_other_folders(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (each,) = measured(run)
    here = {"resumed_at": 5, "step": 7, "key": "dataflex.mix.proportions", "before": [1, 1], "now": [3, 1]}
    changes = [Change(**here, effect=FROM_HERE), Change(**{**here, "key": "learning_rate"}, effect=NO_EFFECT)]
    record = replace(each.record, changes=changes, rounds=[replace(each.record.rounds[-1], round=2)])
    rows = {row[0]: row[1] for row in setup_table([replace(each, record=record)]).rows}
    assert rows["changed at a resume"] == "from step 8 dataflex.mix.proportions [3, 1]"
    assert rows["rounds not on record"] == "0, 1"
    assert not {"changed at a resume", "rounds not on record"} & {row[0] for row in setup_table([each]).rows}


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        report([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"config\.yaml is missing"):
        report([tmp_path])
    run = write_config(tmp_path / "run")
    (run / "dataflex" / "config.yaml").write_text("stage: sft\n")
    with pytest.raises(ConfigError, match="with a section dataflex"):
        report([run])


# Tables


def test_run_table_has_the_hand_computed_numbers(tmp_path: Path) -> None:
    table = run_table(measured(finished_run(tmp_path / "run")))
    assert dict(zip(table.header, table.rows[0], strict=True)) == {
        "run": "run",
        "components": "select=loss mix=odm",
        "rounds": "3",
        "steps": "9",
        "samples": "18",
        "distinct": "8",
        "overlap": "0.625",
        "tokens": "123,456",
        "train loss": "2.1000",
        "eval loss": "3.1000",
        "eval best": "3.1000",
        "held_out loss": "3.0000",
        "held_out best": "2.0000",
        "train s": "100.0",
        "decide s": "1.5",
        "overhead": "1.5 %",
    }
    assert table.notes == ()


def test_domain_table_has_the_shares(tmp_path: Path) -> None:
    table = domain_table(measured(finished_run(tmp_path / "run")))
    assert table.rows == [
        ["run", "math", "9", "0.500", "0.833", "0.500", "0.500", "1.0000", "1.0000"],
        ["run", "<script>", "9", "0.500", "0.167", "0.500", "0.500", "2.0000", "2.0000"],
    ]


def test_score_table_has_the_quantiles_of_the_first_and_last_scored_round(tmp_path: Path) -> None:
    table = score_table(measured(finished_run(tmp_path / "run")))
    assert table.header == ["run", "round", "min", "5%", "25%", "median", "75%", "95%", "max"]
    assert table.rows == [
        ["run", "1", "1", "1.2", "2", "3", "4", "4.8", "5"],
        ["run", "2", *["0.5"] * 7],
    ]


def test_runs_are_compared_side_by_side(tmp_path: Path) -> None:
    one, two = finished_run(tmp_path / "one" / "run"), weight_run(tmp_path / "two" / "run")
    table = run_table(measured(one, two))
    assert column(table, "run") == ["one/run", "two/run"]
    assert column(table, "components") == ["select=loss mix=odm", "weight=loss"]
    assert column(table, "distinct") == ["8", "-"]
    assert column(table, "samples") == ["18", "-"]


def test_weight_only_run_has_no_data_charts(tmp_path: Path) -> None:
    runs = measured(weight_run(tmp_path / "run"))
    assert [table.title for table in tables(runs)] == ["Runs"]
    assert not {"samples", "distinct", "overlap"} & set(run_table(runs).header)
    found = charts(runs)
    assert chart(found, "Sample weights").figure is not None
    for title in ("Proportions: run", "Scores of the selected samples: run", "Overlap of consecutive rounds"):
        assert chart(found, title).figure is None
        assert chart(found, title).caption


def test_run_without_decisions_has_its_losses_and_cost(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run")
    write_state(run, [{"step": step, "loss": 1.0, **costs(step, 5 * step)} for step in range(1, 5)], 4)
    write_evaluations(run, [evaluation_line(4, {"a": 2.0})])
    write_summary(run, rounds=0, decision_seconds=0.0, overhead_fraction=0.0, evaluate_seconds=1.0, steps=4)
    runs = measured(run)
    assert not {"rounds", "samples", "distinct"} & set(run_table(runs).header)
    assert column(run_table(runs), "evaluate s") == ["1.0"]
    drawn = {each.title for each in charts(runs) if each.figure}
    assert {"Training loss against time", "Evaluation loss by domain", "Seconds by run"} <= drawn
    assert not any("Proportions" in title or "seen" in title for title in drawn)


def test_text_fits_the_width_in_aligned_columns() -> None:
    header = ["run", "components", "rounds", "eval loss"]
    table = Table("Runs", header, [["a", "mix=odm", "3", "1.5"], ["b\x1b[31m", "-", "12", "-"]], 2, ("A note.",))
    assert to_text(table, 80).splitlines() == [
        "Runs",
        "",
        "run     components  rounds  eval loss",
        "a       mix=odm          3        1.5",
        "b?[31m  -               12          -",
        "",
        "A note.",
    ]
    narrow = to_text(table, 30).splitlines()
    assert max(len(text) for text in narrow) <= 30
    assert narrow[2:8] == [
        "run     components  rounds",
        "a       mix=odm          3",
        "b?[31m  -               12",
        "",
        "run     eval loss",
        "a             1.5",
    ]


# The page


def test_page_is_self_contained_and_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path / "run")
    output = report([run])
    assert output == run / "dataflex" / "report.html"
    assert "select=loss mix=odm" in capsys.readouterr().out
    text = output.read_text()
    assert "* plotly.js v" in unpacked_script(text, "plotly")
    ours = re.sub(r'<script type="text/plain".*?</script>', "", text)
    assert len(ours) < 100_000
    assert not re.search(r"https?://", ours)
    assert not re.search(r"<(link|img|iframe)\b|\b(src|href)\s*=|@import|url\(", ours)
    assert "default-src 'none'" in ours
    assert "&lt;script&gt;" in ours
    assert ours.count("<script") == 1
    assert len(text) < 3_000_000
    assert list(output.parent.glob(".*")) == []


def unpacked_script(text: str, key: str) -> str:
    (found,) = re.findall(f'<script type="text/plain" id="{key}">([A-Za-z0-9+/=]*)</script>', text)
    return gzip.decompress(base64.b64decode(found)).decode()


def test_page_names_missing_parts() -> None:
    found = [Chart("Loss", "Training <loss>", "none of <it>.", None)]
    text = page("a <title>", [], found, "js</script>\u00e9")
    assert "Not drawn - Training &lt;loss&gt;: none of &lt;it&gt;." in text
    assert "a &lt;title&gt;" in text
    assert "js</script>" not in text
    assert unpacked_script(text, "plotly") == "js</script>\u00e9"


def test_figures_are_valid_plotly(tmp_path: Path) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    runs = measured(finished_run(tmp_path / "a$x$"), weight_run(tmp_path / "b%{y}"), many_domains(tmp_path / "c"))
    figures = [each.figure for each in charts(runs) if each.figure is not None]
    assert len(figures) == 15
    for each in figures:
        graph_objects.Figure(each)
        assert each["data"]
    assert "<script>" not in json.dumps(figures)
    assert "$" not in json.dumps(figures).replace("&#36;", "")


def token_line(step: int, **tokens: dict[float, int]) -> dict[str, Any]:
    """Return a line about one step: for each domain the number of tokens of each weight (0, or a power of 2)."""

    def of(values: list[tuple[float, int]]) -> tuple[float, float, float]:
        total, squares = (sum(number * weight**power for weight, number in values) for power in (1, 2))
        return total, squares, total**2 / squares if squares else 0.0

    found: dict[str, Any] = {"step": step, "steps": 2, "effective_tokens": 0.0}
    found |= {key: {} for key in ("tokens", "counting", "sums", "squares", "effective", "bins")}
    for name, counts in tokens.items():
        found["tokens"][name] = sum(counts.values())
        found["counting"][name] = sum(number for weight, number in counts.items() if weight)
        found["sums"][name], found["squares"][name], found["effective"][name] = of(list(counts.items()))
        found["bins"][name] = [0] * 14
        for weight, number in counts.items():
            found["bins"][name][0 if weight == 0 else int(np.log2(weight)) + 7] += number
    found["effective_tokens"] = of([pair for counts in tokens.values() for pair in counts.items()])[2]
    return found


TOKEN_LINES = (
    token_line(3, math={0: 6, 1: 4}, code={2: 10}),
    token_line(6, math={0: 1, 0.5: 9}, code={0: 5, 64: 5}),
    token_line(9, math={}, code={0: 8}),  # no token of one domain
)


def token_run(run: Path, lines: Sequence[dict[str, Any]] = TOKEN_LINES) -> Path:
    weight_run(run)
    (run / "dataflex" / "token_weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def numbers(chart: Chart) -> tuple[list[str], list[list[str]]]:
    assert chart.figure is not None
    found = data(chart.figure)
    return found.header, found.rows


def test_token_weights_are_drawn_by_domain_and_over_time(tmp_path: Path) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    found = charts(measured(token_run(tmp_path / "run")))
    header, rows = numbers(chart(found, "Tokens that count: run"))
    assert header == ["step", "all domains", "math", "code"]
    assert rows == [["3", "0.7", "0.4", "1"], ["6", "0.7", "0.9", "0.5"], ["9", "0", "-", "0"]]
    header, rows = numbers(chart(found, "Effective tokens of a step: run"))
    mixed = [(4 + 20) ** 2 / (4 + 40), (4.5 + 320) ** 2 / (2.25 + 20480), 0]
    assert header == ["step", "all domains", "math", "code"]
    assert [[float(value) for value in row[2:]] for row in rows] == [[2, 5], [4.5, 2.5], [0, 0]]
    assert [float(row[1]) for row in rows] == pytest.approx([value / 2 for value in mixed], rel=1e-4)
    header, rows = numbers(chart(found, "Token weights: run"))
    assert header == ["step", "weight 0", "0.35 to 0.71", "0.71 to 1.4", "1.4 to 2.8", "above 45"]
    assert [[float(value) for value in row] for row in rows] == [
        [3, 0.3, 0, 0.2, 0.5, 0], [6, 0.3, 0.45, 0, 0, 0.25], [9, 1, 0, 0, 0, 0],
    ]  # fmt: skip
    for each in found:
        if each.figure is not None:
            graph_objects.Figure(each.figure)


def test_long_runs_have_bars_of_many_intervals(tmp_path: Path) -> None:
    lines = [token_line(step, all={0: step % 2, 1: 1}) for step in range(1, 1001)]
    found = charts(measured(token_run(tmp_path / "run", lines)))
    header, rows = numbers(chart(found, "Token weights: run"))
    assert len(rows) == 40
    assert rows[-1][0] == "1,000"
    shares = np.array([[float(value) for value in row[1:]] for row in rows])
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(shares[:, 0], 1 / 3, atol=0.01)  # every second step has one of two
    header, _ = numbers(chart(found, "Tokens that count: run"))
    assert header == ["step", "run"]  # one domain


def test_the_domain_table_has_the_tokens_that_count(tmp_path: Path) -> None:
    log = {"dataflex/loss/math": 1.0, "dataflex/loss/code": 2.0}
    run = token_run(tmp_path / "run")
    write_state(run, history(9, **log), 9)
    table = domain_table(measured(run))
    assert column(table, "tokens that count") == ["0.650", "0.536"]
    assert column(table, "effective") == [f"{13 / 20:.3f}", f"{15 / 28:.3f}"]


def test_in_a_preference_stage_samples_are_counted(tmp_path: Path) -> None:
    run = token_run(tmp_path / "run")
    (run / "dataflex" / "config.yaml").write_text(
        yaml.safe_dump({"stage": "dpo", "dataflex": {"weight": {"method": "loss"}}})
    )
    log = {"dataflex/loss/math": 1.0, "dataflex/loss/code": 2.0, "dataflex/domain_tokens/math": 3}
    write_state(run, history(9, **log), 9)
    found = charts(measured(run))
    titles = ["Samples that count: run", "Effective samples of a step: run", "Distribution of the sample weights: run"]
    titles += ["Training loss against the domain's own samples: run"]
    for title in titles:
        drawn = json.dumps(chart(found, title).figure) + chart(found, title).caption
        assert "token" not in drawn.lower()
    assert "samples that count" in domain_table(measured(run)).header
    both = domain_table(measured(run, token_run(tmp_path / "sft")))
    assert "samples or tokens that count" in both.header


def test_a_run_without_token_weights_on_record_has_no_charts_of_them(tmp_path: Path) -> None:
    runs = measured(finished_run(tmp_path / "old"), weight_run(tmp_path / "weight"))
    assert not [each.title for each in charts(runs) if "Token" in each.title or "Effective" in each.title]
    assert "tokens that count" not in domain_table(runs).header
    assert report([tmp_path / "weight"], tmp_path / "page.html").exists()
    assert report([token_run(tmp_path / "new")], tmp_path / "page.html").exists()


def many_domains(run: Path) -> Path:
    """A run of more domains than are drawn one by one."""
    write_config(run, mix="odm")
    counts = {f"domain-{i}": i + 1 for i in range(DOMAINS + 8)}
    write_rounds(run, [round_line(number, counts) for number in range(61)])
    write_state(run, history(9, **{f"dataflex/loss/{name}": 1.0 for name in counts}), 9)
    write_summary(run)
    return run


def test_logged_loss_is_drawn_behind_its_mean_for_few_runs(tmp_path: Path) -> None:
    paths = [write_config(tmp_path / name, select="loss") for name in "abcd"]
    for path in paths:
        write_state(path, history(120), 120)
        write_summary(path)
    few, many = (chart(charts(measured(*chosen)), "Training loss against steps") for chosen in (paths[:3], paths))
    assert few.figure is not None
    assert many.figure is not None
    assert [trace["mode"] for trace in few.figure["data"]] == ["lines"] * 3 + ["lines+markers"] * 3
    assert [trace.get("opacity", 1) for trace in few.figure["data"]] == [0.3, 0.3, 0.3, 1, 1, 1]
    assert len(many.figure["data"]) == 4


def looks(found: Figure) -> list[tuple[Any, Any]]:
    """What a chart's lines and points look like, apart from their colour."""
    return [(trace.get("line", {}).get("dash"), trace["marker"]["symbol"]) for trace in found["data"]]


def test_eight_runs_look_different_as_lines_and_as_points(tmp_path: Path) -> None:
    paths = [finished_run(tmp_path / name) for name in "abcdefgh"]
    for path in paths:
        write_task(path, "quiz", chance=None)
    found = charts(measured(*paths))
    for title in ("Downstream tasks", "Training loss against steps"):
        drawn = chart(found, title).figure
        assert drawn is not None
        assert len(set(looks(drawn))) == 8
        swatches = [re.sub("#[0-9A-F]{6}", "", item.swatch) for item in legend(drawn)]
        assert len(set(swatches)) == 8


def test_drawn_domains_look_different(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", mix="odm")
    large = (0, 35, 40, 56, 70, 80)  # numbers of the same dash or symbol, or both
    counts = {f"domain-{i}": 100 if i in large else 1 for i in range(90)}
    write_rounds(run, [round_line(number, counts, pool=counts) for number in range(2)])
    write_state(run, history(9, **{f"dataflex/loss/{name}": 1.0 for name in counts}), 9)
    write_summary(run)
    drawn = chart(charts(measured(run)), "Training loss by domain: run").figure
    assert drawn is not None
    assert {f"domain-{i}" for i in large} < {trace["name"] for trace in drawn["data"]}
    assert len(set(looks(drawn))) == len(drawn["data"]) == DOMAINS


def test_small_domains_are_added_up(tmp_path: Path) -> None:
    runs = measured(many_domains(tmp_path / "run"))
    figure = chart(charts(runs), "Proportions: run").figure
    assert figure is not None
    names = [trace["name"] for trace in figure["data"]]
    assert names == [*(f"domain-{i}" for i in range(8, 20)), "others (8 domains)"]
    shares = [unpacked(trace["y"]) for trace in figure["data"]]
    np.testing.assert_allclose(np.sum(shares, axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(shares[-1], sum(range(1, 9)) / sum(range(1, 21)), rtol=1e-6)


def unpacked(values: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])


def mixed_run(run: Path, num_domains: int, rounds: int = 6, steps: int = 20) -> Path:
    """A run that weighs the loss by domain and, in rounds 3 and later, is held back in its first domain."""
    write_config(run, mix="doremi")
    names = domain_names(num_domains)
    rng = np.random.default_rng(num_domains)
    counts = rng.integers(1, 50, (rounds, num_domains))
    counts[:, 0] = 400
    planned = counts.cumsum(axis=0)
    lines = []
    for number, row in enumerate(counts):
        changes: dict[str, Any] = {
            "start_step": 10 * number,
            "steps": 10,
            "pool": dict.fromkeys(names, 100),
            "proportions": dict(zip(names, ((row + 0.25) / (row + 0.25).sum()).tolist(), strict=True)),
            "epochs": dict(zip(names, (planned[number] / 100).tolist(), strict=True)),
        }
        if number >= 3:
            changes["capped"] = {names[0]: 0.95}
        lines.append(round_line(number, dict(zip(names, row.tolist(), strict=True)), **changes))
    write_rounds(run, lines)
    raw = rng.random((steps, num_domains)) + np.arange(num_domains)
    write_loss_weights(run, names, raw / raw.sum(axis=1, keepdims=True))
    log = [
        {"step": step}
        | {"loss": 1.0}
        | {f"dataflex/loss/{name}": 3 - step / 20 + i for i, name in enumerate(names)}
        | {f"dataflex/domain_tokens/{name}": step * (i + 1) * 10 for i, name in enumerate(names)}
        for step in range(1, 21)
    ]
    write_state(run, log, 20)
    write_summary(run)
    return run


def domain_names(count: int) -> list[str]:
    return [f"d{i}, <of {count}>" for i in range(count)]


def write_loss_weights(run: Path, names: Sequence[str], values: np.ndarray, first: int = 1) -> None:
    with (run / "dataflex" / "loss_weights.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["step", *names])
        rows.writerows([step, *row] for step, row in enumerate(values.tolist(), start=first))


def read_csv(run: Path) -> np.ndarray:
    """The whole of loss_weights.csv: the step and the weights of each line."""
    return np.loadtxt(run / "dataflex" / "loss_weights.csv", delimiter=",", skiprows=1)


def write_domain_weights(run: Path, names: Sequence[str]) -> dict[str, float]:
    """Write means that are not those of the file, so that one can tell which are shown."""
    means = {name: (i + 1) / 1000 for i, name in enumerate(names)}
    found = {"method": "doremi", "steps": 777, "proportions": means, "last": dict.fromkeys(names, 0.5)}
    (run / "dataflex" / "domain_weights.json").write_text(json.dumps(found))
    return means


def traces_of(found: Sequence[Chart], title: str) -> dict[str, tuple[list[float], list[float]]]:
    """The points of each curve of a chart, by the name it goes by."""
    drawn = chart(found, title).figure
    assert drawn is not None
    return {
        html.unescape(trace["name"]): (unpacked(trace["x"]).tolist(), unpacked(trace["y"]).tolist())
        for trace in drawn["data"]
    }


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "dataflex" / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_domains", [2, 7, 1000])
def test_proportions_are_stacked_over_steps(tmp_path: Path, num_domains: int) -> None:
    run = mixed_run(tmp_path / "run", num_domains)
    found = charts(measured(run))
    shown = traces_of(found, "Proportions: run")
    lines = rounds_of(run)
    held = [each["proportions"] for each in [*lines, lines[-1]]]
    samples = {name: sum(each["domains"][name] for each in lines) for name in domain_names(num_domains)}
    named = [name for name in shown if not name.startswith("others")]
    if num_domains > DOMAINS:
        assert min(samples[name] for name in named) >= max(samples[name] for name in samples if name not in named)
        assert list(shown)[-1] == f"others ({num_domains - DOMAINS} domains)"
        rest = [1 - sum(shares[name] for name in named) for shares in held]
        np.testing.assert_allclose(shown[list(shown)[-1]][1], rest, rtol=1e-5)
        assert f"The {DOMAINS} domains with the most samples" in chart(found, "Proportions: run").caption
    assert len(named) == min(num_domains, DOMAINS)
    for name in named:
        steps, shares = shown[name]
        assert steps == [0, 10, 20, 30, 40, 50, 60]
        np.testing.assert_allclose(shares, [each[name] for each in held], rtol=1e-6)
    np.testing.assert_allclose(np.sum([y for _, y in shown.values()], axis=0), 1, rtol=1e-6)


@pytest.mark.parametrize("num_domains", [2, 7, 1000])
def test_passes_and_caps_of_domains_are_drawn(tmp_path: Path, num_domains: int) -> None:
    run = mixed_run(tmp_path / "run", num_domains)
    lines = rounds_of(run)
    counted = [{key: each[key] for key in each if key != "epochs"} for each in lines]
    for written in (lines, counted):  # a record without passes has those that its plans give
        write_rounds(run, written)
        found = charts(measured(run))
        shown = traces_of(found, "Passes over each domain: run")
        assert shown.pop("cut by max_epochs_per_domain") == ([3, 4, 5], [16.0, 20.0, 24.0])
        names = domain_names(num_domains)
        planned = {name: np.cumsum([line["domains"][name] for line in lines]) / 100 for name in names}
        most = sorted(names, key=lambda name: -planned[name][-1])[:DOMAINS]
        assert set(shown) == set(most)
        for name, (numbers, passes) in shown.items():
            assert numbers == list(range(6))
            np.testing.assert_allclose(passes, planned[name], rtol=1e-6)
    cut = traces_of(found, "Shares that were cut: run")
    shares = [0.95 - line["domains"][names[0]] / line["size"] for line in lines]
    ((name, (numbers, taken)),) = cut.items()
    assert (name, numbers) == (names[0], list(range(6)))
    np.testing.assert_allclose(taken, [0, 0, 0, *shares[3:]], rtol=1e-5)


def test_passes_need_their_sizes(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run", 2)
    lines = [{key: line[key] for key in line if key not in ("epochs", "pool")} for line in rounds_of(run)]
    write_rounds(run, lines)
    assert "earlier versions" in chart(charts(measured(run)), "Passes over each domain: run").caption
    assert "passes" not in domain_table(measured(run)).header
    write_rounds(run, [*lines[:-1], {**lines[-1], "pool": {domain_names(2)[0]: 800}}])
    shown = traces_of(charts(measured(run)), "Passes over each domain: run")
    assert shown[domain_names(2)[0]] == (list(range(6)), [0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    assert domain_names(2)[1] not in shown


@pytest.mark.parametrize("num_domains", [2, 7, 1000])
def test_loss_weights_are_read_from_the_file(tmp_path: Path, num_domains: int) -> None:
    run = mixed_run(tmp_path / "run", num_domains, steps=100 if num_domains == 1000 else 5000)
    written = read_csv(run)
    at = {int(row[0]): row[1:] for row in written}
    title = "Loss weights of the domains: run"
    found = charts(measured(run))
    names = domain_names(num_domains)
    mean = dict(zip(names, written[:, 1:].mean(axis=0), strict=True))
    shown = traces_of(found, title)
    assert set(shown) == set(sorted(names, key=lambda name: -mean[name])[:DOMAINS])
    for name, (steps, weights) in shown.items():
        assert (steps[0], steps[-1]) == (1, len(written))
        assert len(steps) <= 2000
        np.testing.assert_allclose(weights, [at[int(step)][names.index(name)] for step in steps], rtol=1e-6)
    caption = chart(found, title).caption
    drawn = {len(steps) for steps, _ in shown.values()}
    assert drawn == (
        {100} if num_domains == 1000 else {int(re.findall(r"([0-9,]+) of 5,000 steps", caption)[0].replace(",", ""))}
    )
    if num_domains == 1000:
        rest = sum(mean[name] for name in names if name not in shown)
        assert f"the 988 others have a mean weight of {rest:.3g} together" in caption
    figure = chart(found, title).figure
    assert figure is not None
    averages = [trace["hovertemplate"].split(", ")[1] for trace in figure["data"]]
    assert averages == [f"{mean[html.unescape(trace['name'])]:.4g} on average" for trace in figure["data"]]
    means = write_domain_weights(run, names)
    figure = chart(charts(measured(run)), title).figure
    assert figure is not None
    assert {trace["hovertemplate"].split(", ")[1] for trace in figure["data"]} == {
        f"{means[name]:.4g} on average" for name in names[-DOMAINS:]
    }


@pytest.mark.parametrize("num_domains", [2, 7, 1000])
def test_loss_against_the_tokens_of_each_domain(tmp_path: Path, num_domains: int) -> None:
    run = mixed_run(tmp_path / "run", num_domains, steps=10)
    found = charts(measured(run))
    title = "Training loss against the domain's own tokens: run"
    shown = traces_of(found, title)
    assert len(shown) == min(num_domains, DOMAINS)
    for name, (tokens, losses) in shown.items():
        i = domain_names(num_domains).index(name)
        assert tokens == [step * (i + 1) * 10 for step in range(1, 21)]
        np.testing.assert_allclose(losses, [3 - step / 20 + i for step in range(1, 21)], rtol=1e-6)
    figure = chart(found, title).figure
    assert figure is not None
    assert (
        figure["layout"]["xaxis"].get("type") == "log"
    )  # 20 times as many tokens, of domains that differ by 2 and more


def test_domains_with_few_tokens_have_a_linear_scale_and_without_tokens_are_left_out(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", mix="odm")
    log = [
        {"step": step, "dataflex/loss/a": 1.0, "dataflex/domain_tokens/a": 100 * (step - 1)}
        | ({"dataflex/loss/b": 2.0, "dataflex/domain_tokens/b": 50 * step} if step > 2 else {})
        for step in range(1, 6)
    ]
    write_state(run, log, 5)
    write_summary(run)
    title = "Training loss against the domain's own tokens: run"
    found = charts(measured(run))
    assert traces_of(found, title) == {"a": ([100, 200, 300, 400], [1.0] * 4), "b": ([150, 200, 250], [2.0] * 3)}
    figure = chart(found, title).figure
    assert figure is not None
    assert "type" not in figure["layout"]["xaxis"]


def test_domain_table_has_the_mixture(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run", 1000, steps=40)
    names, lines = domain_names(1000), rounds_of(run)
    of_file = dict(zip(names, read_csv(run)[:, 1:].mean(axis=0), strict=True))
    for finished in (False, True):
        means = write_domain_weights(run, names) if finished else of_file
        table = domain_table(measured(run))
        assert len(table.rows) == 40
        for row in table.rows:
            cells = dict(zip(table.header, row, strict=True))
            i = names.index(cells["domain"])
            planned = sum(line["domains"][names[i]] for line in lines)
            assert cells["last proportion"] == f"{lines[-1]['proportions'][names[i]]:.3f}"
            assert cells["passes"] == f"{planned / 100:.3f}"
            assert cells["rounds capped"] == ("3" if i == 0 else "0")
            assert cells["last wanted"] == ("0.950" if i == 0 else "-")
            assert cells["loss weight"] == f"{means[names[i]]:.4f}"
        steps = 777 if finished else 40
        assert f"run: loss weight is the mean over {steps} steps with a loss weighted by domain." in table.notes


def test_capped_domains_that_are_not_listed_are_named(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run", 100, steps=1)
    lines = rounds_of(run)
    rare = min(lines[0]["domains"], key=lambda name: sum(line["domains"][name] for line in lines))
    write_rounds(run, [*lines[:-1], {**lines[-1], "capped": {rare: 0.5}}])
    assert f"run: max_epochs_per_domain also cut {rare}." in domain_table(measured(run)).notes


def test_mixtures_of_several_runs_are_in_one_report(tmp_path: Path) -> None:
    paths = [mixed_run(tmp_path / name, k, steps=3000) for name, k in (("two", 2), ("many", 125))]
    found = charts(measured(*paths, finished_run(tmp_path / "old"), weight_run(tmp_path / "weight")))
    titles = [each.title for each in found if each.figure]
    for kind in ("Proportions", "Loss weights of the domains", "Passes over each domain", "Shares that were cut"):
        assert [title for title in titles if title.startswith(f"{kind}: ") and "old" not in title] == [
            f"{kind}: two",
            f"{kind}: many",
        ]
    table = domain_table(measured(*paths, finished_run(tmp_path / "older")))
    assert {row[0] for row in table.rows} == {"two", "many", "older"}
    assert {row[table.header.index("loss weight")] for row in table.rows if row[0] == "older"} == {"-"}


def test_weights_are_read_up_to_the_last_whole_line(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    file = run / "dataflex" / "loss_weights.csv"
    for text in ("", "step,a", "step,a,b\n", "step,a,b\n1,0.5,0.2"):
        file.write_text(text)
        assert read_run(run).loss_weights is None
    file.write_text("step,a,b\r\n1,0.5,0.5\r\n2,0.25,0.75\r\n2,0.25,0.75\r\n1,0.5,0.5\r\n3,1.0,0.0\r\n4,0.1,0.")
    found = read_run(run).loss_weights
    assert found is not None
    assert (found.names, found.steps.tolist(), found.total) == (["a", "b"], [1, 2, 3], 3)
    assert found.values.tolist() == [[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]
    np.testing.assert_allclose(found.mean, [1.75 / 3, 1.25 / 3])


@pytest.mark.parametrize("block", [64, 1000, 1 << 23])
def test_weights_are_read_in_blocks_and_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("dataflex.record.loss_weights._BLOCK", block)
    monkeypatch.setattr("dataflex.record.loss_weights.KEPT_STEPS", 100)
    values = np.random.default_rng(0).random((1003, 3))
    names = ["a\nb", 'with "quotes", and a comma', "\u00fc"]
    write_loss_weights(finished_run(tmp_path / "run"), names, values, first=5)
    found = read_run(tmp_path / "run").loss_weights
    assert found is not None
    assert (found.names, found.total) == (names, 1003)
    assert 50 <= found.steps.size <= 100
    assert found.steps.tolist() == [*range(5, 1008, 16), 1007]
    np.testing.assert_array_equal(found.values, values[found.steps - 5])
    np.testing.assert_allclose(found.mean, values.mean(axis=0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,a\n1,1.0\n", r"expected the header step,DOMAIN"),
        ("step,a,a\n1,1.0,1.0\n", r"expected the header step,DOMAIN"),
        ("step\n1\n", r"expected the header step,DOMAIN"),
        ("step,a\n1,high\n", r"expected a step and 1 numbers"),
        ("step,a\n1.5,1.0\n", r"expected a step and 1 numbers"),
        ("step,a,b\n1,1.0\n", r"expected a step and 2 numbers"),
        ("step,a\n1,1.0,2.0\n", r"expected a step and 1 numbers"),
        ("step,a\n1,\n", r"expected a step and 1 numbers"),
    ],
)
def test_weights_of_another_shape_are_named(tmp_path: Path, text: str, message: str) -> None:
    run = finished_run(tmp_path / "run")
    (run / "dataflex" / "loss_weights.csv").write_text(text)
    with pytest.raises(ConfigError, match=rf"loss_weights\.csv: {message}"):
        read_run(run)


def test_result_with_other_domains_than_the_weights_is_named(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run", 2, steps=3)
    write_domain_weights(run, ["a", "b"])
    with pytest.raises(ConfigError, match=r"domain_weights\.json: 'proportions' does not name the domains"):
        read_run(run)
    (run / "dataflex" / "domain_weights.json").write_text('{"method": "doremi"}')
    with pytest.raises(ConfigError, match=r"domain_weights\.json: 'steps'"):
        read_run(run)


def test_older_record_is_drawn_against_steps_with_the_trainers_losses(tmp_path: Path) -> None:
    found = charts(measured(finished_run(tmp_path / "run")))
    loss = chart(found, "Training loss against steps").figure
    assert loss is not None
    assert unpacked(loss["data"][0]["x"]).tolist() == list(range(1, 10))
    assert "earlier versions" in chart(found, "Training loss against time").caption
    assert chart(found, "Trainer's eval_loss: held_out").figure is not None
    assert chart(found, "Evaluation loss by domain").figure is None
    share = chart(found, "Share of each domain ever seen: run")
    assert share.figure is not None
    assert "are not on record" in share.caption
    assert [unpacked(trace["y"]).tolist() for trace in share.figure["data"]] == [[5, 5, 5], [1, 3, 3]]


def test_runs_with_and_without_tokens_share_the_axis_of_steps(tmp_path: Path) -> None:
    old, new = finished_run(tmp_path / "old"), finished_run(tmp_path / "new")
    write_state(new, [{"step": step, "loss": 1.0, **costs(step, 5 * step)} for step in range(1, 5)], 4)
    assert chart(charts(measured(new)), "Training loss against tokens").figure is not None
    both = charts(measured(old, new))
    assert chart(both, "Training loss against steps").figure is not None
    assert "Without data" not in chart(both, "Training loss against time").caption
    assert "Not known at every step: old" in chart(both, "Training loss against time").caption


def test_losses_on_different_data_are_not_compared_silently(tmp_path: Path) -> None:
    one, two = finished_run(tmp_path / "one"), finished_run(tmp_path / "two")
    for run, digest in ((one, "ab"), (two, "cd")):
        write_evaluations(run, [evaluation_line(3, {"a": 2.0}, fingerprint=digest)])
    title = "Evaluation loss against tokens, token-weighted"
    assert "cannot be compared" in chart(charts(measured(one, two)), title).caption
    assert "cannot be compared" not in chart(charts(measured(one)), title).caption


def test_evaluation_and_task_tables_have_the_numbers(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    write_evaluations(
        run, [evaluation_line(3, {"a": 2.0}), evaluation_line(6, {"a": 1.0}), evaluation_line(9, {"a": 1.5})]
    )
    write_task(run, "quiz", notes=["acc cannot be told from chance."])
    runs = measured(run)
    assert evaluation_table(runs).rows == [["run", "a", "2", "10", "2.0000", "1.5000", "1.0000", "2.0000", "0.5000"]]
    table = task_table(runs)
    assert table.rows == [
        ["run", "quiz", "acc", "multiple choice", "200", "5", "0.3000", "0.0300", "0.2500"],
        ["run", "quiz", "acc_norm", "multiple choice", "200", "5", "0.5000", "0.0300", "0.2500"],
    ]
    assert table.notes == ("run, quiz: acc cannot be told from chance.",)
    assert column(run_table(runs), "token-weighted loss") == ["1.5000"]
    assert "eval loss" not in run_table(runs).header


def test_pairs_have_an_accuracy_and_no_perplexity_or_bits(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    none = dict.fromkeys(("perplexity", "bits_per_byte", "tokens", "bytes"))
    lines = []
    for step, accuracy in ((3, 0.5), (6, 0.75)):
        mean = {"loss": 0.7, "perplexity": None, "bits_per_byte": None, "accuracy": accuracy, "margin": 0.2}
        own = {**mean, **none, "samples": 4}
        groups = {"domains": {"a": own, "b": own}, "token_weighted": mean, "unweighted": mean}
        lines.append(evaluation_line(step, {"a": 0.7}, **groups))
    write_evaluations(run, lines)
    runs = measured(run)
    table = evaluation_table(runs)
    assert table.header == ["run", "set", "samples", "first loss", "last loss", "lowest", "accuracy", "margin"]
    assert table.rows[0] == ["run", "a", "4", "0.7000", "0.7000", "0.7000", "0.7500", "0.2000"]
    assert column(run_table(runs), "accuracy") == ["0.7500"]
    found = charts(runs)
    titles = {each.title for each in found}
    assert "Bits per byte by domain" not in titles
    whole, by_domain = (chart(found, f"Evaluation accuracy {of}").figure for of in ("against tokens", "by domain"))
    assert whole is not None
    assert unpacked(whole["data"][0]["x"]).tolist() == [21, 42]
    assert unpacked(whole["data"][0]["y"]).tolist() == [0.5, 0.75]
    assert by_domain is not None
    assert [trace["name"] for trace in by_domain["data"]] == ["a", "b"]
    (finished_run(tmp_path / "text") / "dataflex" / "evaluations.jsonl").write_text(
        json.dumps(evaluation_line(3, {"a": 2.0})) + "\n"
    )
    assert not any("accuracy" in each.title for each in charts(measured(tmp_path / "text")))


def test_task_without_a_number_has_none_in_the_table_and_no_point(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    unknown = {"value": None, "stderr": None}
    write_task(run, "quiz", metrics={"acc": unknown, "f1": {"value": 0.5, "stderr": None}}, chance=0.5)
    write_task(run, "recall", metrics={"acc": unknown})
    runs = measured(run)
    cells = [(row[1], row[2], row[6], row[7]) for row in task_table(runs).rows]
    assert cells == [("quiz", "acc", "-", "-"), ("quiz", "f1", "0.5000", "-"), ("recall", "acc", "-", "-")]
    figure = chart(charts(runs), "Downstream tasks").figure
    assert figure is not None
    assert data(figure).rows == [["run", "quiz f1", "0.5", "+- 0"], ["chance", "quiz f1", "0.5", ""]]


def test_long_row_names_are_shortened_only_if_they_stay_distinct(tmp_path: Path) -> None:
    assert row_labels(["a" * 40 + "b", "c & d"], 11) == ["aaaa...aaab", "c &amp; d"]
    names = ["mmlu_high_school_macroeconomics", "mmlu_high_school_microeconomics"]
    run = finished_run(tmp_path / ("a" * 20 + "1" + "b" * 20))
    other = finished_run(tmp_path / ("a" * 20 + "2" + "b" * 20))
    for name in names:
        write_task(run, name, metrics={"acc": {"value": 0.5, "stderr": 0.1}})
    found = charts(measured(run, other))
    tasks, cost = (chart(found, title).figure for title in ("Downstream tasks", "Seconds by run"))
    assert tasks is not None
    assert cost is not None
    assert tasks["layout"]["yaxis"]["ticktext"] == [f"{name} acc" for name in names]
    assert cost["layout"]["yaxis"]["ticktext"] == [run.name, other.name]


def test_many_repeat_counts_are_grouped(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", order="sort")
    write_rounds(run, [round_line(0, {"math": 45}, pool={"math": 9})])
    write_plan(run, 0, [0] * 30 + [1] * 13 + [2, 3], None)
    figure = chart(charts(measured(run)), "How often samples were planned").figure
    assert figure is not None
    (bars,) = figure["data"]
    counted = dict(zip(bars["x"], unpacked(bars["y"]).tolist(), strict=True))
    assert list(counted)[-3:] == ["12", "13 to 25", "26 to 30"]
    assert {label: count for label, count in counted.items() if count} == {
        "never": 5,
        "1": 2,
        "13 to 25": 1,
        "26 to 30": 1,
    }


def test_data_below_a_chart_is_thinned_with_both_ends() -> None:
    one = line([(step, 2.0 * step) for step in range(1000)], "a & b", style(0), 2000)
    other = line([(step, 1.0) for step in range(0, 1000, 2)], "c", style(1), 2000)
    shared = data(figure([one], "step", "loss"))
    assert shared.header == ["step", "a & b"]
    assert len(shared.rows) == 50
    assert (shared.rows[0], shared.rows[-1]) == (["0", "0"], ["999", "1,998"])
    assert shared.note == "50 of 1000 rows."
    apart = data(figure([one, other], "step", "loss"))
    assert apart.header == ["", "step", "loss"]
    assert [row[0] for row in apart.rows] == ["a & b"] * 25 + ["c"] * 25
    assert apart.rows[-1] == ["c", "998", "1"]


def test_every_curve_has_data_points_if_curves_outnumber_rows() -> None:
    curves = [line([(i, 0.5), (i + 1, 0.25 * i)], f"curve {i}", style(i), 100) for i in range(60)]
    shown = data(figure(curves, "step", "loss"), 50)
    assert [(row[0], row[2]) for row in shown.rows] == [(f"curve {i}", f"{0.25 * i:.5g}") for i in range(60)]
    assert shown.note == "60 of 120 points, the last of each curve."


def test_large_sample_indices_keep_their_digits() -> None:
    places = [0.123456, 9876.54, 12345.67, 100_010.5, -2_345_678.25, 3e15, 1e15 + 0.5]
    rows = data(figure([line([(x, 1.0) for x in places], "a", style(0), 100)], "seconds", "loss")).rows
    assert [row[0] for row in rows] == [
        "0.12346",
        "9876.5",
        "12,345.7",
        "100,010.5",
        "-2,345,678.2",
        "3e+15",
        "1e+15",
    ]


def test_rows_and_error_bars_are_in_the_data() -> None:
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "one",
        "y": [0.2, 0.8],
        "marker": {"symbol": ["x", "x-open"]},
    }
    whole = {**points, "x": [1.5, 2.5], "error_x": {"array": [0.5, 0.25]}}
    chart_of = figure([whole], "value", "")
    chart_of["layout"]["yaxis"] |= {"tickvals": [0, 1], "ticktext": ["first", "second"]}
    assert data(chart_of).header == ["", "", "value", "error bar"]
    assert data(chart_of).rows == [["one", "first", "1.5", "+- 0.5"], ["one", "second", "2.5", "+- 0.25"]]
    whole["error_x"]["arrayminus"] = [1.0, 1.5]
    assert [row[3] for row in data(chart_of).rows] == ["0.5 to 2", "1 to 2.75"]


def test_page_of_given_tables_and_charts_replaces_only_pages(tmp_path: Path) -> None:
    drawn = Chart("Own", "A chart", "Of ours.", figure([line([(1, 2.0)], "x", style(0), 10)], "a", "b"))
    output = tmp_path / "page.html"
    for title in ("First", "Second"):
        write_page(output, title, [Table("T", ["a"], [["1"]], 1)], [drawn])
    assert "<h1>Second</h1>" in output.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    output.write_text("mine")
    with pytest.raises(ConfigError, match="is not a DataFlex report"):
        write_page(output, "Third", [], [drawn])
    assert output.read_text() == "mine"


def test_several_runs_are_written_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = report([finished_run(tmp_path / "one"), weight_run(tmp_path / "two"), Path("one")])
    assert output == Path("dataflex-report.html")
    assert "<h1>2 runs - DataFlex report</h1>" in output.read_text()


def test_only_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    output = tmp_path / "page.html"
    report([run], output)
    report([run], output)
    output.write_text("<html>my own page</html>")
    with pytest.raises(ConfigError, match="is not a DataFlex report"):
        report([run], output)
    assert output.read_text() == "<html>my own page</html>"
    with pytest.raises(ConfigError, match="is a folder"):
        report([run], tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        report([run], tmp_path / "nowhere" / "page.html")


def test_tables_are_printed_without_plotly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match=r'pip install "dataflex\[report\]"'):
        report([run])
    assert "123,456" in capsys.readouterr().out
    assert not (run / "dataflex" / "report.html").exists()


def test_output_into_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    command = [sys.executable, "-m", "dataflex", "report", str(run)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
    assert (run / "dataflex" / "report.html").is_file()


def test_report_is_imported_without_the_heavy_libraries() -> None:
    code = "import sys, dataflex.report.report as _; print({'torch', 'pandas', 'plotly'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Size


def test_long_curve_keeps_its_ends_and_extremes() -> None:
    rng = np.random.default_rng(0)
    curve = [(step, float(value)) for step, value in enumerate(rng.normal(size=100_001))]
    curve[500] = (500, float("nan"))
    thinned = thin(curve, 2000)
    assert len(thinned) <= 2000
    assert (thinned[0], thinned[-1]) == (curve[0], curve[-1])
    known = [value for step, value in curve if step != 500]
    values = [value for _, value in thinned]
    assert (np.nanmin(values), np.nanmax(values)) == (min(known), max(known))
    assert thin(curve[:2000], 2000) == curve[:2000]


def test_running_mean_is_that_of_a_window_around_the_point() -> None:
    curve = [(step, float(step % 3)) for step in range(150)]
    curve[76] = (76, float("nan"))
    means = dict(smooth(curve))
    assert means[60] == pytest.approx(1.0)
    assert means[0] == pytest.approx((0 + 1) / 2)
    assert means[75] == pytest.approx((2 + 0) / 2)
    assert smooth(curve[:99]) == curve[:99]


def test_rounds_are_picked_evenly_with_both_ends() -> None:
    assert evenly(range(10), 4) == [0, 3, 6, 9]
    assert evenly(range(3), 4) == [0, 1, 2]
    assert evenly(range(9), 1) == [8]


def test_ten_million_rows_are_read_one_plan_at_a_time(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run", select="loss")
    size, num_rounds = 10_000, 1000
    half = {"math": size // 2, "<script>": size // 2}
    write_rounds(run, [round_line(number, half) for number in range(num_rounds)])
    for number in range(4):
        write_plan(run, number, range(number * size // 2, number * size // 2 + size), np.arange(size))
    plans = run / "dataflex" / "plans"
    for number in range(4, num_rounds):
        (plans / f"round-{number:05d}.parquet").hardlink_to(plans / f"round-{number % 4:05d}.parquet")
    tracemalloc.start()
    (found,) = measured(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.coverage is not None
    assert (found.coverage.samples, found.coverage.distinct) == (size * num_rounds, 5 * size // 2)
    assert found.coverage.overlap[:4] == [(1, 1 / 3), (2, 1 / 3), (3, 1 / 3), (4, 0.0)]
    assert found.scores is not None
    assert len(found.scores.rounds) == 200
    assert found.coverage.times.nonzero()[0].tolist() == [250, 500]  # the ends of the pool are in one plan of four
    assert found.coverage.times[[250, 500]].tolist() == [size, 3 * size // 2]
    assert peak < 20e6


def test_page_of_a_large_run_is_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    run = write_config(tmp_path / "run", select="loss", mix="odm", weight="loss")
    names = [f"a domain with quite a long name, number {i}" for i in range(40)]
    write_rounds(
        run, [round_line(i, dict(zip(names, rng.integers(1, 99, 40).tolist(), strict=True))) for i in range(1000)]
    )
    keys = ["loss", "dataflex/weight_min", "dataflex/weight_max", *(f"dataflex/loss/{name}" for name in names[:20])]
    noise = rng.normal(size=(4000, len(keys))).round(6).tolist()
    state = [{"step": i, **costs(i, i), **dict(zip(keys, row, strict=True))} for i, row in enumerate(noise, start=1)]
    write_state(run, state, 4000)
    losses = rng.uniform(1, 3, size=(500, 40)).round(6)
    lines = [evaluation_line(i, dict(zip(names, row.tolist(), strict=True))) for i, row in enumerate(losses, start=1)]
    write_evaluations(run, lines)
    write_summary(run)
    size = report([run]).stat().st_size
    assert size < 5_000_000
