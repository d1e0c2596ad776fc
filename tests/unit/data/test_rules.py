"""Rules that turn scores into a selection: top-k and weighted draws without replacement."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from dataflex.api.context import RoundContext
from dataflex.api.params import ComponentParams
from dataflex.api.selection import Selection
from dataflex.api.selector import Selector
from dataflex.data import rules
from dataflex.data.rules import ranks_among, ranks_of_best, sample_without_replacement, top_k
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError
from dataflex.selectors.cluster_less import ClusterLessSelector
from dataflex.selectors.delta_loss import DeltaLossSelector
from dataflex.selectors.full import FullSelector
from dataflex.selectors.loss import LossSelector
from dataflex.selectors.random import RandomSelector
from unit.fakes import ScoreSelector, build, context, decided, group_of, make_pool


def best(scores: np.ndarray, count: int) -> list[int]:
    """The ``count`` largest by a full sort, ties to the lower position."""
    return sorted(sorted(range(scores.size), key=lambda i: (-scores[i], i))[:count])


def test_top_k_equals_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        size = int(rng.integers(1, 40))
        scores = rng.integers(0, rng.integers(2, 30), size).astype(np.float32)  # few values: many ties
        count = int(rng.integers(0, size + 3))
        chosen = top_k(scores, count)
        assert chosen.dtype == np.int64
        assert chosen.tolist() == best(scores, count)


def test_top_k_with_infinite_scores() -> None:
    scores = np.array([-np.inf, 3, np.inf, -np.inf, -np.inf])
    assert top_k(scores, 2).tolist() == [1, 2]
    assert top_k(scores, 4).tolist() == [0, 1, 2, 3]


def inclusion(weights: list[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact probabilities that successive sampling draws each position, and each pair, by enumeration."""
    size = len(weights)
    single, pair = np.zeros(size), np.zeros((size, size))
    for order in permutations(range(size), count):
        probability, left = 1.0, sum(weights)
        for position in order:
            probability *= weights[position] / left
            left -= weights[position]
        single[list(order)] += probability
        for i in order:
            for j in order:
                pair[i, j] += probability
    return single, pair


@pytest.mark.parametrize("weights, count", [([1.0, 2.0, 3.0, 4.0], 2), ([5.0, 1.0, 1.0, 0.1, 2.0], 3)])
def test_draws_have_the_probabilities_of_successive_sampling(weights: list[float], count: int) -> None:
    draws = 10_000
    single, pair = inclusion(weights, count)
    assert single.sum() == pytest.approx(count)
    rng = np.random.default_rng(2)
    scale = np.array(weights) * 37.0  # any scale
    chosen = np.stack([sample_without_replacement(scale, count, rng) for _ in range(draws)])
    member = np.zeros((draws, len(weights)))
    np.put_along_axis(member, chosen, 1, axis=1)
    deviation = np.sqrt(single * (1 - single) / draws)
    assert np.all(np.abs(member.mean(0) - single) < 4 * deviation)
    both = member.T @ member / draws
    assert np.all(np.abs(both - pair) < 4 * np.sqrt(pair * (1 - pair) / draws) + 1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-60, 1e-30, 1.0, 1e30, 1e60])
def test_the_scale_of_the_weights_does_not_matter(scale: float) -> None:
    weights = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    single, _ = inclusion(weights[1:].tolist(), 2)
    rng, draws, counts = np.random.default_rng(4), 2000, np.zeros(5)
    for _ in range(draws):
        counts[sample_without_replacement(weights * scale, 2, rng)] += 1
    assert counts[0] == 0
    assert np.all(np.abs(counts[1:] / draws - single) < 4 * np.sqrt(single * (1 - single) / draws))


def test_weights_of_very_different_sizes_come_in_their_order() -> None:
    weights = np.array([0.0, 1e-100, 0.0, 1.0, 1e-50])
    rng = np.random.default_rng(5)
    for count, expected in [(1, [3]), (2, [3, 4]), (3, [1, 3, 4])]:
        for _ in range(20):
            assert sample_without_replacement(weights, count, rng).tolist() == expected


def test_draws_are_distinct_ascending_and_leave_out_zero_weights() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        weights = rng.random(50) * (rng.random(50) < 0.4)
        count = int(rng.integers(0, np.count_nonzero(weights) + 1))
        chosen = sample_without_replacement(weights, count, rng)
        assert chosen.shape == (count,)
        assert np.all(np.diff(chosen) > 0)
        assert np.all(weights[chosen] > 0)


def test_drawing_more_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 .*from 2"):
        sample_without_replacement(np.array([0.0, 1.0, 2.0]), 3, np.random.default_rng(0))


class ZeroExponential(np.random.Generator):
    """Gives the exponential variate 0 at the first position, as a float32 generator does once in 2**23 draws."""

    def standard_exponential(self, size=None, dtype=np.float64, **_):
        values = super().standard_exponential(size, dtype=dtype)
        values[0] = 0
        return values


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("first", [0.0, 1.0])
def test_an_exponential_of_zero_changes_nothing(first: float) -> None:
    weights = np.array([first, 1.0, 2.0, 3.0, 4.0])
    chosen = sample_without_replacement(weights, 3, ZeroExponential(np.random.Philox(1)))
    assert chosen.shape == (3,)
    assert (0 in chosen.tolist()) == (first > 0)


@pytest.mark.parametrize("kind", ["spread", "few", "ascending", "periodic", "equal", "infinite"])
def test_order_statistics_equal_the_sorted_array(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(rules, "_BLOCK", 10)
    monkeypatch.setattr(rules, "_LOOKED_AT", 20)
    monkeypatch.setattr(rules, "_CACHED", 7)
    partitions = []
    partition = np.partition
    monkeypatch.setattr(np, "partition", lambda *given: partitions.append(1) or partition(*given))
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = int(rng.integers(1, 400))
        values = {
            "spread": rng.standard_normal(size),
            "few": rng.integers(0, 4, size),
            "ascending": np.arange(size),
            "periodic": np.arange(size) % max(1, size // 20),  # the values looked at are all alike
            "equal": np.zeros(size),
            "infinite": rng.choice([-np.inf, 0, 1, np.inf], size),
        }[kind].astype(rng.choice(["f4", "f8"]))
        first = int(rng.integers(0, size))
        count = int(rng.integers(1, min(4, size - first) + 1))
        found = rules.order_statistics(values, first, count)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, np.sort(values)[first : first + count])
    assert len(partitions) < (300 if kind == "periodic" else 60)


@pytest.mark.parametrize("blocks", [False, True])
def test_quantiles_equal_numpys_bit_by_bit(monkeypatch: pytest.MonkeyPatch, blocks: bool) -> None:
    if blocks:
        monkeypatch.setattr(rules, "_BLOCK", 10)
        monkeypatch.setattr(rules, "_LOOKED_AT", 20)
    rng = np.random.default_rng(1)
    for _ in range(400):
        values = rng.standard_exponential(int(rng.integers(1, 300))).astype(np.float32)
        shares = tuple(rng.choice([rng.random(), 0.5, 0.25, 0.33, 1e-9, 1 - 1e-9], 2).tolist())
        assert rules.quantiles(values, shares).tolist() == np.quantile(values, shares).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_draw_in_chunks_equals_a_draw_in_one_piece(dtype: type) -> None:
    size, temperature = 100_000, 1.7
    weights = np.random.default_rng(2).choice([0.0, 1.0, 5.0], size).astype(dtype)
    rng = np.random.default_rng(3)
    noise = np.log(np.maximum(rng.standard_exponential(size, dtype=np.float32), np.finfo(np.float32).tiny))
    with np.errstate(divide="ignore"):
        logits = np.log(weights) / temperature
    keys = (logits - logits.max() - noise).astype(np.float32)
    wanted = np.sort(np.argsort(-keys, kind="stable")[:5000])
    found = sample_without_replacement(weights, 5000, np.random.default_rng(3), temperature)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(rules.sample_softmax(logits, 5000, np.random.default_rng(3)), wanted)


# The base class of selectors


def test_rule_top_k_takes_the_best_of_the_candidates() -> None:
    pool = make_pool({"a": 10})
    selector = ScoreSelector(lambda candidates: -((candidates - 6.0) ** 2))
    selection = decided(selector, context(pool), group_of(pool, 3, start=4))
    assert selection.indices.tolist() == [5, 6, 7]
    assert selection.scores.tolist() == [-1, 0, -1]
    assert selection.unscored == 0


def test_rule_sample_prefers_high_scores_by_the_formula() -> None:
    scores = np.array([0.0, 1.0, 2.0, 5.0])
    z = (scores - scores.mean()) / scores.std()
    for temperature in (1.0, 3.0):
        single, _ = inclusion(list(np.exp(z / temperature)), 2)
        pool = make_pool({"a": 4})
        selector = ScoreSelector(lambda candidates: scores[candidates], rule="sample", temperature=temperature)
        draws = 3000
        counts = np.zeros(4)
        rng = np.random.default_rng(4)
        for _ in range(draws):
            counts[decided(selector, context(pool, rng=rng), group_of(pool, 2)).indices] += 1
        assert np.all(np.abs(counts / draws - single) < 4 * np.sqrt(single * (1 - single) / draws))


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 2.0**40])
def test_rule_sample_works_with_equal_scores(value: float) -> None:
    pool = make_pool({"a": 30})
    selector = ScoreSelector(lambda candidates: np.full(candidates.size, value), rule="sample")
    first = decided(selector, context(pool), group_of(pool, 10)).indices
    second = decided(selector, context(pool, round=1), group_of(pool, 10)).indices
    assert np.unique(first).size == 10
    assert not np.array_equal(first, second)
    assert np.array_equal(first, decided(selector, context(pool), group_of(pool, 10)).indices)


def test_rule_sample_at_a_low_temperature_is_nearly_top_k() -> None:
    pool = make_pool({"a": 100})
    selector = ScoreSelector(lambda candidates: candidates.astype(float), rule="sample", temperature=1e-3)
    selection = decided(selector, context(pool), group_of(pool, 60))
    assert selection.indices.min() >= 30
    assert np.unique(selection.indices).size == 60


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_a_score_that_is_no_number_names_the_component(bad: float) -> None:
    pool = make_pool({"a": 10})
    selector = ScoreSelector(lambda candidates: np.where(candidates == 7, bad, 1.0))
    with pytest.raises(ComponentError, match=r"selector 'scores' .*1 scores.*indices 7\b"):
        decided(selector, context(pool), group_of(pool, 3, start=2))


def test_a_sample_without_a_score_is_left_out_without_an_error() -> None:
    pool = make_pool({"a": 10})
    selector = ScoreSelector(lambda candidates: np.where(candidates == 7, np.nan, candidates))
    chosen = decided(selector, context(pool), group_of(pool, 3, start=2))
    assert (chosen.indices.tolist(), chosen.unscored, chosen.ranked) == ([6, 8, 9], 1, 7)


def test_too_few_scores_blame_the_samples_at_fault_alone() -> None:
    pool = make_pool({"a": 10})
    pool.__dict__["trained"][[0, 1]] = False

    def said(*missing: int) -> str:
        selector = ScoreSelector(lambda candidates: np.where(np.isin(candidates, missing), np.nan, 1.0))
        with pytest.raises(ComponentError) as caught:
            decided(selector, context(pool), group_of(pool, 9))
        return str(caught.value)

    assert "9 samples are wanted but only 8 of 10 have a score (the others have no token to train on)" in said(0, 1)
    mixed = said(0, 1, 6, 8)
    assert mixed.startswith("selector 'scores' (ScoreSelector.score, ")
    assert "returned NaN for 2 candidates that have a token to train on (pool indices 6, 8), 2 more have none" in mixed


@pytest.mark.parametrize(
    "picked, said",
    [
        ([0, 0], "picked a position more than once"),
        ([0, 9], "positions outside 0 to 3"),
        ([0], "positions of shape"),
        ([0.0, 1.0], "float64 positions"),
        ([0, 2], r"picked 1 candidates without a score \(NaN\)"),
    ],
)
def test_a_rule_that_returns_other_samples_is_refused(picked: list, said: str) -> None:
    class Odd(ScoreSelector):
        def pick(self, scores: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
            return np.array(picked)

    selector = Odd(lambda candidates: np.array([1.0, 2.0, np.nan, 3.0]))
    with pytest.raises(ComponentError, match=rf"selector 'scores' \(.*Odd.pick.*{said}"):
        decided(selector, context(make_pool({"a": 4})), group_of(make_pool({"a": 4}), 2))


def test_another_rule_is_ranked_by_the_scores_in_the_order_it_gives_to_ties() -> None:
    class Last(ScoreSelector):
        def pick(self, scores: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
            return np.lexsort((-np.arange(scores.size), -scores))[:count]

    pool = make_pool({"a": 6})
    chosen = decided(Last(lambda candidates: np.array([1, 2, 2, 2, 0, 3])), context(pool), group_of(pool, 3))
    assert (chosen.indices.tolist(), chosen.ranks.tolist()) == ([2, 3, 5], [3, 2, 1])


def test_scores_of_the_wrong_shape_name_the_component() -> None:
    pool = make_pool({"a": 10})
    for shape in ((9,), (10, 1), ()):
        selector = ScoreSelector(lambda candidates, shape=shape: np.zeros(shape))
        with pytest.raises(ComponentError, match=r"selector 'scores' .*10 candidates"):
            decided(selector, context(pool), group_of(pool, 3))


def test_a_budget_above_the_group_is_whole_passes_and_the_best_for_the_rest() -> None:
    pool = make_pool({"a": 3, "b": 5})
    selector = ScoreSelector(lambda candidates: candidates.astype(float))
    selection = decided(selector, context(pool), group_of(pool, 12, start=3))
    counts = np.bincount(selection.indices, minlength=8)
    assert counts.tolist() == [0, 0, 0, 2, 2, 2, 3, 3]
    scored = ~np.isnan(selection.scores)
    assert sorted(selection.indices[scored].tolist()) == [6, 7]
    assert selection.scores[scored].tolist() == selection.indices[scored].tolist()


def test_a_budget_of_whole_passes_asks_for_no_scores() -> None:
    pool = make_pool({"a": 4})

    def fail(candidates: IndexArray) -> None:
        raise AssertionError("scored for nothing")

    selection = decided(ScoreSelector(fail), context(pool), group_of(pool, 8))
    assert np.bincount(selection.indices).tolist() == [2, 2, 2, 2]


def test_a_selector_may_choose_without_scores() -> None:
    class Last(Selector):
        family, name = "selector", "last"
        Params = ComponentParams

        def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
            return Selection(candidates[candidates.size - count :])

    pool = make_pool({"a": 5})
    assert decided(build(Last), context(pool), group_of(pool, 2)).indices.tolist() == [3, 4]
    more = decided(build(Last), context(pool), group_of(pool, 7))
    assert np.bincount(more.indices).tolist() == [1, 1, 1, 2, 2]
    assert more.scores is None


def test_a_selector_that_defines_neither_score_nor_choose_is_an_error() -> None:
    class Empty(Selector):
        family, name = "selector", "empty"

    pool = make_pool({"a": 5})
    with pytest.raises(NotImplementedError, match="'empty'"):
        decided(build(Empty), context(pool), group_of(pool, 2))


# Ranks


def brute_ranks(scores: np.ndarray) -> np.ndarray:
    """The place of every score in a full sort, from 1; ties to the lower position, NaN last."""
    order = sorted(range(scores.size), key=lambda i: (np.isnan(scores[i]), -scores[i], i))
    ranks = np.empty(scores.size, dtype=np.int64)
    ranks[order] = np.arange(1, scores.size + 1)
    return ranks


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_ranks_equal_a_full_sort(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_BLOCK", block)
    rng = np.random.default_rng(6)
    for kind in (np.float32, np.float64):
        for _ in range(150):
            size = int(rng.integers(1, 40))
            scores = rng.integers(-3, rng.integers(-2, 30), size).astype(kind)  # few values: many ties
            scores[rng.random(size) < 0.2] = -np.inf
            expected = brute_ranks(scores)
            chosen = np.flatnonzero(rng.random(size) < rng.random())
            found = ranks_among(scores, chosen)
            assert found.dtype == np.int64
            assert found.tolist() == expected[chosen].tolist()
            best_ones = top_k(scores, int(rng.integers(0, size + 1)))
            assert ranks_of_best(scores[best_ones]).tolist() == expected[best_ones].tolist()


@pytest.mark.parametrize("rule", ["top_k", "sample"])
def test_the_base_class_ranks_chosen_samples_among_the_scored_ones(rule: str) -> None:
    rng = np.random.default_rng(7)
    scores = rng.integers(0, 9, 60).astype(np.float32)
    scores[rng.random(60) < 0.2] = np.nan
    pool = make_pool({"a": 20, "b": 40})
    selector = ScoreSelector(lambda candidates: scores[candidates], rule=rule)
    for number in range(20):
        chosen = decided(selector, context(pool, round=number), group_of(pool, 12, start=20))
        assert chosen.ranked == int((~np.isnan(scores[20:])).sum())
        assert chosen.ranks.tolist() == brute_ranks(scores[20:])[chosen.indices - 20].tolist()
        assert (rule == "top_k") == (sorted(chosen.ranks.tolist()) == list(range(1, 13)))


def test_samples_of_whole_passes_have_no_rank() -> None:
    pool = make_pool({"a": 3, "b": 5})
    chosen = decided(ScoreSelector(lambda candidates: candidates % 4), context(pool), group_of(pool, 12, start=3))
    assert chosen.ranked == 5
    assert chosen.ranks.tolist() == [0] * 10 + [1, 2]
    assert chosen.indices[10:].tolist() == [3, 6 + 1]  # scores 3 of samples 3 and 7
    whole = decided(ScoreSelector(lambda candidates: candidates), context(pool), group_of(pool, 10, start=3))
    assert (whole.ranks, whole.ranked) == (None, 0)


@pytest.mark.parametrize("focus, sign", [("high", 1), ("low", -1)])
def test_the_loss_selector_ranks_by_its_focus(focus: str, sign: int) -> None:
    losses = np.random.default_rng(8).integers(0, 12, 50).astype(np.float32)
    losses[[3, 40]] = np.nan
    pool = make_pool({"a": 50})
    chosen = decided(build(LossSelector, focus=focus), context(pool, losses), group_of(pool, 20))
    assert chosen.ranked == 48
    assert chosen.ranks.tolist() == brute_ranks(sign * losses)[chosen.indices].tolist()


@pytest.mark.parametrize("selector", ["low", "high", "delta_loss"])
def test_a_sample_without_a_score_is_ranked_behind_none_that_has_one(selector: str) -> None:
    pool = make_pool({"a": 6})
    # The wanted direction is as low as a number can be for samples 2, 4 and 5; 0 and 3 have no token to train on.
    worst = -3e38 if selector == "high" else 3e38
    losses = np.array([np.nan, 1, worst, np.nan, worst, worst], dtype=np.float32)
    tried = build(DeltaLossSelector) if selector == "delta_loss" else build(LossSelector, focus=selector)
    if selector == "delta_loss":
        tried.load_state_dict({"baseline": np.array([np.nan, 2, 2, np.nan, 2, 2], dtype=np.float32)})
    with np.errstate(invalid="ignore"):
        selection = decided(tried, context(pool, losses, update=1, num_updates=3), group_of(pool, 4))
    assert selection.indices.tolist() == [1, 2, 4, 5]
    assert (selection.ranks.tolist(), selection.ranked) == ([1, 2, 3, 4], 4)


def test_delta_loss_ranks_by_the_fall() -> None:
    rng = np.random.default_rng(9)
    first, second = rng.random(50).astype(np.float32), rng.random(50).astype(np.float32)
    second[7] = np.nan
    pool, selector = make_pool({"a": 50}), build(DeltaLossSelector)
    before = decided(selector, context(pool, first, num_updates=3), group_of(pool, 20))
    assert before.ranks is None  # drawn uniformly
    chosen = decided(selector, context(pool, second, update=1, num_updates=3, round=1), group_of(pool, 20))
    assert chosen.ranked == 49
    assert chosen.ranks.tolist() == brute_ranks(first - second)[chosen.indices].tolist()


@pytest.mark.parametrize("selector", [build(LossSelector), build(RandomSelector), build(FullSelector)])
def test_selectors_without_a_ranking_record_no_ranks(selector: Selector) -> None:
    pool = make_pool({"a": 50})
    chosen = decided(selector, context(pool, np.arange(50)), group_of(pool, 20))
    assert (chosen.ranks, chosen.ranked) == (None, 0)


@pytest.mark.parametrize("rule", ["top_k", "sample"])
def test_cluster_less_ranks_tied_members_in_the_order_they_are_drawn(rule: str) -> None:
    scores = np.random.default_rng(10).integers(0, 4, 40).astype(np.float32)
    scores[5:9] = np.nan

    class Fixed(ClusterLessSelector):
        def begin(self, ctx: RoundContext) -> None:
            pass

        def score(self, ctx: RoundContext, candidates: IndexArray) -> np.ndarray:
            return scores[candidates]

    pool = make_pool({"a": 40})
    for number in range(5):
        chosen = decided(build(Fixed, rule=rule), context(pool, round=number), group_of(pool, 15))
        assert chosen.ranked == 36
        if rule == "sample":
            assert chosen.ranks.tolist() == brute_ranks(scores)[chosen.indices].tolist()
            continue
        assert sorted(chosen.ranks.tolist()) == list(range(1, 16))
        assert np.array_equal(chosen.scores, scores[chosen.indices])
        assert np.all(np.diff(chosen.scores[np.argsort(chosen.ranks)]) <= 0)
