"""Clusters of samples by their tokens: separable texts, degenerate pools, and no dependence on chance."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from dataflex.data.clusters import token_clusters
from dataflex.data.pool import Pool
from dataflex.data.stages import STAGES

INSTRUCT = Path(__file__).parents[4] / "shared" / "data" / "instruct"
SOURCES = ("gsm8k_train", "gpteacher_codegen", "gpteacher_roleplay", "alpaca")


def pool_of(*parts: Sequence[Sequence[int]]) -> Pool:
    return Pool.concatenate({f"part{k}": Dataset.from_dict({"input_ids": list(part)}) for k, part in enumerate(parts)})


def topics(count: int, topics: int, seed: int) -> list[list[int]]:
    """Samples of 20 to 60 tokens, alternately of each topic's 50 words, half of them words that all topics use."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        length = rng.integers(10, 31)
        own = 1000 + 50 * (number % topics) + rng.integers(0, 50, length)
        samples.append([7, *own.tolist(), *rng.integers(100, 400, length).tolist(), 8])
    return samples


def purity(clusters: np.ndarray, kinds: np.ndarray) -> float:
    """Share of the samples that are of the most frequent kind in their cluster."""
    return sum(int(np.bincount(kinds[clusters == number]).max()) for number in np.unique(clusters)) / kinds.size


def test_topics_become_clusters() -> None:
    clusters = token_clusters(pool_of(topics(600, 6, 0)), 6, seed=1)
    assert clusters.shape == (600,)
    assert clusters.dtype == np.int32
    assert set(clusters.tolist()) == set(range(6))
    assert purity(clusters, np.arange(600) % 6) > 0.95


def test_pairs_are_clustered_by_the_prompt_with_the_chosen_response() -> None:
    chosen, rejected = topics(300, 5, 0), topics(300, 5, 1)
    rows = Dataset.from_dict({"chosen_input_ids": chosen, "rejected_input_ids": rejected})
    pairs = Pool.concatenate({"pairs": rows}, fields=STAGES["rm"].fields)
    assert np.array_equal(token_clusters(pairs, 5, seed=1), token_clusters(pool_of(chosen), 5, seed=1))


def test_clusters_depend_on_the_seed_alone() -> None:
    rows = topics(400, 5, 2)
    pool = pool_of(rows)
    first = token_clusters(pool, 12, seed=3)
    np.random.seed(99)  # noqa: NPY002
    assert np.array_equal(token_clusters(pool, 12, seed=3), first)
    assert np.array_equal(token_clusters(pool_of(rows[:150], rows[150:]), 12, seed=3), first)  # domains do not count
    assert not np.array_equal(token_clusters(pool, 12, seed=4), first)


def test_clusters_do_not_depend_on_the_chunks_of_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = topics(300, 5, 4)
    whole = token_clusters(pool_of(rows), 5, seed=0)
    pieces = [Dataset.from_dict({"input_ids": rows[begin : begin + 70]}) for begin in range(0, 300, 70)]
    backwards = concatenate_datasets(pieces[::-1])
    order = np.argsort(np.concatenate([np.arange(begin, min(begin + 70, 300)) for begin in (280, 210, 140, 70, 0)]))
    monkeypatch.setattr("dataflex.data.clusters._ROWS", 37)
    assert np.array_equal(token_clusters(Pool(backwards.select(order), ("all",), np.array([300])), 5, seed=0), whole)


def test_a_large_pool_is_clustered_after_a_fit_on_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflex.data.clusters._FITTED", 150)
    clusters = token_clusters(pool_of(topics(900, 6, 5)), 12, seed=1)
    assert purity(clusters, np.arange(900) % 6) > 0.9


def test_equal_samples_share_a_cluster() -> None:
    rows = topics(40, 4, 6)
    clusters = token_clusters(pool_of(rows * 3), 10, seed=0).reshape(3, 40)
    assert (clusters == clusters[0]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows, num_clusters, found",
    [
        ([[1, 2]] * 5, 5, 5),  # no more samples than clusters
        ([[1, 2]] * 3, 9, 3),
        ([[1, 2]] * 30, 4, 1),  # all equal
        ([[]] * 30, 4, 1),  # no tokens
        ([[number] for number in range(30)], 4, 1),  # nothing in common
        ([[1, 2]] * 10 + [[3, 4]] * 10 + [[]] * 5, 8, 3),  # fewer kinds than clusters
        ([[1, 2]] * 10 + [[3, 4]] * 10, 1, 1),
    ],
)
def test_degenerate_pools_give_as_many_clusters_as_possible(
    rows: list[list[int]], num_clusters: int, found: int
) -> None:
    clusters = token_clusters(pool_of(rows), num_clusters, seed=0)
    assert sorted(set(clusters.tolist())) == list(range(found))


def test_at_least_one_cluster_is_needed() -> None:
    with pytest.raises(ValueError, match="num_clusters"):
        token_clusters(pool_of([[1]]), 0, seed=0)


@pytest.mark.skipif(not INSTRUCT.is_dir(), reason=f"{INSTRUCT} is absent")
def test_text_of_different_kinds_separates_with_the_shared_instructions() -> None:
    parts = []
    for source in SOURCES:
        with (INSTRUCT / f"{source}.jsonl").open() as file:
            texts = [json.loads(line) for _, line in zip(range(1500), file, strict=False)]
        words = [f"{text['instruction']} {text['input']} {text['output']}".split() for text in texts]
        parts.append([[zlib.crc32(word.encode()) % 50_000 for word in sample] for sample in words])
    pool = pool_of(*parts)
    clusters = token_clusters(pool, 40, seed=0)
    assert purity(clusters, pool.domain_ids(np.arange(pool.size))) > 0.85  # by chance: 0.25
