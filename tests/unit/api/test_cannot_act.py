"""``Component.cannot_act`` of every method: when a method cannot act in a run, and that the reason is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.api import registry
from dataflex.api.component import Component
from dataflex.api.context import StepStatistics
from dataflex.api.mixer import Mixer
from dataflex.api.schedule import RunOutline, Schedule, default_update_steps
from dataflex.config.loading import DataFlexConfig, split_config
from dataflex.mixers.odm import OdmMixer
from dataflex.planning.run_plan import notes_of
from unit.fakes import build, context, make_pool

NEEDED: dict[str, dict[str, Any]] = {
    "less": {"validation": "v"},
    "cluster_less": {"validation": "v"},
    "icons": {"validation": "v"},
    "greats": {"validation": "v"},
    "tracin": {"validation": "v", "checkpoints": ["c"]},
    "nice": {"validation": "v", "reward": "exact_match"},
    "adapt": {"validation": "v"},
    "joint_update_aware": {"validation": "v"},
    "aioli": {"validation": "v"},
    "skill_it": {"validation": "v"},
    "static": {"proportions": [1, 1, 1]},
    "regmix": {"mixtures": "m.csv", "losses": "l.csv"},
    "schedule": {"points": [{"step": 0, "proportions": [1, 1, 1]}]},
    "doremi": {"reference_model": "r"},
    "score_column": {"column": "quality"},
    "span": {"roles": {"assistant": 0.5}},
    "rho_loss": {"reference_model": "r"},
    "rho1": {"reference_model": "r"},
    "token_cleaning": {"reference_model": "r"},
    "ss_token": {"reference_model": "r"},
    "dsir": {"validation": "v"},
    "deita": {"quality": "quality"},
    "external_margin": {"margin": "margin"},
    "half": {"folder": "f"},
    "stages": {"stages": [{"domains": ["a"]}, {"domains": ["b", "c"]}]},
}


def outline(
    total: int = 4000, length: int = 100, *, warmup: int = 0, domains: int = 3, batch: int = 4, pool: int = 10_000
) -> RunOutline:
    return RunOutline(Schedule(warmup, length, -1, total), batch, pool_size=pool, domains=domains, accumulation=1)


def make(family: str, name: str, **params: Any) -> Component:
    cls = registry.get(family, name)
    return cls(cls.Params(**{**NEEDED.get(name, {}), **params}))


def test_every_method_can_act_in_a_long_run_of_many_rounds() -> None:
    registry.load_components([], None)
    names = [
        (family, name)
        for family in registry.CONFIG_KEYS.values()
        for name, cls in registry.available(family).items()
        if cls.__module__.startswith("dataflex.")
    ]
    assert len(names) >= 31
    for family, name in names:
        assert make(family, name).cannot_act(outline(total=2400)) is None, name
    warm = outline(total=2400, warmup=5)
    assert make("mixer", "random", initial_proportions=[1, 1, 1]).cannot_act(warm) is None
    assert make("mixer", "moe_balance", initial_proportions=[1, 1, 1]).cannot_act(outline()) is None


@pytest.mark.parametrize(
    "family, name, params, run, text",
    [
        ("selector", "delta_loss", {}, {"total": 100}, "no second one"),
        ("selector", "random", {}, {"total": 10, "length": 10, "pool": 40}, "every sample is taken"),
        ("mixer", "odm", {}, {"total": 100}, "after 0 of 100 steps, and before 4 steps"),
        ("mixer", "odm", {}, {"total": 4, "length": 1}, "after 3 of 4 steps"),
        ("mixer", "odm", {"variant": "official"}, {"total": 60, "warmup": 50}, "only decision comes after the warm-up"),
        ("mixer", "ado", {}, {"total": 1000}, r"start_step \(1000\).* last of 10 decisions comes after 900 of 1000"),
        ("mixer", "ado", {"start_step": 10, "ignore_steps": 500}, {"total": 600}, "ignore_steps .500. leaves fewer"),
        ("mixer", "aioli", {}, {"total": 1200}, r"LearnParams takes 12 rounds .* and the run has 12"),
        ("mixer", "skill_it", {}, {"total": 100}, "by the graph alone"),
        (
            "mixer",
            "schedule",
            {"points": [{"step": 0, "proportions": [1, 1, 1]}, {"step": 500, "proportions": [2, 1, 1]}]},
            {"total": 400},
            "step 500 are never trained on: the run has 400 steps, and its last round begins at step 300",
        ),
        (
            "mixer",
            "schedule",
            {"points": [{"step": 0, "proportions": [1, 1, 1]}, {"step": 50, "proportions": [2, 1, 1]}]},
            {"total": 100},  # one round, on the proportions of step 0
            "step 50 are never",
        ),
        (
            "mixer",
            "schedule",
            {
                "points": [{"step": 0, "proportions": [1, 1, 1]}, {"step": 350, "proportions": [2, 1, 1]}],
                "interpolation": "step",
            },
            {"total": 400},  # rounds begin at 0, 100, 200, 300
            "step 350 are never",
        ),
        ("mixer", "group_dro", {"weights": "previous"}, {"total": 5, "warmup": 4}, "no second one"),
        ("mixer", "doremi", {"weights": "previous"}, {"total": 1, "length": 1}, "no second one"),
        ("mixer", "unimax", {}, {"total": 2500}, r"10000 samples and max_epochs \(1\) allows 10000"),
        ("mixer", "random", {"initial_proportions": [1, 1, 1]}, {}, "initial_proportions .* the run has none"),
        ("order", "sort", {}, {"length": 1}, "inside a step changes nothing"),
        ("order", "shuffle", {}, {"total": 11, "warmup": 10}, "inside a step changes nothing"),
        ("selector", "less", {"max_overhead": 0.5}, {"total": 100}, "the only decision scores the 32 samples"),
        ("weighter", "loss", {}, {"batch": 1}, "one sample"),
        ("weighter", "loss", {"temperature_end": 0.1, "temperature_steps": 5000}, {}, "ends at 0.28"),
        ("weighter", "rho1", {"share": 1}, {}, "every token has weight 1"),
        ("weighter", "focal", {"gamma": 0}, {}, "all weights are 1"),
    ],
)
def test_a_method_names_the_reason_why_it_cannot_act(
    family: str, name: str, params: dict[str, Any], run: dict[str, Any], text: str
) -> None:
    registry.load_components([], None)
    found = make(family, name, **params).cannot_act(outline(**run))
    assert found is not None
    assert re.search(text, found), found


def test_no_mixer_can_act_on_one_domain() -> None:
    registry.load_components([], None)
    for name in registry.available("mixer"):
        component = make("mixer", name)
        assert isinstance(component, Mixer)
        found = component.cannot_act(outline(domains=1))
        assert "one domain" in str(found), name


@pytest.mark.parametrize("domains", [2, 3, 5])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_odm_is_right_about_when_its_shares_can_differ(domains: int, variant: str) -> None:
    """Compared with the mixer itself, which receives losses that differ as much as possible."""
    mixer = build(OdmMixer, variant=variant, alpha=0.0)
    pool = make_pool({str(number): 4 for number in range(domains)})
    losses = np.linspace(0.1, 9.0, domains)
    for step in range(12):
        shares = mixer.mix(context(pool))
        differ = bool(np.ptp(shares) > 1e-9)
        run = RunOutline(Schedule(0, step, -1, step + 1) if step else Schedule(0, 1, -1, 1), 4, domains=domains)
        assert run.schedule.last_decision == step
        assert differ == (mixer.cannot_learn(run) is None), (step, shares)
        mixer.on_step(
            StepStatistics(
                step + 1,
                losses,
                np.ones(domains, np.int64),
                np.ones(domains, np.int64),
                proportions=np.full(domains, 1 / domains),
            )
        )


def notes(run: RunOutline, **section: Any) -> list[str]:
    config = split_config({"dataflex": section})
    assert isinstance(config.dataflex, DataFlexConfig)
    return notes_of(config.dataflex, config.build_components(), run, {})


def test_notes_name_the_component_and_the_key_to_set() -> None:
    (note,) = notes(outline(100), mix={"method": "odm"})
    assert note.startswith("mix odm: the last decision comes after 0 of 100 steps")
    assert "update_steps" in note
    assert notes(outline(), mix={"method": "odm"}, select={"method": "loss"}) == []


def test_a_selector_by_domain_may_find_every_domain_taken_whole() -> None:
    section = {"mix": {"method": "uniform"}, "select": {"method": "loss"}}
    (note,) = notes(outline(400, 100, pool=400), **section)
    assert note.startswith("select loss: a round takes 400 samples and the pool has 400")
    assert notes(outline(400, 100, pool=401), **section) == []


@pytest.mark.parametrize(
    "section, words",
    [
        ({"warmup_steps": 3}, ["warmup_steps", "nothing is decided"]),
        ({"update_steps": 3}, ["update_steps", "nothing is decided"]),
        ({"weight": {"method": "loss"}, "updates": 3}, ["dataflex.updates", "update_steps"]),
        ({"weight": {"method": "loss"}, "update_steps": 3}, ["dataflex.update_steps", "updates"]),
    ],
)
def test_keys_of_rounds_are_noted_in_a_run_without_rounds(section: dict[str, Any], words: list[str]) -> None:
    (note,) = notes(outline(), **section)
    for word in words:
        assert word in note
    assert notes(outline(), weight={"method": "loss"}, update_steps=3, updates=2) == []
    assert notes(outline(), update_steps=3, updates=2) == []


def test_the_component_of_the_documentation_says_when_it_cannot_act() -> None:
    """What docs/methods/README.md shows works as it says."""
    page = (Path(__file__).parents[3] / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"np": np}
    exec("from dataflex import *\n" + source, names)
    mixer = build(names["AfterAWhile"])
    try:
        assert "for 100 steps" in mixer.cannot_act(outline(total=100))
        assert mixer.cannot_act(outline(total=101)) is None
        pool = make_pool({"a": 4, "b": 16})
        early, late = context(pool, start_step=99), context(pool, start_step=100)
        assert mixer.mix(early).tolist() == [1.0, 1.0]
        assert early.undecided == ["the first 100 steps have equal shares"]
        assert mixer.mix(late).tolist() == [2.0, 4.0]
        assert late.undecided == []
        assert default_update_steps(
            rounds=mixer.wanted_rounds(2), num_samples=2000, global_batch_size=1, run_steps=500
        ) == 50  # fmt: skip
    finally:
        registry._registered.pop(("mixer", "after_a_while"))
