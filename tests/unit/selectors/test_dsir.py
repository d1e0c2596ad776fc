"""DSIR: hashed words and pairs, log importance weights, the draw, separate targets."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dataflex.data.pool import Pool
from dataflex.errors import ComponentError, ConfigError
from dataflex.selectors.dsir import DsirSelector, Grams, Hasher, in_turn, log_ratios, log_weights
from unit.fakes import build, context, make_pool, scores_of

WANTED, SEEN = np.array([6.0, 3.0, 1.0]), np.array([2, 3, 5])
WORDS = [f"w{number}" for number in range(40)]


def pool_of(texts: dict[str, list[str]]) -> Pool:
    """Return a pool whose samples' tokens are the numbers of their texts."""
    flat = [text for part in texts.values() for text in part]
    pool = make_pool(
        {name: len(part) for name, part in texts.items()}, rows=[{"input_ids": [i]} for i in range(len(flat))]
    )
    pool.decode = lambda tokens: flat[tokens[0]]
    return pool


def draw_texts(rng: np.random.Generator, count: int, words: list[str] = WORDS, least: int = 3) -> list[str]:
    return [" ".join(rng.choice(words, rng.integers(least, 25))) for _ in range(count)]


def weigh(raw: list[str], targets: dict[str, list[str]], **params: Any) -> np.ndarray:
    given = build(DsirSelector, **{"min_words": 1, **params}).params
    return log_weights(pool_of({"raw": raw}), pool_of(targets), given)


def test_weights_have_the_golden_numbers() -> None:
    ratios = log_ratios(WANTED, SEEN)
    np.testing.assert_allclose(ratios, [1.098612, 0, -1.609438], atol=1e-6)
    documents = [(2, 1, 0), (0, 1, 2), (4, 2, 0), (1, 1, 1)]
    words = np.concatenate([np.repeat(np.arange(3), counts) for counts in documents])
    lengths = np.array([sum(counts) for counts in documents])
    grams = Grams(words, np.zeros(0, dtype=np.int64), lengths)
    grams = grams._replace(pairs=np.ones(int((lengths - 1).sum()), dtype=np.int64))  # a bucket of ratio 0
    found = grams.sums(ratios)
    np.testing.assert_allclose(found, [2.197225, -3.218876, 4.394449, -0.510826], atol=1e-6)
    assert set(np.argsort(-found - [0.1, 2, -1, 0.5])[:2].tolist()) == {0, 2}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_weights_equal_a_computation_by_counting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        raw, target = draw_texts(rng, 12), draw_texts(rng, 5, WORDS[10:])
        hasher = Hasher(50, seed)

        def counted(text: str, hasher: Hasher = hasher) -> Counter[int]:
            words = re.findall(r"\w+|[^\w\s]+", text.lower())
            found = Counter(int(hasher.grams([word]).words[0]) for word in words)
            found.update(int(hasher.grams([f"{a} {b}"]).pairs[0]) for a, b in pairwise(words))
            return found

        p, q = sum(map(counted, target), Counter()), sum(map(counted, raw), Counter())
        expected = [
            sum(
                times * (math.log(p[b] / p.total() + 1e-8) - math.log(q[b] / q.total() + 1e-8))
                for b, times in counted(text).items()
            )
            for text in raw
        ]
        np.testing.assert_allclose(weigh(raw, {"t": target}, buckets=50, hash_seed=seed)[:, 0], expected, atol=1e-6)


def test_a_target_that_is_the_pool_gives_no_weight() -> None:
    texts = draw_texts(np.random.default_rng(0), 30)
    assert weigh(texts, {"t": texts}).tolist() == [[0.0]] * 30
    assert weigh(texts, {"t": texts[10:], "u": texts[:10]}).tolist() == [[0.0]] * 30


def test_the_hash_does_not_depend_on_the_process_and_has_a_seed() -> None:
    text = ["A cat, a dog; THE cat! naïve 漢字"]
    assert Hasher(10_000, 0).grams(text).words.tolist()[:4] == Hasher(10_000, 0).grams(["a cat , a"]).words.tolist()
    assert Hasher(10_000, 0).grams(text).pairs.tolist() != Hasher(10_000, 1).grams(text).pairs.tolist()
    assert Hasher(10_000, 0).grams(["a cat , a dog ; the"]).words.tolist() == KNOWN
    forth, back = Hasher(10_000).grams(["a cat"]).pairs, Hasher(10_000).grams(["cat a"]).pairs
    assert forth.tolist() != back.tolist()


KNOWN = [6473, 8230, 684, 6473, 9264, 6704, 6000]


def test_word_pairs_do_not_cross_texts() -> None:
    hasher = Hasher(10_000)
    together = hasher.grams(["a b c", "", "d", "e f"])
    assert together.lengths.tolist() == [3, 0, 1, 2]
    alone = [hasher.grams([text]).pairs.tolist() for text in ("a b c", "", "d", "e f")]
    assert together.pairs.tolist() == [bucket for each in alone for bucket in each]
    assert together.sums(np.ones(10_000)).tolist() == [5, 0, 1, 3]


def test_buckets_are_filled_evenly() -> None:
    grams = Hasher(64).grams([" ".join(f"word{number}" for number in range(20_000))])
    for values in (grams.words, grams.pairs):
        counts = np.bincount(values, minlength=64)
        assert abs(counts - counts.mean()).max() < 6 * math.sqrt(counts.mean())


def selector_and_context(raw: list[str], targets: dict[str, list[str]], seed: int = 1, **params: Any) -> Any:
    selector = build(DsirSelector, **{"min_words": 1, "buckets": 100_000, **params})
    pool, validation = pool_of({"raw": raw}), pool_of(targets)
    return selector, dataclasses.replace(context(pool, seed=seed), validation_pool=validation)


def test_samples_with_the_targets_words_are_drawn() -> None:
    rng = np.random.default_rng(3)
    raw = draw_texts(rng, 50, WORDS[:5]) + draw_texts(rng, 50, WORDS[5:10])
    selector, ctx = selector_and_context(raw, {"t": draw_texts(rng, 30, WORDS[5:10])})
    selector.begin(ctx)
    assert selector.choose(ctx, np.arange(100), 40).indices.min() >= 50


def test_the_noise_depends_on_the_seed_and_can_be_switched_off() -> None:
    texts = draw_texts(np.random.default_rng(4), 40)
    chosen = []
    for seed in (1, 1, 2):
        selector, ctx = selector_and_context(texts, {"t": texts}, seed)
        selector.begin(ctx)
        chosen.append(selector.choose(ctx, np.arange(40), 10).indices.tolist())
    assert chosen[0] == chosen[1] != chosen[2]
    selector, ctx = selector_and_context(texts, {"t": texts}, resample=False)
    selector.begin(ctx)
    assert selector.choose(ctx, np.arange(40), 10).indices.tolist() == list(range(10))  # ties go to the first


def test_equal_weights_are_drawn_uniformly() -> None:
    texts = draw_texts(np.random.default_rng(5), 30)
    times = np.zeros(30)
    for seed in range(300):
        selector, ctx = selector_and_context(texts, {"t": texts}, seed)
        selector._weights = np.zeros((30, 1))
        times[selector.choose(ctx, np.arange(30), 10).indices] += 1
    assert abs(times - 100).max() < 45


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_targets_take_turns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for shares in ([1.0, 1.0], [0.7, 0.2, 0.1], [3.0, 1.0]):
        keys = rng.normal(size=(60, len(shares)))
        order = in_turn(keys, shares)
        assert sorted(order.tolist()) == list(range(60))
        due = sorted(((k - 0.5) / (share / sum(shares)), t) for t, share in enumerate(shares) for k in range(1, 61))
        left, taken = set(range(60)), Counter[int]()
        for place, row in enumerate(order.tolist(), start=1):
            target = due[place - 1][1]
            assert row == max(left, key=lambda i: keys[i, target])
            left.remove(row)
            taken[target] += 1
            assert all(abs(taken[t] - place * share / sum(shares)) < 1 for t, share in enumerate(shares))


def test_separate_targets_have_their_shares() -> None:
    rng = np.random.default_rng(6)
    raw = draw_texts(rng, 60, WORDS[:5]) + draw_texts(rng, 60, WORDS[5:10])
    targets = {"one": draw_texts(rng, 90, WORDS[:5]), "two": draw_texts(rng, 25, WORDS[5:10])}
    together, ctx = selector_and_context(raw, targets)
    together.begin(ctx)
    assert np.count_nonzero(together.choose(ctx, np.arange(120), 40).indices >= 60) < 10
    for shares, count in ((None, 20), ([1.0, 3.0], 30)):
        apart, ctx = selector_and_context(raw, targets, separate_targets=True, target_shares=shares)
        scores = scores_of(apart, ctx, np.arange(120))
        assert np.count_nonzero(np.argsort(-scores)[:40] >= 60) == count
    wrong, ctx = selector_and_context(raw, targets, separate_targets=True, target_shares=[1.0, 1.0, 1.0])
    with pytest.raises(ConfigError, match="target_shares has 3 numbers, and there are 2 sub-tasks"):
        wrong.begin(ctx)
    with pytest.raises(ValueError, match="for separate_targets"):
        build(DsirSelector, target_shares=[1.0])


def test_short_texts_are_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a b", *draw_texts(np.random.default_rng(7), 20, least=5), "", "c"]
    found = weigh(texts, {"t": texts}, min_words=5)
    assert np.flatnonzero(np.isnan(found[:, 0])).tolist() == [0, 21, 22]
    assert "3 of 23 samples have fewer than min_words (5)" in caplog.text
    with pytest.raises(ConfigError, match=r"none of the pool's 2 samples has 100 words \(the longest has 3\)"):
        weigh(["a b c", "d"], {"t": texts}, min_words=100)
    with pytest.raises(ConfigError, match="the text of t has no word"):
        weigh(texts, {"t": [" "]})


def test_duplicated_samples_have_one_weight() -> None:
    texts = draw_texts(np.random.default_rng(8), 5)
    found = weigh(texts + texts[:2] * 3, {"t": texts[:2]})[:, 0]
    assert found[5:].tolist() == found[:2].tolist() * 3


def test_bad_parameters_are_refused_before_the_model_is_loaded() -> None:
    selector = build(DsirSelector, min_words=8)
    (problem,) = selector.pool_problems(make_pool({"a": 3}, lengths=[5, 7, 6]))
    assert problem == ("min_words", "no sample has 8 words: the longest has 7 tokens. Lower min_words.")
    texts = ["w", "a b c, d e f", "x y"]
    pool = make_pool({"a": 3}, rows=[{"input_ids": [i]} for i in range(3)], lengths=[7, 9, 8])
    pool.decode = lambda tokens: texts[tokens[0]]
    (problem,) = selector.pool_problems(pool)
    assert problem == ("min_words", "no sample has 8 words: the longest has 7 words. Lower min_words.")
    texts[2] += " a b c d e f"
    assert not list(selector.pool_problems(pool))
    view: Any = None
    given = {"separate_targets": True, "target_shares": [1.0, 2.0], "validation": ["a"]}
    assert [key for key, _ in build(DsirSelector, **given).problems(view)] == ["target_shares"]
    assert not list(build(DsirSelector, **{**given, "validation": ["a", "b"]}).problems(view))


def test_too_few_long_texts_are_an_error() -> None:
    texts = ["a b", "c d", *draw_texts(np.random.default_rng(9), 3, least=5)]
    selector, ctx = selector_and_context(texts, {"t": texts}, min_words=5)
    selector.begin(ctx)
    with pytest.raises(ComponentError, match="only 3 of 5 have a score: the others have fewer than min_words words"):
        selector.choose(ctx, np.arange(5), 4)
