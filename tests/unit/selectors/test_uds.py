"""UDS: nuclear norms of logits, projections, the distance to the samples trained last."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from dataflex import LogitNorms, LogitProjections
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.data.rng import derive_rng
from dataflex.probe import logit_norms
from dataflex.probe.logit_norms import nuclear_norm
from dataflex.selectors.uds import UdsSelector, utility
from unit.fakes import MeasuringProbe, build, context, decided, group_of, make_pool
from unit.probe.test_measurement import ROWS, collate, models, probe_of
from unit.selectors.test_s2l import step

__all__ = ["models"]  # the fixture

N = len(ROWS)


@pytest.mark.parametrize("part", [1, 3, 8192])
def test_nuclear_norms_are_sums_of_singular_values(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_norms, "_PART", part)
    assert nuclear_norm(torch.diag(torch.tensor([3.0, 4.0]))).item() == pytest.approx(7, abs=1e-6)
    assert nuclear_norm(torch.ones(2, 2)).item() == pytest.approx(2, abs=1e-6)
    for seed in (1, 2, 3):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            matrix = rng.normal(size=rng.integers(1, 12, 2))
            expected = np.linalg.svd(matrix, compute_uv=False).sum()
            found = nuclear_norm(torch.from_numpy(matrix).float()).item()
            assert found == pytest.approx(expected, rel=1e-6)
            turned = np.linalg.qr(rng.normal(size=(matrix.shape[0],) * 2))[0] @ matrix
            assert nuclear_norm(torch.from_numpy(turned).float()).item() == pytest.approx(expected, rel=1e-6)


def logits_of(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in ROWS]


def projected(logits: torch.Tensor, settings: LogitProjections) -> np.ndarray:
    """Return the projection by the fast Fourier transform of the whole matrix."""

    def draw(of: str) -> np.random.Generator:
        return derive_rng(settings.seed, "logit_projections", of)

    tokens, width = logits.shape
    signs = [np.where(draw(of).random(n) < 0.5, 1.0, -1.0) for of, n in (("tokens", tokens), ("words", width))]
    turned = np.fft.fft(logits.double().numpy() * signs[1], axis=1).real
    turned = np.fft.fft(turned * signs[0][:, None], axis=0).real
    rows = (draw("rows").random(settings.rows) * tokens).astype(int)
    columns = draw("columns").integers(width, size=settings.columns)
    return (turned[np.ix_(rows, columns)] / np.sqrt(settings.rows * settings.columns)).ravel()


@pytest.mark.parametrize("left", [False, True])
def test_norms_and_projections_equal_those_of_each_sample_alone(models: dict[str, Any], left: bool) -> None:
    model = models["llama"]
    alone = logits_of(model)
    settings = LogitProjections(rows=3, columns=5, seed=4)
    for budget in (16, 400):
        probe = probe_of(model, budget, collate=lambda rows: collate(rows, left))
        found = probe.measure(settings, np.arange(N))
        expected = np.array([projected(each, settings) for each in alone])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        norms = probe.measure(LogitNorms(settings, found[:2]), np.arange(N))
        singular = [np.linalg.svd(each.double().numpy(), compute_uv=False).sum() for each in alone]
        distances = np.linalg.norm(expected[:, None] - expected[None, :2], axis=2).mean(axis=1)
        trained = np.arange(N) != 3
        np.testing.assert_allclose(norms[trained, 0], np.array(singular)[trained], rtol=1e-5)
        np.testing.assert_allclose(norms[trained, 1], distances[trained], atol=1e-4)
        assert np.isnan(norms[3]).all()
        assert probe.measure(LogitNorms(settings), np.array([0]))[0, 1] == 0


def test_projections_keep_lengths_on_average() -> None:
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    lengths = [
        logit_norms._Projector(LogitProjections(8, 64, seed))(matrix).square().sum().item() for seed in range(200)
    ]
    kept = [(size + 2) / (2 * size) for size in matrix.shape]  # the real part: half, but all at frequencies 0 and n / 2
    assert np.mean(lengths) == pytest.approx(matrix.square().sum().item() * kept[0] * kept[1], rel=0.05)


def test_scores_have_the_golden_numbers() -> None:
    others, points = np.array([[0, 1], [3, 4]]), np.array([[0, 0], [1, 0]])
    distances = np.linalg.norm(points[:, None] - others[None], axis=2).mean(axis=1)
    np.testing.assert_allclose(distances, [3, 2.943175], atol=1e-6)
    found = utility(np.array([7, 2], np.float32), distances.astype(np.float32), 0.5)
    np.testing.assert_allclose(found, [8.5, 3.471588], atol=1e-6)


class Points(MeasuringProbe):
    """Gives every sample a norm and a point."""

    def __init__(self, norms: np.ndarray, points: np.ndarray) -> None:
        self.norms, self.points = norms.astype(np.float32), points.astype(np.float32)
        self.asked: list[list[int]] = []

    def logit_projections(self, measurement: LogitProjections, indices: Any, samples: Any) -> Any:
        self.asked.append(indices.tolist())
        return self.points[indices]

    def logit_norms(self, measurement: LogitNorms, indices: Any, samples: Any) -> Any:
        distances = np.zeros(indices.size)
        if measurement.others is not None:
            distances = np.linalg.norm(self.points[indices][:, None] - measurement.others[None], axis=2).mean(axis=1)
        return np.stack([self.norms[indices], distances], axis=1).astype(np.float32)


def test_samples_far_from_those_trained_last_are_preferred() -> None:
    rng = np.random.default_rng(2)
    pool, probe = make_pool({"a": 20}), Points(np.linspace(1, 2, 20), rng.normal(size=(20, 4)) * 100)
    ctx: Any = dataclasses.replace(context(pool), probe=probe)
    selector = build(UdsSelector, alpha=1.0, memory=3)
    assert decided(selector, ctx, group_of(pool, 4)).indices.tolist() == [16, 17, 18, 19]  # nothing to compare with
    for indices in ([0, 1], [2, 5], [7]):
        selector.on_step(step(indices, [1.0] * len(indices)))
    found = decided(selector, ctx, group_of(pool, 4)).indices.tolist()
    assert probe.asked == [[2, 5, 7]]
    scores = [
        probe.norms[i] + np.mean([np.linalg.norm(probe.points[i] - probe.points[j]) for j in (2, 5, 7)])
        for i in range(20)
    ]
    assert found == sorted(np.argsort(-np.array(scores))[:4].tolist())
    again = build(UdsSelector, alpha=1.0, memory=3)
    again.load_state_dict(selector.state_dict())
    assert decided(again, ctx, group_of(pool, 4)).indices.tolist() == found


def test_without_diversity_no_state_is_stored() -> None:
    selector = build(UdsSelector, alpha=0)
    assert selector.needs(None).step_losses == "nothing"
    selector.on_step(step([1, 2], [1.0, 1.0]))
    assert selector.state_dict()["recent"].size == 0
    assert build(UdsSelector).needs(None).step_losses == "samples"


def test_projections_are_counted_as_far_as_there_are_samples() -> None:
    run = RunOutline(Schedule(2, 5, -1, 22), 4, 100)
    selector = build(UdsSelector, memory=30)
    assert selector.measured_samples(LogitProjections(), run) == 8 + 28 + 30 + 30
    assert selector.measured_samples(LogitNorms(), run) == 400
