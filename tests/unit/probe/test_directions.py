"""Update directions, features and lengths of gradients, compared with optimizer steps and whole gradients."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex.api.probe import GradientSettings
from dataflex.data.token_loss import IGNORE_INDEX, shifted
from dataflex.probe.error_norms import ErrorNorms
from dataflex.probe.gradient_features import GradientFeatures, GradientSimilarities
from dataflex.probe.gradient_norms import GradientNorms
from dataflex.probe.gradients import GradientPass, canonical
from dataflex.probe.head import error_norm
from dataflex.probe.layers import Outer
from dataflex.probe.mode import probe_mode
from dataflex.probe.moments import Moments, read_moments
from dataflex.probe.preconditioners import AdamPreconditioner, NoPreconditioner, Preconditioner
from dataflex.probe.projections import CountProjection, IdentityProjection
from dataflex.probe.reducers import ProjectionReducer, Reducer
from unit.fakes import products_of
from unit.probe.models import (
    EXACT,
    LENGTHS,
    MODELS,
    a_batch,
    flat,
    llama,
    make,
    mixtral,
    one_by_one,
    opt,
    probe_of,
)

ADAM = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0}
CPU = torch.device("cpu")
Model = Any


def mean_loss(model: Model, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    logits = model(**inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def trained(model: Model, steps: int = 4, **options: Any) -> torch.optim.AdamW:
    """Return an optimizer with some steps of history on other data."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{**ADAM, **options})
    for step in range(steps):
        optimizer.zero_grad()
        mean_loss(model, *a_batch([8, 6, 11], seed=100 + step)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def moments_of(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Moments]:
    return {canonical(name): item for name, item in read_moments(optimizer, model).items()}


def sizes_of(model: Model) -> dict[str, int]:
    return {canonical(name): value.numel() for name, value in model.named_parameters() if value.requires_grad}


def measured(model: Model, sink: Reducer, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    sink.begin(labels.shape[0], torch.float64)
    sink.block_elements = 200
    GradientPass(model, sink.add, "mean", True, "error", torch.device("cpu")).run(dict(inputs), shifted(labels))
    return sink.result


def directions(model: Model, preconditioner: Preconditioner, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return whole directions, (B, P)."""
    return measured(
        model, ProjectionReducer(preconditioner, IdentityProjection(sizes_of(model), CPU), CPU), inputs, labels
    )


def parameters_of(model: Model) -> Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters() if value.requires_grad]).clone()


def alone(inputs: dict[str, Tensor], labels: Tensor, row: int) -> tuple[dict[str, Tensor], Tensor]:
    return {key: value[row : row + 1] for key, value in inputs.items()}, labels[row : row + 1]


# Adam


@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
@pytest.mark.parametrize("name", ["llama tied", "mixtral", "lora", "dora"])
def test_the_adam_direction_equals_the_next_optimizer_step(name: str, implementation: dict[str, bool]) -> None:
    model = make(MODELS[name])
    optimizer = trained(model, **implementation)
    inputs, labels = a_batch(LENGTHS)
    found = directions(model, AdamPreconditioner(moments_of(model, optimizer), less=False), inputs, labels)
    before = parameters_of(model)
    for row in range(len(LENGTHS)):
        other, its_optimizer = copy.deepcopy((model, optimizer))
        mean_loss(other, *alone(inputs, labels, row)).backward()
        its_optimizer.step()
        step = (before - parameters_of(other)) / ADAM["lr"]
        assert (found[row] - step).norm() < 1e-5 * step.norm()


@pytest.mark.parametrize("less", [False, True])
def test_parameters_without_a_gradient_move_with_the_moments(less: bool) -> None:
    model = make(lambda: mixtral(num_local_experts=8))
    optimizer = trained(model)
    moments = moments_of(model, optimizer)
    inputs, labels = a_batch([3])
    gradients = one_by_one(model, inputs, labels)
    found = directions(model, AdamPreconditioner(moments, less), inputs, labels)[0]
    pieces = dict(zip(moments, found.split(list(sizes_of(model).values())), strict=True))
    for part in ("embed_tokens", "experts.gate_up_proj", "experts.down_proj"):
        name = next(name for name in moments if part in name)
        item = moments[name]
        first, second = (0.9, 0.999) if less else item.betas
        average, square = first * item.exp_avg, second * item.exp_avg_sq
        if less:
            expected = average / (square + 1e-8).sqrt()
        else:
            count = item.step + 1
            expected = (average / (1 - first**count)) / ((square / (1 - second**count)).sqrt() + item.eps)
        shape = (item.exp_avg.shape[0], -1)
        untouched = ~gradients[name].view(shape).any(dim=1)
        assert 2 <= untouched.sum() < shape[0]
        moved = pieces[name].view(shape)[untouched]
        assert moved.any()
        torch.testing.assert_close(moved, expected.view(shape)[untouched], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "moments, gradient, inside, outside",
    [((0.01, 1e-6), 0.02, 9.266958, 9.299940), ((1e-6, 1e-12), 2e-6, 0.010999, 1.087495)],
)
def test_directions_have_the_golden_numbers(
    moments: tuple[float, float], gradient: float, inside: float, outside: float
) -> None:
    average, square = (torch.tensor([value], dtype=torch.float64) for value in moments)
    # After very many steps nothing is left of Adam's bias correction.
    item = Moments(average, square, 10**6, (0.9, 0.999), 1e-8)
    for less, expected in ((True, inside), (False, outside)):
        given = torch.full((1, 1), gradient, dtype=torch.float64)
        made = AdamPreconditioner({"x": item}, less)("x", 0, given)
        assert made.item() == pytest.approx(expected, rel=5e-5 if expected < 1 else 1e-6)


def test_a_parameter_without_moments_uses_zero_moments() -> None:
    zeros = torch.zeros(2, dtype=torch.float64)
    adam = AdamPreconditioner({"x": Moments(zeros, zeros, 0, (0.9, 0.999), 1e-8)}, less=False)
    made = adam("x", 0, torch.tensor([[3.0, 0.0], [-0.2, 1e-3]], dtype=torch.float64))
    torch.testing.assert_close(made, torch.tensor([[1.0, 0.0], [-1.0, 1.0]]).double(), rtol=1e-4, atol=0)


# Influence is real


def smooth() -> Model:
    return opt(activation_function="gelu", init_std=0.3, dropout=0.0)  # all of it in float64


def falls(model: Model, moved: Tensor, rates: list[float], held: tuple[dict[str, Tensor], Tensor]) -> list[float]:
    """Return by how much the loss falls per unit of learning rate, for steps along ``-moved``."""
    values = [value for value in model.parameters() if value.requires_grad]
    pieces = moved.split([value.numel() for value in values])
    found = []
    with torch.no_grad():
        before = mean_loss(model, *held)
        for rate in rates:
            for sign in (-1, 1):
                for value, piece in zip(values, pieces, strict=True):
                    value += sign * rate * piece.view(value.shape)
                if sign < 0:
                    found.append(float((before - mean_loss(model, *held)) / rate))
    return found


@pytest.mark.parametrize("adam", [False, True])
def test_the_loss_falls_by_the_influence(adam: bool) -> None:
    model = make(smooth)
    optimizer = trained(model)
    plain = NoPreconditioner()
    used = AdamPreconditioner(moments_of(model, optimizer), less=False) if adam else plain
    samples, held = a_batch([9, 6]), a_batch([12], seed=7)
    (target,) = directions(model, plain, *held)
    for moved in directions(model, used, *samples):
        influence = float(moved @ target)
        rates = [2.0**-k * 1e-3 / float(moved.norm()) for k in range(3)]
        errors = [fall - influence for fall in falls(model, moved, rates, held)]
        assert abs(errors[0]) < 0.05 * abs(influence)
        for larger, smaller in pairwise(errors):
            assert smaller / larger == pytest.approx(0.5, abs=0.02)  # what is left is of second order
        assert 2 * errors[2] - errors[1] == pytest.approx(0, abs=1e-5 * abs(influence))


def test_the_error_of_a_projected_influence_has_the_stated_variance() -> None:
    model = make(smooth)
    sizes = sizes_of(model)
    x, y = directions(model, NoPreconditioner(), *a_batch([9, 6]))
    dim, seeds = 256, 40
    pair, estimates = torch.stack([x, y]), []
    for seed in range(seeds):
        projection = CountProjection(dim, seed, CPU)
        out = torch.zeros(2, projection.width, dtype=torch.float64)
        for name, piece in zip(sizes, pair.split(list(sizes.values()), dim=1), strict=True):
            projection.add(out, name, 0, piece.clone(), sizes[name])
        first, second = projection.folded(out)
        estimates.append(float(first @ second))
    variance = float((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)) / dim
    assert abs(np.mean(estimates) - float(x @ y)) < 5 * np.sqrt(variance / seeds)
    assert np.std(estimates) > 0.5 * np.sqrt(variance)


# What the probe makes of them


@pytest.mark.parametrize("projection", ["count", "rademacher", "kronecker"])
def test_features_are_linear_in_the_gradients(projection: str) -> None:
    """A feature is one linear map of the whole gradient, however it was put together."""
    model = make(MODELS["lora"])
    inputs, labels = a_batch(LENGTHS)
    settings = GradientSettings(projection=projection, dim=96, normalize=False)
    probe = probe_of(model, inputs, labels)
    found = probe.measure(GradientFeatures(settings), np.arange(5))
    np.testing.assert_allclose(
        found, probe_of(model, inputs, labels, batch_tokens=1).measure(GradientFeatures(settings), np.arange(5)), 1e-4
    )
    unit = probe.measure(GradientFeatures(GradientSettings(projection=projection, dim=96)), np.arange(5))
    np.testing.assert_allclose(unit, found / np.linalg.norm(found, axis=1, keepdims=True), rtol=1e-5)
    targets = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    np.testing.assert_allclose(
        probe.measure(GradientSimilarities(settings, targets), np.arange(5)), found @ targets.T, rtol=1e-4
    )


def test_a_count_projection_sums_signed_entries_of_the_gradient() -> None:
    model = make(MODELS["mixtral"])
    inputs, labels = a_batch(LENGTHS)
    found = probe_of(model, inputs, labels).measure(
        GradientFeatures(GradientSettings(dim=128, seed=3, normalize=False)), np.arange(5)
    )
    projection = CountProjection(128, 3, CPU)
    expected = torch.zeros(5, projection.width, dtype=torch.float64)
    for name, rows in one_by_one(model, inputs, labels).items():
        projection.add(expected, name, 0, rows.clone(), rows.shape[1])
    np.testing.assert_allclose(found, projection.folded(expected).numpy(), rtol=1e-4, atol=1e-6)


def test_lengths_of_gradients_are_exact() -> None:
    model = make(MODELS["llama tied"])
    optimizer = trained(model)
    inputs, labels = a_batch(LENGTHS)
    labels[2] = IGNORE_INDEX
    probe = probe_of(model, inputs, labels, moments=lambda: read_moments(optimizer, model))
    lengths = probe.measure(GradientNorms(GradientSettings()), np.arange(5))
    exact = np.linalg.norm(flat(one_by_one(model, inputs, labels), model), axis=1)
    assert np.isnan(lengths).tolist() == [False, False, True, False, False]
    exact[2] = np.nan
    np.testing.assert_allclose(lengths, exact, rtol=1e-5)
    adam = directions(model, AdamPreconditioner(moments_of(model, optimizer), less=False), inputs, labels)
    lengths = probe.measure(GradientNorms(GradientSettings(preconditioner="adam")), np.arange(5))
    scored = [0, 1, 3, 4]
    np.testing.assert_allclose(lengths[scored], adam.norm(dim=1).numpy()[scored], rtol=1e-5)


@pytest.mark.parametrize("preconditioner", ["none", "adam"])
@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("name", ["llama tied", "mixtral", "lora"])
def test_products_equal_those_of_whole_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, ghost: bool, preconditioner: str
) -> None:
    monkeypatch.setattr(Outer, "small", property(lambda self: ghost))
    model = make(MODELS[name])
    optimizer = trained(model)
    inputs, labels = a_batch(LENGTHS)
    probe = probe_of(model, inputs, labels, moments=lambda: read_moments(optimizer, model))
    settings = GradientSettings(preconditioner=preconditioner)
    groups, targets = [np.array([0, 3]), np.array([1]), np.array([4, 2, 0])], np.array([2, 1])
    used = NoPreconditioner()
    if preconditioner == "adam":
        used = AdamPreconditioner(moments_of(model, optimizer), less=False)
    rows = directions(model, used, inputs, labels).numpy()
    for group, found in zip(
        groups,
        products_of(probe, groups, settings, targets),
        strict=True,
    ):
        exact = rows[group] @ rows[np.concatenate([group, targets])].T
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


def test_features_without_a_sketch_keep_every_product() -> None:
    model = make(llama)
    inputs, labels = a_batch(LENGTHS)
    probe = probe_of(model, inputs, labels)
    features = probe.measure(GradientFeatures(EXACT), np.arange(5))
    (products,) = products_of(probe, [np.arange(5)], EXACT, np.arange(5))
    np.testing.assert_allclose(products, np.hstack([features @ features.T] * 2), rtol=1e-4, atol=1e-5)


# EL2N


def test_the_error_norm_has_the_golden_number() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    assert error_norm(logits, torch.tensor([0])).item() == pytest.approx(0.424336, abs=1e-6)


def test_the_error_norm_is_the_distance_to_the_label() -> None:
    logits = 4 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 7
    exact = (logits.double().softmax(-1) - F.one_hot(labels, 7)).norm(dim=-1)
    torch.testing.assert_close(error_norm(logits, labels).double(), exact, rtol=1e-4, atol=1e-4)
    sure = torch.tensor([[1e4, 0.0, 0.0]] * 2)
    assert error_norm(sure, torch.tensor([0, 1])).tolist() == pytest.approx([0, 2**0.5])


def test_error_norms_of_samples_are_means_over_tokens() -> None:
    model = make(llama).float()
    inputs, labels = a_batch(LENGTHS)
    labels[3] = IGNORE_INDEX
    found = probe_of(model, inputs, labels).measure(ErrorNorms(), np.arange(5))
    with probe_mode(model):
        chances = model(**inputs).logits.softmax(-1)
    targets = shifted(labels)
    for row, value in enumerate(found.tolist()):
        counted = targets[row] != IGNORE_INDEX
        answers = F.one_hot(targets[row][counted], chances.shape[-1])
        exact = (chances[row][counted] - answers).norm(dim=-1).mean()
        assert value == pytest.approx(float(exact), rel=1e-4, nan_ok=True)
    assert np.isnan(found[3])
