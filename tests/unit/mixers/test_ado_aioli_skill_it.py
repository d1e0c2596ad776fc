"""ado, aioli and skill_it against scalar loops written from the papers' formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from dataflex.api.context import StepStatistics
from dataflex.api.mixer import Mixer
from dataflex.data.pool import Pool
from dataflex.errors import CheckpointError, ComponentError, ConfigError
from dataflex.mixers import base_scaling_law
from dataflex.mixers.ado import ADOMixer
from dataflex.mixers.aioli import AioliMixer, mixing_matrix
from dataflex.mixers.base_validation_loss import validation_losses
from dataflex.mixers.skill_it import SkillItMixer, read_graph
from dataflex.record.checkpoint import STATE_VERSION, read_state, write_state
from unit.fakes import MeasuringProbe, build, context, make_pool


def pool_of(count: int) -> Pool:
    return make_pool({f"d{number}": 3 + 2 * number for number in range(count)})


def targets_of(names: tuple[str, ...], samples: int = 2) -> Pool:
    pool = make_pool({name: samples for name in names})
    pool.__dict__["trained_tokens"] = np.full(pool.size, 5, dtype=np.int32)
    return pool


class Losses(MeasuringProbe):
    """A probe whose validation losses are those of the next row; every sample of a domain has its domain's loss."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.calls = np.asarray(rows, dtype=np.float32), 0

    def losses(self, measurement: Any, indices: np.ndarray, pool: Pool) -> np.ndarray:
        self.calls += 1
        return self.rows[self.calls - 1][pool.domain_ids(indices)]


def resumed(mixer: Mixer, folder: Path) -> Any:
    """Return a new mixer with the state of another, through a checkpoint's file."""
    folder.mkdir(exist_ok=True)
    write_state(folder, {"version": STATE_VERSION, "mixer": mixer.state_dict()})
    other = type(mixer)(mixer.params)
    other.load_state_dict(read_state(folder)["mixer"])
    return other


def step(number: int, losses: Any, samples: Any) -> StepStatistics:
    counts = np.asarray(samples, dtype=np.int64)
    values = np.where(counts > 0, np.asarray(losses, dtype=np.float64), np.nan)
    return StepStatistics(number, values, counts * 10, counts)


# --- the fit ----------------------------------------------------------------------------------------------------------


def slow_objective(law: Any, n: Any, losses: Any, min_e: float) -> float:
    """ADO's objective, point by point."""
    a, e, alpha = law
    total = 0.0
    for count, loss in zip(n, losses, strict=True):
        top = max(a - alpha * math.log(count), e)
        predicted = top + math.log(math.exp(a - alpha * math.log(count) - top) + math.exp(e - top))
        error = abs(math.log(loss) - predicted)
        total += 0.5 * error**2 if error <= 1e-3 else 1e-3 * (error - 0.5e-3)
    return total + max(alpha - 0.8, 0) + max(0.001 - alpha, 0) + max(a - 6.5, 0) + max(min_e - e, 0)


NUMBERS = np.arange(500, 6000, 23) * 32.0


@pytest.mark.parametrize("law", [(1.0, 0.7, 0.3), (2.0, -1.0, 0.2), (3.0, 0.5, 0.5), (4.0, -2.5, 0.35)])
def test_the_fit_recovers_the_law_of_a_curve_without_noise(law: tuple[float, float, float]) -> None:
    a, e, alpha = law
    found = base_scaling_law.fit(NUMBERS, np.exp(e) + np.exp(a) * NUMBERS**-alpha)
    np.testing.assert_allclose(found, law, rtol=1e-4)


@pytest.mark.parametrize("law, floor", [((1.5, 0.3, 0.3), None), ((3.0, -0.5, 0.4), 1.2), ((5.0, 1.0, 0.7), None)])
def test_the_fit_is_as_low_as_searches_from_many_starts(law: tuple[float, float, float], floor: float | None) -> None:
    a, e, alpha = law
    few = NUMBERS[::8]
    noise = np.random.default_rng(3).normal(0, 0.02, few.size)
    losses = (np.exp(e) + np.exp(a) * few**-alpha) * np.exp(noise)
    min_e = -math.inf if floor is None else math.log(floor)
    found = base_scaling_law.fit(few, losses, floor)
    assert found is not None
    starts = [(x, y, z) for x in (-1, 2, 5) for y in (-1, 0.5) for z in (0.1, 0.6)]
    lowest = min(
        minimize(slow_objective, start, (few, losses, min_e), method="Nelder-Mead", options={"maxfev": 1500}).fun
        for start in starts
    )
    value = slow_objective(found, few, losses, min_e)
    assert value <= lowest * (1 + 1e-6)
    assert value == pytest.approx(base_scaling_law.objective(found, np.log(few), np.log(losses), min_e), rel=1e-12)


@pytest.mark.parametrize("law", [(7.0, -0.5, 0.9), (2.0, 1.0, 0.0005), (1.0, 0.5, 0.3)])
def test_the_gradient_is_that_of_the_objective(law: tuple[float, float, float]) -> None:
    losses = 1.5 + 3 * NUMBERS**-0.2
    center = float(np.log(NUMBERS).mean())
    at = np.array([law[0] - law[2] * center, law[1], law[2]])
    arguments = (np.log(NUMBERS) - center, np.log(losses), center, 0.9)
    value, gradient = base_scaling_law._value_and_gradient(at, *arguments)
    assert value == pytest.approx(slow_objective(law, NUMBERS, losses, 0.9), rel=1e-10)
    for number in range(3):
        shift = np.eye(3)[number] * 1e-6
        ahead, behind = (base_scaling_law._value_and_gradient(at + sign * shift, *arguments)[0] for sign in (1, -1))
        assert gradient[number] == pytest.approx((ahead - behind) / 2e-6, rel=1e-4)


def test_too_few_points_give_no_law() -> None:
    assert base_scaling_law.fit(NUMBERS[:3], np.ones(3)) is None
    assert base_scaling_law.fit(NUMBERS[:9], np.array([1.0] * 8 + [0.0])) is None
    assert base_scaling_law.fit(NUMBERS[:9], np.array([1.0] * 8 + [np.nan])) is None


def test_the_history_is_bounded_and_keeps_means() -> None:
    history = base_scaling_law.LossHistory(16)
    losses = np.random.default_rng(0).uniform(1, 2, (100, 2))
    losses[:5, 1] = np.nan
    for number in range(100):
        history.add(np.array([3, 1]) * (number + 1), losses[number])
        assert history.size < 16
    assert history.stride == 8
    plain = {"ignore_steps": 0, "smoothing_steps": 0}
    for of_domain, per_step in [(True, 3), (False, 4)]:
        n, kept = history.curve(0, of_domain=of_domain, **plain)
        np.testing.assert_allclose(kept, [losses[low : low + 8, 0].mean() for low in range(0, 96, 8)], rtol=1e-12)
        np.testing.assert_allclose(n, [per_step * (low + 4.5) for low in range(0, 96, 8)], rtol=1e-12)
    assert history.curve(1, of_domain=True, **plain)[0][0] == 8 + 4.5  # its first point has steps without a loss
    assert history.curve(0, of_domain=True, ignore_steps=9, smoothing_steps=0)[0][0] == 3 * (16 + 4.5)


def test_a_state_of_another_length_is_refused() -> None:
    history = base_scaling_law.LossHistory(64)
    for number in range(40):
        history.add(np.array([number + 1]), np.array([2.0]))
    base_scaling_law.LossHistory(64).load_state_dict(history.state_dict())
    with pytest.raises(CheckpointError, match="history_points = 64, this run has 16"):
        base_scaling_law.LossHistory(16).load_state_dict(history.state_dict())


def test_the_window_of_the_smoothing_shrinks_with_the_points() -> None:
    history = base_scaling_law.LossHistory(16)
    losses = np.array([2.0, 1.7, 1.8, 1.4, 1.5, 1.1])
    for number, loss in enumerate(losses):
        history.add(np.array([number + 1]), np.array([loss]))
    (_, smooth) = history.curve(0, of_domain=True, ignore_steps=0, smoothing_steps=101)
    for low, at in [(0, 0), (0, 2), (1, 3), (1, 5)]:  # a cubic through the five points around each
        x = np.arange(low, low + 5)
        assert smooth[at] == pytest.approx(np.polyval(np.polyfit(x, losses[x], 3), at), rel=1e-9)
    (_, plain) = history.curve(0, of_domain=True, ignore_steps=0, smoothing_steps=4)
    np.testing.assert_array_equal(plain, losses)


# --- ado --------------------------------------------------------------------------------------------------------------


def with_laws(mixer: Any, laws: Any) -> Any:
    """Return a mixer that has laws without a fit, and whose next fit is far away."""
    state = mixer.state_dict()
    mixer.load_state_dict({**state, "laws": np.asarray(laws, dtype=np.float64), "fitted_at": 0})
    return mixer


def test_ado_gives_the_golden_numbers() -> None:
    pool = make_pool({"a": 600, "b": 400})
    mixer = build(ADOMixer, min_probability=0.0, start_step=10**6)
    mixer.mix(context(pool))
    with_laws(mixer, [[1, 0.7, 0.3], [1, 0.9, 0.5]])
    # Before the step h was such that it is one half each after it.
    mixer.load_state_dict({**mixer.state_dict(), "realised": np.array([0.5, 0.5])})
    mixer.on_step(step(1, [2, 2], [5000, 5000]))
    shares = mixer.mix(context(pool, start_step=1))
    np.testing.assert_allclose(shares, 0.9 * np.array([0.6, 0.4]) + 0.1 * np.array([0.850268, 0.149732]), atol=1e-7)
    laws = np.array([[1, 0.7, 0.3], [1, 0.9, 0.5]])
    levels = np.exp(laws[:, 1]) + np.exp(base_scaling_law.reducible(laws, np.full(2, 1e4)))
    np.testing.assert_allclose(levels, [2.185265, 2.486786], atol=1e-6)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_ado_follows_the_formulas_for_twenty_steps(count: int, same: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(count)
    pool = pool_of(count)
    lowest = 0.05
    mixer = build(ADOMixer, min_probability=lowest, use_same_step_size=same, start_step=10**6)
    mixer.mix(context(pool))
    laws = np.stack([rng.uniform(0, 3, count), rng.uniform(-1, 1, count), rng.uniform(0.01, 0.6, count)], axis=1)
    with_laws(mixer, laws)
    sizes = [3 + 2 * number for number in range(count)]
    prior = [size / sum(sizes) for size in sizes]
    before, history, seen = [prior], list(prior), [0] * count
    for number in range(1, 21):
        samples = rng.integers(1, 9, count) if number == 1 else rng.integers(0, 9, count)
        samples[number % count] += 1
        if number > 1:
            samples[(number + 1) % count] = 0
        mixer.on_step(step(number, rng.uniform(1, 3, count), samples))
        speeds = []
        for k in range(count):
            seen[k] += int(samples[k])
            history[k] = 0.9 * history[k] + 0.1 * samples[k] / samples.sum()
        for k in range(count):
            n = sum(seen) if same else seen[k]
            a, e, alpha = laws[k]
            level = math.exp(e) + math.exp(a) * n**-alpha
            speeds.append(max(alpha, 0.05) * (level - math.exp(e)) / n * prior[k] * math.sqrt(history[k]))
        rho = [max(speed / sum(speeds), lowest) for speed in speeds]
        rho = [share / sum(rho) for share in rho]
        mean = [sum(column) / len(before) for column in zip(*before, strict=True)]
        expected = [0.9 * old + 0.1 * new for old, new in zip(mean, rho, strict=True)]
        before.append(rho)  # of the step just made; the first is mu
        shares = mixer.mix(context(pool, start_step=number))
        np.testing.assert_allclose(shares, expected, rtol=1e-9)
        assert shares.sum() == pytest.approx(1, abs=1e-12)
        assert (shares >= 0.1 * lowest / (1 + count * lowest)).all()
        if number == 9:
            mixer = resumed(mixer, tmp_path)


def train_ado(mixer: Any, pool: Pool, first: int, last: int, laws: Any, absent: int | None = None) -> list[Any]:
    """Return what the mixer decides every 5 steps of a run whose losses follow laws exactly."""
    found = []
    for number in range(first, last + 1):
        if (number - 1) % 5 == 0:
            found.append(mixer.mix(context(pool, start_step=number - 1)))
        samples = np.full(len(laws), 4)
        if absent is not None:
            samples[absent] = 0
        elif number % 3 == 0:
            samples[0] = 0
        n = 4 * len(laws) * number
        mixer.on_step(step(number, [math.exp(e) + math.exp(a) * n**-alpha for a, e, alpha in laws], samples))
    return found


LAWS = [(2.0, -1.0, 0.3), (1.5, 0.4, 0.2), (3.0, 0.0, 0.5)]


def test_ado_fits_when_it_is_due_and_resumes_exactly(tmp_path: Path) -> None:
    pool = pool_of(3)
    params = {"start_step": 20, "fit_steps": 30, "ignore_steps": 5, "history_points": 32, "smoothing_steps": 0}
    whole = build(ADOMixer, **params)
    decisions = train_ado(whole, pool, 1, 120, LAWS)
    prior = np.array([3, 5, 7]) / 15
    for shares in decisions[:4]:
        np.testing.assert_allclose(shares, prior, rtol=1e-12)
    assert not np.allclose(decisions[4], prior, atol=1e-3)
    assert whole.fits == 4  # at 20, 50, 80 and 110
    np.testing.assert_allclose(whole.laws[1:], LAWS[1:], rtol=0.1, atol=0.03)  # points are means over 4 steps
    for cut in (17, 43, 66):
        half = build(ADOMixer, **params)
        start = train_ado(half, pool, 1, cut, LAWS)
        rest = train_ado(resumed(half, tmp_path), pool, cut + 1, 120, LAWS)
        np.testing.assert_array_equal(start + rest, decisions)


def test_ado_counts_failed_fits_and_keeps_the_earlier_law(caplog: pytest.LogCaptureFixture) -> None:
    pool = pool_of(3)
    mixer = build(ADOMixer, start_step=10, fit_steps=10, ignore_steps=0, smoothing_steps=0)
    decisions = train_ado(mixer, pool, 1, 31, LAWS, absent=2)
    np.testing.assert_allclose(decisions, [np.array([3, 5, 7]) / 15] * 7, rtol=1e-12)
    assert mixer.fits == 3
    assert mixer.failed_fits.tolist() == [0, 0, 3]
    assert "at step 10 no law could be fitted for d2" in caplog.text
    kept = mixer.laws[1].copy()
    mixer.on_step(step(32, [1.0, 0.0, 1.0], [4, 4, 4]))  # a loss of 0 has no logarithm
    mixer.mix(context(pool, start_step=40))
    assert mixer.failed_fits.tolist() == [0, 1, 4]
    np.testing.assert_array_equal(mixer.laws[1], kept)


def test_ado_begins_with_the_given_shares() -> None:
    pool = pool_of(2)
    mixer = build(ADOMixer, prior={"d0": 3, "d1": 1}, initial_proportions=[1, 1])
    assert mixer.initial(context(pool)).tolist() == [1, 1]
    assert mixer.mix(context(pool)).tolist() == [0.75, 0.25]
    assert build(ADOMixer, prior=[1, 3]).initial(context(pool)).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    "params, key, text",
    [
        ({"prior": [1, 0, 1]}, "prior", "is 0 for b"),
        ({"prior": [1, 1]}, "prior", "2 numbers for 3"),
        ({"min_probability": 0.34}, "min_probability", r"adds up to more than 1; use at most 0.333333"),
        ({"initial_proportions": {"a": 1, "b": 1, "x": 1}}, "initial_proportions", "unknown domain 'x'"),
    ],
)
def test_ado_refuses_parameters_that_do_not_fit_the_domains(params: dict, key: str, text: str) -> None:
    problem = build(ADOMixer, **params).check_domains(("a", "b", "c"))
    assert problem is not None
    assert problem[0] == key
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(problem[1])
    assert build(ADOMixer).check_domains(("a", "b", "c")) is None


@pytest.mark.parametrize("count", [1, 1000])
def test_ado_with_one_domain_and_with_a_thousand(count: int) -> None:
    pool = pool_of(count)
    mixer = build(ADOMixer, min_probability=1e-4, start_step=10**6)
    mixer.mix(context(pool))
    with_laws(mixer, np.tile([1.0, 0.5, 0.3], (count, 1)))
    for number in range(1, 11):
        mixer.on_step(step(number, np.ones(count), np.ones(count)))
    shares = mixer.mix(context(pool, start_step=10))
    assert shares.shape == (count,)
    assert shares.sum() == pytest.approx(1, abs=1e-12)


# --- the validation loss ----------------------------------------------------------------------------------------------


def test_validation_losses_are_means_over_tokens() -> None:
    pool = make_pool({"a": 2, "b": 3})
    pool.__dict__["trained_tokens"] = np.array([1, 3, 2, 0, 2], dtype=np.int32)
    losses = np.array([4, 1, 2, np.nan, 1], dtype=np.float32)

    class Samples(MeasuringProbe):
        def losses(self, measurement: Any, indices: np.ndarray, pool: Pool) -> np.ndarray:
            return losses[indices]

    given = context(pool, validation_pool=pool, probe=Samples())
    np.testing.assert_allclose(validation_losses(given), [(4 + 3) / 4, (4 + 2) / 4])
    pool.__dict__["trained_tokens"] = np.array([1, 3, 0, 0, 0], dtype=np.int32)
    with pytest.raises(ComponentError, match="no validation sample of 'b' has a token"):
        validation_losses(given)


def test_trained_tokens_are_labels_after_the_first() -> None:
    datasets = pytest.importorskip("datasets")
    labels = [[-100, 5, 6], [7, -100], [8], [9, 9, -100, 9], []]
    rows = {"input_ids": [[1] * len(row) for row in labels], "labels": labels}
    with_labels = Pool(datasets.Dataset.from_dict(rows), ("a",), np.array([5]))
    assert with_labels.trained_tokens.tolist() == [2, 0, 0, 2, 0]
    assert with_labels.trained.tolist() == [True, False, False, True, False]
    plain = Pool(datasets.Dataset.from_dict({"input_ids": rows["input_ids"]}), ("a",), np.array([5]))
    assert plain.trained_tokens.tolist() == [2, 1, 0, 3, 0]


# --- aioli ------------------------------------------------------------------------------------------------------------


def test_aioli_solves_for_the_golden_row() -> None:
    np.testing.assert_allclose(mixing_matrix(np.array([[0.3, 0.1, 0.1]]), 0.75), [[0.38, 0.06, 0.06]], atol=1e-12)


def slow_aioli(p: list[float], drops: list[list[float]], f: float, eta: float, normalize: bool) -> list[float]:
    """Return p after one update: Cramer-free, by the closed inverse of W = (f - g) I + g J."""
    count, rows = len(p), len(drops)
    g = (1 - f) / (count - 1)
    solved = [[(drops[i][j] - g * sum(drops[i])) / (f - g) for j in range(count)] for i in range(rows)]
    if normalize:
        low = min(min(row) for row in solved)
        if low < 0:
            solved = [[value - low for value in row] for row in solved]
        total = sum(sum(row) for row in solved)
        solved = [[value / total for value in row] for row in solved]
    grown = [p[j] * math.exp(eta * sum(row[j] for row in solved)) for j in range(count)]
    return [value / sum(grown) for value in grown]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count, others", [(2, 2), (3, 1), (7, 4)])
def test_aioli_goes_through_its_cycle(count: int, others: int, normalize: bool, tmp_path: Path) -> None:
    sweeps, exploit, f, eta = 2, 3, 0.6, 0.7
    cycle = sweeps * count + exploit
    rows = np.random.default_rng(count).uniform(1, 3, (4 * cycle, others)).astype(np.float32)
    probe = Losses(rows)
    pool, targets = pool_of(count), targets_of(tuple(f"v{number}" for number in range(others)))
    mixer = build(AioliMixer, lp_rounds=sweeps, exploit_rounds=exploit, one_hot_factor=f, eta=eta, normalize=normalize)
    p, used, number = [1 / count] * count, 0, 0
    for _ in range(3):
        before, used = rows[used].astype(float), used + 1
        drops = [[0.0] * count for _ in range(others)]
        for _ in range(sweeps):
            trained = []
            for _ in range(count):
                shares = mixer.mix(context(pool, validation_pool=targets, probe=probe, round=number, num_updates=999))
                (domain,) = np.flatnonzero(np.isclose(shares, f))
                trained.append(int(domain))
                wanted = np.full(count, (1 - f) / (count - 1))
                wanted[domain] = f
                np.testing.assert_allclose(shares, wanted, rtol=1e-12)
                after, used = rows[used].astype(float), used + 1
                for i in range(others):
                    drops[i][domain] += (before[i] - after[i]) / sweeps
                before, number = after, number + 1
                mixer = resumed(mixer, tmp_path)
            assert sorted(trained) == list(range(count))
        p = slow_aioli(p, drops, f, eta, normalize)
        for _ in range(exploit):
            shares = mixer.mix(context(pool, validation_pool=targets, probe=probe, round=number, num_updates=999))
            np.testing.assert_allclose(shares, p, rtol=1e-9)
            assert shares.sum() == pytest.approx(1, abs=1e-12)
            number += 1
        assert probe.calls == used


def test_aioli_with_a_moving_average_begins_at_equal_shares_each_time() -> None:
    rows = np.random.default_rng(0).uniform(1, 3, (20, 2)).astype(np.float32)
    probe, pool, targets = Losses(rows), pool_of(2), targets_of(("a", "b"))
    mixer = build(AioliMixer, lp_rounds=1, exploit_rounds=1, one_hot_factor=1.0, eta=0.5, normalize=False, ema=0.25)
    average, used = None, 0
    for cycle in range(3):
        drops = np.zeros((2, 2))
        for part in range(2):
            shares = mixer.mix(
                context(pool, validation_pool=targets, probe=probe, round=3 * cycle + part, num_updates=99)
            )
            drops[:, int(shares.argmax())] = rows[used + part].astype(float) - rows[used + part + 1].astype(float)
        average = drops if average is None else 0.75 * drops + 0.25 * average
        weights = np.exp(0.5 * average.sum(axis=0))
        shares = mixer.mix(context(pool, validation_pool=targets, probe=probe, round=3 * cycle + 2, num_updates=99))
        np.testing.assert_allclose(shares, weights / weights.sum(), rtol=1e-9)
        used += 3


def test_a_warm_up_between_rounds_does_not_count_as_learning() -> None:
    rows = [[3.0], [2.5], [9.0], [8.8]]
    probe, pool, targets = Losses(rows), pool_of(2), targets_of(("v",))
    given = {"validation_pool": targets, "probe": probe, "num_updates": 99}
    mixer = build(AioliMixer, lp_rounds=1, exploit_rounds=1, one_hot_factor=1.0, eta=1.0, normalize=False)
    first = int(mixer.mix(context(pool, **given)).argmax())
    assert mixer.initial(context(pool, round=1, **given)).tolist() == [0.5, 0.5]
    mixer.mix(context(pool, round=2, **given))
    weights = np.exp([0.5, 0.2] if first == 0 else [0.2, 0.5])
    shares = mixer.mix(context(pool, round=3, **given))
    np.testing.assert_allclose(shares, weights / weights.sum(), rtol=1e-6)
    assert probe.calls == 4


def test_aioli_keeps_equal_shares_if_no_loss_changes() -> None:
    probe, pool, targets = Losses(np.ones((9, 2))), pool_of(2), targets_of(("a", "b"))
    mixer = build(AioliMixer, lp_rounds=1, exploit_rounds=1)
    for number in range(3):
        shares = mixer.mix(context(pool, validation_pool=targets, probe=probe, round=number, num_updates=9))
    np.testing.assert_allclose(shares, [0.5, 0.5], rtol=1e-12)


def test_aioli_with_one_domain_measures_nothing_and_is_quick_with_a_thousand() -> None:
    probe = Losses(np.ones((1, 1)))
    alone = build(AioliMixer).mix(context(pool_of(1), validation_pool=targets_of(("v",)), probe=probe))
    assert alone.tolist() == [1.0]
    assert probe.calls == 0
    drops = np.random.default_rng(0).normal(size=(5, 1000))
    solved = mixing_matrix(drops, 0.75)
    np.testing.assert_allclose(solved.sum(axis=1), drops.sum(axis=1), rtol=1e-6)  # every mixture's shares sum to 1


def test_aioli_refuses_mixtures_that_are_all_the_same() -> None:
    problem = build(AioliMixer, one_hot_factor=0.25).check_domains(("a", "b", "c", "d"))
    assert problem is not None
    assert problem[0] == "one_hot_factor"
    assert "above 1 / 4" in problem[1]
    assert build(AioliMixer, one_hot_factor=0.26).check_domains(("a", "b", "c", "d")) is None


# --- skill_it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, others", [(1, 1), (2, 3), (3, 3), (7, 2)])
def test_skill_it_follows_the_formula_for_twenty_decisions(count: int, others: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(count)
    graph = rng.uniform(0, 1, (count, others))
    rows = rng.uniform(1, 4, (20, others)).astype(np.float32)
    probe, pool = Losses(rows), pool_of(count)
    targets = targets_of(tuple(f"v{number}" for number in range(others)))
    mixer = build(SkillItMixer, graph=graph.tolist(), eta=0.3, window=3)
    for number in range(20):
        weights = []
        for i in range(count):
            gain = 0.0
            for j in range(others):
                window = [1.0] if number == 0 else [float(rows[t][j]) for t in range(max(0, number - 2), number + 1)]
                gain += graph[i][j] * sum(window)
            weights.append(math.exp(0.3 * gain))
        if number in (1, 8):
            mixer = resumed(mixer, tmp_path)
        given = context(pool, validation_pool=targets, probe=probe, round=number)
        if number == 0:
            np.testing.assert_allclose(mixer.initial(given), np.array(weights) / sum(weights), rtol=1e-9)
        np.testing.assert_allclose(mixer.mix(given), np.array(weights) / sum(weights), rtol=1e-9)


def test_skill_it_does_not_overflow_with_a_thousand_domains() -> None:
    names = tuple(f"d{number}" for number in range(1000))
    probe = Losses(np.full((2, 1000), 9.0))
    mixer = build(SkillItMixer, eta=5.0)
    for number in range(2):
        shares = mixer.mix(context(pool_of(1000), validation_pool=targets_of(names, 1), probe=probe, round=number))
        np.testing.assert_allclose(shares, 1 / 1000, rtol=1e-9)


def test_the_default_graph_matches_names_then_positions() -> None:
    assert read_graph(None, ("a", "b"), ("b", "a")).tolist() == [[0.5, 1], [1, 0.5]]
    assert read_graph(None, ("a", "b"), ("x", "y")).tolist() == [[1, 0.5], [0.5, 1]]
    with pytest.raises(ConfigError, match=r"3 validation domains .* cannot be matched one to one with the 2 domains"):
        read_graph(None, ("a", "b"), ("x", "y", "z"))


def test_a_graph_in_a_file_is_read_by_name(tmp_path: Path) -> None:
    table = tmp_path / "graph.csv"
    table.write_text("domain,x,y\nb,3,4\na,1,2\n")
    mapping = tmp_path / "graph.json"
    mapping.write_text(json.dumps({"b": {"y": 4, "x": 3}, "a": {"x": 1, "y": 2}}))
    for path in (table, mapping):
        assert read_graph(str(path), ("a", "b"), ("y", "x")).tolist() == [[2, 1], [4, 3]]
        assert build(SkillItMixer, graph=str(path)).check_domains(("a", "b")) is None


def test_a_graph_in_a_file_is_read_once(tmp_path: Path) -> None:
    pool, targets, probe = pool_of(2), targets_of(("x", "y")), Losses(np.ones((9, 2)))
    file = tmp_path / "graph.csv"
    file.write_text("-,x,y\nd0,1,2\nd1,0,0\n")
    mixer = build(SkillItMixer, graph=str(file), eta=1.0)
    first = mixer.mix(context(pool, validation_pool=targets, probe=probe))
    assert first[0] == pytest.approx(1 / (1 + math.exp(-3)))
    file.unlink()
    second = resumed(mixer, tmp_path).mix(context(pool, validation_pool=targets, probe=probe, round=1))
    assert second[0] == pytest.approx(1 / (1 + math.exp(-6)))
    np.testing.assert_array_equal(
        mixer.mix(context(pool, validation_pool=targets, probe=Losses(np.ones((1, 2))))), second
    )


def test_a_large_graph_is_accepted(tmp_path: Path) -> None:
    names = tuple(f"domain {number}" for number in range(600))
    file = tmp_path / "graph.json"
    file.write_text(json.dumps({name: dict.fromkeys(names, 1) for name in names}))
    assert read_graph(str(file), names, names).shape == (600, 600)


@pytest.mark.parametrize(
    "graph, text",
    [
        ([[1, 2]], "has 1 rows for 2 domains"),
        ([[1, 2], [1]], "row of 'b' has 1 numbers for 2"),
        ([[1, 2], [1, -1]], "not negative, got -1.0 in the row of 'b', column 2"),
        ([[], []], "row of 'a' has 0 numbers"),
        ("a,x\nb,1\n", "no value for domain 'a'"),
        ("-,x\na,1\nb,1\nc,1\n", "unknown domain 'c'"),
        ("-,x,y\na,1,2\nb,1\n", "1 numbers for 2 columns"),
        ("-,x\na,1\na,1\n", "'a' is there twice"),
        ("-,x\na,one\nb,1\n", "cannot be read"),
        ("", "cannot be read: the file is empty"),
        ({"a": {"x": 1}, "b": {"z": 1}}, "row 'b': unknown validation domain 'z'"),
        ({"a": 1, "b": 2}, "must hold a mapping"),
        ({"a": {"x": True}, "b": {"x": 1}}, "must hold a mapping"),
        ({"a": {"x": float("nan")}, "b": {"x": 1}}, "finite"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused(graph: Any, text: str, tmp_path: Path) -> None:
    if not isinstance(graph, list):
        path = tmp_path / ("graph.csv" if isinstance(graph, str) else "graph.json")
        path.write_text(graph if isinstance(graph, str) else json.dumps(graph))
        graph = str(path)
    problem = build(SkillItMixer, graph=graph).check_domains(("a", "b"))
    assert problem is not None
    assert problem[0] == "graph"
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(problem[1])


def test_named_validation_sets_are_compared_with_the_graph_before_a_model_is_loaded() -> None:
    problem = build(SkillItMixer, validation=["x", "y", "z"]).check_domains(("a", "b"))
    assert problem is not None
    assert problem[0] == "graph"
    given = {"graph": [[1, 2], [3, 4]], "validation": ["x", "y", "z"]}
    assert "2 numbers for 3 validation domains" in build(SkillItMixer, **given).check_domains(("a", "b"))[1]
    assert build(SkillItMixer, **given, subtask_column="kind").check_domains(("a", "b")) is None
