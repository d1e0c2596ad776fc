"""LESS, ICONS, GraNd and EL2N: aggregation over sub-tasks, votes, and checks before a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dataflex.config.checks import problems_of
from dataflex.config.loading import split_config
from dataflex.data.pool import Pool
from dataflex.errors import ComponentError, ConfigError
from dataflex.selectors.base_gradients import subtask_means
from dataflex.selectors.el2n import El2nSelector
from dataflex.selectors.grand import GrandSelector
from dataflex.selectors.icons import IconsSelector, consensus
from dataflex.selectors.less import LessSelector
from unit.fakes import FakeProbe, build, context, decided, group_of, make_pool, scores_of

N, K = 40, 6
SUBTASKS = {"short": 2, "long": 9, "one": 1}


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    rows = rng.normal(size=(count, K))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def probe() -> FakeProbe:
    rng = np.random.default_rng(0)
    return FakeProbe(features=unit(rng, N), targets=unit(rng, sum(SUBTASKS.values())))


@pytest.fixture
def targets() -> Pool:
    return make_pool(SUBTASKS)


def mean_cosines(probe: FakeProbe) -> np.ndarray:
    """Return each sample's mean cosine with each sub-task's samples, pair by pair."""
    table, begin = [], 0
    for size in SUBTASKS.values():
        held = probe.targets[begin : begin + size]
        table.append([[float(np.dot(row, other)) for other in held] for row in probe.features])
        begin += size
    return np.array([[np.mean(cosines) for cosines in rows] for rows in table]).T


# LESS


def test_less_takes_the_best_sub_task(probe: FakeProbe, targets: Pool) -> None:
    ctx = context(make_pool({"a": N}), probe=probe, validation_pool=targets)
    cosines = mean_cosines(probe)
    assert np.unique(cosines.argmax(axis=1)).size == 3
    found = scores_of(build(LessSelector), ctx, np.arange(N))
    np.testing.assert_allclose(found, cosines.max(axis=1), rtol=1e-5, atol=1e-6)
    chosen = decided(build(LessSelector), ctx, group_of(ctx.pool, 7))
    assert chosen.indices.tolist() == sorted(np.argsort(-cosines.max(axis=1))[:7])
    np.testing.assert_allclose(chosen.scores, cosines.max(axis=1)[chosen.indices], rtol=1e-5)


def test_less_can_average_over_sub_tasks_of_any_sizes(probe: FakeProbe, targets: Pool) -> None:
    ctx = context(make_pool({"a": N}), probe=probe, validation_pool=targets)
    found = scores_of(build(LessSelector, aggregation="mean"), ctx, np.arange(N))
    np.testing.assert_allclose(found, mean_cosines(probe).mean(axis=1), rtol=1e-5, atol=1e-6)


def test_a_candidate_equal_to_the_only_validation_sample_is_the_best(probe: FakeProbe) -> None:
    probe.targets = probe.features[13:14]
    ctx = context(make_pool({"a": N}), probe=probe, validation_pool=make_pool({"held": 1}))
    chosen = decided(build(LessSelector), ctx, group_of(ctx.pool, 1))
    assert chosen.indices.tolist() == [13]
    assert chosen.scores[0] == pytest.approx(1, abs=1e-5)


def test_validation_gradients_are_plain_and_computed_once_in_a_round(probe: FakeProbe, targets: Pool) -> None:
    ctx = context(make_pool({"a": 15, "b": 25}), probe=probe, validation_pool=targets)
    selector = build(LessSelector, preconditioner="adam_less", projection="rademacher", proj_dim=64, projection_seed=4)
    selector.begin(ctx)
    for begin, end in ((0, 15), (15, 40)):
        selector.select(ctx, group_of(ctx.pool, 5, begin, end))
    assert [asked.preconditioner for asked in probe.settings] == ["none", "adam_less", "adam_less"]
    assert {(asked.projection, asked.dim, asked.seed, asked.normalize) for asked in probe.settings} == {
        ("rademacher", 64, 4, True)
    }
    assert [(asked[0], asked[-1]) for asked in probe.asked] == [(0, 14), (15, 39)]


def test_validation_samples_without_a_gradient_do_not_count(probe: FakeProbe, targets: Pool) -> None:
    ctx = context(make_pool({"a": N}), probe=probe, validation_pool=targets)
    features = probe.targets.copy()
    features[3:7] = 0
    expected = [features[:2].mean(0), features[[2, 7, 8, 9, 10]].mean(0), features[11]]
    np.testing.assert_allclose(subtask_means(features, ctx), expected, rtol=1e-6)


def test_a_sub_task_without_any_gradient_is_an_error(probe: FakeProbe, targets: Pool) -> None:
    probe.targets[2:11] = 0
    ctx = context(make_pool({"a": N}), probe=probe, validation_pool=targets)
    with pytest.raises(ComponentError, match="'long'"):
        scores_of(build(LessSelector), ctx, np.arange(N))


@pytest.mark.parametrize("selector", [LessSelector, IconsSelector])
def test_samples_without_a_gradient_are_never_chosen(selector: Any, probe: FakeProbe, targets: Pool) -> None:
    probe.features[::4] = np.nan
    ctx = context(make_pool({"a": N}), probe=probe, validation_pool=targets)
    chosen = decided(build(selector), ctx, group_of(ctx.pool, 30))
    assert sorted(chosen.indices.tolist()) == [index for index in range(N) if index % 4]
    assert chosen.unscored == 10
    with pytest.raises(ComponentError, match="31 samples are wanted but only 30 of 40"):
        decided(build(selector), ctx, group_of(ctx.pool, 31))


# ICONS


def test_votes_equal_a_computation_by_hand() -> None:
    influence = np.array([[0.9, 0.1], [0.8, 0.9], [0.1, 0.8], [0.2, 0.2], [0.3, 0.3]], dtype=np.float32)
    # Two votes each: samples 0 and 1, samples 1 and 2. Ranks of 6: (5 4 1 2 3) and (1 5 4 2 3), halved.
    expected = [1 + 3 / 6, 2 + 4.5 / 6, 1 + 2.5 / 6, 2 / 6, 3 / 6]
    np.testing.assert_allclose(consensus(influence, 0.4), expected, rtol=1e-6)


def test_equal_votes_are_ranked_by_percentile_and_not_by_index() -> None:
    influence = np.array([[0.4, 0.0], [0.5, 0.0], [0.3, 0.1], [0.2, 0.9]], dtype=np.float32)
    scores = consensus(influence, 0.75)
    assert np.floor(scores).tolist() == [2, 2, 2, 1]  # all three at the cut of the second sub-task count
    assert scores[1] > scores[0]


def test_samples_that_are_equal_have_equal_scores() -> None:
    scores = consensus(np.ones((5, 3), dtype=np.float32), 0.2)
    np.testing.assert_allclose(scores, 3.5)


@pytest.mark.parametrize(
    "size, share, votes", [(100, 0.07, 7), (100, 0.29, 29), (50, 0.14, 7), (30, 0.07, 3), (5, 0.01, 1)]
)
def test_the_number_of_votes_is_the_share_rounded_up_without_rounding_error(
    size: int, share: float, votes: int
) -> None:
    scores = consensus(np.random.default_rng(1).permutation(size)[:, None].astype(np.float32), share)
    assert np.count_nonzero(scores >= 1) == votes


@pytest.mark.parametrize("subtasks", [1, 4])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.99])
def test_consensus_equals_a_computation_by_counting(share: float, subtasks: int) -> None:
    influence = np.random.default_rng(1).permutation(60 * subtasks).reshape(60, subtasks).astype(np.float32)
    influence[[3, 50]] = np.nan
    table = {row: influence[row].tolist() for row in range(60) if row not in (3, 50)}
    found = consensus(influence, share)
    assert np.isnan(found[[3, 50]]).all()
    for row, values in table.items():
        votes, places = 0, []
        for task, value in enumerate(values):
            column = [other[task] for other in table.values()]
            votes += sum(other > value for other in column) < share * len(column)
            places.append(sum(other <= value for other in column) / (len(column) + 1))
        assert found[row] == pytest.approx(votes + sum(places) / subtasks, rel=1e-5)


def test_a_single_sub_task_ranks_by_influence(probe: FakeProbe) -> None:
    probe.targets = probe.targets[:5]
    ctx = context(make_pool({"a": N}), probe=probe, validation_pool=make_pool({"held": 5}))
    scores = scores_of(build(IconsSelector), ctx, np.arange(N))
    cosines = (probe.features @ probe.targets.T).mean(axis=1)
    assert np.argsort(scores).tolist() == np.argsort(cosines).tolist()
    assert (scores > 1).sum() == 8


def test_icons_prefers_samples_with_votes_of_many_sub_tasks() -> None:
    axes = np.eye(3, dtype=np.float32)
    features = np.vstack([axes, np.full((1, 3), 3**-0.5), -axes]).astype(np.float32)
    probe = FakeProbe(features=features, targets=axes)
    ctx = context(make_pool({"a": 7}), probe=probe, validation_pool=make_pool({"x": 1, "y": 1, "z": 1}))
    group = group_of(ctx.pool, 1)
    assert decided(build(IconsSelector, vote_share=0.25), ctx, group).indices.tolist() == [3]
    assert decided(build(LessSelector), ctx, group).indices.tolist() != [3]
    assert {asked.preconditioner for asked in probe.settings[:2]} == {"none"}


# GraNd and EL2N


@pytest.mark.parametrize("selector", [GrandSelector, El2nSelector])
def test_el2n_and_grand_choose_by_their_focus(selector: Any) -> None:
    lengths = np.random.default_rng(2).permutation(20).astype(np.float32)
    lengths[[4, 11]] = np.nan
    pool = make_pool({"a": 20})
    order = np.argsort(lengths)[:18]
    high = decided(build(selector), context(pool, lengths), group_of(pool, 5))
    low = decided(build(selector, focus="low"), context(pool, lengths), group_of(pool, 5))
    assert high.indices.tolist() == sorted(order[::-1][:5])
    assert low.indices.tolist() == sorted(order[:5])
    assert high.unscored == low.unscored == 2
    np.testing.assert_array_equal(low.scores, -lengths[low.indices])


def test_grand_measures_the_configured_direction() -> None:
    pool = make_pool({"a": 4})
    ctx = context(pool, np.arange(4))
    decided(build(GrandSelector, preconditioner="adam", unsupported_parameters="ignore"), ctx, group_of(pool, 2))
    (asked,) = ctx.probe.settings
    assert (asked.preconditioner, asked.unsupported) == ("adam", "ignore")


# Before anything is loaded

WARM = {"warmup_steps": 5}
LESS = {"method": "less", "validation": "held"}


def problems(select: dict[str, Any], section: dict[str, Any] = WARM, **changes: Any) -> dict[str, str]:
    keys = {"model_name_or_path": "org/model", "stage": "sft", "do_train": True, "dataset": "a", "output_dir": "out"}
    raw = {**keys, "dataset_dir": "ONLINE", **changes, "dataflex": {"select": select, **section}}
    return {problem.key: problem.message for problem in problems_of(split_config(raw))}


@pytest.mark.parametrize(
    "select",
    [
        LESS,
        {**LESS, "preconditioner": "adam_less"},
        {"method": "icons", "validation": ["x", "y"]},
        {"method": "grand"},
        {"method": "el2n", "focus": "low"},
    ],
)
def test_a_good_run_has_no_problem(select: dict[str, Any]) -> None:
    for optimizer in ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit"):
        assert problems(select, optim=optimizer) == {}


@pytest.mark.parametrize("select", [LESS, {"method": "grand", "preconditioner": "adam"}])
def test_adam_needs_a_step_of_warmup(select: dict[str, Any]) -> None:
    found = problems(select, {"warmup_steps": 0})
    assert "warmup_steps" in found["dataflex.select.preconditioner"]
    assert problems({**select, "preconditioner": "none"}, {"warmup_steps": 0}) == {}
    assert problems(select, {"warmup_steps": 1}) == {}


@pytest.mark.usefixtures("all_packages")
@pytest.mark.parametrize(
    "changes, text",
    [
        ({"optim": "sgd"}, "optim: sgd"),
        ({"optim": "adafactor"}, "optim: adafactor"),
        ({"optim": "lion_8bit"}, "optim: lion_8bit"),
        ({"use_galore": True}, "use_galore"),
        ({"use_apollo": True}, "use_apollo"),
        ({"use_badam": True}, "use_badam"),
        ({"use_adam_mini": True}, "use_adam_mini"),
        ({"use_muon": True}, "use_muon"),
    ],
)
def test_adam_needs_its_moments(changes: dict[str, Any], text: str) -> None:
    assert text in problems(LESS, **changes)["dataflex.select.preconditioner"]
    assert problems({**LESS, "preconditioner": "none"}, **changes) == {}


@pytest.mark.usefixtures("all_packages")
@pytest.mark.parametrize("key", ["use_unsloth", "fp8"])
def test_libraries_that_replace_layers_are_refused(key: str) -> None:
    for select in (LESS, {"method": "grand"}, {"method": "greats", "validation": ["x"]}):
        assert key in problems(select, **{key: True})["dataflex.select.method"]
        assert "dataflex.select.method" not in problems(select, **{key: False})
    assert "dataflex.select.method" not in problems({"method": "loss"}, **{key: True})


@pytest.mark.parametrize("method", ["less", "icons"])
def test_validation_samples_are_needed(method: str) -> None:
    assert "eval_dataset" in problems({"method": method})["dataflex.select.validation"]
    assert problems({"method": method}, eval_dataset="held") == {}
    assert problems({"method": method}, val_size=0.1) == {}
    assert problems({"method": "grand"}) == {}


def test_validation_names_are_read_as_data_set_names_are() -> None:
    for given in ("x, y", ["x", " y "]):
        assert LessSelector.Params(validation=given).validation == ["x", "y"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"proj_dim": 0},
        {"proj_dim": -8},
        {"proj_dim": 2.5},
        {"projection_seed": -1},
        {"projection": "gaussian"},
        {"preconditioner": "sgd"},
        {"aggregation": "median"},
        {"validation": ""},
        {"validation": []},
        {"unsupported_parameters": "drop"},
    ],
)
def test_bad_parameters_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        problems({**LESS, **wrong})


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_share_of_votes_must_be_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="vote_share"):
        problems({"method": "icons", "validation": "held", "vote_share": share})
