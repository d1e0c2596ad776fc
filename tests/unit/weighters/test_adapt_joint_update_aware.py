"""The weighters adapt and joint_update_aware: golden numbers, an independent solution, and invariances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from dataflex.api.context import StepBatch, StepStart
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.probe.embeddings import Embeddings
from dataflex.weighters.adapt import AdaptParams, AdaptWeighter
from dataflex.weighters.base_anchors import AnchoredWeighter
from dataflex.weighters.joint_update_aware import JointUpdateAwareParams, JointUpdateAwareWeighter, joint_weights
from unit.fakes import MeasuringProbe, build, make_pool

KINDS = [AdaptWeighter, JointUpdateAwareWeighter]


class Vectors(MeasuringProbe):
    """Gives vectors of the pool's and of the validation samples."""

    def __init__(self, pool: Any, anchors: Any) -> None:
        self.pool = np.asarray(pool, np.float32)
        self.anchors = np.asarray(anchors, np.float32)
        self.asked: list[tuple[bool, list[int]]] = []

    def embeddings(self, measurement: Embeddings, indices: Any, samples: Any = None) -> Any:
        assert measurement.normalize
        self.asked.append((samples is None, np.asarray(indices).tolist()))
        return (self.pool if samples is None else self.anchors)[indices]


def start(probe: Vectors, step: int = 0, seed: int = 0) -> StepStart:
    pool, validation = (make_pool({"a": len(each)}) for each in (probe.pool, probe.anchors))
    return StepStart(step, 100, np.random.default_rng(seed), pool, probe, validation)


def shown(vectors: Any, step: int = 0) -> StepBatch:
    pooled = torch.as_tensor(np.asarray(vectors, np.float32))
    return StepBatch(torch.ones(len(pooled)), step, 100, pooled=pooled)


def weights_of(
    kind: type[AnchoredWeighter[Any]], vectors: Any, anchors: Any, pool: Any = ((1.0, 0.0),), **params: Any
) -> Tensor:
    weighter = build(kind, **{"center_samples": 0, **params})
    weighter.begin_step(start(Vectors(pool, anchors)))
    weights: Tensor = weighter.weigh(shown(vectors))
    return weights


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def test_adapt_has_the_golden_numbers() -> None:
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    phi = Embeddings(pooling="weighted_mean").reduce(hidden, torch.tensor([[True, True, False]]))
    np.testing.assert_allclose(phi[0], [0.447214, 0.894427], atol=1e-6)
    anchors = [(1.0, 0.0), (0.6, 0.8)]
    for tau, expected in [(1.0, 0.671625), (0.1, 0.999220)]:
        assert weights_of(AdaptWeighter, phi, anchors, tau=tau).item() == pytest.approx(expected, abs=1e-6)
    assert weights_of(AdaptWeighter, phi, anchors, tau=0.1, clip=0.9).item() == pytest.approx(0.9)
    earlier = build(AdaptWeighter, defaults="dataflex_1")
    earlier.begin_step(start(Vectors([(1, 0)], anchors)))
    assert earlier.weigh(shown(phi)).item() == pytest.approx(0.671625, abs=1e-6)


Z, U = [(1.0, 0.0), (0.8, 0.6), (0.0, 1.0)], [(0.6, 0.8)]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"beta": 0.1, "tau": 0.05, "iterations": 5, "damping": 1.0}, (0.001092, 0.924408, 0.074500)),
        ({"defaults": "dataflex_1"}, (0.001092, 0.924408, 0.074500)),
        ({"beta": 0.1, "tau": 0.05, "iterations": 5, "damping": 0.5}, (0.011464, 0.907207, 0.081330)),
        ({"beta": 1.0, "tau": 0.05, "iterations": 5, "damping": 1.0}, (0.0, 0.000003, 0.999997)),
        ({"beta": 1.0, "tau": 0.05}, (0.138278, 0.478658, 0.383063)),  # the solution
        ({"tau": 0.5, "mode": "align_only"}, (0.219961, 0.451895, 0.328143)),
    ],
)
def test_joint_update_aware_has_the_golden_numbers(params: dict[str, Any], expected: tuple[float, ...]) -> None:
    found = weights_of(JointUpdateAwareWeighter, Z, U, **params)
    np.testing.assert_allclose(found.numpy() / 3, expected, atol=2e-6)


def objective(weights: np.ndarray, likeness: np.ndarray, alike: np.ndarray, beta: float, tau: float) -> float:
    entropy = -(weights * np.log(weights)).sum()
    return float(likeness @ weights - beta / 2 * weights @ alike @ weights + tau * entropy)


@pytest.mark.parametrize("seed", range(3))
def test_joint_weights_solve_their_problem(seed: int) -> None:
    """An optimizer that knows nothing of fixed points finds the same weights, also if the undamped map oscillates."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        count, tau = int(rng.integers(2, 7)), float(rng.uniform(0.05, 1))
        beta = float(rng.choice([0, 0.3, 1, 3])) * tau * rng.uniform(1, 8)
        vectors, anchors = unit(rng.normal(size=(count, 4))), unit(rng.normal(size=(3, 4)))
        likeness, alike = vectors @ unit(anchors.mean(0)), vectors @ vectors.T
        given = torch.from_numpy(likeness), torch.from_numpy(alike), beta, tau, 2000, 2 / (2 + beta / tau)
        weights = joint_weights(*given).numpy() / count

        def lost(logits: np.ndarray, s=likeness, similar=alike, b=beta, t=tau) -> float:
            values = np.exp(logits - logits.max()) + 1e-300
            return -objective(values / values.sum(), s, similar, b, t)

        best = minimize(lost, np.zeros(count), method="BFGS", options={"gtol": 1e-10})
        assert objective(weights, likeness, alike, beta, tau) >= -best.fun - 1e-9
        expected = np.exp(best.x - best.x.max())
        np.testing.assert_allclose(weights, expected / expected.sum(), atol=1e-4)
        target = np.exp((likeness - beta * alike @ weights) / tau)
        np.testing.assert_allclose(weights, target / target.sum(), atol=1e-6)  # only the solution stays where it is
        whole = weights_of(JointUpdateAwareWeighter, vectors, anchors, beta=beta, tau=tau, iterations=2000)
        np.testing.assert_allclose(whole.numpy() / count, weights, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_adapt_equals_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        pool, vectors, anchors = (unit(rng.normal(size=(count, 5)) + 1) for count in (6, 4, 3))
        tau, center = float(rng.uniform(0.05, 1)), pool.mean(0)
        found = weights_of(AdaptWeighter, vectors, anchors, pool, tau=tau, center_samples=6)
        for vector, weight in zip(vectors, found, strict=True):
            cosines = [unit(vector - center) @ unit(anchor - center) for anchor in anchors]
            assert float(weight) == pytest.approx(1 / (1 + np.exp(-np.mean(cosines) / tau)), abs=1e-5)


def some(seed: int = 0, count: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(count, 6))), unit(rng.normal(size=(5, 6)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_their_samples(kind: type[AnchoredWeighter[Any]]) -> None:
    vectors, anchors = some()
    order = np.random.default_rng(1).permutation(9)
    weights = weights_of(kind, vectors, anchors)
    assert weights.std() > 0.01
    torch.testing.assert_close(weights_of(kind, vectors[order], anchors), weights[order])
    torch.testing.assert_close(weights_of(kind, vectors, anchors[::-1]), weights)
    torch.testing.assert_close(weights_of(kind, vectors, np.repeat(anchors, 3, 0)), weights)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
    torch.testing.assert_close(weights_of(kind, vectors @ rotation, anchors @ rotation), weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_samples_have_equal_weights(kind: type[AnchoredWeighter[Any]]) -> None:
    vectors, anchors = some()
    weights = weights_of(kind, np.repeat(vectors[:1], 4, 0), anchors)
    torch.testing.assert_close(weights, weights[:1].expand(4))
    if kind is JointUpdateAwareWeighter:
        torch.testing.assert_close(weights, torch.ones(4))
        one = weights_of(kind, vectors[:1], anchors)
        torch.testing.assert_close(one, torch.ones(1))


def test_only_joint_weights_depend_on_the_other_samples() -> None:
    vectors, anchors = some()
    whole, part = (weights_of(AdaptWeighter, each, anchors) for each in (vectors, vectors[:4]))
    torch.testing.assert_close(whole[:4], part)
    assert AdaptWeighter.elementwise
    joint, part = (weights_of(JointUpdateAwareWeighter, each, anchors) for each in (vectors, vectors[:4]))
    assert not JointUpdateAwareWeighter.elementwise
    assert (joint[:4] / joint[0] - part / part[0]).abs().max() > 1e-3
    assert joint.mean().item() == pytest.approx(1, abs=1e-6)


def test_alike_samples_share_their_weight() -> None:
    twins = [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    weights = weights_of(JointUpdateAwareWeighter, twins, [(1.0, 1.0)], beta=5.0, tau=0.1, mode="diverse_only")
    assert weights[0] == pytest.approx(weights[1])
    assert weights[2] > 1.3 * weights[0]


def test_a_common_direction_gives_equal_weights_unless_it_is_subtracted() -> None:
    rng = np.random.default_rng(0)
    pool = unit(rng.normal(size=(40, 8)) + 4)
    plain = weights_of(AdaptWeighter, pool[:20], pool[:3], pool, defaults="dataflex_1")
    assert plain.max() / plain.min() < 1.05
    told = weights_of(AdaptWeighter, pool[:20], pool[:3], pool, center_samples=40)
    assert told.max() / told.min() > 3


def test_anchors_are_embedded_at_their_cadence_and_kept_by_a_resume() -> None:
    rng = np.random.default_rng(0)
    probe = Vectors(unit(rng.normal(size=(30, 4))), unit(rng.normal(size=(12, 4))))
    params = {"anchor_every": 5, "anchors": 4, "center_samples": 7}
    weighter = build(AdaptWeighter, **params)
    for step in (0, 3, 4, 6, 9, 11, 30):  # it is asked in the steps it weighs
        weighter.begin_step(start(probe, step, seed=step))
    assert [of_pool for of_pool, _ in probe.asked] == [False, True] * 4  # in steps 0, 6, 11, 30
    draws = [indices for _, indices in probe.asked]
    assert [len(draw) for draw in draws] == [4, 7] * 4
    assert draws[0] != draws[2]
    assert all(draw == sorted(set(draw)) for draw in draws)
    again = build(AdaptWeighter, **params)
    again.load_state_dict(weighter.state_dict())
    again.begin_step(start(probe, 33))
    assert len(probe.asked) == 8
    batch = shown(probe.pool[:5])
    assert torch.equal(again.weigh(batch), weighter.weigh(batch))
    fresh = build(AdaptWeighter)
    fresh.load_state_dict({})
    assert fresh.state_dict() == {}


def test_defaults_of_the_earlier_release_by_name() -> None:
    adapt = AdaptParams(defaults="dataflex_1")
    assert (adapt.tau, adapt.anchor_every, adapt.clip, adapt.center_samples, adapt.anchors) == (1, 50, None, 0, None)
    joint = JointUpdateAwareParams(defaults="dataflex_1", damping=0.5)
    assert (joint.beta, joint.tau, joint.iterations, joint.damping) == (0.1, 0.05, 5, 0.5)
    assert (joint.pooling, joint.layer, joint.mode, joint.anchors) == ("last", -1, "full", 1)


def test_the_cost_counts_anchors_and_embeddings() -> None:
    run = RunOutline(Schedule(0, 1, -1, 120), 8, accumulation=2, validation=30)
    weighter = build(AdaptWeighter, anchors=20, center_samples=10)
    assert weighter.measured_samples(weighter.params.embeddings, run) == 3 * 30
    assert not weighter.decides_within_step
    assert build(JointUpdateAwareWeighter).decides_within_step
    single = RunOutline(Schedule(0, 1, -1, 120), 1)
    assert "one sample" in str(build(JointUpdateAwareWeighter).cannot_act(single))
    assert build(AdaptWeighter).cannot_act(single) is None
