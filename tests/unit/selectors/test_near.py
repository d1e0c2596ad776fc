"""NEAR: reading down the lists of neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex import ComponentError, RoundContext
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.selectors.base_neighbours import scanned
from dataflex.selectors.near import NearSelector
from unit.fakes import build, context, decided, embedded, group_of, make_pool, scores_of

TABLE = np.array([[3, 1, 4], [3, 5, 1]])


def by_hand(ctx: RoundContext, wanted: int, candidates: Any = None, taken: Any = ()) -> list[int]:
    """Return what NEAR takes, by sorting everything."""
    base, queries = ctx.embeddings(), ctx.embeddings(ctx.validation)
    numbers = np.arange(ctx.pool.size) if candidates is None else candidates
    lists = [
        sorted(numbers, key=lambda x: (-float(query @ base[x]), x))
        for query in queries.astype(np.float64)
        if query.any()
    ]
    found: list[int] = []
    for rank in range(len(numbers)):
        for each in lists:
            if each[rank] not in found and each[rank] not in taken:
                found.append(int(each[rank]))
    return found[:wanted]


def write(tmp_path: Path, table: Any) -> str:
    np.save(tmp_path / "table.npy", table)
    return str(tmp_path / "table.npy")


def test_columns_are_read_one_after_another() -> None:
    order, first = scanned(TABLE)
    assert order.tolist() == [3, 1, 5, 4]
    np.testing.assert_array_equal(TABLE.T.ravel()[first], order)
    for seed in range(20):
        table = np.random.default_rng(seed).permuted(np.tile(np.arange(30), (4, 1)), axis=1)[:, :7]
        seen: list[int] = []
        for number in table.T.ravel().tolist():
            seen += [number] if number not in seen else []
        assert scanned(table)[0].tolist() == seen
        assert sorted(scanned(table[::-1])[0]) == sorted(seen)


def test_a_given_table_is_read_and_one_that_is_too_short_refused(tmp_path: Path) -> None:
    selector = build(NearSelector, indices_path=write(tmp_path, TABLE))
    pool = make_pool({"a": 6})
    assert list(selector.problems(None)) == list(selector.pool_problems(pool)) == []
    assert selector.needs(None).embeddings is selector.needs(None).validation is None
    assert decided(selector, context(pool), group_of(pool, 4)).indices.tolist() == [3, 1, 5, 4]
    with pytest.raises(ComponentError, match=r"5 samples are wanted, and the lists in '.*' hold 4 of the 6"):
        decided(selector, context(pool), group_of(pool, 5))


def test_lists_that_are_shorter_than_a_round_and_parameters_beside_them_are_refused(tmp_path: Path) -> None:
    def round_of(samples: int) -> RunOutline:
        return RunOutline(Schedule(0, samples, -1, 100), 1, 6)

    path = write(tmp_path, np.array([[1, -1, 3], [1, 3, 5]]))
    selector = build(NearSelector, indices_path=path)
    assert selector.unfit(round_of(3)) is None
    found = selector.unfit(round_of(4))
    assert found is not None
    assert found[0] == "indices_path"
    assert "hold 3 different samples, and a round takes 4" in found[1]
    assert build(NearSelector).unfit(round_of(50)) is None
    assert build(NearSelector, indices_path=str(tmp_path / "absent.npy")).unfit(round_of(4)) is None
    with pytest.raises(ValueError, match="encoder, max_k: not used, as indices_path gives the lists"):
        build(NearSelector, indices_path=path, encoder="x", max_k=3)


@pytest.mark.parametrize(
    "table, message",
    [
        (np.array([1, 2]), "numbers with 2 dimensions is needed"),
        (np.empty((0, 3), int), "shape"),
        (np.array([["a"]]), "array of numbers"),
        (np.array([[0.5]]), "pool indices are integers"),
        (np.array([[0, -1]]), "indices from -1 to 0; the 6 samples of this pool have the indices 0 to 5"),
        (np.array([[0, 6]]), "indices from 0 to 6"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, table: Any, message: str) -> None:
    selector = build(NearSelector, indices_path=write(tmp_path, table))
    found = list(selector.problems(None)) or list(selector.pool_problems(make_pool({"a": 6})))
    assert [key for key, _ in found] == ["indices_path"]
    assert message in found[0][1]


def test_a_missing_file_or_one_without_an_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("hello")
    for name, message in (("absent.npy", "there is no file"), ("text.npy", "cannot be read as a .npy file")):
        [(key, text)] = build(NearSelector, indices_path=str(tmp_path / name)).problems(None)
        assert key == "indices_path"
        assert message in text


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_decisions_continue_down_the_lists(seed: int) -> None:
    ctx, selector = embedded(seed=seed), build(NearSelector, max_k=8)
    taken: list[int] = []
    for _ in range(3):
        chosen = decided(selector, ctx, group_of(ctx.pool, 9)).indices.tolist()
        assert chosen == by_hand(ctx, 9, taken=taken)
        taken += chosen
    assert by_hand(ctx, 27) == taken  # as one decision would have it


def test_used_up_lists_begin_again_with_a_note() -> None:
    ctx, selector = embedded(size=12), build(NearSelector, max_k=100)
    first, second = (decided(selector, ctx, group_of(ctx.pool, 8)).indices.tolist() for _ in range(2))
    assert len(set(first) | set(second)) == 12
    assert second[4:] == first[:4]
    assert "ended after 12 samples" in "".join(ctx.notes)
    third = decided(selector, ctx, group_of(ctx.pool, 8)).indices.tolist()
    assert third == [each for each in by_hand(ctx, 12) if each not in first[:4]]


def test_groups_have_lists_of_their_own_and_scores_are_cosines() -> None:
    ctx, selector = embedded(), build(NearSelector, encoder="some")
    chosen = decided(selector, ctx, group_of(ctx.pool, 7, 20, 60))
    assert chosen.indices.tolist() == by_hand(ctx, 7, np.arange(20, 60))
    cosines = ctx.embeddings()[chosen.indices] @ ctx.embeddings(ctx.validation).T
    assert all(np.isclose(row, score).any() for row, score in zip(cosines, chosen.scores, strict=True))
    assert chosen.ranks.tolist() == list(range(1, 8))
    again = decided(selector, ctx, group_of(ctx.pool, 7, 0, 20))
    assert again.indices.tolist() == by_hand(ctx, 7, np.arange(20))


def test_a_resumed_selector_decides_as_an_uninterrupted_one() -> None:
    ctx, whole = embedded(), build(NearSelector, max_k=4, encoder="some")
    resumed = build(NearSelector, max_k=4, encoder="some")
    assert build(NearSelector).state_dict()["taken"] is None
    for budget in (30, 3, 20, 40):
        expected = decided(whole, ctx, group_of(ctx.pool, budget))
        found = decided(resumed, ctx, group_of(ctx.pool, budget))
        np.testing.assert_array_equal(found.indices, expected.indices)
        state = resumed.state_dict()
        resumed = build(NearSelector, max_k=4, encoder="some")
        resumed.load_state_dict(state)


def test_samples_without_a_token_or_text_are_left_out() -> None:
    ctx = embedded()
    ctx.pool.trained[:5] = False
    ctx.embeddings(ctx.validation)[0] = 0
    chosen = decided(build(NearSelector), ctx, group_of(ctx.pool, 55))
    assert chosen.unscored == 5
    assert sorted(chosen.indices.tolist()) == list(range(5, 60))
    assert chosen.indices.tolist() == by_hand(ctx, 55, np.arange(5, 60))
    with pytest.raises(ComponentError, match="56 samples are wanted, and only 55 of 60 have a token"):
        decided(build(NearSelector), ctx, group_of(ctx.pool, 56))
    ctx.embeddings(ctx.validation)[:] = 0
    with pytest.raises(ComponentError, match="no validation sample has text"):
        decided(build(NearSelector), ctx, group_of(ctx.pool, 5))


def test_offline_scores_fall_down_the_lists() -> None:
    ctx = embedded()
    ctx.pool.trained[:5] = False
    scores = scores_of(build(NearSelector, max_k=3), ctx, np.arange(60))
    listed = np.flatnonzero(~np.isnan(scores))
    assert listed[np.argsort(-scores[listed])].tolist() == by_hand(ctx, 60, np.arange(5, 60))[: listed.size]
    assert scores.dtype == np.float32
    assert np.nanmax(scores) == 1


def test_one_candidate_and_duplicates_are_handled() -> None:
    ctx = embedded(size=9)
    ctx.embeddings()[:] = ctx.embeddings()[0]
    assert decided(build(NearSelector), ctx, group_of(ctx.pool, 5)).indices.tolist() == [0, 1, 2, 3, 4]
    assert decided(build(NearSelector), ctx, group_of(ctx.pool, 1, 4, 5)).indices.tolist() == [4]
