"""The weighter ss_token: golden numbers, the count of kept tokens, invariances, and refused settings."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dataflex.api.context import StepBatch, TokenLosses
from dataflex.errors import ComponentError
from dataflex.weighters.base_top_tokens import top_weights
from dataflex.weighters.ss_token import SSTokenParams, SSTokenWeighter, scaled
from unit.fakes import build

HISTORY, NOW, ATTENTION = [[2.0, 1.5, 0.8, 3.0]], [[1.2, 1.6, 0.3, 2.9]], [[0.2, 0.6, 0.5, 0.1]]


def weights_of(history: Any, now: Any, attention: Any, trained: Tensor | None = None, **params: Any) -> Tensor:
    values = [torch.as_tensor(each, dtype=torch.float32) for each in (now, history, attention)]
    mask = torch.ones(values[0].shape, dtype=torch.bool) if trained is None else trained
    if params.get("gamma") != 0:
        params["reference_model"] = "history"
    tokens = TokenLosses(values[0], mask, values[1], values[2])
    weights: Tensor = build(SSTokenWeighter, **params).weigh(StepBatch(values[0].mean(1), tokens=tokens))
    return weights


@pytest.mark.parametrize(("gamma", "expected"), [(0.5, [0, 1, 2]), (1.0, [0, 2, 3]), (0.0, [0, 1, 2])])
def test_the_golden_tokens_are_kept(gamma: float, expected: list[int]) -> None:
    weights = weights_of(HISTORY, NOW, ATTENTION, gamma=gamma)[0]
    assert weights.nonzero().flatten().tolist() == expected
    torch.testing.assert_close(weights[expected], torch.full((3,), 4 / 3))
    loss = float((weights * torch.tensor(NOW[0])).mean())
    assert loss == pytest.approx(float(np.mean([NOW[0][place] for place in expected])))  # the mean over kept tokens


def test_the_golden_scores() -> None:
    improved = torch.tensor(HISTORY) - torch.tensor(NOW)
    scores = scaled(improved, torch.ones(1, 4, dtype=torch.bool))
    np.testing.assert_allclose(scores, [[1, 0, 0.666667, 0.222222]], atol=1e-6)
    both = 0.5 * scores + 0.5 * torch.tensor(ATTENTION)
    np.testing.assert_allclose(both, [[0.6, 0.3, 0.583333, 0.161111]], atol=1e-6)


def by_hand(history: Any, now: Any, attention: Any, share: float, gamma: float) -> list[float]:
    """Return the weights of one sample's trained tokens, one token after the other."""
    improved = [float(before) - float(after) for before, after in zip(history, now, strict=True)]
    low, high = min(improved), max(improved)
    scores = [
        gamma * (each - low) / (high - low + 1e-8) + (1 - gamma) * float(seen)
        for each, seen in zip(improved, attention, strict=True)
    ]
    most = math.ceil(Decimal(str(share)) * len(scores))
    first = sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:most]
    return [len(scores) / most if place in first else 0.0 for place in range(len(scores))]


@pytest.mark.parametrize("share", [0.05, 0.29, 0.6, 1.0])
@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_random_samples_agree_with_plain_python(share: float, gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    history, now, attention = torch.rand(3, 6, 40, generator=generator)
    trained = torch.rand(6, 40, generator=generator) < 0.6
    trained[0], trained[1] = True, False
    trained[1, 7] = True
    trained[:, -1] = False
    weights = weights_of(history, now, attention, trained, share=share, gamma=gamma)
    for row in range(6):
        mask = trained[row]
        expected = by_hand(history[row][mask], now[row][mask], attention[row][mask], share, gamma)
        np.testing.assert_allclose(weights[row][mask], expected, rtol=1e-6)
        assert float(weights[row][mask].mean()) == pytest.approx(1)
        alone = [each[row : row + 1] for each in (history, now, attention, trained)]
        assert torch.equal(weights_of(*alone, share=share, gamma=gamma)[0], weights[row])  # elementwise


@pytest.mark.parametrize(
    ("share", "tokens", "expected"),
    [(0.07, 100, 7), (0.29, 100, 29), (0.6, 5, 3), (0.6, 6, 4), (0.6, 1, 1), (0.001, 7, 1), (1.0, 9, 9), (0.1, 30, 3)],
)
def test_the_share_is_rounded_up_without_an_error_of_the_product(share: float, tokens: int, expected: int) -> None:
    scores, trained = torch.arange(tokens).flip(0).float()[None], torch.ones(1, tokens, dtype=torch.bool)
    weights = top_weights(scores, trained, share, rounded_up=True)
    assert int((weights > 0).sum()) == expected
    assert weights[0, 0] == pytest.approx(tokens / expected)


def test_of_equal_scores_the_first_are_kept() -> None:
    trained = torch.tensor([[False, True, True, False, True, True]])
    assert top_weights(torch.zeros(1, 6), trained, 0.5, rounded_up=True).tolist() == [[0, 2, 2, 0, 0, 0]]
    equal = weights_of([[1.0] * 4], [[0.5] * 4], [[0.0] * 4], share=0.5)  # no spread of the improvements
    assert equal.tolist() == [[2, 2, 0, 0]]


def test_the_improvement_does_not_depend_on_its_scale_and_origin() -> None:
    generator = torch.Generator().manual_seed(1)
    history, now, attention = torch.rand(3, 4, 30, generator=generator)
    plain = weights_of(history, now, attention)
    assert torch.equal(weights_of(8 * history + 3, 8 * now, attention), plain)
    order = torch.randperm(30, generator=generator)
    moved = weights_of(history[:, order], now[:, order], attention[:, order])
    assert torch.equal(moved, plain[:, order])


def test_each_part_is_needed_only_if_it_counts() -> None:
    both, losses, seen = (
        build(SSTokenWeighter, reference_model="start"),
        build(SSTokenWeighter, reference_model="start", gamma=1),
        build(SSTokenWeighter, gamma=0),
    )
    found = [each.needs(None) for each in (both, losses, seen)]  # type: ignore[arg-type]
    assert [needs.reference is not None for needs in found] == [True, True, False]
    assert [needs.prompt_attention for needs in found] == [True, False, True]
    tokens = TokenLosses(torch.tensor(NOW), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ComponentError, match=r"batch.prompt_attention .* Needs\(prompt_attention=True\)"):
        seen.weigh(StepBatch(torch.ones(1), tokens=tokens))
    with pytest.raises(ComponentError, match=r"batch.reference_losses .* Needs\(reference=self.params\)"):
        both.weigh(StepBatch(torch.ones(1), tokens=tokens))


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "needs reference_model, reference_losses or both: the model that training starts from"),
        ({"gamma": 0, "reference_model": "start"}, "gamma: 0 compares no losses; remove reference_model"),
        ({"share": 0, "reference_model": "start"}, "greater than 0"),
        ({"gamma": 1.5, "reference_model": "start"}, "less than or equal to 1"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        SSTokenParams(**params)


def test_a_history_model_that_overflows_is_an_error() -> None:
    with pytest.raises(ComponentError, match="history model's loss of a token of step 1 is not finite"):
        weights_of([[2.0, math.nan, 0.8, 3.0]], NOW, ATTENTION)


class View:
    """A run with some of LLaMA-Factory's keys."""

    def __init__(self, **keys: Any) -> None:
        self.llamafactory = keys


def problems(gamma: float = 0.5, **keys: Any) -> list[tuple[str, str]]:
    return list(build(SSTokenWeighter, gamma=gamma, reference_model="start").problems(View(**keys)))  # type: ignore[arg-type]


def test_samples_without_a_prompt_are_refused() -> None:
    assert not problems()
    assert not problems(train_on_prompt=False)
    for keys in ({"stage": "pt"}, {"train_on_prompt": True}):
        ((parameter, text),) = problems(**keys)
        assert parameter == "gamma"
        assert next(iter(keys)) in text
        assert not problems(gamma=1, **keys)


def test_keeping_every_token_is_reported() -> None:
    assert build(SSTokenWeighter, reference_model="start").cannot_act(None) is None  # type: ignore[arg-type]
    reason = build(SSTokenWeighter, reference_model="start", share=1).cannot_act(None)  # type: ignore[arg-type]
    assert reason == "share is 1, so every token has weight 1; lower share"
