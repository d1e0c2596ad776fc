"""The selectors dpo_gap, external_margin, hard_pairs and half: golden numbers, directions, tables and refusals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from dataflex import IndexArray
from dataflex.api.context import RoundContext
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.config.checks import problems_of
from dataflex.config.loading import split_config
from dataflex.data.pool import Pool, Rows
from dataflex.data.stages import STAGES
from dataflex.errors import ConfigError
from dataflex.selectors.base_difficulties import difficulties_of, read_difficulties, write_difficulties
from dataflex.selectors.base_margins import PAIR_STAGES, preferred
from dataflex.selectors.dpo_gap import DpoGapSelector
from dataflex.selectors.external_margin import ExternalMarginSelector, combined, probability
from dataflex.selectors.half import TABLE, HalfSelector, halves
from dataflex.selectors.hard_pairs import HardPairsSelector
from unit.fakes import MeasuringProbe, build, context, decided, group_of, make_pool

GAPS = np.array([0.5, -2.0, 3.0, 0.1, -0.3, 1.0], dtype=np.float32)


class PairsProbe(MeasuringProbe):
    """Returns the given margins, or losses."""

    def __init__(self, values: Sequence[float] | np.ndarray[Any, Any]) -> None:
        self.values, self.asked = np.asarray(values, dtype=np.float32), 0

    def margins(self, measurement: Any, indices: IndexArray, samples: None) -> Any:
        self.asked += 1
        return self.values[indices]

    losses = margins


def pairs(values: Sequence[float] | np.ndarray[Any, Any], **changes: Any) -> RoundContext:
    pool = make_pool({"a": len(values)})
    return context(pool, **{"probe": PairsProbe(values), **changes})


def run_view(**given: Any) -> Any:
    own = {"warmup_steps": given.pop("warmup_steps", 2), "offline": given.pop("offline", False)}
    return SimpleNamespace(llamafactory={"stage": "dpo", **given}, **own)


def pool_with_rows(sizes: dict[str, int], numbers: dict[str, Any] | None = None) -> Pool:
    pool = make_pool(sizes)
    for name in sizes:
        pool.rows_of[name] = Rows(name, None, numbers=(numbers or {}).get(name))  # type: ignore[arg-type]
    return pool


# Directions.

BEST = {
    "small": [1, 4, 3],  # the most negative first
    "small_absolute": [3, 4, 0],
    "middle": [0, 3, 4],  # ranks 1 to 3 of 0 to 5
    "large": [2, 5, 0],
}


@pytest.mark.parametrize("prefer", BEST)
def test_dpo_gap_chooses_by_the_direction_that_is_named(prefer: str) -> None:
    selector = build(DpoGapSelector, prefer=prefer)
    chosen = decided(selector, pairs(GAPS), group_of(make_pool({"a": 6}), 3))
    assert sorted(chosen.indices.tolist()) == sorted(BEST[prefer])
    scores = selector.score(pairs(GAPS), np.arange(6))
    assert np.argsort(-scores, kind="stable")[: 1 if prefer == "middle" else 3].tolist() == (
        [3] if prefer == "middle" else BEST[prefer]
    )


def test_dpo_gap_prefers_the_smallest_signed_gap_by_default_as_the_code_of_the_paper() -> None:
    assert DpoGapSelector.Params().prefer == "small"
    order = np.argsort(-build(DpoGapSelector).score(pairs(GAPS), np.arange(6)))
    np.testing.assert_array_equal(order, np.argsort(GAPS))


def test_small_and_large_are_mirror_images() -> None:
    for prefer, other in (("small", "large"), ("small_absolute", "small_absolute")):
        np.testing.assert_array_equal(preferred(GAPS, prefer), preferred(-GAPS, other))  # type: ignore[arg-type]


# Stages and references.


@pytest.mark.parametrize("stage", ["sft", "pt", "kto"])
@pytest.mark.parametrize(
    "select",
    [
        {"method": "dpo_gap"},
        {"method": "external_margin", "margin": "m"},
        {"method": "external_margin", "margin": "m", "implicit": True, "bounds": [[0, 1], [0, 1]]},
        {"method": "hard_pairs"},
        {"method": "hard_pairs", "column": "m"},
    ],
)
def test_a_stage_without_pairs_is_refused_once(stage: str, select: dict[str, Any]) -> None:
    config = split_config({"stage": stage, "dataflex": {"warmup_steps": 1, "select": select}})
    (problem,) = [each for each in problems_of(config) if each.key == "dataflex.select.method"]
    assert re.search(rf"stage (is )?{stage}\b.* dpo or (stage: )?rm", problem.message)


def test_the_stages_of_pairs_are_those_that_the_framework_trains() -> None:
    assert tuple(name for name, stage in STAGES.items() if stage.takes_pairs) == PAIR_STAGES


def test_half_takes_any_stage() -> None:
    assert not list(build(HalfSelector, folder="f").problems(run_view(stage="sft")))


@pytest.mark.parametrize(
    "given, text",
    [
        ({"warmup_steps": 0}, "Set dataflex.warmup_steps"),
        ({"offline": True}, "adapter_name_or_path"),
        ({"warmup_steps": 0, "ref_model": "m"}, None),
        ({"offline": True, "adapter_name_or_path": "a"}, None),
        ({"warmup_steps": 0, "pref_loss": "simpo"}, None),
        ({"warmup_steps": 0, "stage": "rm"}, None),
        ({}, None),
    ],
)
def test_a_decision_in_which_the_model_is_its_own_reference_is_refused(given: dict[str, Any], text: str | None) -> None:
    implicit = build(ExternalMarginSelector, margin="m", implicit=True, bounds=[(-1, 1), (-1, 1)])
    measured = build(HardPairsSelector)
    for selector, key in ((build(DpoGapSelector), "method"), (implicit, "implicit"), (measured, "method")):
        found = list(selector.problems(run_view(**given)))
        if text is None:
            assert not found
        else:
            assert [where for where, _ in found] == [key]
            assert text in found[0][1]
    for given_margins in (build(ExternalMarginSelector, margin="m"), build(HardPairsSelector, column="m")):
        assert not list(given_margins.problems(run_view(**given)))


# External margins.


def test_the_aggregation_has_the_golden_numbers() -> None:
    both = combined([np.array([0.9, 0.6, 0.8, 0.5]), np.array([0.7, 0.8, 0.3, 0.5])])
    np.testing.assert_allclose(both, [0.954545, 0.857143, 0.631579, 0.5], atol=1e-6)
    np.testing.assert_allclose(probability(np.array([2, 0.5, -1, 4.0]), -2, 2), [1, 0.625, 0.25, 1])


def test_the_aggregation_is_symmetric_and_knows_neutral_certain_and_contradicting_sources() -> None:
    rng = np.random.default_rng(0)
    first, second, third = rng.random((3, 9))
    np.testing.assert_allclose(combined([first, second, third]), combined([third, first, second]))
    np.testing.assert_allclose(combined([combined([first, second]), third]), combined([first, second, third]))
    np.testing.assert_allclose(combined([first, np.full(9, 0.5)]), first)
    np.testing.assert_allclose(combined([1 - first, 1 - second]), 1 - combined([first, second]))
    assert combined([np.array([1.0, 0.0, 1.0]), np.array([0.3, 0.3, 0.0])]).tolist() == [1, 0, 0.5]


def with_columns(columns: dict[str, Sequence[float]], implicit: Sequence[float] = ()) -> RoundContext:
    size = len(next(iter(columns.values())))
    ctx = pairs(implicit if len(implicit) else np.zeros(size))
    for name, values in columns.items():
        ctx.pool.keep_column(name, np.array(values, dtype=np.float64))
    return ctx


def test_one_source_is_compared_directly() -> None:
    everyone = np.arange(3)
    ctx = with_columns({"m": [0.1, 7.0, -3.0], "c": [1.0, 2.0, 3.0], "r": [0.5, 2.5, 1.0]})
    of_margin = build(ExternalMarginSelector, margin="m").score(ctx, everyone)
    np.testing.assert_allclose(of_margin, [0.1, 7, -3])
    rewards = build(ExternalMarginSelector, chosen="c", rejected="r")
    np.testing.assert_allclose(rewards.score(ctx, everyone), [0.5, -0.5, 2])
    np.testing.assert_allclose(rewards.score(ctx, np.array([2])), [2])
    assert ctx.probe.asked == 0  # type: ignore[attr-defined]
    assert rewards.needs(run_view()).columns == ("c", "r")
    small = build(ExternalMarginSelector, margin="m", prefer="small_absolute").score(ctx, everyone)
    assert np.argsort(-small).tolist() == [0, 2, 1]


def test_several_columns_and_the_implicit_margin_are_combined() -> None:
    ctx = with_columns({"m": [2, 0.5, -1, 4], "c": [3, 3, 3, 3], "r": [0, 3, 2, 3]}, implicit=[0.1, -0.1, 0.05, 0])
    selector = build(
        ExternalMarginSelector,
        margin=["m"],
        chosen=["c"],
        rejected=["r"],
        implicit=True,
        bounds=[(-2, 2), (-5, 5), (-0.2, 0.2)],
    )
    sources = [np.array([1, 0.625, 0.25, 1]), np.array([0.8, 0.5, 0.6, 0.5]), np.array([0.75, 0.25, 0.625, 0.5])]
    odds = np.prod([each / (1 - np.minimum(each, 1 - 1e-12)) for each in sources], axis=0)
    np.testing.assert_allclose(selector.score(ctx, np.arange(4)), odds / (1 + odds), atol=1e-6)
    needs = selector.needs(run_view())
    assert (needs.columns, [each.name for each in needs.measurements]) == (("m", "c", "r"), ["margins"])


@pytest.mark.parametrize(
    "params, text",
    [
        ({}, "needs margin"),
        ({"implicit": True}, "use the method dpo_gap"),
        ({"chosen": "c"}, "chosen names 1 columns and rejected 0"),
        ({"margin": ["m", "n"]}, "2 sources need one .lo, hi. each, got none"),
        ({"margin": ["m", "n"], "bounds": [(0, 1)]}, "got 1"),
        ({"margin": ["m", "n"], "bounds": [(0, 1), (1, 1)]}, "lo must be below hi"),
        ({"margin": "m", "bounds": [(0, 1)]}, "not used with a single source"),
        ({"margin": "m", "max_overhead": 0.5}, "cost nothing"),
    ],
)
def test_sources_that_do_not_fit_are_refused(params: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        ExternalMarginSelector.Params(**params)


@pytest.mark.parametrize(
    "cls, params", [(ExternalMarginSelector, {"margin": "m"}), (HardPairsSelector, {"column": "m"})]
)
@pytest.mark.parametrize(
    "values, row, text",
    [
        ([0.5, np.nan, 1.0], 1, "'m' has no value; every pair needs a number"),
        ([0.5, 1.0, -np.inf], 2, "'m' is -inf"),
        (np.array(["a", "b"], dtype=object), None, "'m' holds text"),
        ([0.5, 1.0, 0.0], None, None),
    ],
)
def test_a_column_with_a_missing_number_is_refused(
    cls: Any, params: dict[str, Any], values: Any, row: int | None, text: str | None
) -> None:
    found = build(cls, **params).column_problem("m", np.asarray(values))
    if text is None:
        assert found is None
    else:
        assert found is not None
        assert (found[0], text in found[1]) == (row, True)


# Hard pairs.


def test_the_easiest_pairs_of_the_golden_numbers_are_chosen() -> None:
    losses = [0.7, 0.3, 0.9, 0.5]
    ctx = pairs(losses)
    chosen = decided(build(HardPairsSelector), ctx, group_of(ctx.pool, 2))
    assert chosen.indices.tolist() == [1, 3]
    assert chosen.ranks is not None
    assert chosen.ranks.tolist() == [1, 2]
    ctx = with_columns({"d": losses})
    chosen = decided(build(HardPairsSelector, column="d"), ctx, group_of(ctx.pool, 2))
    assert chosen.indices.tolist() == [1, 3]
    assert ctx.probe.asked == 0  # type: ignore[attr-defined]


def test_given_difficulties_take_one_round_and_measured_ones_several() -> None:
    assert build(HardPairsSelector, column="d").wanted_rounds(1) == 1
    assert build(HardPairsSelector).wanted_rounds(1) == 4
    with pytest.raises(ValidationError, match="remove one"):
        HardPairsSelector.Params(column="d", difficulties="f")
    with pytest.raises(ValidationError, match="cost nothing"):
        HardPairsSelector.Params(column="d", max_overhead=0.1)


def test_tables_are_matched_by_data_set_and_row_and_averaged(tmp_path: Path) -> None:
    pool = pool_with_rows({"a": 3, "b": 2}, {"a": np.array([4, 0, 9])})
    write_difficulties(tmp_path / "one", pool, np.array([0, 2, 4]), np.array([1.0, 3.0, 5.0]))
    scores = {"dataset": ["b", "b", "a", "a"], "row": [0, 1, 0, 7], "score": [-2.0, None, -4.0, -100.0]}
    pq.write_table(pa.table(scores), tmp_path / "two")
    pq.write_table(pa.table({"dataset": ["a"], "row": [4], "score": [-2.0]}), tmp_path / "three")
    paths = [str(tmp_path / name) for name in ("one", "two", "three")]
    selector = build(HardPairsSelector, difficulties=paths)
    assert not list(selector.pool_problems(pool))
    ctx = context(pool, probe=None)
    np.testing.assert_allclose(selector.score(ctx, np.arange(5)), [-1.5, -4, -3, -2, -5])
    assert not selector.needs(run_view()).measurements

    ((key, said),) = build(HardPairsSelector, difficulties=paths[:1]).pool_problems(pool)
    assert key == "difficulties"
    assert "2 of the 5 pairs are in no table, the first of them row 0 of 'a'" in said
    ((key, said),) = build(HardPairsSelector, difficulties=paths).pool_problems(make_pool({"a": 3, "b": 2}))
    assert "not known from which rows" in said


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tables = {
        "columns": ({"row": [1], "loss": [1.0]}, "has the columns row, loss"),
        "rows": ({"dataset": ["a"], "row": pa.array([None], pa.int64()), "score": [1.0]}, "row is null"),
        "number": ({"dataset": ["a"], "row": [1], "difficulty": [np.inf]}, "difficulty is inf in a row"),
    }
    for name, (content, text) in tables.items():
        pq.write_table(pa.table(content), tmp_path / name)
        with pytest.raises(ConfigError, match=text):
            read_difficulties(tmp_path / name)
        ((key, said),) = build(HardPairsSelector, difficulties=str(tmp_path / name)).problems(run_view())
        assert (key, text in said) == ("difficulties", True)
    (tmp_path / "text").write_text("x")
    for name in ("text", "missing"):
        with pytest.raises(ConfigError, match="is not readable Parquet"):
            read_difficulties(tmp_path / name)


# Halves.


def test_halves_are_disjoint_and_cover_the_pool() -> None:
    for size in (2, 7, 100):
        first, second = halves(size, 3)
        assert first.size - second.size in (0, 1)
        assert sorted([*first, *second]) == list(range(size))
        assert np.all(np.diff(first) > 0)
    assert halves(100, 3)[0].tolist() != halves(100, 4)[0].tolist()


def test_each_half_is_trained_in_passes_and_the_other_half_is_measured(tmp_path: Path) -> None:
    pool = pool_with_rows({"a": 6, "b": 5})
    values = np.linspace(1, 2, 11)
    own, other = halves(11, 5)
    for half in ("first", "second"):
        mine, measured = (own, other) if half == "first" else (other, own)
        folder = tmp_path / half
        selector = build(HalfSelector, half=half, split_seed=5, folder=str(folder))
        drawn: list[int] = []
        for number in range(4):
            ctx = context(pool, probe=PairsProbe(values + number), round=number, start_step=number)
            chosen = decided(selector, ctx, group_of(pool, mine.size // 2))
            drawn += chosen.indices.tolist()
            assert (folder / TABLE).exists() == (number > 0)
            if number == 1:  # continue from a checkpoint
                copy = build(HalfSelector, half=half, split_seed=5, folder=str(folder))
                copy.load_state_dict(selector.state_dict())
                selector = copy
        whole = 2 * (mine.size // 2)
        assert set(drawn) <= set(mine.tolist())
        if whole == mine.size:
            assert sorted(drawn) == sorted([*mine, *mine])
        table = read_difficulties(folder / TABLE)
        assert table.num_rows == measured.size
        expected = np.full(11, np.nan)
        expected[measured] = values[measured] + 2  # mean of + 1, + 2 and + 3
        np.testing.assert_allclose(difficulties_of(pool, [table]), expected, rtol=1e-6)


def test_two_halves_give_every_sample_a_difficulty(tmp_path: Path) -> None:
    pool = pool_with_rows({"a": 5, "b": 4})
    for half in ("first", "second"):
        selector = build(HalfSelector, half=half, folder=str(tmp_path / half))
        decided(selector, context(pool, probe=PairsProbe(np.arange(9)), start_step=1), group_of(pool, 3))
    tables = [str(tmp_path / half / TABLE) for half in ("first", "second")]
    chosen = decided(build(HardPairsSelector, difficulties=tables), context(pool, probe=None), group_of(pool, 4))
    assert chosen.indices.tolist() == [0, 1, 2, 3]


def test_half_says_how_often_it_measures() -> None:
    selector = build(HalfSelector, folder="f", measurements=3)
    assert selector.wanted_rounds(1) == 4

    def outline(total: int, warmup: int = 0) -> RunOutline:
        return RunOutline(Schedule(warmup, 10, -1, total), 4, pool_size=100)

    (measurement,) = selector.needs(run_view()).measurements
    assert selector.measured_samples(measurement, outline(40)) == 150
    assert selector.measured_samples(measurement, outline(45, warmup=5)) == 200
    assert selector.cannot_act(outline(40)) is None
    assert "no loss is measured" in (selector.cannot_act(outline(10)) or "")
    assert list(selector.problems(run_view(offline=True)))
    assert list(selector.pool_problems(make_pool({"a": 1})))
