"""The weighter token_cleaning: golden numbers, parts that follow each other, the exact resume, and refused runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from dataflex.api.component import made_with, state_of, take_back
from dataflex.api.context import StepBatch, StepStart, TokenLosses
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.data.pool import Pool
from dataflex.errors import ComponentError
from dataflex.planning.run_plan import expected_forwards
from dataflex.weighters import token_cleaning
from dataflex.weighters.rho1 import Rho1Weighter
from dataflex.weighters.token_cleaning import TokenCleaningWeighter, top_tokens
from unit.fakes import MeasuringProbe, build, make_pool

Losses = list[NDArray[np.float32]]


class Model(MeasuringProbe):
    """Has a loss for every token that changes with the number of steps trained."""

    def __init__(self, pool: Pool, losses: Callable[[int, int], NDArray[np.float32]]) -> None:
        self.pool, self.losses_of, self.step, self.measured = pool, losses, 0, 0

    def losses_by_token(self, measurement: Any, indices: NDArray[np.int64], samples: None) -> Losses:
        self.measured += indices.size
        return [self.losses_of(index, self.step) for index in indices.tolist()]

    token_losses = losses_by_token


def pool_of(counts: list[int]) -> Pool:
    return make_pool({"all": len(counts)}, lengths=[count + 1 for count in counts])


def rows(values: list[list[float]]) -> Callable[[int, int], NDArray[np.float32]]:
    return lambda index, step: np.array(values[index], np.float32)


def fixed(scores: list[list[float]], **params: Any) -> tuple[TokenCleaningWeighter, Pool]:
    """Return a weighter that has scored samples with the given differences of base and reference."""
    pool = pool_of([len(each) for each in scores])
    base = [[score + 3 for score in each] for each in scores]
    reference = SimpleNamespace(token_losses=lambda indices: [np.full(len(scores[i]), 3, np.float32) for i in indices])
    weighter = build(TokenCleaningWeighter, reference_model="folder", **params)
    weighter.begin_step(start_of(pool, Model(pool, rows(base)), range(1), reference=reference))
    return weighter, pool


def start_of(pool: Pool, model: Model, indices: Any, step: int = 0, reference: Any = None) -> StepStart:
    model.step = step
    return StepStart(
        step=step,
        total_steps=100,
        rng=np.random.default_rng(0),
        pool=pool,
        probe=model,
        reference_losses=reference,
        index_source=lambda: np.asarray(indices),
    )


def weights_of(weighter: TokenCleaningWeighter, pool: Pool, indices: list[int], left: bool = False) -> Losses:
    """Return the weights of the trained tokens of samples, padded on either side."""
    counts = pool.trained_tokens[indices]
    trained = torch.zeros(len(indices), int(counts.max()) + 2, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        trained[row, (trained.shape[1] - count if left else 0) :][:count] = True
    tokens = TokenLosses(torch.rand(trained.shape) * trained, trained)
    batch = StepBatch(torch.ones(len(indices)), pool=pool, places=torch.tensor(indices), tokens=tokens)
    weights = weighter.weigh(batch)
    assert not weights[~trained].any()
    return [weights[row][trained[row]].numpy() for row in range(len(indices))]


def test_scores_have_the_golden_choices() -> None:
    scores = [[2, 0.1, -0.1], [1, -0.2, 0.6, 0]]
    weighter, pool = fixed(scores)
    for left in (False, True):
        found = weights_of(weighter, pool, [0, 1], left)
        np.testing.assert_allclose(found[0], np.array([1, 1, 0]) * 7 / 4, rtol=1e-6)
        np.testing.assert_allclose(found[1], np.array([1, 0, 1, 0]) * 7 / 4, rtol=1e-6)
    weighter, pool = fixed(scores, scope="sample")
    found = weights_of(weighter, pool, [1, 0])
    np.testing.assert_allclose(found[0], np.array([1, 0, 1, 0]) * 7 / 3, rtol=1e-6)
    np.testing.assert_allclose(found[1], np.array([1, 0, 0]) * 7 / 3, rtol=1e-6)


@pytest.mark.parametrize("share", [0.29, 0.6, 0.001, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_top_tokens_equal_a_sort_of_each_group(share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 130, 9)
    scores = rng.integers(0, 8, counts.sum()).astype(np.float32)  # many are equal
    found = top_tokens(scores, np.repeat(np.arange(9), counts), share)
    expected, begin = [], 0
    for count in counts.tolist():
        part = scores[begin : begin + count]
        kept = max(1, round(share * 1000) * count // 1000)
        first = sorted(range(count), key=lambda place: (-part[place], place))[:kept]
        expected += [begin + place for place in first]
        begin += count
    assert sorted(expected) == np.flatnonzero(found).tolist()


def test_pools_larger_than_a_block_are_measured_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).normal(size=(11, 5)).tolist()
    whole, pool = fixed(scores)
    monkeypatch.setattr(token_cleaning, "_BLOCK", 3)
    blocks, _ = fixed(scores)
    for ours, theirs in zip(
        weights_of(blocks, pool, list(range(11))), weights_of(whole, pool, list(range(11))), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_all_tokens_kept_have_weight_one_exactly() -> None:
    weighter, pool = fixed([[1, 2, 3], [1], [4, 4]], share=1)
    assert [each.tolist() for each in weights_of(weighter, pool, [2, 0, 1])] == [[1, 1], [1, 1, 1], [1]]


COUNTS = [3, 5, 2, 4, 6, 1, 3, 7, 2, 4]


def evolving_losses(index: int, step: int) -> NDArray[np.float32]:
    return np.random.default_rng((index, step)).random(COUNTS[index]).astype(np.float32)


def evolving(**params: Any) -> TokenCleaningWeighter:
    return build(TokenCleaningWeighter, mode="self_evolving", **{"parts": 3, "share": 0.5, **params})


def by_hand(part: range, step: int) -> dict[int, NDArray[np.float64]]:
    """Return the weights of a part whose reference is the model at a step."""
    tokens = [(index, token) for index in part for token in range(COUNTS[index])]
    scores = {
        (index, token): float(evolving_losses(index, 0)[token] - evolving_losses(index, step)[token])
        for index, token in tokens
    }
    kept = sorted(tokens, key=lambda place: -scores[place])[: len(tokens) // 2]
    found = {index: np.zeros(COUNTS[index]) for index in part}
    for index, token in kept:
        found[index][token] = len(tokens) / len(kept)
    return found


STEPS = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 1]]
"""Steps over 10 samples in the parts 0 to 2, 3 to 5 and 6 to 9."""


def test_the_model_in_training_becomes_the_reference_of_each_part() -> None:
    pool, weighter = pool_of(COUNTS), evolving()
    model = Model(pool, evolving_losses)
    expected = (
        {index: np.ones(COUNTS[index]) for index in range(3)} | by_hand(range(3, 6), 1) | by_hand(range(6, 10), 2)
    )
    measured = [7, 10, 14, 14]  # the base of the last two parts, and then each part when it begins
    for step, (indices, samples) in enumerate(zip(STEPS, measured, strict=True)):
        weighter.begin_step(start_of(pool, model, indices, step))
        for index, weights in zip(indices, weights_of(weighter, pool, indices), strict=True):
            np.testing.assert_allclose(weights, expected[index], rtol=1e-6)
        assert model.measured == samples


def test_a_resumed_weighter_goes_on_with_the_same_weights() -> None:
    pool = pool_of(COUNTS)
    whole, first = evolving(), evolving()
    for step in (0, 1):
        for weighter in (whole, first):
            weighter.begin_step(start_of(pool, Model(pool, evolving_losses), STEPS[step], step))
    state, then = state_of(first), made_with(first)
    assert state["kept"].dtype == np.uint8
    assert state["kept"].size == -(-sum(COUNTS[:6]) // 8)
    assert state["base"].size == sum(COUNTS[6:])
    second = evolving()
    assert take_back(second, state, then) == []
    for step in (2, 3):
        for weighter in (whole, second):
            weighter.begin_step(start_of(pool, Model(pool, evolving_losses), STEPS[step], step))
        for ours, theirs in zip(
            weights_of(second, pool, STEPS[step]), weights_of(whole, pool, STEPS[step]), strict=True
        ):
            assert np.array_equal(ours, theirs)
    other = evolving(share=0.4)
    assert take_back(other, state, then) == ["share"]
    with pytest.raises(ComponentError, match="trained 2 steps, and the checkpoint has no scores"):
        other.begin_step(start_of(pool, Model(pool, evolving_losses), STEPS[2], 2))


def test_samples_in_another_order_are_an_error() -> None:
    pool = pool_of(COUNTS)
    with pytest.raises(ComponentError, match="first step does not have the first samples"):
        evolving().begin_step(start_of(pool, Model(pool, evolving_losses), [0, 1, 7]))


def test_tokens_that_are_not_those_of_the_pool_are_an_error() -> None:
    pool = pool_of([3, 3, 3])
    with pytest.raises(ComponentError, match="6 tokens of a list of samples are scored, and 9 are trained on"):
        build(TokenCleaningWeighter, reference_model="x").begin_step(
            start_of(pool, Model(pool, rows([[1, 2]] * 3)), range(1))
        )


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "mode: fixed needs reference_model"),
        ({"mode": "self_evolving", "reference_model": "x"}, "takes no reference"),
        ({"reference_model": "x", "parts": 4}, "parts is used in mode: self_evolving"),
    ],
)
def test_parameters_that_contradict_the_mode_are_refused(params: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        build(TokenCleaningWeighter, **params)


def view(warmup: int = 0, **llamafactory: Any) -> Any:
    return SimpleNamespace(warmup_steps=warmup, llamafactory=llamafactory)


def test_runs_that_cannot_score_in_time_are_refused() -> None:
    weighter, given = evolving(), build(TokenCleaningWeighter, reference_model="x")
    assert list(weighter.problems(view(disable_shuffling="true"))) == []
    assert list(weighter.problems(view(train_sampling_strategy="sequential"))) == []
    assert list(given.problems(view())) == []
    for run, text in (
        (view(), "LLaMA-Factory shuffles all samples"),
        (view(disable_shuffling="false"), "LLaMA-Factory shuffles all samples"),
        (view(warmup=3, disable_shuffling=True), "set dataflex.warmup_steps: 0"),
        (view(streaming=True, disable_shuffling=True), "streaming: false"),
    ):
        ((key, problem),) = weighter.problems(run)
        assert key == "mode"
        assert text in problem


def outline(batch: int = 2, steps: int = 50, pool: int | None = None, size: int = 20) -> RunOutline:
    return RunOutline(Schedule(0, 1, -1, steps), batch, pool_size=pool, sizes={"all": size})


def test_runs_whose_parts_do_not_follow_each_other_are_refused() -> None:
    weighter = evolving()
    assert weighter.unfit(outline()) is None
    assert weighter.unfit(outline(pool=20))[0] == "mode"
    key, text = weighter.unfit(outline(batch=8))
    assert (key, text) == (
        "parts",
        "3 parts of 20 samples have fewer samples than a step (8); use at most 2.",
    )
    assert weighter.cannot_act(outline()) is None
    assert "all in the first of 3 parts" in weighter.cannot_act(outline(steps=3))
    assert evolving(share=1).cannot_act(outline()) is not None


def test_the_cost_counts_the_forward_passes_over_the_pool() -> None:
    assert evolving(parts=5).measured_samples(None, outline()) == 2 * 16
    given = build(TokenCleaningWeighter, reference_model="x")
    assert given.measured_samples(None, outline()) == 20
    # The reference does not run in the steps, but once over the 20 samples of the pool.
    assert expected_forwards(given, given.needs(None), outline()) == 20 + 20
    table = build(TokenCleaningWeighter, reference_model="x", reference_losses="y")
    assert expected_forwards(table, table.needs(None), outline()) == 20
    each = build(Rho1Weighter, reference_model="x")
    assert expected_forwards(each, each.needs(None), outline()) == 50 * 2


def test_what_a_weighter_did_not_ask_for_is_not_known_before_a_step() -> None:
    start = StepStart(step=0, total_steps=1, rng=np.random.default_rng(0))
    with pytest.raises(ComponentError, match=r"start.reference is read .* Needs\(reference=self.params\)"):
        _ = start.reference
    with pytest.raises(ComponentError, match=r"start.indices: the samples of a stream have no index"):
        _ = start.indices
