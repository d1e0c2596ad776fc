"""A list of selectors on record and explained: every part against a brute force of filter, then choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dataflex.api.components import Components, Entry
from dataflex.api.context import RoundContext
from dataflex.api.schedule import Schedule
from dataflex.api.selector import Selector
from dataflex.cli import main
from dataflex.data.sampling import IndexArray
from dataflex.mixers.static import StaticMixer
from dataflex.planning.planner import Planner
from dataflex.record.reader import read_run
from dataflex.record.schema import Cost
from dataflex.record.writer import RunWriter
from dataflex.selectors.loss import LossSelector
from unit.fakes import FakeProbe, begin_record, build, make_pool

SIZES = {"alpha": 30, "beta": 20}
RNG = np.random.default_rng(2)
FIRST, SECOND = RNG.normal(size=50).astype(np.float32), RNG.normal(size=50).astype(np.float32)
FIRST[[3, 40]] = np.nan
EVERY, KEEP, ROUNDS = 3, 0.5, 8
"""Of the filter, whose result so stands in rounds 1-3, 4-6 and 7-7; round 0 is the warm-up."""


class Table(Selector):
    """Gives the scores of a table, which is moved on by the number of the decision."""

    family = "selector"

    def __init__(self, name: str, table: np.ndarray) -> None:
        super().__init__(self.Params())
        self.name, self.table, self.shift = name, table, 0  # type: ignore[misc]

    def begin(self, ctx: RoundContext) -> None:
        self.shift = ctx.update

    def score(self, ctx: RoundContext, candidates: IndexArray) -> np.ndarray:
        return moved(self.table, self.shift)[candidates]


def moved(table: np.ndarray, update: int) -> np.ndarray:
    """The scores of a decision."""
    return np.roll(table, update)


def planner_of(mixed: bool, last_every: int = 1) -> Planner:
    select = (
        Entry(Table("coarse", FIRST), "select.0", EVERY, KEEP),
        Entry(Table("fine", SECOND), "select.1", last_every),
    )
    mix = build(StaticMixer, proportions=[0.5, 0.5]) if mixed else None
    schedule = Schedule(1, 2, -1, 1 + 2 * (ROUNDS - 1))
    return Planner(make_pool(SIZES), Components(select=select, mix=mix), schedule, seed=3, global_batch_size=4)


def write_rounds(planner: Planner, writer: RunWriter, numbers: range) -> None:
    """Decide and record some rounds."""
    step = 0
    for number in range(numbers.stop):
        slot = planner.schedule.slot_at(step)
        step = slot.start_step + slot.steps
        if number in numbers:
            writer.round(planner.plan(slot, FakeProbe()), planner.pool, Cost())


CONFIGURATION = {"dataflex": {"select": [{"method": "coarse", "keep": KEEP, "every": EVERY}, {"method": "fine"}]}}


def write_run(path: Path, mixed: bool, last_every: int = 1) -> Path:
    planner = planner_of(mixed, last_every)
    methods = {"select": "coarse, fine"} | ({"mix": "static"} if mixed else {})
    write_rounds(planner, begin_record(path, planner.pool, methods, CONFIGURATION), range(ROUNDS))
    return path


def groups_of(mixed: bool) -> dict[str, range]:
    return {"alpha": range(30), "beta": range(30, 50)} if mixed else {"pool": range(50)}


def filtering(mixed: bool, update: int) -> dict[int, tuple[float | None, int | None, int, bool]]:
    """Score, rank, candidates and whether it is left, of every sample at a decision of the filter, by full sorts."""
    scores, found = moved(FIRST, update), {}
    for group in groups_of(mixed).values():
        scored = sorted((i for i in group if not np.isnan(scores[i])), key=lambda i: -scores[i])
        kept = round(KEEP * len(scored))
        for i in group:
            found[i] = (None, None, len(group), False)
        for place, i in enumerate(scored):
            found[i] = (float(scores[i]), place + 1, len(group), place < kept)
    return found


def ask(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> Any:
    capsys.readouterr()
    assert main(["explain", str(run), "--no-text", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def told(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> str:
    capsys.readouterr()
    assert main(["explain", str(run), "--no-text", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("mixed", [False, True])
def test_every_sample_is_told_what_the_filter_said_of_it(mixed: bool, tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", mixed)
    samples = ask(capsys, run, "--index", *map(str, range(50)))["samples"]
    for sample in samples:
        expected = []
        for update, (first, last) in zip((0, 3, 6), ((1, 3), (4, 6), (7, 7)), strict=True):
            score, rank, candidates, kept = filtering(mixed, update)[sample["index"]]
            expected.append(
                {
                    "round": first, "until": last, "key": "select.0", "method": "coarse", "score": score, "rank": rank,
                    "candidates": candidates, "kept": kept,
                }
            )  # fmt: skip
        assert sample["filtered"] == expected
        for place in sample["placements"]:  # planned only where it was left, and ranked among those left
            if place["round"]:
                stands = [one for one in sample["filtered"] if one["round"] <= place["round"] <= one["until"]]
                assert [one["kept"] for one in stands] == [True]
                assert place["chosen_by"] == "coarse, fine"
                assert place["score"] == pytest.approx(moved(SECOND, place["round"] - 1)[sample["index"]])


def test_the_files_hold_what_was_left_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", True)
    (file,) = (run / "dataflex" / "filters").iterdir()
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    lines = [json.loads(line) for line in (run / "dataflex" / "rounds.jsonl").read_text().splitlines()]
    assert "filters" not in lines[0]
    assert [line["round"] for line in lines[1:] if "table" in line["filters"][0]] == [1, 4, 7]
    for number, update in ((1, 0), (4, 3), (7, 6)):
        rows = table.filter(pa.array(table.column("round").to_numpy() == number)).to_pylist()
        expected = filtering(True, update)
        assert len(rows) == 50
        one = lines[number]["filters"][0]
        left = [row["index"] for row in rows[: one["number_kept"]]]
        assert set(left) == {i for i, (*_, kept) in expected.items() if kept}
        assert one["kept"] == {"alpha": sum(i < 30 for i in left), "beta": sum(i >= 30 for i in left)}
        assert {row["index"]: (row["score"], row["rank"]) for row in rows} == {
            i: (score, rank) for i, (score, rank, *_) in expected.items()
        }
    assert read_run(run).round(5).filters[0].of_update == {"alpha": 3, "beta": 3}


def test_which_selectors_decided_in_a_round(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", False, last_every=2)
    lines = [json.loads(line) for line in (run / "dataflex" / "rounds.jsonl").read_text().splitlines()]
    # Decisions 0 to 6: the filter is due at 0, 3, 6 and the last one at 0, 2, 4, 6; at 3 the last one's result stands.
    decided = {"select.0": [1, 5], "select.1": [1, 3, 5, 7]}
    for key, rounds in decided.items():
        assert [line["round"] for line in lines[1:] if key not in line.get("standing", [])] == rounds
    for number in range(1, ROUNDS):
        first, last = ask(capsys, run, "--top", "1", "--round", str(number))["selectors"]
        for part in (first, last):
            rounds = [each for each in decided[part["key"]] if each <= number]
            assert (part["decided"], part["decided_in"]) == (number in rounds, rounds[-1])
        # Where the last one's scores stand, the filter is not asked at all.
        asked = number in decided["select.1"]
        assert (first["candidates"], first["left"]) == ((50, 24) if asked else (None, None))
        assert (last["method"], last["candidates"], last["left"]) == ("fine", 24 if asked else None, 8)
    assert ask(capsys, run, "--top", "1", "--round", "0")["selectors"] == []
    assert ask(capsys, run)["selectors"] == [
        {"key": "select.0", "method": "coarse", "decided": 2, "rounds": 7},
        {"key": "select.1", "method": "fine", "decided": 4, "rounds": 7},
    ]


def test_the_parts_in_words(tmp_path: Path, capsys: Any) -> None:
    often = write_run(tmp_path / "often", False)
    assert (
        "select.0 coarse left 24 of 50 samples in round 1, and this result holds\nselect.1 fine chose 8 of 24 samples\n"
    ) in told(capsys, often, "--top", "1", "--round", "2")
    run = write_run(tmp_path / "run", False, last_every=2)
    assert (
        "select.0 coarse was not called, because the result of a later selector holds; it decided last in round 1\n"
        "select.1 fine chose 8 samples by its scores up to round 3\n"
    ) in told(capsys, run, "--top", "1", "--round", "4")
    assert "select.0 coarse left 24 of 50 samples\nselect.1 fine chose 8 of 24 samples\n" in told(
        capsys, run, "--top", "1", "--round", "5"
    )
    assert "select.0 coarse decided in 2 of 7 rounds.\nselect.1 fine decided in 4 of 7 rounds.\n" in told(capsys, run)
    out = next(i for i, (_, rank, _, kept) in filtering(False, 0).items() if rank is not None and not kept)
    score, rank, *_ = filtering(False, 0)[out]
    lines = [line.split() for line in told(capsys, run, "--index", str(out)).splitlines()]
    assert ["select.0", "coarse", "1", "4", f"{score:.4g}", str(rank), "of", "50", "left", "out"] in lines


def test_a_resumed_record_is_that_of_a_run_never_cut(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", True)
    cut, planner = tmp_path / "cut", planner_of(True)
    methods = {"select": "coarse, fine", "mix": "static"}
    writer = begin_record(cut, planner.pool, methods, CONFIGURATION)
    write_rounds(planner, writer, range(3))
    state = planner.state_dict()
    write_rounds(planner, writer, range(3, 6))  # after the checkpoint; made again
    again = planner_of(True)
    again.load_state_dict(state)
    writer, domains = RunWriter(cut), dict(SIZES)
    writer.begin(CONFIGURATION, 3, domains=domains, methods=methods)
    # The scores of a filter that decides anew must not depend on what was given up.
    write_rounds(again, writer, range(3, ROUNDS))
    for name in ("rounds.jsonl", "record.json", "filters/from-round-00001.arrows", "plans/from-round-00000.arrows"):
        assert (cut / "dataflex" / name).read_bytes() == (whole / "dataflex" / name).read_bytes(), name


def test_one_selector_that_decides_every_time_has_no_parts(tmp_path: Path, capsys: Any) -> None:
    pool = make_pool(SIZES)
    entry = (Entry(build(LossSelector, focus="high"), "select"),)
    planner = Planner(pool, Components(select=entry), Schedule(0, 2, -1, 4), seed=3, global_batch_size=4)
    writer = begin_record(tmp_path / "run", pool, {"select": "loss"}, {"dataflex": {"select": {"method": "loss"}}})
    for step in (0, 2):
        slot = planner.schedule.slot_at(step)
        writer.round(planner.plan(slot, FakeProbe(np.arange(50))), pool, Cost())
    run = tmp_path / "run"
    assert ask(capsys, run)["selectors"] == ask(capsys, run, "--top", "1")["selectors"] == []
    assert ask(capsys, run, "--index", "49")["samples"][0]["filtered"] == []
    assert not (run / "dataflex" / "filters").exists()
    assert "filters" not in (run / "dataflex" / "rounds.jsonl").read_text()


def test_a_report_of_a_list_of_selectors_names_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", True)
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert "coarse, fine" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("within", [(0,), (1,), (0, 1)])
def test_ranks_within_a_domain_are_told_among_its_samples(within: tuple[int, ...], tmp_path: Path, capsys: Any) -> None:
    planner = planner_of(False)
    assert planner.chain is not None
    for number in within:
        component = planner.chain.entries[number].component
        component.params = component.Params(within="domain")
    run = tmp_path / "run"
    write_rounds(planner, begin_record(run, planner.pool, {"select": "coarse, fine"}, CONFIGURATION), range(ROUNDS))
    for sample in ask(capsys, run, "--index", *map(str, range(50)))["samples"]:
        expected = [filtering(0 in within, update)[sample["index"]] for update in (0, 3, 6)]
        assert [(one["score"], one["rank"], one["candidates"], one["kept"]) for one in sample["filtered"]] == expected
        for place in sample["placements"]:
            if place["round"]:
                assert place["chosen_by"] == "coarse, fine"
                assert 1 <= place["rank"] <= place["candidates"]
                assert (place["candidates"] < 20) == (1 in within)  # of 24 that the filter left of both
