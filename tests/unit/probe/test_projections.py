"""Random linear maps: unbiased, of the stated variance, independent of cuts of a gradient, good enough to rank."""

from __future__ import annotations

import contextlib
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from dataflex.api.probe import GradientSettings
from dataflex.errors import ComponentError
from dataflex.probe.gradient_features import GradientFeatures, GradientSimilarities
from dataflex.probe.layers import Lookup, Outer, Whole
from dataflex.probe.model import ModelProbe
from dataflex.probe.moments import Moments
from dataflex.probe.preconditioners import make_preconditioner
from dataflex.probe.projections import (
    CountProjection,
    IdentityProjection,
    KroneckerProjection,
    RademacherProjection,
    make_projection,
    plain_sketch,
)
from tiny import WORDS, sentence
from unit.fakes import make_pool
from unit.probe.models import collate, llama, lora, whole

CPU = torch.device("cpu")
KINDS = [CountProjection, RademacherProjection]


def mapped(projection: Any, rows: Tensor, name: str = "w", pieces: list[int] | None = None) -> Tensor:
    """Return the features of (B, n) gradients of one parameter, given piece by piece."""
    total = rows.shape[1]
    edges = [0, *(pieces or []), total]
    out = torch.zeros(rows.shape[0], projection.width, dtype=rows.dtype)
    for begin, end in pairwise(edges):
        projection.add(out, name, begin, rows[:, begin:end].clone(), total)
    return projection.folded(out)


def stated_variance(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Return the variance of the inner product of rows, (n,)."""
    squares, both = x.square().sum(1) * y.square().sum(1), (x * y).sum(1)
    return (squares + both**2 - 2 * (x.square() * y.square()).sum(1)) / dim


def pairs(kind: str, count: int, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return pairs of vectors of nothing in particular, or with a structure a projection could trip over."""
    generator = torch.Generator().manual_seed(5)
    x, noise = (torch.randn(count, size, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "repeated":
        x, noise = (values[:, :dim].repeat(1, -(-size // dim))[:, :size] for values in (x, noise))
    if kind == "uneven":
        scale = torch.logspace(0, -3, size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
        x, noise = x * scale, noise * scale
    return x, 0.5 * x + noise


@pytest.mark.parametrize(
    "kind, structure",
    [
        (CountProjection, "generic"),
        (CountProjection, "repeated"),
        (CountProjection, "uneven"),
        (RademacherProjection, "generic"),
    ],
)
def test_inner_products_are_kept_with_the_stated_variance(kind: Any, structure: str) -> None:
    dim, size, seeds = 64, 6400, 200
    x, y = pairs(structure, 20, size, dim)
    both = torch.cat([x, y])
    estimates = []
    for seed in range(seeds):
        features = mapped(kind(dim, seed, CPU), both.clone())
        estimates.append((features[:20] * features[20:]).sum(1))
    found, exact = torch.stack(estimates), (x * y).sum(1)
    variance = stated_variance(x, y, dim)
    assert ((found.mean(0) - exact).abs() < 4 * (variance / seeds).sqrt()).all()
    # 20 pairs in 200 seeds: the mean of the ratios is known to about 2 %.
    ratio = float((((found - exact) ** 2).mean(0) / variance).mean())
    assert 0.9 < ratio < 1.1


def test_kronecker_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(5)
    inputs, gradients, values = (torch.randn(2, 5, n, generator=generator).double() for n in (12, 9, 20))
    inputs[1], gradients[1], values[1] = (part[0] + 0.5 * part[1] for part in (inputs, gradients, values))
    ids = torch.tensor([[1, 4, 4, 0, 2], [4, 1, 3, 3, 4]])
    parts = {
        "matrix": [Outer(inputs, gradients), Outer(gradients.flip(1) @ torch.ones(9, 12).double(), gradients)],
        "experts": [Outer(inputs, gradients, 0, 27), Outer(inputs, gradients, 18, 27)],
        "table": [Lookup(ids, gradients, 6, None)],
        "vector": [Whole(values.sum(1))],
    }
    exact = sum(float(both[0] @ both[1]) for both in map(whole, parts.values()))
    estimates = []
    for seed in range(400):
        projection, out = KroneckerProjection(48, seed, CPU), torch.zeros(2, 48, dtype=torch.float64)
        for name, uses in parts.items():
            for use in uses:
                projection.add_part(out, name, use)
        estimates.append(float(out[0] @ out[1]))
    assert abs(np.mean(estimates) - exact) < 4 * np.std(estimates) / 20


def test_kronecker_is_linear_in_the_gradient() -> None:
    inputs, gradients = torch.randn(3, 4, 10, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    projection = KroneckerProjection(12, 1, CPU)
    together, apart = torch.zeros(2, 3, 12, dtype=torch.float64)
    projection.add_part(together, "w", Outer(inputs, gradients))
    for token in range(4):
        projection.add_part(apart, "w", Outer(inputs[:, token : token + 1], gradients[:, token : token + 1]))
    torch.testing.assert_close(together, apart)


def test_a_kronecker_sketch_is_not_worse_than_one_of_dense_matrices() -> None:
    """Of matrices x g and y h, (a + 2)(b + 2) / (a b) - 1 bounds the dense variance over |x|^2 |y|^2 |g|^2 |h|^2."""
    x, y = pairs("uneven", 20, 300, 8)
    g, h = pairs("repeated", 20, 200, 16)
    (inputs, gradients), estimates = (torch.cat([x, y]), torch.cat([g, h])), []
    for seed in range(300):
        projection, out = KroneckerProjection(128, seed, CPU), torch.zeros(40, 128, dtype=torch.float64)
        projection.add_part(out, "w", Outer(inputs.unsqueeze(1), gradients.unsqueeze(1)))
        estimates.append((out[:20] * out[20:]).sum(1))
    found, exact = torch.stack(estimates), (x * y).sum(1) * (g * h).sum(1)
    scale = torch.stack([each.square().sum(1) for each in (x, y, g, h)]).prod(0)
    variance = ((found - exact) ** 2).mean(0) / scale
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / 300**0.5).all()
    assert float(variance.mean()) < 10 / 8 * 18 / 16 - 1


def test_sketches_of_unit_vectors_equal_their_projections() -> None:
    places = torch.tensor([[0, 3, 36], [37, 99, 3]])
    expected = CountProjection(37, 3, CPU).of("w", 0, torch.eye(100)[places], 100)
    assert torch.equal(CountProjection(37, 3, CPU).of_units("w", places, 100), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_linear(kind: Any) -> None:
    x, y = pairs("generic", 2, 5000, 32)
    projection = kind(32, 0, CPU)
    torch.testing.assert_close(mapped(projection, 2 * x - 3 * y), 2 * mapped(projection, x) - 3 * mapped(projection, y))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_does_not_depend_on_how_a_gradient_is_cut(kind: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dim, size = int(rng.integers(1, 100)), int(rng.integers(100, 9000))
    x, _ = pairs("generic", 4, size, dim)
    expected = mapped(kind(dim, 0, CPU), x)
    pieces = np.sort(rng.choice(np.arange(1, size), size=8, replace=False)).tolist()
    torch.testing.assert_close(mapped(kind(dim, 0, CPU), x, pieces=pieces), expected)
    for row in range(4):  # and whatever else is in the batch
        torch.testing.assert_close(mapped(kind(dim, 0, CPU), x[row : row + 1])[0], expected[row])


@pytest.mark.parametrize("kind", KINDS)
def test_projections_of_shards_add_up(kind: Any) -> None:
    """Each process holds a stretch of the parameters; the sum of their features is the feature of the whole."""
    x, _ = pairs("generic", 3, 6000, 64)
    total = torch.zeros(3, 64, dtype=torch.float64)
    for begin, end in ((2000, 5000), (5000, 6000), (0, 2000)):
        shard = kind(64, 7, CPU)
        sums = torch.zeros(3, shard.width, dtype=torch.float64)
        shard.add(sums, "w", begin, x[:, begin:end].clone(), 6000)
        total += shard.folded(sums)
    torch.testing.assert_close(total, mapped(kind(64, 7, CPU), x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_is_determined_by_seed_and_name(kind: Any) -> None:
    x, _ = pairs("generic", 1, 3000, 64)
    first = mapped(kind(64, 1, CPU), x)
    assert torch.equal(first, mapped(kind(64, 1, CPU), x))
    others = [mapped(kind(64, 2, CPU), x), mapped(kind(64, 1, CPU), x, name="v")]
    for other in others:
        cosine = torch.nn.functional.cosine_similarity(first, other).abs()
        assert cosine < 5 / 64**0.5
        assert not torch.equal(first, other)


def test_parameters_of_one_shape_do_not_share_their_signs() -> None:
    """Under one map for all layers, opposite gradients of two layers would be lost."""
    x, _ = pairs("generic", 1, 3000, 64)
    for kind in KINDS:
        projection = kind(64, 0, CPU)
        kept = mapped(projection, x, "one") + mapped(projection, -x, "other")
        assert kept.norm() > x.norm()


def test_identity_is_the_gradient_in_order() -> None:
    sizes = {"a": 5, "b": 3, "c": 4}
    x = torch.arange(24, dtype=torch.float32).view(2, 12)
    projection, out = IdentityProjection(sizes, CPU), torch.zeros(2, 12)
    for name, begin, end in (("c", 8, 12), ("a", 0, 2), ("b", 5, 8), ("a", 2, 5)):
        start = begin - {"a": 0, "b": 5, "c": 8}[name]
        projection.add(out, name, start, x[:, begin:end].clone(), sizes[name])
    assert torch.equal(out, x)


def test_inputs_that_cannot_be_projected_are_refused() -> None:
    sizes = {"a": 60, "b": 40}
    for projection in ("count", "rademacher", "kronecker"):
        with pytest.raises(ComponentError, match=r"proj_dim.*101.*100"):
            make_projection(GradientSettings(projection=projection, dim=101), sizes, CPU)
        assert make_projection(GradientSettings(projection=projection, dim=100), sizes, CPU).dim == 100
    assert make_projection(GradientSettings(projection="identity", dim=8192), sizes, CPU).dim == 100
    for preconditioner in ("adam", "adam_less"):
        with pytest.raises(ComponentError, match=r"kronecker.*preconditioner: none"):
            make_projection(GradientSettings(preconditioner, "kronecker", dim=10), sizes, CPU)


# Ranking


def text(rng: random.Random, count: int) -> list[dict[str, list[int]]]:
    """Return samples of sentences, each begun with token 1."""
    rows = []
    for _ in range(count):
        ids = [1, *(2 + WORDS.index(word) for word in sentence(rng, 3, 20).split())]
        rows.append({"input_ids": ids, "labels": ids})
    return rows


@pytest.fixture(scope="module")
def probe() -> ModelProbe:
    """A briefly trained model with adapters of 24,576 numbers."""
    torch.manual_seed(0)
    model = lora(llama(hidden_size=64, intermediate_size=128, num_hidden_layers=3), r=8)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(25):
        model(**collate(text(rng, 16))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = text(rng, 80)
    pool = make_pool({"a": 80}, [len(row["input_ids"]) for row in rows], rows)
    return ModelProbe(
        pool=pool,
        model=lambda: model,
        collate=collate,
        autocast=contextlib.nullcontext,
        device=CPU,
        batch_tokens=400,
    )


@pytest.fixture(scope="module")
def exact(probe: ModelProbe) -> np.ndarray:
    return influence(probe, GradientSettings(projection="identity"))


def influence(probe: ModelProbe, settings: GradientSettings) -> np.ndarray:
    """Return the mean cosine of 64 samples with 16 validation samples."""
    targets = probe.measure(GradientFeatures(settings), np.arange(64, 80)).mean(0, keepdims=True)
    return probe.measure(GradientSimilarities(settings, targets), np.arange(64))[:, 0]


@pytest.mark.parametrize("projection", ["count", "kronecker"])
def test_projected_influence_ranks_as_the_exact_one(probe: ModelProbe, exact: np.ndarray, projection: str) -> None:
    assert sum(probe.parameter_sizes().values()) == 3 * 8192
    found = influence(probe, GradientSettings(projection=projection, dim=8192))
    assert spearmanr(found, exact).statistic > 0.9
    assert np.abs(found - exact).max() < 5 / 8192**0.5


def test_all_blocks_together_are_the_same_sketch() -> None:
    projection = CountProjection(37, 3, CPU)
    for start, size in ((0, 400), (5, 20), (36, 3), (74, 111), (100, 300)):
        values = torch.randn(4, size, dtype=torch.float64)
        sums = torch.zeros(4, projection.width, dtype=torch.float64)
        projection.add(sums, "weight", start, values.clone(), 400)
        found = plain_sketch(values, start, projection._key("weight"), 37)
        assert torch.allclose(found, projection.folded(sums), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [CountProjection, RademacherProjection, IdentityProjection])
@pytest.mark.parametrize("preconditioner", ["none", "adam", "adam_less"])
def test_directions_are_projected(kind: Any, preconditioner: str) -> None:
    """Signs and the sum are part of the preconditioner's passes in some projections."""
    generator = torch.Generator().manual_seed(2)
    gradients, average, square = (torch.randn(n, 500, generator=generator, dtype=torch.float64) for n in (3, 1, 1))
    moments = {"w": Moments(average[0], square[0].square(), 4, (0.8, 0.95), 1e-3)}
    made = make_preconditioner(GradientSettings(preconditioner), moments)
    projection = kind({"w": 500}, CPU) if kind is IdentityProjection else kind(37, 3, CPU)
    found, expected = torch.zeros(2, 3, projection.width, dtype=torch.float64)
    for begin, end in ((0, 130), (130, 131), (131, 500)):
        projection.add_directions(found, "w", begin, gradients[:, begin:end].clone(), 500, made)
    projection.add(expected, "w", 0, made("w", 0, gradients.clone()), 500)
    assert expected.norm() > 1
    torch.testing.assert_close(projection.folded(found), projection.folded(expected))
