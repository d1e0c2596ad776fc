"""TSDS: golden numbers, the steps of the authors' code, the optimum of a linear program, and the chosen samples."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linprog

from dataflex import ComponentError, nearest
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.selectors import tsds
from dataflex.selectors.near import NearSelector
from dataflex.selectors.tsds import TsdsParams, TsdsSelector, fill
from unit.fakes import build, context, decided, embedded, group_of, make_pool, scores_of

CANDIDATES = np.array([(0, 0), (0.1, 0), (0, 0.1), (1, 0), (0, 1), (1, 1), (2, 2), (3, 0)])
QUERIES = np.array([(0.06, 0.02), (0.9, 0.8)])


def given(**params: Any) -> TsdsParams:
    return TsdsParams(**{"alpha": 0.5, "c": 0.5, **params})


def probabilities(queries: NDArray[Any], base: NDArray[Any], params: TsdsParams) -> NDArray[Any]:
    return tsds.probabilities(*nearest(queries, base, params.max_k, metric="l2"), base, params)


def neighbours(queries: NDArray[Any], base: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    distances = np.sqrt(((queries[:, None] - base[None]) ** 2).sum(-1))
    order = np.lexsort((np.broadcast_to(np.arange(len(base)), distances.shape), distances))[:, :k]
    return order, np.take_along_axis(distances, order, 1)


def densities(base: NDArray[Any], ids: NDArray[Any], sigma: float, kde_k: int) -> NDArray[Any]:
    """Return the density of every candidate by pairs; 1 of one that is nobody's neighbour, or without a kernel."""
    rho = np.ones(len(base))
    known = np.unique(ids)
    for each in known if sigma else ():
        squares = np.sort(((base[known] - base[each]) ** 2).sum(-1))[:kde_k]
        rho[each] = np.maximum(0, 1 - squares / sigma**2).sum()
    return rho


def by_heap(queries: NDArray[Any], base: NDArray[Any], params: TsdsParams) -> NDArray[Any]:
    """Return the probabilities by the steps of the authors' code, with a share of at most what is left."""
    number, size = len(queries), len(base)
    width = min(params.max_k, size)
    ids, d = neighbours(queries, base, width)
    rho = densities(base, ids, 0 if params.variant == "uniform" else params.sigma, params.kde_k)[ids]
    mass, weighted, costs, last = 1 / rho[:, 0], d[:, 0] / rho[:, 0], np.zeros(number), np.full(number, -1)
    heap = [(mass[i], 0, i) for i in range(number)] if width > 1 else []
    heapq.heapify(heap)
    total, level = 0.0, 1.0
    while heap:
        level, k, i = heapq.heappop(heap)
        cost = d[i, k + 1] * level - weighted[i]
        total, costs[i] = total + cost - costs[i], cost
        if params.alpha / params.c * total >= (1 - params.alpha) * number:
            break
        last[i] = k
        if k < width - 2:
            mass[i] += 1 / rho[i, k + 1]
            weighted[i] += d[i, k + 1] / rho[i, k + 1]
            heapq.heappush(heap, (mass[i], k + 1, i))
    shares = np.zeros(size)
    for i in range(number):
        left = 1 / number
        for k in range(last[i] + 1):
            part = min(left, 1 / (number * level * rho[i, k]))
            shares[ids[i, k]] += part
            left -= part
        shares[ids[i, last[i] + 1]] += left
    return shares


@pytest.mark.parametrize(
    "params, expected",
    [
        ({"sigma": 0.75}, (0.165999, 0.167001, 0.167001, 0.007905, 0, 0.492095, 0, 0)),
        ({"sigma": 0.0}, (1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6, 0, 0)),
        ({"variant": "uniform"}, (1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6, 0, 0)),
        ({"sigma": 0.75, "max_k": 3}, (0.084333, 0.084842, 0.330826, 0.25, 0, 0.25, 0, 0)),
    ],
)
def test_probabilities_have_the_golden_numbers(params: dict[str, Any], expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(probabilities(QUERIES, CANDIDATES, given(**params)), expected, atol=1e-6)
    np.testing.assert_allclose(by_heap(QUERIES, CANDIDATES, given(**params)), expected, atol=1e-6)


def test_a_query_beyond_the_neighbourhood_gives_its_mass_to_its_nearest_sample() -> None:
    candidates = np.array([(0, 0), (0.4, 0), (0, 0.4), (0.4, 0.4), (10, 0), (14, 0)])
    found = probabilities(np.array([(0.0, 0), (10, 0)]), candidates, given(alpha=0.99))
    np.testing.assert_allclose(found, (0.5, 0, 0, 0, 0.5, 0), atol=1e-6)


def test_one_query_has_the_golden_numbers() -> None:
    line = np.arange(6.0)
    filled, _ = fill(line[None], lambda columns: np.ones((1, columns)), 5.0)
    assert (filled.level, filled.last.tolist()) == (3, [1])
    query, base = np.zeros((1, 1)), line[:, None]
    found = probabilities(query, base, TsdsParams(alpha=0.5, c=5.0, variant="uniform"))
    np.testing.assert_allclose(found, (1 / 3, 1 / 3, 1 / 3, 0, 0, 0), atol=1e-6)
    double = np.array([0.0, 0, 1, 2, 3, 4])[:, None]
    found = probabilities(query, double, TsdsParams(alpha=0.5, c=5.0, sigma=0.5))
    np.testing.assert_allclose(found, (1 / 6, 1 / 6, 1 / 3, 1 / 3, 0, 0), atol=1e-6)


def instance(seed: int, number: int) -> tuple[NDArray[Any], NDArray[Any], TsdsParams]:
    rng = np.random.default_rng([seed, number])
    base, queries = rng.normal(size=(int(rng.integers(2, 40)), 3)), rng.normal(size=(int(rng.integers(1, 6)), 3))
    base[rng.random(len(base)) < 0.4] = base[0]
    params = {
        "alpha": float(rng.uniform(0.1, 0.9)),
        "c": float(rng.uniform(0.2, 8)),
        "sigma": float(rng.choice([0, 0.5, 1.5])),
        "max_k": int(rng.choice([3, 10, 100])),
        "kde_k": int(rng.choice([2, 8, 100])),
    }
    return queries, base, TsdsParams(**params)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_probabilities_equal_the_steps_of_the_authors_code(seed: int) -> None:
    for number in range(20):
        queries, base, params = instance(seed, number)
        found = probabilities(queries, base, params)
        assert found.sum() == pytest.approx(1)
        np.testing.assert_allclose(found, by_heap(queries, base, params), atol=1e-6, err_msg=f"{seed} {number}")


def least(d: NDArray[Any], rho: NDArray[Any], alpha: float, c: float, top: float) -> float:
    """Return the least value of the objective by a linear program; ``top`` is the largest s."""
    number, size = d.shape
    cost = np.append(alpha / c * d.ravel(), 1 - alpha)
    rows = np.kron(np.eye(number), np.ones(size))
    caps = np.hstack([np.diag(rho.ravel()), np.full((number * size, 1), -1 / number)])
    bounds = [*[(0, None)] * (number * size), (1 / top, None)]
    sums = np.hstack([rows, np.zeros((number, 1))])
    solved = linprog(cost, caps, np.zeros(number * size), sums, np.full(number, 1 / number), bounds)
    assert solved.status == 0
    return float(solved.fun)


def value(seed: int, number: int) -> tuple[float, float]:
    """Return the objective of a random instance's masses, and the least there can be."""
    rng = np.random.default_rng([7, seed, number])
    count, size = int(rng.integers(1, 5)), int(rng.integers(2, 12))
    d, rho = np.sort(rng.exponential(size=(count, size)), axis=1), 1 + rng.exponential(size=(count, size))
    rho[:, -1] = 1e-6  # takes whatever is left, as the objective's last neighbour does
    alpha, c = float(rng.uniform(0.05, 0.95)), float(rng.uniform(0.1, 3))
    filled, found = fill(d, lambda columns: rho[:, :columns], (1 - alpha) * c * count / alpha)
    found = np.pad(found, ((0, 0), (0, size - found.shape[1])), constant_values=1)
    mass = np.where(np.arange(size) <= filled.last[:, None], 1 / (count * filled.level * found), 0)
    mass[np.arange(count), filled.last + 1] += 1 / count - mass.sum(axis=1)
    assert mass.min() > -1e-12
    largest = filled.level if not filled.is_found else np.inf
    assert (count * rho * mass * filled.level <= 1 + 1e-9).all()
    reached = alpha / c * (mass * d).sum() + (1 - alpha) * max((count * rho * mass).max(), 1 / largest)
    return reached, least(d, rho, alpha, c, largest)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_linear_program_does_better(seed: int) -> None:
    for number in range(334):  # about a thousand in all
        reached, best = value(seed, number)
        assert reached == pytest.approx(best, abs=1e-6), (seed, number)


def test_probabilities_are_invariant_to_order_and_scale() -> None:
    rng = np.random.default_rng(1)
    base, queries = rng.normal(size=(50, 4)), rng.normal(size=(6, 4))
    params = TsdsParams(alpha=0.6, c=2.0, sigma=1.0)
    shares = probabilities(queries, base, params)
    order = rng.permutation(50)
    np.testing.assert_allclose(probabilities(queries[::-1], base[order], params), shares[order], atol=1e-9)
    scaled = TsdsParams(alpha=0.6, c=6.0, sigma=3.0)
    np.testing.assert_allclose(probabilities(3 * queries, 3 * base, scaled), shares, atol=1e-9)
    nearest_only = probabilities(queries, base, TsdsParams(alpha=0.9999999, c=1e-6))
    np.testing.assert_array_equal(np.flatnonzero(nearest_only), np.unique(neighbours(queries, base, 1)[0]))
    spread = probabilities(queries, base, TsdsParams(alpha=1e-7, c=100.0, variant="uniform"))
    np.testing.assert_allclose(spread, np.append(np.full(49, 1 / 49), 0)[np.argsort(np.argsort(-spread))], atol=0.03)


def test_duplicates_of_a_lone_sample_share_its_mass() -> None:
    lone = np.array([(0.0, 0), (5, 0), (0, 5), (5, 5)])
    many = np.vstack([lone, np.repeat(lone[:1], 9, axis=0)])
    queries, params = np.array([(0.1, 0.0), (4.9, 5.0)]), TsdsParams(alpha=0.5, c=2.0, sigma=1.0)
    alone, together = probabilities(queries, lone, params), probabilities(queries, many, params)
    assert together[[0, *range(4, 13)]].sum() == pytest.approx(alone[0])
    np.testing.assert_allclose(together[1:4], alone[1:], atol=1e-9)
    assert np.ptp(together[[0, *range(4, 13)]]) < 1e-9


def crowded() -> Any:
    """Return a context of 400 samples, and 100 near-duplicates more of each of the 20 that the queries are about."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(20, 48))[np.arange(400) % 20] + 0.7 * rng.normal(size=(400, 48))
    queries = base[:20] + 0.3 * rng.normal(size=(20, 48))
    base = np.vstack([base, np.repeat(base[:20], 100, axis=0) + 0.01 * rng.normal(size=(2000, 48))])
    vectors = [base.astype(np.float32), queries.astype(np.float32)]
    for each in vectors:
        each /= np.linalg.norm(each, axis=1, keepdims=True)
    held = make_pool({"held": 20})
    source = lambda samples: vectors[samples is held]  # noqa: E731
    return context(make_pool({"a": len(base)}), validation_pool=held, embedding_source=source)


def test_near_duplicates_fill_the_choice_of_near_but_not_of_tsds() -> None:
    ctx = crowded()
    originals = np.append(np.arange(400), np.repeat(np.arange(20), 100))
    distinct = {}
    for cls in (NearSelector, TsdsSelector):
        chosen = decided(build(cls), ctx, group_of(ctx.pool, 100)).indices
        distinct[cls.name] = np.unique(originals[chosen]).size
    assert distinct["near"] == 20
    assert distinct["tsds"] > 60
    uniform = decided(build(TsdsSelector, variant="uniform"), ctx, group_of(ctx.pool, 100)).indices
    assert np.unique(originals[uniform]).size < distinct["tsds"] / 2


def test_samples_are_drawn_by_their_probabilities() -> None:
    ctx = embedded(size=60)
    shares = probabilities(ctx.embeddings(ctx.validation), ctx.embeddings(), TsdsParams(c=0.2))
    counts = np.zeros(60)
    for number in range(400):
        one = embedded(size=60, round=number)
        chosen = decided(build(TsdsSelector, c=0.2, replacement=True), one, group_of(one.pool, 30))
        counts += np.bincount(chosen.indices, minlength=60)
        np.testing.assert_allclose(chosen.scores, shares[chosen.indices], rtol=1e-5)
    assert np.abs(counts / counts.sum() - shares).max() < 0.01
    assert not counts[shares == 0].any()
    chosen = decided(build(TsdsSelector, c=0.2), ctx, group_of(ctx.pool, 8))
    assert np.unique(chosen.indices).size == 8
    assert shares[chosen.indices].min() > 0
    again = decided(build(TsdsSelector, c=0.2), embedded(size=60), group_of(ctx.pool, 8))
    np.testing.assert_array_equal(again.indices, chosen.indices)


def test_groups_and_samples_without_a_token_are_handled() -> None:
    ctx = embedded(size=60)
    ctx.pool.trained[20:25] = False
    selector = build(TsdsSelector, encoder="some", c=100.0)
    chosen = decided(selector, ctx, group_of(ctx.pool, 10, 20, 60))
    assert (chosen.unscored, chosen.indices.min() >= 25) == (5, True)
    assert decided(selector, ctx, group_of(ctx.pool, 10, 0, 20)).indices.max() < 20
    resumed = build(TsdsSelector, encoder="some", c=100.0)
    resumed.load_state_dict(selector.state_dict())
    assert len(resumed._kept) == 2
    other = embedded(size=60, seed=9)  # whose embeddings are not read
    other.pool.trained[20:25] = False
    same = decided(resumed, other, group_of(ctx.pool, 10, 20, 60))
    np.testing.assert_array_equal(same.indices, chosen.indices)


def test_offline_scores_are_the_probabilities() -> None:
    ctx = embedded(size=60)
    ctx.pool.trained[5] = False
    scores = scores_of(build(TsdsSelector, c=0.5), ctx, np.arange(60))
    trained = np.delete(np.arange(60), 5)
    queries = ctx.embeddings(ctx.validation)
    np.testing.assert_allclose(scores[trained], probabilities(queries, ctx.embeddings()[trained], TsdsParams(c=0.5)))
    assert np.flatnonzero(np.isnan(scores)).tolist() == [5]


def test_too_few_samples_with_a_probability_are_an_error() -> None:
    ctx = embedded(size=60)
    with pytest.raises(
        ComponentError, match=r"40 samples are wanted without replacement, and only .* Raise max_k or c"
    ):
        decided(build(TsdsSelector, c=0.01), ctx, group_of(ctx.pool, 40))
    assert decided(build(TsdsSelector, c=0.01, replacement=True), ctx, group_of(ctx.pool, 40)).indices.size == 40
    assert decided(build(TsdsSelector), ctx, group_of(ctx.pool, 1, 4, 5)).indices.tolist() == [4]


def test_given_probabilities_are_read_and_checked(tmp_path: Path) -> None:
    pool = make_pool({"a": 4})

    def with_file(values: Any) -> Any:
        np.save(tmp_path / "p.npy", values)
        return build(TsdsSelector, probs_path=str(tmp_path / "p.npy"))

    selector = with_file(np.array([0.0, 3, 0, 1]))
    assert list(selector.problems(None)) == list(selector.pool_problems(pool)) == []
    assert sorted(decided(selector, context(pool), group_of(pool, 2)).indices.tolist()) == [1, 3]
    with pytest.raises(ComponentError, match=r"only 2 of 4 candidates .* Give more of them one"):
        decided(selector, context(pool), group_of(pool, 3))
    with pytest.raises(ComponentError, match="none of 2 candidates has a probability"):
        decided(with_file(np.array([0.0, 0, 3, 1])), context(pool), group_of(pool, 1, 0, 2))
    assert "3 numbers, and the pool has 4 samples" in next(with_file(np.ones(3)).pool_problems(pool))[1]
    assert "finite numbers" in next(with_file(np.array([1.0, np.nan, 0, 0])).pool_problems(pool))[1]
    assert "1 dimension" in next(with_file(np.ones((2, 2))).problems(None))[1]
    selector = with_file(np.array([0.0, 3, 0, 1]))
    assert selector.unfit(RunOutline(Schedule(0, 2, -1, 9), 1, 4)) is None
    found = selector.unfit(RunOutline(Schedule(0, 3, -1, 9), 1, 4))
    assert found is not None
    assert found[0] == "probs_path"
    assert "2 of 4 samples have a probability above 0" in found[1]
    again = build(TsdsSelector, probs_path=str(tmp_path / "p.npy"), replacement=True)
    assert again.unfit(RunOutline(Schedule(0, 3, -1, 9), 1, 4)) is None
    with pytest.raises(ValueError, match="alpha, max_k: not used, as probs_path gives the probabilities"):
        build(TsdsSelector, probs_path="p.npy", alpha=0.6, max_k=100)


def test_parameters_without_a_use_are_refused() -> None:
    with pytest.raises(ValueError, match="kde_k has no use with variant uniform"):
        TsdsParams(variant="uniform", kde_k=3)
