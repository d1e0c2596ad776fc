"""GREATS, cluster-LESS, TracIn, and LESS over checkpoints equal direct computations; the best samples of a pool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_from_disk

from dataflex.api.component import made_with, take_back
from dataflex.api.components import only
from dataflex.commands.offline import Amount, score_pool
from dataflex.data.pool import Pool
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ComponentError, ConfigError, DataFlexError
from dataflex.selectors.cluster_less import ClusterLessSelector, draw_members
from dataflex.selectors.greats import GreatsSelector, greedy
from dataflex.selectors.less import LessSelector
from dataflex.selectors.tracin import TracinSelector
from dataflex.trainer.inputs import RunData
from unit import fakes
from unit.fakes import FakeProbe, MeasuringProbe, ScoreSelector, build, context, decided, group_of, scores_of


def make_pool(sizes: dict[str, int], untrained: Any = ()) -> Pool:
    """Return a pool of which the samples ``untrained`` have no token to train on."""
    pool = fakes.make_pool(sizes)
    pool.__dict__["trained"] = ~np.isin(np.arange(pool.size), untrained)  # in place of the cached property
    return pool


# GREATS


def products(gradients: Any, validation: Any) -> np.ndarray:
    gradients, validation = np.atleast_2d(gradients), np.atleast_2d(validation)
    return gradients @ np.vstack([gradients, validation]).T


def utility(matrix: np.ndarray, chosen: Any, eta: float) -> float:
    """Return the second-order worth of one step on a set of samples, the Hessian the identity."""
    number, chosen = len(matrix), list(chosen)
    linear = matrix[chosen, number:].mean(axis=1).sum()
    return eta * linear - eta**2 * sum(matrix[one, other] for one, other in combinations(chosen, 2))


def test_the_greedy_choice_equals_a_computation_by_hand() -> None:
    matrix = products([(1, 0), (1, 0.1), (0.9, -0.5), (0, 1)], (1, 0))
    # U before each pick: (.1 .1 .09 0), (- .09 .081 0), (- - .0725 -.001), (- - - .004)
    picks, values = greedy(matrix, 4, 0.1)
    assert picks.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(values, [0.1, 0.09, 0.0725, 0.004], rtol=1e-6)


def test_a_duplicate_of_a_chosen_sample_is_worth_less() -> None:
    matrix = products([(1, 0), (1, 0), (0, 0.9), (0.2, 0)], (1, 1))
    assert greedy(matrix, 2, 0.05)[0].tolist() == [0, 1]
    assert greedy(matrix, 2, 0.5)[0].tolist() == [0, 2]
    for eta in (0.05, 0.5):
        best = max(combinations(range(4), 2), key=lambda pair: utility(matrix, pair, eta))
        assert set(best) == set(greedy(matrix, 2, eta)[0].tolist())


@pytest.mark.parametrize("seed", range(20))
def test_greedy_finds_the_best_set_if_interactions_are_small(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = products(rng.normal(size=(8, 5)), rng.normal(size=(3, 5)))
    linear = np.sort(matrix[:, 8:].mean(axis=1))
    count = int(rng.integers(1, 8))
    gap = np.diff(linear).min()
    eta = 0.5 * gap / (8 * np.abs(matrix[:, :8]).max())
    best = max(combinations(range(8), count), key=lambda chosen: utility(matrix, chosen, eta))
    picks, values = greedy(matrix, count, eta)
    assert set(picks.tolist()) == set(best)
    assert values.sum() == pytest.approx(utility(matrix, best, eta), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_every_pick_is_the_best_next_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = products(rng.normal(size=(7, 4)), rng.normal(size=(2, 4)))
    picks, values = greedy(matrix, 7, 0.4)
    assert sorted(picks.tolist()) == list(range(7))
    for number, (pick, value) in enumerate(zip(picks, values, strict=True)):
        before = picks[:number].tolist()
        worth = {
            z: utility(matrix, [*before, z], 0.4) - utility(matrix, before, 0.4)
            if before
            else utility(matrix, [z], 0.4)
            for z in range(7)
            if z not in before
        }
        assert pick == max(worth, key=worth.__getitem__)
        assert value == pytest.approx(worth[pick], rel=1e-4, abs=1e-6)


def test_a_learning_rate_of_zero_ranks_as_a_vanishing_one() -> None:
    rng = np.random.default_rng(0)
    matrix = products(rng.normal(size=(9, 4)), rng.normal(size=(2, 4)))
    assert greedy(matrix, 9, 0.0)[0].tolist() == np.argsort(-matrix[:, 9:].mean(axis=1)).tolist()


class ProductProbe(MeasuringProbe):
    """Exact inner products of given gradients."""

    def __init__(self, gradients: np.ndarray, validation: np.ndarray) -> None:
        self.gradients, self.validation = gradients, validation
        self.groups: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []

    def gradient_products(self, measurement: Any, indices: np.ndarray, samples: None) -> list[np.ndarray]:
        assert measurement.validation.size == len(self.validation)
        groups = np.split(indices, np.cumsum(measurement.sizes)[:-1])
        self.groups += groups
        self.targets.append(measurement.others)
        return [products(self.gradients[group], self.validation[measurement.others]) for group in groups]


@pytest.mark.parametrize("budget, sizes", [(8, [8, 8]), (20, [16, 16, 8]), (3, [6]), (17, [16, 16, 2])])
def test_greats_filters_the_running_pass_group_by_group(budget: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(1)
    probe = ProductProbe(rng.normal(size=(50, 6)), rng.normal(size=(5, 6)))
    pool, held = make_pool({"a": 50}), make_pool({"held": 5})
    group, same_pass = group_of(pool, budget), group_of(pool, budget)
    group_size = 4 if budget == 8 else 8
    selector = build(GreatsSelector, group_size=group_size, learning_rate=0.05)
    chosen = decided(selector, context(pool, probe=probe, validation_pool=held), group)
    assert [candidates.size for candidates in probe.groups] == sizes
    assert np.array_equal(np.concatenate(probe.groups), same_pass.draw(sum(sizes)))
    assert chosen.indices.size == chosen.scores.size == budget
    assert chosen.shuffled
    begin = 0
    for candidates in probe.groups:
        count = min(group_size, budget - begin)
        picks, values = greedy(products(probe.gradients[candidates], probe.validation[probe.targets[0]]), count, 0.05)
        assert chosen.indices[begin : begin + count].tolist() == candidates[picks].tolist()
        np.testing.assert_allclose(chosen.scores[begin : begin + count], values, rtol=1e-5)
        begin += count
    decided(selector, context(pool, probe=probe, validation_pool=held, round=1), group)
    assert np.array_equal(np.concatenate(probe.groups[len(sizes) :]), same_pass.draw(sum(sizes)))


def test_greats_draws_as_many_candidates_as_its_factor_gives() -> None:
    probe = ProductProbe(np.ones((50, 2)), np.ones((5, 2)))
    pool, held = make_pool({"a": 50}), make_pool({"held": 5})
    selector = build(GreatsSelector, group_size=10, candidate_factor=1.1, learning_rate=0.05)
    decided(selector, context(pool, probe=probe, validation_pool=held), group_of(pool, 15))
    assert [candidates.size for candidates in probe.groups] == [11, 6]  # 1.1 x 10, and 5.5 rounded up


def test_greats_draws_other_validation_samples_in_each_round() -> None:
    probe = ProductProbe(np.ones((50, 2)), np.ones((30, 2)))
    pool, held = make_pool({"a": 50}), make_pool({"held": 30})
    selector = build(GreatsSelector, validation_size=4)
    for number in range(3):
        decided(selector, context(pool, probe=probe, validation_pool=held, round=number), group_of(pool, 8))
    assert all(np.unique(targets).size == 4 for targets in probe.targets)
    assert len({tuple(targets) for targets in probe.targets}) == 3
    few = ProductProbe(np.ones((50, 2)), np.ones((2, 2)))
    decided(selector, context(pool, probe=few, validation_pool=make_pool({"held": 2})), group_of(pool, 8))
    assert few.targets[0].tolist() == [0, 1]


def test_greats_takes_the_optimizers_learning_rate() -> None:
    probe = ProductProbe(np.array([(1.0, 0), (1, 0), (0, 0.9), (0.2, 0)]), np.array([(1.0, 1)]))
    pool, held = make_pool({"a": 4}), make_pool({"held": 1})
    for eta, expected in ((0.05, {0, 1}), (0.5, {0, 2})):
        ctx = context(pool, probe=probe, validation_pool=held, learning_rate=eta)
        assert set(decided(build(GreatsSelector, group_size=2), ctx, group_of(pool, 2)).indices.tolist()) == expected
        given = context(pool, probe=probe, validation_pool=held, learning_rate=0.55 - eta)
        selector = build(GreatsSelector, group_size=2, learning_rate=eta)
        assert set(decided(selector, given, group_of(pool, 2)).indices.tolist()) == expected


def test_greats_skips_samples_without_a_label() -> None:
    """A sample without a gradient would be taken before those that harm, U = 0."""
    gradients = -np.ones((40, 2))
    untrained = np.arange(0, 40, 3)
    gradients[untrained] = 0.0
    probe = ProductProbe(gradients, np.ones((3, 2)))
    pool, held = make_pool({"a": 40}), make_pool({"held": 3})
    pool.__dict__["trained"][untrained] = False
    held.__dict__["trained"][:2] = False
    chosen = decided(build(GreatsSelector), context(pool, probe=probe, validation_pool=held), group_of(pool, 8))
    assert not np.isin(np.concatenate(probe.groups), untrained).any()
    assert [candidates.size for candidates in probe.groups] == [16]
    assert chosen.indices.size == 8
    assert chosen.unscored > 0
    assert probe.targets[0].tolist() == [2]
    held.__dict__["trained"][:] = False
    with pytest.raises(ComponentError, match="no validation sample has a token"):
        decided(build(GreatsSelector), context(pool, probe=probe, validation_pool=held), group_of(pool, 8))
    pool.__dict__["trained"][:] = False
    with pytest.raises(ComponentError, match=r"no sample of .* has a token"):
        decided(build(GreatsSelector), context(pool, probe=probe, validation_pool=held), group_of(pool, 8))


# Cluster-LESS


N, K = 60, 5
CLUSTERS = np.repeat(np.arange(6), [4, 20, 3, 13, 1, 19]).astype(np.int32)
SUBTASKS = {"x": 2, "y": 3}


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    rows = rng.normal(size=(count, K))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def probe() -> FakeProbe:
    rng = np.random.default_rng(0)
    return FakeProbe(features=unit(rng, N), targets=unit(rng, 5))


def clustered(**params: Any) -> ClusterLessSelector:
    selector = build(ClusterLessSelector, **params)
    selector.load_state_dict({"clusters": CLUSTERS})
    return selector


def ctx_of(probe: Any, untrained: Any = (), **changes: Any) -> Any:
    return context(make_pool({"a": N}, untrained), probe=probe, validation_pool=make_pool(SUBTASKS), **changes)


def subtask_cosines(probe: FakeProbe, sample: int) -> list[float]:
    cosines = [float(np.dot(probe.features[sample], other)) for other in probe.targets]
    return [np.mean(cosines[:2]), np.mean(cosines[2:])]


@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_a_members_score_is_the_mean_of_its_clusters_representatives(probe: FakeProbe, aggregation: Any) -> None:
    scores = scores_of(clustered(representatives=3, aggregation=aggregation), ctx_of(probe), np.arange(N))
    (asked,) = probe.asked
    assert [int((CLUSTERS[asked] == number).sum()) for number in range(6)] == [3, 3, 3, 3, 1, 3]
    for sample in range(N):
        found = [subtask_cosines(probe, other) for other in asked if CLUSTERS[other] == CLUSTERS[sample]]
        means = [sum(column) / len(column) for column in zip(*found, strict=True)]
        expected = max(means) if aggregation == "max" else sum(means) / 2
        assert scores[sample] == pytest.approx(expected, abs=1e-6)


def test_a_cluster_of_representatives_alone_is_less_on_averages(probe: FakeProbe) -> None:
    scores = scores_of(clustered(representatives=N), ctx_of(probe), np.arange(N))
    table = np.array([subtask_cosines(probe, sample) for sample in range(N)])
    for number in range(6):
        np.testing.assert_allclose(scores[number == CLUSTERS], table[number == CLUSTERS].mean(axis=0).max(), atol=1e-6)


def test_only_clusters_of_the_candidates_are_scored(probe: FakeProbe) -> None:
    candidates = np.arange(24, 41)
    chosen = decided(clustered(), ctx_of(probe), group_of(make_pool({"a": N}), 5, 24, 41))
    assert np.isin(probe.asked[0], candidates).all()
    assert np.isin(chosen.indices, candidates).all()


def test_whole_clusters_are_taken_best_first_and_the_last_one_in_part(probe: FakeProbe) -> None:
    for cluster, value in enumerate([0.1, 0.9, 0.5, 0.7, 0.3, 0.8]):
        probe.features[cluster == CLUSTERS] = value * np.eye(K, dtype=np.float32)[0]
    probe.targets = np.tile(np.eye(K, dtype=np.float32)[0], (5, 1))
    drawn = set()
    for number in range(30):
        chosen = decided(clustered(), ctx_of(probe, round=number), group_of(make_pool({"a": N}), 43))
        parts = {cluster: chosen.indices[CLUSTERS[chosen.indices] == cluster] for cluster in range(6)}
        assert [part.size for part in parts.values()] == [0, 20, 0, 4, 0, 19]  # 20 + 19, and 4 of 13
        assert chosen.indices.tolist() == sorted(set(chosen.indices.tolist()))
        np.testing.assert_allclose(chosen.scores[CLUSTERS[chosen.indices] == 3], 0.7, rtol=1e-6)
        drawn.add(tuple(parts[3].tolist()))
        again = decided(clustered(), ctx_of(probe, round=number), group_of(make_pool({"a": N}), 43))
        assert np.array_equal(again.indices, chosen.indices)
    assert len(drawn) > 20
    assert len({index for part in drawn for index in part}) == 13


def test_a_sample_without_a_trained_token_is_never_chosen(probe: FakeProbe) -> None:
    untrained = np.concatenate([np.flatnonzero(CLUSTERS == 3), [0, 1, 2, 30, 59]])  # three of the four in cluster 0
    probe.features[untrained] = np.nan
    ctx = ctx_of(probe, untrained)
    scores = scores_of(clustered(), ctx, np.arange(N))
    assert np.flatnonzero(np.isnan(scores)).tolist() == sorted({*untrained})
    assert not np.isin(probe.asked[0], untrained).any()
    assert np.bincount(CLUSTERS[probe.asked[0]], minlength=6).tolist() == [1, 4, 3, 0, 1, 4]
    assert scores[3] == pytest.approx(max(subtask_cosines(probe, 3)), abs=1e-6)
    left = N - np.unique(untrained).size
    chosen = decided(clustered(), ctx_of(probe, untrained), group_of(make_pool({"a": N}), left))
    assert chosen.indices.tolist() == np.setdiff1d(np.arange(N), untrained).tolist()
    assert chosen.unscored == N - left
    with pytest.raises(ComponentError, match=f"{left + 1} samples are wanted but only {left} of 60 have a score"):
        decided(clustered(), ctx_of(probe, untrained), group_of(make_pool({"a": N}), left + 1))
    asked = len(probe.asked)
    assert np.isnan(scores_of(clustered(), ctx_of(probe, np.arange(N)), np.arange(N))).all()
    assert len(probe.asked) == asked


def test_a_cluster_whose_representatives_have_no_score_has_none(probe: FakeProbe) -> None:
    probe.features[CLUSTERS == 3] = np.nan
    scores = scores_of(clustered(), ctx_of(probe), np.arange(N))
    assert np.isnan(scores).tolist() == (CLUSTERS == 3).tolist()


def labelled(labels: list[list[int]]) -> Pool:
    columns = {"input_ids": [[7] * len(row) for row in labels], "labels": labels}
    return Pool(Dataset.from_dict(columns), ("a",), np.array([len(labels)]))


@pytest.mark.parametrize("seed", range(5))
def test_samples_with_a_trained_token_are_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [rng.choice([IGNORE_INDEX, 0, 5], rng.integers(0, 6), p=[0.7, 0.2, 0.1]).tolist() for _ in range(200)]
    expected = [any(label != IGNORE_INDEX for label in row[1:]) for row in labels]
    assert labelled(labels).trained.tolist() == expected
    assert 20 < sum(expected) < 180
    part = labelled(labels).dataset.select(range(50, 150))
    assert Pool(part, ("a",), np.array([100])).trained.tolist() == expected[50:150]


def test_of_plain_text_every_token_is_trained_on() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1], [1, 2], [], [3, 4, 5]]})
    assert Pool(dataset, ("a",), np.array([4])).trained.tolist() == [False, True, False, True]


@pytest.mark.parametrize("seed", range(10))
def test_representatives_are_distinct_members_of_their_clusters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters = rng.permutation(np.repeat(rng.permutation(9), rng.integers(1, 12, 9))).astype(np.int32)
    count = int(rng.integers(1, 6))
    found = draw_members(clusters, count, np.random.default_rng(seed))
    assert found.tolist() == sorted(set(found.tolist()))
    for cluster in range(9):
        assert (clusters[found] == cluster).sum() == min(count, (clusters == cluster).sum())
    assert np.array_equal(found, draw_members(clusters, count, np.random.default_rng(seed)))


def test_every_member_is_drawn_equally_often() -> None:
    clusters = np.array([0, 1, 0, 1, 1, 0, 1, 2, 1], dtype=np.int32)
    rng, counts = np.random.default_rng(0), np.zeros(9)
    for _ in range(3000):
        counts[draw_members(clusters, 2, rng)] += 1
    shares = np.where(clusters == 0, 2 / 3, np.where(clusters == 1, 2 / 5, 1.0))
    np.testing.assert_allclose(counts / 3000, shares, atol=0.04)


class EmbeddingProbe(FakeProbe):
    def embeddings(self, measurement: Any, indices: np.ndarray, samples: None) -> np.ndarray:
        assert indices.tolist() == list(range(N))
        self.embedded = getattr(self, "embedded", 0) + 1
        return self.space[indices]


def test_clusters_of_separable_embeddings_are_computed_once(probe: FakeProbe) -> None:
    rng = np.random.default_rng(3)
    truth = rng.permutation(np.repeat(np.arange(5), 12))
    embedding = EmbeddingProbe(features=probe.features, targets=probe.targets)
    embedding.space = (10 * np.eye(5)[truth] + 0.1 * rng.normal(size=(N, 5))).astype(np.float32)
    selector = build(ClusterLessSelector, cluster_size=12, representatives=2)
    assert selector.scored_samples(N) == 10
    first = decided(selector, ctx_of(embedding), group_of(make_pool({"a": N}), 20))
    labels = selector.state_dict()["clusters"]
    assert len({(one, other) for one, other in zip(truth.tolist(), labels.tolist(), strict=True)}) == 5
    assert np.unique(labels).size == 5

    other = build(ClusterLessSelector, cluster_size=12, representatives=2)
    assert other.state_dict() == {}
    other.load_state_dict(selector.state_dict())
    expected = decided(selector, ctx_of(embedding, round=1), group_of(make_pool({"a": N}), 20))
    resumed = decided(other, ctx_of(embedding, round=1), group_of(make_pool({"a": N}), 20))
    assert embedding.embedded == 1
    assert np.array_equal(resumed.indices, expected.indices)
    assert np.array_equal(resumed.scores, expected.scores)
    assert first.indices.size == 20
    alone = scores_of(build(ClusterLessSelector, cluster_size=12), ctx_of(embedding), np.arange(N))  # without a choice
    assert np.unique(alone).size == 5


CHANGES = [{"cluster_size": 20}, {"cluster_iterations": 3}]


@pytest.mark.parametrize("changes", CHANGES)
def test_clusters_of_other_parameters_are_computed_again(probe: FakeProbe, changes: Any) -> None:
    embedding = EmbeddingProbe(features=probe.features, targets=probe.targets)
    embedding.space = unit(np.random.default_rng(3), N)
    selector = build(ClusterLessSelector, cluster_size=12)
    scores_of(selector, ctx_of(embedding), np.arange(N))
    state = selector.state_dict()
    other = build(ClusterLessSelector, **{"cluster_size": 12, **changes})
    assert take_back(other, state, made_with(selector)) == list(changes)
    found = scores_of(other, ctx_of(embedding, round=1), np.arange(N))
    fresh = build(ClusterLessSelector, **{"cluster_size": 12, **changes})
    np.testing.assert_array_equal(found, scores_of(fresh, ctx_of(embedding, round=1), np.arange(N)))
    same = build(ClusterLessSelector, cluster_size=12, representatives=2, proj_dim=64, aggregation="mean")
    assert take_back(same, state, made_with(selector)) == []
    scores_of(same, ctx_of(embedding, round=1), np.arange(N))
    assert embedding.embedded == 3


# Stored checkpoints


class CheckpointProbe(FakeProbe):
    """Features that depend on the checkpoint looked at."""

    def __init__(self, features: dict[str, np.ndarray], targets: dict[str, np.ndarray], rates: list[float]) -> None:
        super().__init__()
        self.of, self.held, self.rates = features, targets, rates
        self.looked_at: list[str] = []

    @contextmanager
    def checkpoint(self, folder: str) -> Iterator[None]:
        self.looked_at.append(folder)
        self.features, self.targets = self.of[folder], self.held[folder]
        yield
        self.features = self.targets = None

    def learning_rates(self, folders: list[str]) -> list[float]:
        assert folders == list(self.of)
        return self.rates


@pytest.fixture
def course() -> CheckpointProbe:
    rng = np.random.default_rng(5)
    folders = ["one", "two", "three"]
    features = {folder: rng.normal(size=(N, K)).astype(np.float32) for folder in folders}
    features["two"][7] = np.nan
    return CheckpointProbe(features, {folder: unit(rng, 5) for folder in folders}, [0.5, 0.3, 0.2])


def summed(probe: CheckpointProbe, weights: list[float]) -> list[list[float]]:
    table = []
    for sample in range(N):
        row = []
        for held in (range(2), range(2, 5)):
            pairs = [
                sum(
                    weight * float(np.dot(probe.of[folder][sample], probe.held[folder][other]))
                    for folder, weight in zip(probe.of, weights, strict=True)
                )
                for other in held
            ]
            row.append(sum(pairs) / len(pairs))
        table.append(row)
    return table


GIVEN = [3.0, 0.0, 1.0]


@pytest.mark.parametrize("weights", [None, GIVEN])
def test_tracin_equals_a_computation_by_hand(course: CheckpointProbe, weights: Any) -> None:
    selector = build(TracinSelector, checkpoints=list(course.of), checkpoint_weights=weights)
    found = scores_of(selector, ctx_of(course), np.arange(N))
    expected = [max(row) for row in summed(course, [0.75, 0.0, 0.25] if weights else course.rates)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.flatnonzero(np.isnan(found)).tolist() == [7]
    assert {asked.normalize for asked in course.settings} == {False}


def test_tracin_scores_are_computed_once(course: CheckpointProbe) -> None:
    selector = build(TracinSelector, checkpoints=list(course.of))
    parts = [np.arange(0, 20), np.arange(10, 40), np.arange(N)]  # each goes on where the others ended
    found = [scores_of(selector, ctx_of(course), part) for part in parts]
    asked = np.concatenate(course.asked[::3])
    assert sorted(asked.tolist()) == list(range(N))
    whole = scores_of(build(TracinSelector, checkpoints=list(course.of)), ctx_of(course), np.arange(N))
    for part, scores in zip(parts, found, strict=True):
        np.testing.assert_array_equal(scores, whole[part])
    assert len(course.looked_at) == 3 * 4

    resumed = build(TracinSelector, checkpoints=list(course.of))
    assert resumed.state_dict() == {}
    resumed.load_state_dict(selector.state_dict())
    np.testing.assert_array_equal(scores_of(resumed, ctx_of(None), np.arange(N)), whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_weights": [0.0, 0.0, 1.0]},
        {"checkpoints": ["three", "two", "one"]},
        {"preconditioner": "adam"},
        {"projection": "rademacher"},
        {"proj_dim": 64},
        {"projection_seed": 1},
        {"unsupported_parameters": "ignore"},
    ],
)
def test_tracin_scores_of_other_parameters_are_computed_again(course: CheckpointProbe, changes: Any) -> None:
    given = {"checkpoints": list(course.of), "checkpoint_weights": [0.5, 0.3, 0.2]}
    selector = build(TracinSelector, **given)
    scores_of(selector, ctx_of(course), np.arange(N))
    state, then = selector.state_dict(), json.loads(json.dumps(made_with(selector)))
    other = build(TracinSelector, **{**given, **changes})
    assert take_back(other, state, then) == list(changes)
    course.looked_at.clear()
    found = scores_of(other, ctx_of(course), np.arange(N))
    assert len(course.looked_at) == 3
    np.testing.assert_array_equal(
        found, scores_of(build(TracinSelector, **{**given, **changes}), ctx_of(course), np.arange(N))
    )
    for harmless in ({"rule": "sample"}, {"temperature": 0.5}, {"feature_dir": "features"}):
        same = build(TracinSelector, **given, **harmless)
        assert take_back(same, state, then) == []
        np.testing.assert_array_equal(scores_of(same, ctx_of(None), np.arange(N)), state["scores"])


def test_a_state_without_its_parameters_is_computed_again(course: CheckpointProbe) -> None:
    selector = build(TracinSelector, checkpoints=list(course.of))
    assert set(take_back(selector, {"scores": np.zeros(N, dtype=np.float32)}, {})) == TracinSelector.state_depends_on
    assert selector.state_dict() == {}
    assert np.nanstd(scores_of(selector, ctx_of(course), np.arange(N))) > 0.1
    clusters = build(ClusterLessSelector)
    assert take_back(clusters, {"clusters": CLUSTERS}, {}) == ["cluster_iterations", "cluster_size"]
    assert clusters.state_dict() == {}


@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_less_sums_weighted_similarities_over_checkpoints(course: CheckpointProbe, aggregation: Any) -> None:
    selector = build(LessSelector, checkpoints=list(course.of), aggregation=aggregation, preconditioner="adam")
    found = scores_of(selector, ctx_of(course), np.arange(N))
    table = np.array(summed(course, course.rates))
    expected = table.max(axis=1) if aggregation == "max" else table.mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert course.looked_at == ["one", "two", "three"]
    assert [asked.preconditioner for asked in course.settings] == ["none", "adam"] * 3
    assert {asked.normalize for asked in course.settings} == {True}


def test_less_computes_validation_features_of_a_checkpoint_once_in_a_round(course: CheckpointProbe) -> None:
    selector, ctx = build(LessSelector, checkpoints=list(course.of)), ctx_of(course)
    selector.begin(ctx)
    selector.score(ctx, np.arange(10))
    selector.score(ctx, np.arange(10, 20))
    assert len(course.settings) == 3 + 2 * 3


def test_cluster_less_sums_weighted_similarities_over_checkpoints(course: CheckpointProbe) -> None:
    for features in course.of.values():
        features[7] = 1.0
    scores = scores_of(clustered(checkpoints=list(course.of), representatives=N), ctx_of(course), np.arange(N))
    table = np.array(summed(course, course.rates))
    for number in range(6):
        expected = table[number == CLUSTERS].mean(axis=0).max()
        np.testing.assert_allclose(scores[number == CLUSTERS], expected, rtol=1e-4, atol=1e-5)


# The best of a pool, without training


def scored_run(scores: Any, seed: int = 0) -> Any:
    """Return a run of 2 domains whose selector gives these scores, and its probe; its rows are not known."""
    values = np.asarray(scores, dtype=np.float32)
    selector = ScoreSelector(lambda candidates: values[candidates])
    rows = Dataset.from_dict({"input_ids": [[number, number] for number in range(values.size)]})
    pool = Pool(rows, ("a", "b"), np.array([values.size - 3, 3]))
    components = SimpleNamespace(select=only("select", selector))
    config, settings = SimpleNamespace(llamafactory={}), SimpleNamespace(seed=seed)
    inputs = SimpleNamespace(components=components, settings=settings, config=config)
    probe: Any = FakeProbe()
    probe.pool = pool
    return SimpleNamespace(inputs=inputs, data=RunData(pool)), SimpleNamespace(
        probe=probe, references={}, embeddings=SimpleNamespace(of_all=lambda key: None)
    )


def outcome(folder: Path, scores: Any, amount: Amount, seed: int = 0) -> dict[str, Any]:
    found = score_pool(*scored_run(scores, seed), folder, amount)
    table = pq.read_table(folder / "scores.parquet")
    written = dict(item.split("=", 1) for item in found.selected.overrides)["tokenized_path"]
    kept = load_from_disk(written)["train"]["input_ids"]
    columns = {name: np.array(table[name].to_pylist(), dtype=object) for name in table.column_names}
    assert [row[0] for row in kept] == np.flatnonzero(columns["selected"].astype(bool)).tolist()
    return columns


def test_ties_at_the_cut_are_drawn(tmp_path: Path) -> None:
    scores = np.repeat([0.5, np.nan, 2.0, 0.5, -1.0], 8)
    counts = np.zeros(scores.size)
    for seed in range(60):
        table = outcome(tmp_path / str(seed), scores, Amount(count=12), seed)
        ranks, selected = table["rank"].astype(int), table["selected"].astype(bool)
        assert sorted(ranks) == list(range(1, 41))
        assert (selected == (ranks <= 12)).all()
        assert sorted(ranks[16:24]) == list(range(1, 9))  # the best
        assert sorted(ranks[[*range(8), *range(24, 32)]]) == list(range(9, 25))
        assert sorted(ranks[32:]) == list(range(25, 33))
        assert sorted(ranks[8:16]) == list(range(33, 41))  # without a score
        counts += selected
    assert (counts[16:24] == 60).all()
    assert (counts[8:16] == 0).all()
    tied = counts[[*range(8), *range(24, 32)]]
    assert tied.sum() == 4 * 60
    assert tied.min() >= 5  # of 15 expected
    again = outcome(tmp_path / "again", scores, Amount(count=12), 59)
    assert (again["rank"] == table["rank"]).all()


def test_a_share_is_rounded_by_its_decimals() -> None:
    assert Amount(0.575).of(100, 100) == 58  # 0.575 * 100 is 57.49999999999999 in floating point
    assert Amount(0.145).of(100, 100) == 14  # halves to even


@pytest.mark.parametrize("fraction, count", [(0.05, 1), (0.5, 4), (1.0, 8)])
def test_a_share_is_of_the_samples_that_have_a_score(tmp_path: Path, fraction: float, count: int) -> None:
    table = outcome(tmp_path, [np.nan, np.nan, *range(8)], Amount(fraction))
    assert np.flatnonzero(table["selected"].astype(bool)).tolist() == list(range(10 - count, 10))


def test_a_count_above_the_scored_samples_is_refused(tmp_path: Path) -> None:
    scores = [1.0, np.nan, 2.0, np.nan, 3.0, np.nan]
    with pytest.raises(ConfigError, match=r"--count: 4 samples are wanted, but only 3 of the pool's 6 have a score"):
        score_pool(*scored_run(scores), tmp_path, Amount(count=4))
    run, probe = scored_run(scores)
    run.inputs.components.select[0].component.function = None  # nothing is scored before it shows
    with pytest.raises(ConfigError, match=r"--count: 7 samples are wanted, but the pool has 6"):
        score_pool(run, probe, tmp_path, Amount(count=7))
    assert not list(tmp_path.iterdir())


def test_an_outcome_without_any_score_is_refused(tmp_path: Path) -> None:
    for amount in (Amount(), Amount(count=1)):
        with pytest.raises(DataFlexError, match=r"'scores' has no score for any of the pool's 6 samples"):
            score_pool(*scored_run([np.nan] * 6), tmp_path, amount)
    assert not list(tmp_path.iterdir())
