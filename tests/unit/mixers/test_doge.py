"""DoGE: domain gradients equal autograd, weights equal plain sums, sketches approximate the exact gradients."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ValidationError

from dataflex.api.context import RoundContext, StepContext
from dataflex.api.probe import GradientSettings
from dataflex.config.loading import RunConfig
from dataflex.data.pool import Pool
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ComponentError
from dataflex.mixers.doge import DogeMixer, alignments
from dataflex.probe.model import ModelProbe
from unit.fakes import MeasuringProbe, build, context, make_pool
from unit.probe.models import a_batch, llama, lora, make, probe_of

GOLDEN = np.array([[1, 0], [0.6, 0.8], [0, 1]])
"""Gradients of three domains, all of length 1."""
GOLDEN_WEIGHTS = [0.331111, 0.336451, 0.332438]
"""After one step from equal weights at learning rate 1e-3 and mu 0.05."""


class Gradients(MeasuringProbe):
    """A probe that knows the gradient of every sample, and of every validation sample."""

    def __init__(self, samples: Any, targets: Any = None) -> None:
        self.samples, self.targets = np.asarray(samples), targets
        self.settings: list[GradientSettings] = []
        self.drawn: list[list[int]] = []

    def gradient_features(
        self, measurement: Any, indices: NDArray[np.int64], samples: Pool | None
    ) -> NDArray[np.float32]:
        self.settings.append(measurement.settings)
        if samples is not None:
            self.drawn.append(indices.tolist())
        return np.asarray((self.samples if samples is None else self.targets)[indices], dtype=np.float32)


def begun(pool: Pool, **params: Any) -> DogeMixer:
    """Return a mixer at the start of a run."""
    mixer = build(DogeMixer, **params)
    mixer.initial(context(pool))
    return mixer


def step_of(
    pool: Pool, probe: Any, indices: Any, tokens: Any, step: int = 0, rate: float = 1e-3, targets: Pool | None = None
) -> StepContext:
    return StepContext(
        pool=pool,
        probe=probe,
        step=step,
        total_steps=100,
        learning_rate=rate,
        indices=np.asarray(indices),
        tokens=np.asarray(tokens),
        losses=np.empty(0),
        excess=np.empty(0),
        validation_pool=targets,
    )


# The update


@pytest.mark.parametrize(
    "max_grad_norm, weights",
    [
        (5.0, [0.300022, 0.381403, 0.318575]),  # W is 1.8, 4.2 and 2.4
        (0.0, [0.300022, 0.381403, 0.318575]),
        (1.0, [0.322218, 0.349055, 0.328727]),  # 0.6, 1.4 and 0.8
    ],
)
def test_longer_gradients_are_cut_to_max_grad_norm(max_grad_norm: float, weights: list[float]) -> None:
    pool = make_pool({"a": 1, "b": 1, "c": 1})
    mixer = begun(pool, mu=0.01, max_grad_norm=max_grad_norm)
    mixer.update_weights(step_of(pool, Gradients(3 * GOLDEN), [0, 1, 2], [1, 1, 1]))
    np.testing.assert_allclose(mixer.loss_weights, weights, atol=1e-6)


def test_validation_gradients_are_cut_to_max_grad_norm() -> None:
    gradients, targets = np.array([[8.0, 0.0], [0.0, 0.5]]), np.array([[0.0, 6.0], [3.0, 0.0]])
    found = alignments(gradients, targets, "official", 4.0)
    # cut to (4, 0), (0, 0.5) and (0, 4), (3, 0); the mean length of the first two is 2.25, and 5 the largest W
    np.testing.assert_allclose(found, [5.0, 2 / 2.25], rtol=1e-6)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_doge_gives_the_golden_number(variant: str) -> None:
    pool = make_pool({"a": 1, "b": 1, "c": 1})
    mixer = begun(pool, variant=variant)
    mixer.update_weights(step_of(pool, Gradients(GOLDEN), [0, 1, 2], [1, 1, 1]))
    np.testing.assert_allclose(mixer.loss_weights, GOLDEN_WEIGHTS, atol=1e-6)
    np.testing.assert_allclose(alignments(GOLDEN, None, variant, 1.0), [0.6, 1.4, 0.8], rtol=2e-6)


def test_the_default_is_the_official_variant() -> None:
    long = alignments(10 * GOLDEN, None, "official", 1.0)
    np.testing.assert_allclose(long, [0.6, 1.4, 0.8], rtol=2e-6)  # cut to length 1
    np.testing.assert_allclose(alignments(10 * GOLDEN, None, "paper", 1.0), [60, 140, 80])
    short = alignments(0.1 * GOLDEN, None, "official", 1.0)
    np.testing.assert_allclose(short, [0.06, 0.14, 0.08], rtol=2e-5)  # 0.01 over a mean length of 0.1
    opposed = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert alignments(opposed, None, "official", 1.0).tolist() == [0, 0]
    assert alignments(opposed, None, "paper", 1.0).tolist() == [-1, -1]
    agreeing = np.ones((9, 1))
    np.testing.assert_allclose(alignments(agreeing, None, "official", 1.0), 5)  # 8, were it not for the limit
    assert build(DogeMixer).params.variant == "official"


def by_hand(
    weights: list[float],
    gradients: list[list[float] | None],
    targets: list[list[float]] | None,
    variant: str,
    rate: float,
    mu: float,
    c: float,
) -> list[float]:
    """Return the next weights in plain sums, number by number; None is the gradient of an absent domain."""

    def inner(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    def cut(gradient: list[float]) -> list[float]:
        length = math.sqrt(inner(gradient, gradient))
        return [value / length for value in gradient] if variant == "official" and length > 1 else gradient

    there = {number: cut(gradient) for number, gradient in enumerate(gradients) if gradient is not None}
    against = None if targets is None else [cut(target) for target in targets]
    raised = []
    for number, weight in enumerate(weights):
        score = 0.0
        if number in there:
            own = there[number]
            others = against or [gradient for other, gradient in there.items() if other != number]
            score = rate * sum(inner(own, other) for other in others)
            if variant == "official":
                score /= sum(math.sqrt(inner(one, one)) for one in there.values()) / len(there) + 1e-6
                score = min(max(score, 0.0), 5 * rate)
        raised.append(weight * math.exp(score / mu))
    return [(1 - c) * value / sum(raised) + c / len(weights) for value in raised]


@pytest.mark.parametrize("target", ["others", "validation"])
@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_twenty_steps_with_absent_domains_follow_the_formula(count: int, variant: str, target: str) -> None:
    rng = np.random.default_rng(count)
    pool = make_pool({f"d{number}": 5 for number in range(count)})
    validation = make_pool({"v": 3, "w": 2}) if target == "validation" else None
    mixer = begun(pool, variant=variant, target=target, mu=0.02, reweight_eps=0.01)
    expected, total, absences = [1 / count] * count, [0.0] * count, 0
    for step in range(20):
        # float32 holds these exactly; sums over samples too
        samples = rng.integers(-8, 9, (pool.size, 6)) / 8 + 0.25
        seen = rng.integers(-8, 9, (5, 6)) / 16
        indices = rng.integers(0, pool.size, 6)
        lengths = rng.integers(1, 5, 6)
        tokens, sums = [0] * count, [[0.0] * 6 for _ in range(count)]
        for index, length in zip(indices, lengths, strict=True):
            tokens[index // 5] += int(length)
            sums[index // 5] = [a + b for a, b in zip(sums[index // 5], samples[index], strict=True)]
        gradients = [
            [value / tokens[number] for value in sums[number]] if tokens[number] else None for number in range(count)
        ]
        absences += gradients.count(None)
        targets = [seen[:3].mean(0).tolist(), seen[3:].mean(0).tolist()] if validation else None
        rate = 1e-2 * (1 - step / 20)
        expected = by_hand(expected, gradients, targets, variant, rate, 0.02, 0.01)
        total = [a + b for a, b in zip(total, expected, strict=True)]
        probe = Gradients(samples, seen.astype(np.float64))
        mixer.update_weights(step_of(pool, probe, indices, tokens, step, rate, validation))
        np.testing.assert_allclose(mixer.loss_weights, expected, rtol=0, atol=1e-9)
    assert absences > 0 or count == 2
    if count == 2 and validation is None:
        assert expected == [0.5, 0.5]  # each has the other's product as its gain
    else:
        assert max(expected) > 1.02 * min(expected)
    np.testing.assert_allclose(mixer.average, np.array(total) / 20, rtol=0, atol=1e-9)


def test_an_absent_domain_gets_no_gain() -> None:
    pool = make_pool({"a": 2, "b": 2, "c": 2})
    mixer = begun(pool)
    probe = Gradients(np.repeat(GOLDEN, 2, axis=0))
    mixer.update_weights(step_of(pool, probe, [0, 2], [3, 3, 0], rate=0.1))
    assert mixer.loss_weights[0] == pytest.approx(mixer.loss_weights[1])
    ratio = mixer.loss_weights[0] / mixer.loss_weights[2]
    assert ratio == pytest.approx(math.exp(0.1 * (0.6 / 9) / (1 / 3) / 0.05), rel=1e-5)  # c stays where it was


@pytest.mark.parametrize("tokens", [[4, 0, 0], [0, 0, 0]])
def test_weights_stay_if_there_is_no_other_domain_to_compare_with(tokens: list[int]) -> None:
    pool = make_pool({"a": 2, "b": 2, "c": 2})
    for variant in ("official", "paper"):
        mixer = begun(pool, variant=variant)
        mixer.update_weights(step_of(pool, Gradients(np.ones((6, 3))), [0, 1], tokens))
        np.testing.assert_array_equal(mixer.loss_weights, np.full(3, 1 / 3))


def test_weights_stay_at_a_learning_rate_of_zero() -> None:
    pool = make_pool({"a": 1, "b": 1, "c": 1})
    mixer = begun(pool)
    for rate in (1e-2, 0.0):
        before = mixer.loss_weights
        mixer.update_weights(step_of(pool, Gradients(GOLDEN), [0, 1, 2], [1, 1, 1], rate=rate))
        assert np.allclose(mixer.loss_weights, before, atol=1e-12) == (rate == 0)


def test_a_resumed_run_equals_an_uninterrupted_run() -> None:
    pool, validation = make_pool({"a": 4, "b": 4, "c": 4}), make_pool({"v": 9})
    rng = np.random.default_rng(0)
    samples, seen = rng.normal(size=(6, 12, 5)), rng.normal(size=(9, 5))
    given = {"target": "validation", "validation_size": 3, "mu": 1e-3}

    def steps(mixer: DogeMixer, numbers: range) -> list[list[float]]:
        found = []
        for number in numbers:
            probe = Gradients(samples[number], seen)
            mixer.update_weights(step_of(pool, probe, range(12), [9, 8, 7], number, targets=validation))
            found.append(mixer.loss_weights.tolist())
        return found

    whole, first, second = begun(pool, **given), begun(pool, **given), build(DogeMixer, **given)
    expected = steps(whole, range(6))
    begin = steps(first, range(3))
    second.load_state_dict(first.state_dict())
    assert begin + steps(second, range(3, 6)) == expected
    assert second.result(pool.domains) == whole.result(pool.domains)
    np.testing.assert_allclose(list(whole.result(pool.domains)["proportions"].values()), np.mean(expected, axis=0))


# What is asked of the probe


def test_gradients_are_projected_without_normalisation() -> None:
    pool, validation = make_pool({"a": 1, "b": 1, "c": 1}), make_pool({"v": 4})
    probe = Gradients(GOLDEN, np.ones((4, 2)))
    given = {"projection": "rademacher", "proj_dim": 64, "projection_seed": 5, "unsupported_parameters": "ignore"}
    mixer = begun(pool, target="validation", **given)
    mixer.update_weights(step_of(pool, probe, [0, 1, 2], [1, 1, 1], targets=validation))
    domains, targets = probe.settings
    asked = GradientSettings("none", "rademacher", 64, domains.seed, "sum", normalize=False, unsupported="ignore")
    assert domains == asked
    assert targets == dataclasses.replace(asked, reduction="mean")  # also its map


def test_every_step_draws_another_random_map() -> None:
    pool = make_pool({"a": 1, "b": 1, "c": 1})
    probe = Gradients(GOLDEN)
    for seed, step in [(0, 0), (0, 1), (1, 0), (0, 1)]:
        mixer = begun(pool, projection_seed=seed)
        mixer.update_weights(step_of(pool, probe, [0, 1, 2], [1, 1, 1], step))
    first, second, other, again = (settings.seed for settings in probe.settings)
    assert len({first, second, other}) == 3
    assert second == again


def test_a_step_computes_only_with_its_own_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    count, calls = 3000, []
    pool = make_pool({f"d{number}": 1 for number in range(count)})
    domain_ids = Pool.domain_ids
    monkeypatch.setattr(Pool, "domain_ids", lambda pool, indices: calls.append(1) or domain_ids(pool, indices))
    tokens = np.zeros(count, dtype=np.int64)
    tokens[[7, 2999]] = [2, 4]
    mixer = begun(pool)
    probe = Gradients(np.ones((count, 3)))
    ctx = step_of(pool, probe, [2999, 7, 40], tokens)  # 40 has no token that counts
    np.testing.assert_array_equal(mixer._domain_gradients(ctx, np.array([7, 2999])), [[0.5] * 3, [0.25] * 3])
    assert len(calls) == 1


def test_validation_samples_are_drawn_by_step_and_seed() -> None:
    pool, validation = make_pool({"a": 1, "b": 1, "c": 1}), make_pool({"v": 30, "w": 3})
    validation.__dict__["trained"] = np.arange(33) != 31

    def drawn(step: int, seed: int = 0) -> list[int]:
        probe = Gradients(GOLDEN, np.ones((33, 2)))
        mixer = begun(pool, target="validation", validation_size=6, validation_seed=seed)
        mixer.update_weights(step_of(pool, probe, [0, 1, 2], [1, 1, 1], step, targets=validation))
        (indices,) = probe.drawn
        return indices

    first = drawn(3)
    assert len(set(first[:6])) == 6
    assert max(first[:6]) < 30
    assert first[6:] == [30, 32]
    assert drawn(3) == first
    assert drawn(4) != first
    assert drawn(3, seed=1) != first


def test_validation_samples_without_a_label_are_an_error() -> None:
    pool, validation = make_pool({"a": 1, "b": 1, "c": 1}), make_pool({"v": 2, "w": 2})
    validation.__dict__["trained"] = np.array([True, True, False, False])
    mixer = begun(pool, target="validation")
    with pytest.raises(ComponentError, match="no validation sample of 'w'"):
        mixer.update_weights(step_of(pool, Gradients(GOLDEN), [0, 1, 2], [1, 1, 1], targets=validation))


def asks(**params: Any) -> bool:
    return build(DogeMixer, **params).needs(RunConfig({}, None)).validation is not None


def test_validation_samples_are_needed_only_by_variants_that_use_them() -> None:
    assert asks(target="validation", validation=["v"])
    assert asks(target="validation", subtask_column="kind")
    assert not asks()
    for given in ({"validation": ["v"]}, {"subtask_column": "kind"}):
        with pytest.raises(ValidationError, match="target: validation only"):
            build(DogeMixer, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"mu": 0},
        {"variant": "code"},
        {"target": "all"},
        {"proj_dim": 0},
        {"feature_dir": "x"},
        {"clip": 1},
        {"max_grad_norm": -1.0},
        {"max_grad_norm": 5.0, "variant": "paper"},
        {"weights": "previous"},
    ],
)
def test_bad_parameters_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DogeMixer.Params(**given)


def test_samples_are_drawn_uniformly_or_by_the_given_shares() -> None:
    pool = make_pool({"a": 30, "b": 10})
    ctx: RoundContext = context(pool)
    assert begun(pool).mix(ctx).tolist() == [1, 1]
    assert begun(pool, proportions={"b": 1, "a": 3}).mix(ctx).tolist() == [3, 1]


# On a real model

LENGTHS = [9, 5, 14, 7, 12, 3, 8]
OWNERS = [0, 0, 1, 1, 1, 3, 3]
"""Domain of each sample of the batch; there is none of domain 2."""
PRESENT = np.array([0, 1, 3])


def real(maker: Any) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor, ModelProbe]:
    """Return a model, a batch, and a probe of a pool of four domains that holds its samples."""
    model = make(maker)
    inputs, labels = a_batch(LENGTHS)
    labels[1] = IGNORE_INDEX  # one sample has nothing to train on
    probe = probe_of(model, inputs, labels)
    sizes = {"a": 2, "b": 3, "c": 1, "d": 2}
    own = probe.pool
    rows = [own.rows(np.array([i]))[0] for i in (0, 1, 2, 3, 4, 4, 5, 6)]  # domain c: a sample the step has not
    probe.pool = make_pool(sizes, lengths=[len(row["input_ids"]) for row in rows], rows=rows)
    return model, inputs, labels, probe


INDICES = np.array([6, 0, 3, 1, 7, 2, 4])
"""The batch's samples in another order, as pool indices."""


def tokens_of(labels: torch.Tensor) -> list[int]:
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
    return [sum(count for count, owner in zip(counts, OWNERS, strict=True) if owner == domain) for domain in range(4)]


def autograd(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> NDArray[np.float64]:
    """Return the gradient of each domain's mean token loss, from one backward each of the whole batch."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    rows = []
    for domain in range(4):
        own = torch.tensor([owner == domain for owner in OWNERS])
        logits = model(**inputs).logits[own][:, :-1]
        targets = labels[own][:, 1:]
        if not own.any():
            rows.append(np.zeros_like(rows[0]))
            continue
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # the mean over trained tokens
        gradients = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("maker", [llama, lora], ids=["llama", "lora"])
def test_domain_gradients_equal_autograd_of_the_mean_losses(maker: Any) -> None:
    model, inputs, labels, probe = real(maker)
    tokens = tokens_of(labels)
    assert tokens[2] == 0
    mixer = begun(probe.pool, projection="identity")
    found = mixer._domain_gradients(step_of(probe.pool, probe, INDICES, tokens), PRESENT)
    expected = autograd(model, inputs, labels)
    assert expected[PRESENT].any(axis=1).all()
    np.testing.assert_allclose(found, expected[PRESENT], rtol=1e-5, atol=1e-6)
    rate, mu = 0.1, 0.01
    official = begun(probe.pool, projection="identity", mu=mu)
    official.update_weights(step_of(probe.pool, probe, INDICES, tokens, rate=rate))
    given = [None if number == 2 else row.tolist() for number, row in enumerate(expected)]
    np.testing.assert_allclose(
        official.loss_weights, by_hand([0.25] * 4, given, None, "official", rate, mu, 0), rtol=1e-4
    )
    assert official.loss_weights[2] < 0.249


def test_the_target_is_the_mean_gradient_of_validation_samples() -> None:
    model, inputs, labels, probe = real(llama)
    mixer = begun(probe.pool, projection="identity", target="validation")
    validation = probe_of(model, inputs, labels).pool
    validation.__dict__["trained"] = np.arange(7) != 1
    ctx = step_of(probe.pool, probe, INDICES, tokens_of(labels), targets=validation)
    expected = 0.0
    for row in (0, 2, 3, 4, 5, 6):
        mask = inputs["attention_mask"][row] == 1
        loss = model(input_ids=inputs["input_ids"][row][mask][None], labels=labels[row][mask][None]).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = expected + torch.cat([gradient.flatten() for gradient in gradients]).numpy() / 6
    np.testing.assert_allclose(mixer._validation_gradients(ctx)[0], expected, rtol=1e-5, atol=1e-6)


def test_sketched_inner_products_are_close_to_the_exact_ones() -> None:
    model, inputs, labels, probe = real(lambda: llama(num_hidden_layers=1))
    exact = autograd(model, inputs, labels)
    dim, steps = 256, 50
    pairs = [(0, 1), (0, 2), (1, 2)]
    mixer, found = begun(probe.pool, proj_dim=dim), []
    for step in range(steps):
        ctx = step_of(probe.pool, probe, INDICES, tokens_of(labels), step)
        sketched = mixer._domain_gradients(ctx, PRESENT)
        assert sketched.shape == (3, dim)
        found.append([sketched[i] @ sketched[j] for i, j in pairs])
    for (i, j), values in zip(pairs, np.array(found).T, strict=True):
        x, y = exact[PRESENT[i]], exact[PRESENT[j]]
        variance = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)) / dim
        assert abs(values.mean() - x @ y) < 4 * math.sqrt(variance / steps)
        assert 0.4 * variance < values.var() < 1.9 * variance
