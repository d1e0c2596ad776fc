"""Selectors that score by losses of the model in training or of a reference: perplexity, rho_loss, ifd."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from dataflex import IGNORE_INDEX, Losses
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.errors import ComponentError
from dataflex.planning.run_plan import expected_forwards
from dataflex.selectors.base_middle import nearness_to_middle
from dataflex.selectors.ifd import Answers, IfdSelector, difficulty
from dataflex.selectors.perplexity import PerplexitySelector
from dataflex.selectors.rho_loss import RhoLossSelector
from unit.fakes import FakeProbe, build, context, decided, group_of, make_pool
from unit.probe.test_measurement import models, pool_of, probe_of

__all__ = ["models"]  # the fixture

SEEDS = [1, 2, 3]


class TableReference:
    """A reference whose losses are in tables: those of the pool, and of samples without their prompts."""

    def __init__(self, losses: Any, alone: Any = ()) -> None:
        self.values, self.alone = np.asarray(losses, np.float32), np.asarray(alone, np.float32)

    def losses(self, indices: Any, samples: Any = None) -> Any:
        return (self.values if samples is None else self.alone)[indices]


def chosen(selector: Any, losses: Any, count: int, **changes: Any) -> list[int]:
    pool = make_pool({"a": len(losses)})
    ctx = context(pool, np.asarray(losses, np.float32), **changes)
    return decided(selector, ctx, group_of(pool, count)).indices.tolist()


# Perplexity

GOLDEN = [3, 9, 5, 7, 4, 6, 8, 10, 2, 11]


def test_perplexity_chooses_the_middle_of_the_ranks() -> None:
    found = chosen(build(PerplexitySelector), GOLDEN, 5)
    assert sorted(GOLDEN[index] for index in found) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1, 2, 7, 10, 41])
def test_the_middle_is_exact_for_every_count(seed: int, size: int) -> None:
    losses = np.random.default_rng(seed).integers(0, 12, size).astype(np.float32)  # with ties
    order = np.argsort(losses, kind="stable")
    for count in range(1, size):
        first = (size - count) // 2
        expected = sorted(order[first : first + count].tolist())
        assert chosen(build(PerplexitySelector), losses, count) == expected, count


@pytest.mark.parametrize("seed", SEEDS)
def test_perplexity_ranks_as_its_logarithm(seed: int) -> None:
    losses = np.random.default_rng(seed).normal(2, 0.5, 30).astype(np.float32)
    for focus in ("middle", "low", "high"):
        selector = build(PerplexitySelector, focus=focus)
        assert chosen(selector, losses, 11) == chosen(selector, np.exp(losses), 11)


def test_perplexity_can_choose_low_or_high_values() -> None:
    assert sorted(chosen(build(PerplexitySelector, focus="low"), GOLDEN, 3)) == [0, 4, 8]
    assert sorted(chosen(build(PerplexitySelector, focus="high"), GOLDEN, 3)) == [1, 7, 9]


def test_samples_without_a_loss_are_not_ranked() -> None:
    losses = [math.nan, 1.0, 2.0, math.nan, 3.0, 4.0, 5.0]
    assert chosen(build(PerplexitySelector), losses, 3) == [2, 4, 5]
    assert np.isnan(nearness_to_middle(np.full(3, np.nan, np.float32))).all()
    with pytest.raises(ComponentError, match="have a score"):
        chosen(build(PerplexitySelector), losses, 6)


def test_perplexity_of_a_reference_does_not_run_the_trained_model() -> None:
    selector = build(PerplexitySelector, focus="high", reference_model="m")
    assert selector.needs(None).measurements == ()
    assert selector.needs(None).reference is selector.params
    assert build(PerplexitySelector).needs(None).reference is None
    reference: Any = TableReference(GOLDEN)
    assert sorted(chosen(selector, [math.nan] * 10, 2, reference_losses=reference)) == [7, 9]


# RHO-LOSS


def test_rho_loss_chooses_the_largest_reducible_losses() -> None:
    losses, irreducible = [3, 2.5, 1, 0.4, 2], [2.9, 1, 0.2, 0.6, 0.5]
    selector = build(RhoLossSelector, reference_model="m")
    reference: Any = TableReference(irreducible)
    ctx = context(make_pool({"a": 5}), losses, reference_losses=reference)
    np.testing.assert_allclose(selector.score(ctx, np.arange(5)), [0.1, 1.5, 0.8, -0.2, 1.5], atol=1e-6)
    assert chosen(selector, losses, 2, reference_losses=reference) == [1, 4]
    assert chosen(selector, losses, 1, reference_losses=reference) == [1]  # of equal ones the first


@pytest.mark.parametrize("seed", SEEDS)
def test_rho_loss_with_the_trained_model_as_reference_gives_equal_scores(seed: int) -> None:
    losses = np.random.default_rng(seed).random(20).astype(np.float32)
    reference: Any = TableReference(losses)
    selector = build(RhoLossSelector, reference_model="m")
    assert chosen(selector, losses, 5, reference_losses=reference) == [0, 1, 2, 3, 4]
    shifted: Any = TableReference(losses * 0.5 + 3)
    others = chosen(selector, losses, 5, reference_losses=shifted)
    assert others == sorted(np.argsort(-losses, kind="stable")[:5].tolist())


def test_rho_loss_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="needs reference_model"):
        build(RhoLossSelector)


# IFD

GIVEN, ALONE = np.array([1, 1.8, 0.3, 2.2], np.float32), np.array([2, 2, 1, 2], np.float32)


@pytest.mark.parametrize(
    "variant, ratios",
    [("cherry", [0.5, 0.9, 0.3, 1.1]), ("superfiltering", [0.367879, 0.818731, 0.496585, 1.221403])],
)
def test_ifd_ratios_have_the_golden_numbers(variant: str, ratios: list[float]) -> None:
    np.testing.assert_allclose(difficulty(GIVEN, ALONE, variant, None), ratios, atol=1e-6)
    limited = difficulty(GIVEN, ALONE, variant)
    np.testing.assert_allclose(limited[:3], ratios[:3], atol=1e-6)
    assert np.isnan(limited[3])


def test_the_two_variants_rank_differently() -> None:
    orders = {name: np.argsort(-difficulty(GIVEN, ALONE, name)[:3]).tolist() for name in ("cherry", "superfiltering")}
    assert orders == {"cherry": [1, 0, 2], "superfiltering": [1, 2, 0]}


def test_a_ratio_of_one_is_within_the_limit_of_one_variant_alone() -> None:
    same = np.ones(1, np.float32)
    assert difficulty(same, same, "cherry").tolist() == [1.0]
    assert np.isnan(difficulty(same, same, "superfiltering")).all()


def test_samples_without_an_answer_or_with_zero_loss_have_no_ratio() -> None:
    given, alone = np.array([np.nan, 0.5, 0], np.float32), np.array([np.nan, 0, 0], np.float32)
    assert np.isnan(difficulty(given, alone)).all()


def rows() -> list[dict[str, Any]]:
    skip = IGNORE_INDEX
    return [
        {"input_ids": [1, 7, 8, 20, 21, 22], "labels": [skip, skip, skip, 20, 21, 22]},
        {"input_ids": [1, 7, 30], "labels": [skip, skip, 30]},  # an answer of one token
        {"input_ids": [1, 7, 40, 41, 9, 42], "labels": [skip, skip, 40, 41, skip, 42]},  # two turns
        {"input_ids": [1, 7, 8], "labels": [skip, skip, skip]},
        {"input_ids": [50, 51, 50], "labels": [50, 51, 50]},  # all of it is trained on
    ]


def pool_of_answers() -> Any:
    pool = make_pool({"a": 5}, lengths=[len(row["input_ids"]) for row in rows()], rows=rows())
    pool.__dict__["trained_tokens"] = np.array([3, 1, 3, 0, 2])
    pool.__dict__["trained"] = pool.trained_tokens > 0
    return pool


def test_prompts_are_left_out_by_the_labels() -> None:
    answers = Answers(pool_of_answers())
    found = answers.rows(np.arange(5))
    assert [row["input_ids"] for row in found] == [[1, 20, 21, 22], [1, 30], [1, 40, 41, 42], [1], [50, 51, 50]]
    assert [row["labels"][1:] for row in found] == [row["input_ids"][1:] for row in found]
    assert {row["labels"][0] for row in found} == {IGNORE_INDEX}
    assert all(len(row["attention_mask"]) == len(row["input_ids"]) for row in found)
    assert answers.lengths.tolist() == [len(row["input_ids"]) for row in found]
    assert answers.size == 5


class TwoLosses(FakeProbe):
    """Gives other losses for samples that are not the pool's, and notes what it was asked."""

    def losses(self, measurement: Any, indices: Any, samples: Any) -> Any:
        assert isinstance(measurement, Losses)
        self.asked.append(indices)
        return (GIVEN if samples is None else ALONE)[indices]


def test_the_largest_ratio_up_to_one_comes_first() -> None:
    pool = make_pool({"a": 4}, rows=rows()[:4])
    ctx = dataclasses.replace(context(pool), probe=TwoLosses())
    found = decided(build(IfdSelector), ctx, group_of(pool, 2))
    assert found.indices.tolist() == [0, 1]
    assert found.unscored == 1
    reference: Any = TableReference(GIVEN, ALONE)
    selector = build(IfdSelector, reference_model="small", variant="superfiltering")
    assert selector.needs(None).reference is selector.params
    assert decided(selector, context(pool, reference_losses=reference), group_of(pool, 2)).indices.tolist() == [1, 2]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"stage": "pt"}, "which stage pt does not have; use stage sft"),
        ({"packing": True}, "packing joins several samples"),
        ({"train_on_prompt": True}, "train_on_prompt trains on prompts"),
    ],
)
def test_settings_that_leave_no_prompts_are_refused(given: dict[str, Any], said: str) -> None:
    class View:
        llamafactory = given

    view: Any = View()
    (problem,) = build(IfdSelector).problems(view)
    assert said in problem[1]


@pytest.mark.parametrize(
    "name, problems", [("absent/of/three", 1), ("./absent", 1), ("~/absent", 1), ("owner/name", 0), ("name", 0)]
)
def test_a_reference_that_is_a_path_must_have_a_model(name: str, problems: int) -> None:
    class View:
        llamafactory: dict[str, Any] = {}

    view: Any = View()
    found = [key for key, _ in build(RhoLossSelector, reference_model=name).params.reference_problems(view)]
    assert found == ["reference_model"] * problems


def test_a_table_alone_has_no_losses_without_prompts() -> None:
    class View:
        llamafactory: dict[str, Any] = {}

    view: Any = View()
    assert [key for key, _ in build(IfdSelector, reference_losses="table").problems(view)] == ["reference_losses"]
    assert not list(build(IfdSelector, reference_losses="table", reference_model="m").problems(view))
    assert not list(build(IfdSelector).problems(view))


def test_every_candidate_is_measured_twice() -> None:
    run = RunOutline(Schedule(0, 5, -1, 20), 4, 100)
    assert build(IfdSelector).measured_samples(Losses(), run) == 800
    for given, forwards in (
        ({}, 800),
        ({"reference_model": "m"}, 200),
        ({"reference_model": "m", "reference_losses": "t"}, 100),
    ):
        selector = build(IfdSelector, **given)
        assert expected_forwards(selector, selector.needs(None), run) == forwards


@pytest.mark.parametrize("seed", SEEDS)
def test_ratios_equal_a_computation_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        given, alone = rng.random((2, 15)).astype(np.float32) * 3
        expected = [g / a for g, a in zip(given.tolist(), alone.tolist(), strict=True)]
        np.testing.assert_allclose(difficulty(given, alone, "cherry", None), expected, rtol=1e-6)
        expected = [math.exp(g) / math.exp(a) for g, a in zip(given.tolist(), alone.tolist(), strict=True)]
        np.testing.assert_allclose(difficulty(given, alone, "superfiltering", None), expected, rtol=1e-6)


def test_losses_without_prompts_equal_those_of_the_answers_alone(models: dict[str, Any]) -> None:
    model = models["llama"]
    given = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in few_tokens()]
    pool = pool_of(given)
    pool.__dict__["trained_tokens"] = np.array([3, 1, 3, 0, 2])
    pool.__dict__["trained"] = pool.trained_tokens > 0
    probe = probe_of(model, pool=pool)
    selector = build(IfdSelector, limit=None)
    found = decided(selector, dataclasses.replace(context(pool), probe=probe), group_of(pool, 4))
    assert found.indices.tolist() == [0, 1, 2, 4]
    assert found.scores is not None
    expected = []
    for row in (given[index] for index in found.indices.tolist()):
        answer = [token for token, label in zip(row["input_ids"][1:], row["labels"][1:], strict=True) if label >= 0]
        alone = torch.tensor([[row["input_ids"][0], *answer]])
        with torch.no_grad():
            whole = torch.log_softmax(model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double(), -1)
            part = torch.log_softmax(model(input_ids=alone).logits[0].double(), -1)
        behind = [-whole[t, label].item() for t, label in enumerate(row["labels"][1:]) if label >= 0]
        before = [-part[t, token].item() for t, token in enumerate(answer)]
        expected.append(np.mean(behind) / np.mean(before))
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)


def few_tokens() -> list[dict[str, Any]]:
    """Return the rows with tokens that a small vocabulary has."""
    return [
        {key: [value if value < 0 else value % 23 + 2 for value in values] for key, values in row.items()}
        for row in rows()
    ]


def test_too_few_samples_with_helpful_prompts_are_an_error() -> None:
    pool = make_pool({"a": 4}, rows=rows()[:4])
    ctx = dataclasses.replace(context(pool), probe=TwoLosses())
    with pytest.raises(ComponentError, match="only 2 of 4 have a score: the prompts of the others are of no help"):
        decided(build(IfdSelector, limit=0.7), ctx, group_of(pool, 3))
