"""The proportional, static, uniform and random mixers follow their formulas; bad proportions are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dataflex.api.context import RoundContext
from dataflex.api.mixer import Mixer
from dataflex.config.checks import problems_of
from dataflex.config.loading import split_config
from dataflex.errors import ComponentError
from dataflex.mixers.ado import ADOMixer
from dataflex.mixers.group_dro import GroupDroMixer
from dataflex.mixers.proportional import ProportionalMixer
from dataflex.mixers.random import RandomMixer
from dataflex.mixers.schedule import ScheduleMixer
from dataflex.mixers.static import StaticMixer
from dataflex.mixers.uniform import UniformMixer
from dataflex.planning.planner import check_proportions
from unit.fakes import build, context, make_planner, make_pool, plans

POOL = make_pool({"a": 900, "b": 90, "c": 10}, lengths=[2] * 900 + [10] * 90 + [100] * 10)


@pytest.mark.parametrize(
    "temperature, expected",
    [
        (1, [0.9, 0.09, 0.01]),
        (2, [30, 90**0.5, 10**0.5]),
        (0.5, [810_000, 8100, 100]),
        (1e9, [1, 1, 1]),
    ],
)
def test_proportional_follows_the_formula(temperature: float, expected: list[float]) -> None:
    shares = build(ProportionalMixer, temperature=temperature).mix(context(POOL))
    np.testing.assert_allclose(shares, np.array(expected) / sum(expected), rtol=1e-6)


def test_proportional_by_tokens() -> None:
    tokens = np.array([1800, 900, 1000])
    for temperature in (1, 3):
        shares = build(ProportionalMixer, size="tokens", temperature=temperature).mix(context(POOL))
        expected = tokens ** (1 / temperature)
        np.testing.assert_allclose(shares, expected / expected.sum(), rtol=1e-12)


def test_proportional_does_not_overflow() -> None:
    pool = make_pool({"a": 2, "b": 20_000})
    shares = build(ProportionalMixer, temperature=0.01).mix(context(pool))
    np.testing.assert_allclose(shares, [0, 1], atol=1e-12)


def test_static_keeps_the_given_proportions() -> None:
    mixer = build(StaticMixer, proportions=[7, 2, 1])
    assert mixer.mix(context(POOL)).tolist() == [7, 2, 1]
    assert mixer.initial(context(POOL)).tolist() == [7, 2, 1]


def test_uniform_gives_equal_shares() -> None:
    np.testing.assert_allclose(build(UniformMixer).mix(context(POOL)), [1 / 3] * 3)


@pytest.mark.parametrize(
    "mixer, expected",
    [(UniformMixer, [1, 1, 1]), (ProportionalMixer, [90, 9, 1]), (RandomMixer, [90, 9, 1])],
)
def test_initial_proportions_are_normalised_and_checked(mixer: type[Mixer], expected: list[float]) -> None:
    own = build(mixer).initial(context(POOL))
    np.testing.assert_allclose(own / own.sum(), np.array(expected) / sum(expected))
    assert build(mixer, initial_proportions=[1, 2, 3]).initial(context(POOL)).tolist() == [1, 2, 3]


def test_random_differs_by_round_and_repeats_by_seed() -> None:
    draws = [build(RandomMixer).mix(context(POOL, round=number)) for number in range(3)]
    for shares in draws:
        assert shares.sum() == pytest.approx(1)
        assert (shares >= 0).all()
    assert not np.allclose(draws[0], draws[1])
    assert not np.allclose(draws[1], draws[2])
    assert np.array_equal(draws[1], build(RandomMixer).mix(context(POOL, round=1)))
    assert not np.allclose(draws[1], build(RandomMixer).mix(context(POOL, round=1, seed=2)))


def test_random_has_the_moments_of_its_dirichlet() -> None:
    for concentration in (1.0, 50.0):
        mixer = build(RandomMixer, concentration=concentration)
        draws = np.stack([mixer.mix(context(POOL, round=number)) for number in range(2000)])
        variance = (1 / 3) * (2 / 3) / (3 * concentration + 1)
        np.testing.assert_allclose(draws.mean(0), 1 / 3, atol=4.5 * np.sqrt(variance / 2000))
        np.testing.assert_allclose(draws.var(0), variance, rtol=0.12)


@pytest.mark.parametrize(
    "proportions, text",
    [
        ([1.0, 2.0], "2 numbers for 3 domains"),
        ([1.0, 2.0, -1.0], "not be? negative|not negative"),
        ([0.0, 0.0, 0.0], "positive sum"),
    ],
)
def test_bad_proportions_are_found_before_training(proportions: list[float], text: str) -> None:
    names = ("a", "b", "c")
    for mixer, key in [(StaticMixer, "proportions"), (UniformMixer, "initial_proportions")]:
        problem = build(mixer, **{key: proportions}).check_domains(names)
        assert problem is not None
        assert problem[0] == key
        with pytest.raises(AssertionError, match=text):
            raise AssertionError(problem[1])
        assert build(mixer, **{key: [0.0, 1.0, 5.0]}).check_domains(names) is None
    assert build(UniformMixer).check_domains(names) is None


@pytest.mark.parametrize("given", [{}, {"proportions": None}, {"proportions": [1, float("nan")]}, {"temperature": 1}])
def test_bad_parameters_of_static_are_refused(given: dict) -> None:
    with pytest.raises(ValidationError):
        StaticMixer.Params(**given)


@pytest.mark.parametrize("method", ["aioli", "doremi", "group_dro", "uniform"])
def test_a_cap_that_would_mislead_is_refused_before_anything_is_loaded(method: str) -> None:
    key = "dataflex.mix.max_epochs_per_domain"
    needed = {"reference_model": "some/reference"} if method == "doremi" else {}
    for cap in (None, 3):
        mix = {"method": method, **needed, "max_epochs_per_domain": cap}
        found = {problem.key for problem in problems_of(split_config({"dataset": "a,b", "dataflex": {"mix": mix}}))}
        assert (key in found) == (cap is not None and method in ("aioli", "doremi"))


@pytest.mark.parametrize(
    "method, given",
    [
        (ADOMixer, lambda file: {"prior": file}),
        (GroupDroMixer, lambda file: {"proportions": file}),
        (ScheduleMixer, lambda file: {"points": [{"step": 0, "proportions": file}]}),
        (StaticMixer, lambda file: {"proportions": file}),
    ],
)
def test_a_file_of_shares_is_read_once(method: type[Mixer], given: Any, tmp_path: Path) -> None:
    file = tmp_path / "shares.json"
    file.write_text('{"a": 5, "b": 3, "c": 2}')
    mixer = build(method, **given(str(file)))
    first = mixer.mix(context(POOL))
    np.testing.assert_allclose(first / first.sum(), [0.5, 0.3, 0.2])
    file.write_text('{"a": 1, "b": 1, "c": 8}')
    np.testing.assert_array_equal(mixer.mix(context(POOL, round=1)), first)
    again = build(method, **given(str(file)))
    again.load_state_dict(mixer.state_dict())
    np.testing.assert_array_equal(again.mix(context(POOL, round=2)), first)


class Given(Mixer):
    """Returns whatever it is given."""

    family, name = "mixer", "given"
    value: object = None

    def mix(self, ctx: RoundContext) -> np.ndarray:
        return self.value


@pytest.mark.parametrize(
    "value",
    [
        [0.5, 0.5],
        [0.5, 0.5, 0, 0],
        [[0.2, 0.3, 0.5]],
        1.0,
        [0.5, 0.5, float("nan")],
        [0.5, 0.5, float("inf")],
        [0.6, 0.6, -0.2],
        [0.0, 0.0, 0.0],
    ],
)
def test_unusable_proportions_name_the_mixer(value: object) -> None:
    mixer = build(Given)
    mixer.value = np.array(value)
    with pytest.raises(ComponentError, match=r"mixer 'given' .*3 finite.*a, b, c"):
        make_planner(POOL, mix=mixer).plan(make_planner(POOL).schedule.slot_at(0), None)


def test_proportions_of_any_scale_are_normalised() -> None:
    mixer = build(Given)
    np.testing.assert_allclose(check_proportions(mixer, np.array([2, 1, 1]), POOL), [0.5, 0.25, 0.25])
    mixer.value = np.array([200, 100, 100])
    (plan,) = plans(make_planner(POOL, steps=4, batch=5, mix=mixer), 1)
    np.testing.assert_allclose(plan.proportions, [0.5, 0.25, 0.25])
    assert np.bincount(POOL.domain_ids(plan.indices)).tolist() == [10, 5, 5]
