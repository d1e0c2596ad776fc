"""The odm, group_dro, unimax and schedule mixers against their formulas in scalar arithmetic, and published numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dataflex.api.context import StepContext, StepStatistics
from dataflex.api.mixer import Mixer
from dataflex.config.loading import parse_config
from dataflex.data.pool import Pool
from dataflex.mixers.group_dro import GroupDroMixer
from dataflex.mixers.odm import OdmMixer, exploration
from dataflex.mixers.schedule import ScheduleMixer
from dataflex.mixers.unimax import UnimaxMixer
from dataflex.record.checkpoint import STATE_VERSION, read_state, write_state
from unit.fakes import FakeProbe, build, context, make_planner, make_pool, plans

NAN = float("nan")
VARIANTS = ("paper", "official")


def pool_of(count: int) -> Pool:
    return make_pool({f"d{number}": 3 + 2 * number for number in range(count)})


def heard(losses: Sequence[float], proportions: Sequence[float], step: int = 1, warmup: bool = False) -> StepStatistics:
    present = ~np.isnan(np.array(losses, dtype=float))
    return StepStatistics(
        step, np.array(losses, dtype=float), 10 * present, 1 * present, np.array(proportions), warmup=warmup
    )


def stepped(pool: Pool, losses: Sequence[float], step: int = 0) -> StepContext:
    values = np.array(losses, dtype=float)
    tokens = np.where(np.isnan(values), 0, 10)
    return StepContext(pool, FakeProbe(), step, 100, 1e-3, np.arange(4), tokens, values, np.empty(0))  # type: ignore[arg-type]


def loss_table(count: int, steps: int = 20) -> list[list[float]]:
    """Return losses of each step and domain; about a third of the domains is absent from a step, one step has none."""
    rng = random.Random(count)
    table = [[NAN if rng.random() < 0.3 else rng.uniform(0.5, 6.0) for _ in range(count)] for _ in range(steps)]
    table[7] = [NAN] * count
    return table


# odm


def odm_reference(
    history: list[tuple[list[float], list[float]]], count: int, variant: str, alpha: float
) -> list[float]:
    """Return the policy after a history of (losses, shares), each average written as the sum of its terms."""
    rewarded = [(losses, shares) for losses, shares in history if any(loss == loss for loss in losses)]
    t = len(rewarded)

    def eps(turn: int) -> float:
        if turn == 0:
            return 1 / count
        return min(1 / count, (math.log(count) / count / turn) ** 0.5)

    averages = []
    for domain in range(count):
        terms = [(losses[domain], shares[domain]) for losses, shares in rewarded if losses[domain] == losses[domain]]
        average = 0.0
        for age, (loss, share) in enumerate(reversed(terms)):
            average += (1 - alpha) * alpha**age * (loss / share if variant == "paper" else math.e**loss)
        averages.append(average)
    if t == 0:
        return [1 / count] * count
    raised = [math.e ** (eps(t - 1) * average) for average in averages] if variant == "paper" else averages
    return [(1 - count * eps(t)) * value / sum(raised) + eps(t) for value in raised]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("alpha", [0.9, 0.0])
def test_odm_follows_the_formula_step_by_step(count: int, variant: str, alpha: float) -> None:
    mixer, pool = build(OdmMixer, variant=variant, alpha=alpha), pool_of(count)
    history: list[tuple[list[float], list[float]]] = []
    spread, table = 0.0, loss_table(count, steps=40)
    for step, losses in enumerate(table):
        expected = odm_reference(history, count, variant, alpha)
        policy = mixer.mix(context(pool, start_step=step))
        np.testing.assert_allclose(policy, expected, rtol=0, atol=1e-9)
        assert policy.sum() == pytest.approx(1, abs=1e-12)
        floor = exploration(mixer.steps, count)
        assert count * floor <= 1 + 1e-12
        assert policy.min() >= floor - 1e-12
        spread = max(spread, policy.max() - policy.min())
        history.append((losses, expected))
        mixer.on_step(heard(losses, expected, step + 1))
    assert spread > 0.01
    assert mixer.steps == sum(any(loss == loss for loss in losses) for losses in table) < 40


def state_of(rewards: Sequence[float], steps: int) -> dict[str, Any]:
    values = np.array(rewards, dtype=float)
    return {"rewards": values, "log_perplexities": np.log(values), "steps": steps}


def test_odm_exploration_has_the_published_values() -> None:
    assert exploration(0, 7) == pytest.approx(1 / 7)
    assert exploration(1, 7) == pytest.approx(0.1429, abs=5e-5)
    assert exploration(100, 7) == pytest.approx(0.0527, abs=5e-5)
    assert exploration(1000, 7) == pytest.approx(0.0167, abs=5e-5)
    assert exploration(9, 3) == pytest.approx(0.201716, abs=5e-7)
    assert exploration(10, 3) == pytest.approx(0.191365, abs=5e-7)
    for count in (1, 2, 7, 49, 1000):
        values = [exploration(steps, count) for steps in range(200)]
        assert values == sorted(values, reverse=True)
        assert max(values) * count <= 1 + 1e-12


def test_odm_paper_policy_and_reward_by_hand() -> None:
    mixer = build(OdmMixer)
    mixer.load_state_dict(state_of([2, 3, 4], steps=10))
    np.testing.assert_allclose(mixer.mix(context(pool_of(3))), [0.305842, 0.331427, 0.362731], atol=5e-7)
    mixer.load_state_dict(state_of([2, 3, 4], steps=9))
    mixer.on_step(heard([NAN, 2.5, NAN], [0.7, 0.2, 0.1]))
    np.testing.assert_allclose(mixer.state_dict()["rewards"], [2, 3.95, 4], rtol=1e-12)
    assert mixer.steps == 10


def test_odm_official_reward_and_policy_by_hand() -> None:
    mixer = build(OdmMixer, variant="official")
    mixer.load_state_dict(state_of([5, 5, 5], steps=9))
    mixer.on_step(heard([2, 1.5, 3], [0.7, 0.2, 0.1]))
    rewards = np.exp(mixer.state_dict()["log_perplexities"])
    np.testing.assert_allclose(rewards, [5.238906, 4.948169, 6.508554], atol=5e-7)
    np.testing.assert_allclose(mixer.mix(context(pool_of(3))), [0.325009, 0.317593, 0.357398], atol=5e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_odm_equal_rewards_keep_equal_shares(variant: str, count: int) -> None:
    mixer, pool = build(OdmMixer, variant=variant), pool_of(count)
    for step in range(40):
        policy = mixer.mix(context(pool))
        np.testing.assert_allclose(policy, 1 / count, rtol=1e-12)
        mixer.on_step(heard([3.0] * count, policy.tolist(), step + 1))


@pytest.mark.parametrize("variant, least", [("paper", 0.51), ("official", 0.6)])
@pytest.mark.parametrize("better", [0, 1])
def test_odm_prefers_the_arm_of_larger_reward(variant: str, least: float, better: int) -> None:
    mixer, pool, rng = build(OdmMixer, variant=variant), pool_of(2), random.Random(3)
    policies = []
    for step in range(400):
        policy = mixer.mix(context(pool))
        policies.append(policy)
        drawn = rng.choices([0, 1], weights=policy.tolist(), k=6)
        losses = [(2.0 if arm == better else 1.0) + rng.gauss(0, 0.05) if arm in drawn else NAN for arm in (0, 1)]
        mixer.on_step(heard(losses, policy.tolist(), step + 1))
    average = np.mean(policies[20:], axis=0)
    assert average[better] > least
    assert sum(policy[better] > 0.5 for policy in policies[20:]) > 370


def test_odm_official_counts_the_steps_of_the_warm_up_but_learns_nothing_from_them() -> None:
    pool, mixer = pool_of(2), build(OdmMixer, variant="official")
    for step in range(20):
        mixer.on_step(heard([4.0, 2.0], [0.5, 0.5], step + 1, warmup=True))
    mixer.on_step(heard([2.0, 2.0], [0.5, 0.5], 21))
    np.testing.assert_allclose(mixer.mix(context(pool)), [0.5, 0.5], rtol=1e-12)
    mixer.on_step(heard([3.0, 2.0], [0.5, 0.5], 22))
    eps = (math.log(2) / 2 / 22) ** 0.5
    first = 0.9 * 0.1 * math.exp(2) + 0.1 * math.exp(3)
    second = 0.9 * 0.1 * math.exp(2) + 0.1 * math.exp(2)
    expected = [(1 - 2 * eps) * reward / (first + second) + eps for reward in (first, second)]
    np.testing.assert_allclose(mixer.mix(context(pool)), expected, rtol=1e-12)
    mixer.on_step(heard([9.0, 1.0], [0.5, 0.5], 23, warmup=True))  # that of a further cycle
    assert mixer.steps == 23
    assert mixer.mix(context(pool))[0] == pytest.approx(expected[0], abs=0.01)


def test_odm_official_keeps_the_shares_of_the_warm_up_until_rewards_arrive() -> None:
    pool = make_pool({"a": 30, "b": 10})
    mixer = build(OdmMixer, variant="official", initial_proportions={"b": 1, "a": 3})
    planner = make_planner(pool, steps=2, batch=4, warmup=5, rounds=2, mix=mixer)
    (warm,) = plans(planner, 1)
    for step in range(5):
        mixer.on_step(heard([1.0, 2.0], warm.proportions.tolist(), step + 1, warmup=True))
    decided = planner.plan(planner.schedule.slot_at(5), FakeProbe())  # type: ignore[arg-type]
    np.testing.assert_allclose(decided.proportions, [0.75, 0.25])
    assert "warm-up" in decided.undecided["mix"]
    for step in range(5, 7):
        mixer.on_step(heard([1.0, 2.0], [0.75, 0.25], step + 1))
    decided = planner.plan(planner.schedule.slot_at(7), FakeProbe())  # type: ignore[arg-type]
    eps = (math.log(2) / 2 / 7) ** 0.5
    np.testing.assert_allclose(decided.proportions[1], (1 - 2 * eps) * math.e / (1 + math.e) + eps, rtol=1e-9)
    assert "mix" not in decided.undecided


def test_odm_learns_in_warm_up_but_keeps_the_initial_proportions() -> None:
    pool = make_pool({"a": 30, "b": 10})
    mixer = build(OdmMixer, initial_proportions={"b": 1, "a": 3})
    planner = make_planner(pool, steps=2, batch=4, warmup=5, rounds=2, mix=mixer)
    (warm,) = plans(planner, 1)
    np.testing.assert_allclose(warm.proportions, [0.75, 0.25])
    for step in range(5):
        mixer.on_step(heard([1.0, 2.0], warm.proportions.tolist(), step + 1, warmup=True))
    decided = planner.plan(planner.schedule.slot_at(5), FakeProbe())  # type: ignore[arg-type]
    expected = odm_reference([([1.0, 2.0], [0.75, 0.25])] * 5, 2, "paper", 0.9)
    np.testing.assert_allclose(decided.proportions, expected, atol=1e-12)
    assert expected[1] > 0.55


@pytest.mark.parametrize("variant", VARIANTS)
def test_odm_begins_with_equal_shares_for_any_initial_proportions(variant: str) -> None:
    mixer = build(OdmMixer, variant=variant, initial_proportions=[1, 2, 3])
    np.testing.assert_allclose(mixer.mix(context(pool_of(3))), 1 / 3)
    mixer.on_step(heard([NAN, NAN, NAN], [0.2, 0.3, 0.5]))
    assert mixer.steps == 0


def test_odm_exponents_are_neither_clipped_nor_overflow() -> None:
    pool, mixer = pool_of(2), build(OdmMixer)
    before, floor = exploration(49, 2), exploration(50, 2)
    mixer.load_state_dict(state_of([12 / before + 1, 1], steps=50))
    policy = mixer.mix(context(pool))
    assert (policy[0] - floor) / (policy[1] - floor) == pytest.approx(math.exp(12), rel=1e-6)
    mixer.load_state_dict(state_of([1e9, 1], steps=50))
    np.testing.assert_allclose(mixer.mix(context(pool)), [1 - floor, floor], rtol=1e-12)
    mixer = build(OdmMixer, variant="official")
    for _ in range(50):
        mixer.on_step(heard([5000.0, 4999.0], [0.5, 0.5]))
    shares = np.array([math.e, 1]) / (math.e + 1)
    np.testing.assert_allclose(mixer.mix(context(pool)), (1 - 2 * floor) * shares + floor, rtol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_odm_gives_a_domain_without_a_loss_the_floor_or_the_least_share(variant: str) -> None:
    mixer = build(OdmMixer, variant=variant)
    for step in range(10):
        mixer.on_step(heard([2.0, NAN, 3.0], [0.5, 0.0, 0.5], step + 1))
    policy = mixer.mix(context(pool_of(3)))
    assert policy[1] == policy.min()
    if variant == "official":
        assert policy[1] == pytest.approx(exploration(10, 3), rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_odm_works_with_many_domains(variant: str) -> None:
    mixer, pool = build(OdmMixer, variant=variant), pool_of(1000)
    rng = np.random.default_rng(0)
    for step in range(200):
        policy = mixer.mix(context(pool))
        losses = np.where(rng.random(1000) < 0.3, rng.uniform(1, 4, 1000), NAN)
        mixer.on_step(heard(losses.tolist(), policy.tolist(), step + 1))
    assert policy.sum() == pytest.approx(1, abs=1e-9)
    assert policy.min() >= exploration(199, 1000) - 1e-15


@pytest.mark.parametrize("given", [{"alpha": 1.0}, {"alpha": -0.1}, {"variant": "code"}, {"warmup_steps": 3}])
def test_odm_refuses_bad_parameters(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OdmMixer.Params(**given)


# group_dro


def group_dro_reference(table: list[list[float]], sizes: list[int], eta: float, constant: float) -> list[float]:
    """Return the weights after the losses in a table: one exponential of the sum of each domain's adjusted losses."""
    sums = [
        math.fsum(row[domain] + constant * size**-0.5 for row in table if row[domain] == row[domain])
        for domain, size in enumerate(sizes)
    ]
    raised = [math.e ** (eta * (value - max(sums))) for value in sums]
    return [value / sum(raised) for value in raised]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("eta, constant", [(0.01, 0.0), (0.5, 2.0)])
def test_group_dro_follows_the_formula_step_by_step(count: int, eta: float, constant: float) -> None:
    mixer, pool = build(GroupDroMixer, eta=eta, adjustment=constant), pool_of(count)
    sizes = pool.domain_sizes.tolist()
    np.testing.assert_allclose(mixer.initial(context(pool)), [1] * count)
    table, seen, averages = loss_table(count), [], []
    for step, losses in enumerate(table):
        mixer.update_weights(stepped(pool, losses, step))
        seen.append(losses)
        expected = group_dro_reference(seen, sizes, eta, constant)
        averages.append(expected)
        np.testing.assert_allclose(mixer.loss_weights, expected, rtol=0, atol=1e-9)
        assert mixer.loss_weights.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(mixer.average, np.mean(averages, axis=0), atol=1e-9)
    result = mixer.result(pool.domains)
    assert result is not None
    assert result["method"] == "group_dro"
    assert result["last"] == dict(zip(pool.domains, mixer.loss_weights.tolist(), strict=True))


def test_group_dro_by_hand() -> None:
    mixer, pool = build(GroupDroMixer, eta=math.log(2)), pool_of(3)
    mixer.initial(context(pool))
    mixer.update_weights(stepped(pool, [1.0, 2.0, NAN]))  # factors 2, 4 and 1
    np.testing.assert_allclose(mixer.loss_weights, [2 / 7, 4 / 7, 1 / 7], rtol=1e-12)
    adjusted = build(GroupDroMixer, eta=math.log(2), adjustment=6.0)
    pool = make_pool({"a": 9, "b": 36, "c": 4})
    adjusted.initial(context(pool))
    adjusted.update_weights(stepped(pool, [1.0, 2.0, NAN]))  # exponents 1 + 2, 2 + 1, none
    np.testing.assert_allclose(adjusted.loss_weights, [8 / 17, 8 / 17, 1 / 17], rtol=1e-12)


def test_group_dro_equal_losses_keep_equal_weights_and_shares_stay() -> None:
    mixer, pool = build(GroupDroMixer, eta=1.0), pool_of(4)
    mixer.initial(context(pool))
    for step in range(20):
        mixer.update_weights(stepped(pool, [2.5] * 4, step))
        np.testing.assert_allclose(mixer.loss_weights, 0.25, rtol=1e-12)
    mixer.update_weights(stepped(pool, [9.0, 1.0, 1.0, 1.0]))
    assert mixer.loss_weights[0] > 0.99
    np.testing.assert_allclose(mixer.mix(context(pool)), mixer.initial(context(pool)))


def test_group_dro_does_not_overflow_and_takes_many_domains() -> None:
    mixer, pool = build(GroupDroMixer, eta=1.0), pool_of(1000)
    mixer.initial(context(pool))
    losses = np.linspace(1, 2000, 1000).tolist()
    for step in range(50):
        mixer.update_weights(stepped(pool, losses, step))
    assert mixer.loss_weights[-1] == pytest.approx(1)
    assert np.isfinite(mixer.loss_weights).all()


@pytest.mark.parametrize("given", [{"eta": 0}, {"adjustment": -1}, {"weights": "next"}, {"initial_proportions": [1]}])
def test_group_dro_refuses_bad_parameters(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GroupDroMixer.Params(**given)


# unimax


def unimax_of(
    sizes: dict[str, int], budget: int, lengths: Sequence[int] | None = None, **params: Any
) -> dict[str, float]:
    """Return the samples each domain gets of a run of ``budget`` samples, trained in rounds of 5 steps of 2."""
    pool = make_pool(
        sizes,
        [length for size, length in zip(sizes.values(), lengths, strict=True) for _ in range(size)]
        if lengths
        else None,
    )
    shares = build(UnimaxMixer, **params).mix(context(pool, total_steps=budget // 2, steps=5, size=10))
    return dict(zip(sizes, (shares * budget).tolist(), strict=True))


def test_unimax_has_the_numbers_of_another_implementation() -> None:
    """The example of the package unimax-sampling, in units of 10 000 000 characters."""
    sizes = {"swe": 179955884499, "fas": 184595788282, "ekk": 42541080893, "isl": 10027573389, "fao": 549707867}
    pool = Pool(None, tuple(sizes), np.array(list(sizes.values())))  # type: ignore[arg-type]
    ctx = context(pool, total_steps=250_000_000, steps=1, size=1000, candidates=np.arange(0))
    shares = dict(zip(sizes, build(UnimaxMixer, max_epochs=4).mix(ctx).tolist(), strict=True))
    expected = {
        "fao": 0.008795325872,
        "isl": 0.160441174224,
        "ekk": 0.2769211666346667,
        "swe": 0.27692116663466665,
        "fas": 0.27692116663466665,
    }
    assert shares == pytest.approx(expected, rel=1e-12)


def level_reference(budget: float, caps: list[float], lengths: list[float]) -> list[float]:
    """Return min(level, cap in the unit) / length of each domain, the level found by bisection."""
    low, high = 0.0, budget * max(lengths)

    def parts(level: float) -> list[float]:
        return [min(level / length, cap) for cap, length in zip(caps, lengths, strict=True)]

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(parts(middle)) < budget else (low, middle)
    return parts(high)


@pytest.mark.parametrize("unit", ["samples", "tokens"])
@pytest.mark.parametrize("seed", range(12))
def test_unimax_is_the_level_that_spends_the_budget(seed: int, unit: str) -> None:
    rng = random.Random(seed)
    count = rng.choice([1, 2, 3, 7])
    sizes = {f"d{number}": rng.randint(1, 200) for number in range(count)}
    lengths = [rng.randint(1, 30) for _ in sizes]
    epochs = rng.choice([0.5, 1, 4])
    caps = [epochs * size for size in sizes.values()]
    budget = 2 * rng.randint(1, max(1, int(sum(caps) / 2)))
    if sum(caps) < budget:
        caps = [cap * budget / sum(caps) for cap in caps]
    got = unimax_of(sizes, budget, lengths, max_epochs=epochs, unit=unit)
    expected = level_reference(
        budget, caps, [float(length) for length in lengths] if unit == "tokens" else [1.0] * count
    )
    np.testing.assert_allclose(list(got.values()), expected, rtol=1e-9)


def test_unimax_by_hand() -> None:
    sizes = {"a": 10, "b": 100, "c": 1000}
    assert unimax_of(sizes, 30) == pytest.approx({"a": 10, "b": 10, "c": 10})
    assert unimax_of(sizes, 90) == pytest.approx({"a": 10, "b": 40, "c": 40})
    assert unimax_of(sizes, 510) == pytest.approx({"a": 10, "b": 100, "c": 400})
    assert unimax_of(sizes, 510, max_epochs=5) == pytest.approx({"a": 50, "b": 230, "c": 230})
    assert unimax_of({"c": 1000, "a": 10, "b": 100}, 90) == pytest.approx({"c": 40, "a": 10, "b": 40})
    # Caps below the budget: all domains at their cap, so by size.
    assert unimax_of(sizes, 2220) == pytest.approx({"a": 20, "b": 200, "c": 2000})
    assert unimax_of({"a": 5}, 20) == pytest.approx({"a": 20})


def test_unimax_by_tokens_by_hand() -> None:
    # 60 samples: a has 20 tokens at most and is capped; b and c get 40 tokens each, b in samples of 1, c of 4.
    sizes, lengths = {"a": 10, "b": 100, "c": 100}, [2, 1, 4]
    assert unimax_of(sizes, 60, lengths, unit="tokens") == pytest.approx({"a": 10, "b": 40, "c": 10})
    assert unimax_of(sizes, 60, lengths) == pytest.approx({"a": 10, "b": 25, "c": 25})


def test_unimax_keeps_the_cap_over_a_whole_run() -> None:
    pool = make_pool({"a": 12, "b": 60, "c": 400})
    planner = make_planner(pool, steps=5, batch=24, rounds=2, warmup=5, mix=build(UnimaxMixer))
    indices = np.concatenate([plan.indices for plan in plans(planner, 3)])
    assert indices.size == 360
    counts = pool.domain_counts(indices)
    assert counts.tolist() == [12, 60, 288]
    assert np.unique(indices).size == 360


def test_unimax_works_in_warm_up_and_with_many_domains() -> None:
    pool = make_pool({"a": 10, "b": 90})
    ctx = context(pool, total_steps=50, steps=1, size=1)
    np.testing.assert_allclose(build(UnimaxMixer).initial(ctx), [0.2, 0.8])
    assert build(UnimaxMixer, initial_proportions=[3, 1]).initial(ctx).tolist() == [3, 1]
    shares = build(UnimaxMixer).mix(context(pool_of(1000), total_steps=1000, steps=1, size=500))
    assert shares.sum() == pytest.approx(1)


# schedule


def scheduled(points: list[tuple[int, Any]], step: int, count: int = 2, **params: Any) -> list[float]:
    mixer = build(ScheduleMixer, points=[{"step": at, "proportions": shares} for at, shares in points], **params)
    ctx = context(pool_of(count), start_step=step)
    shares = mixer.mix(ctx)
    assert mixer.initial(ctx).tolist() == shares.tolist()
    return shares.tolist()


def line_reference(points: list[tuple[int, list[float]]], step: int, linear: bool) -> list[float]:
    scaled = [(at, [share / sum(shares) for share in shares]) for at, shares in points]
    before = [point for point in scaled if point[0] <= step]
    after = [point for point in scaled if point[0] > step]
    if not before:
        return scaled[0][1]
    if not after or not linear:
        return before[-1][1]
    (begin, first), (end, second) = before[-1], after[0]
    return [
        (one * (end - step) + other * (step - begin)) / (end - begin) for one, other in zip(first, second, strict=True)
    ]


@pytest.mark.parametrize("interpolation", ["linear", "step"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_schedule_follows_the_points(count: int, interpolation: str) -> None:
    rng = random.Random(count)
    points = [(at, [rng.uniform(0.1, 9) for _ in range(count)]) for at in (3, 4, 11, 16)]
    for step in range(20):
        shares = scheduled(points, step, count, interpolation=interpolation)
        np.testing.assert_allclose(shares, line_reference(points, step, interpolation == "linear"), atol=1e-12)
        assert sum(shares) == pytest.approx(1, abs=1e-12)


def test_schedule_by_hand() -> None:
    points = [(10, [1, 3]), (20, [3, 1])]
    linear = [scheduled(points, step)[0] for step in (0, 10, 12, 15, 20, 500)]
    assert linear == pytest.approx([0.25, 0.25, 0.35, 0.5, 0.75, 0.75])
    held = [scheduled(points, step, interpolation="step")[0] for step in (0, 10, 19, 20, 500)]
    assert held == pytest.approx([0.25, 0.25, 0.25, 0.75, 0.75])
    # The scale of a point does not draw the line to it.
    assert scheduled([(0, [1, 0]), (10, [0, 100])], 5) == pytest.approx([0.5, 0.5])


def test_schedule_takes_lists_mappings_and_files(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"method": "doremi", "proportions": {"d1": 3, "d0": 1}}))
    points = [(0, [1, 1]), (10, {"d1": 1, "d0": 9}), (20, str(file))]
    got = [scheduled(points, step) for step in (0, 10, 15, 20)]
    np.testing.assert_allclose(got, [[0.5, 0.5], [0.9, 0.1], [0.575, 0.425], [0.25, 0.75]])


def test_schedule_is_read_at_the_first_step_of_a_round() -> None:
    pool = make_pool({"a": 50, "b": 50})
    points = [{"step": 0, "proportions": [1, 0]}, {"step": 10, "proportions": [0, 1]}]
    planner = make_planner(pool, steps=4, batch=5, rounds=3, warmup=2, mix=build(ScheduleMixer, points=points))
    made = plans(planner, 4)
    np.testing.assert_allclose([plan.proportions[1] for plan in made], [0, 0.2, 0.6, 1])
    assert [pool.domain_counts(plan.indices).tolist() for plan in made] == [[10, 0], [16, 4], [8, 12], [0, 20]]


def problems_of_schedule(**given: Any) -> str:
    raw = {"dataset": "a,b", "dataflex": {"mix": {"method": "schedule", **given}}}
    return "\n".join(map(str, parse_config(raw)[1]))


@pytest.mark.parametrize(
    "given, text",
    [
        ({}, r"mix\.points: needed"),
        ({"points": []}, r"mix\.points: .*at least 1 item"),
        (
            {"points": [{"step": 5, "proportions": [1]}] * 2},
            r"mix\.points: the steps of the points must ascend, but 5 comes after 5",
        ),
        ({"points": [{"step": -1, "proportions": [1]}]}, r"points\.0\.step: .*greater than or equal to 0"),
        ({"points": [{"step": 0.5, "proportions": [1]}]}, r"points\.0\.step: .*whole number"),
        ({"points": [{"step": 0}]}, r"points\.0\.proportions: needed"),
        ({"points": [{"step": 0, "proportions": 3}]}, r"points\.0\.proportions.*list of numbers"),
        ({"points": [{"step": 0, "proportions": [1], "at": 2}]}, r"points\.0\.at: "),
        ({"points": [{"step": 0, "proportions": [1]}], "interpolation": "liner"}, "did you mean 'linear'"),
    ],
)
def test_schedule_names_bad_points(given: dict[str, Any], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(problems_of_schedule(**given))


@pytest.mark.parametrize(
    "shares, text",
    [
        ([1, 2, 3], "at step 7: has 3 numbers for 2 domains"),
        ([0, 0], "at step 7: must have a positive sum"),
        ([1, -1], "at step 7: must be finite and not negative"),
        ({"a": 1}, "at step 7: has no share of b"),
        ({"a": 1, "bb": 2}, "at step 7: unknown domain 'bb'; did you mean 'b'"),
        ("nowhere.json", "at step 7: 'nowhere.json' cannot be read"),
    ],
)
def test_schedule_names_the_point_that_does_not_fit_the_domains(shares: Any, text: str) -> None:
    points = [{"step": 0, "proportions": [1, 1]}, {"step": 7, "proportions": shares}]
    problem = build(ScheduleMixer, points=points).check_domains(("a", "b"))
    assert problem is not None
    assert problem[0] == "points.1.proportions"
    assert problem[1].startswith(text)
    assert build(ScheduleMixer, points=points[:1]).check_domains(("a", "b")) is None


# state


def trajectory(mixer: Mixer, pool: Pool, table: list[list[float]], begin: int) -> list[list[float]]:
    """Return shares and loss weights at every step from ``begin`` on."""
    found = []
    for step in range(begin, len(table)):
        shares = mixer.mix(context(pool, start_step=step))
        shares = shares / shares.sum()
        weights: list[float] = []
        if mixer.weighs_loss:
            mixer.update_weights(stepped(pool, table[step], step))
            weights = mixer.loss_weights.tolist()
        found.append([*shares.tolist(), *weights])
        mixer.on_step(heard(table[step], shares.tolist(), step + 1))
    return found


@pytest.mark.parametrize("cut", [0, 1, 11])
@pytest.mark.parametrize(
    "make",
    [
        lambda: build(OdmMixer),
        lambda: build(OdmMixer, variant="official"),
        lambda: build(GroupDroMixer, eta=0.3),
    ],
    ids=["odm-paper", "odm-official", "group_dro"],
)
def test_a_state_stored_in_the_middle_resumes_exactly(make: Any, cut: int, tmp_path: Path) -> None:
    pool, table = pool_of(3), loss_table(3)
    whole = trajectory(make(), pool, table, 0)
    first = make()
    begun = trajectory(first, pool, table[:cut], 0)
    write_state(tmp_path, {"version": STATE_VERSION, "mix": first.state_dict()})
    trajectory(first, pool, table, cut)  # what is stored is not touched by going on
    second = make()
    second.load_state_dict(read_state(tmp_path)["mix"])
    assert begun + trajectory(second, pool, table, cut) == whole


def test_a_stored_state_is_not_changed_by_later_steps() -> None:
    mixer = build(OdmMixer)
    mixer.on_step(heard([1.0, 2.0], [0.5, 0.5]))
    state = mixer.state_dict()
    kept = {key: np.copy(value) for key, value in state.items()}
    mixer.on_step(heard([3.0, NAN], [0.5, 0.5]))
    for key, value in kept.items():
        assert np.array_equal(state[key], value)


def test_odm_may_be_resumed_with_the_other_variant() -> None:
    pool, table = pool_of(3), loss_table(3)
    paper, official = build(OdmMixer), build(OdmMixer, variant="official")
    for step, losses in enumerate(table):
        paper.on_step(heard(losses, [0.2, 0.3, 0.5], step + 1))
        official.on_step(heard(losses, [0.2, 0.3, 0.5], step + 1))
    resumed = build(OdmMixer, variant="official")
    resumed.load_state_dict(paper.state_dict())
    assert resumed.mix(context(pool)).tolist() == official.mix(context(pool)).tolist()
