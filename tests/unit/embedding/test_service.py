"""``ctx.embeddings``: declared in ``needs``, shared in a decision, refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex import (
    EmbeddingParams,
    Embeddings,
    Needs,
    RunOutline,
    Selector,
    SelectorParams,
    StepBatch,
    ValidationParams,
)
from dataflex.api import registry
from dataflex.api.components import Components, only
from dataflex.api.schedule import Schedule
from dataflex.api.weighter import Weighter, WeighterParams
from dataflex.config.checks import problems_of
from dataflex.config.loading import DataFlexConfig, RunConfig, split_config
from dataflex.data.pool import Pool
from dataflex.embedding.of_model import measurements_of
from dataflex.embedding.service import EmbeddingService
from dataflex.errors import ComponentError
from dataflex.planning.planner import Readings
from dataflex.planning.run_plan import DataOutline, TrainerKeys, expected_forwards, plan_of
from unit.fakes import context, make_planner, make_pool, plans
from unit.trainer.test_run import SELECT, run_of


class CountingProbe:
    """Embeds a sample by its number and how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Embeddings, int]] = []

    def measure(self, measurement: Any, indices: Any, samples: Pool | None = None) -> Any:
        self.asked.append((measurement, indices.size))
        return np.full((indices.size, 2), len(self.asked), dtype=np.float32) + indices[:, None]


class NearParams(SelectorParams, ValidationParams, EmbeddingParams):
    pass


class Near(Selector[NearParams]):
    family, name = "selector", "test_near"

    def needs(self, run: Any) -> Needs:
        return Needs(validation=self.params, embeddings=self.params)

    def score(self, ctx: Any, candidates: Any) -> Any:
        assert ctx.embeddings() is ctx.embeddings()
        return ctx.embeddings()[candidates, 0]


class TiltParams(WeighterParams, EmbeddingParams):
    pass


class Tilt(Weighter[TiltParams]):
    family, name, elementwise = "weighter", "test_tilt", True

    def needs(self, run: Any) -> Needs:
        return Needs(embeddings=self.params)

    def weigh(self, batch: Any) -> Any:
        return batch.losses * 0 + 1


class Bare(Selector[SelectorParams]):
    family, name = "selector", "test_bare_embeddings"

    def needs(self, run: Any) -> Needs:
        return Needs(embeddings=self.params)  # type: ignore[arg-type]

    def score(self, ctx: Any, candidates: Any) -> Any:
        return np.zeros(candidates.size)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load_components([])
    for cls in (Near, Tilt, Bare):
        monkeypatch.setitem(registry._registered, (cls.family, cls.name), cls)


def service(probe: Any, pool: Pool, **wanted: EmbeddingParams) -> EmbeddingService:
    return EmbeddingService(wanted, pool, probe)


def test_components_with_the_same_embeddings_share_one_measurement() -> None:
    probe, pool = CountingProbe(), make_pool({"a": 5})
    wanted = {"select": NearParams(), "order": NearParams(pooling="mean"), "mix": NearParams(pooling="last")}
    shared = service(probe, pool, **wanted)
    select, order, mix = (shared.of_all(key) for key in wanted)
    assert select is not None and order is not None and mix is not None  # noqa: PT018
    assert select(None) is order(None)
    assert select(pool) is select(None)
    assert mix(None) is not select(None)
    assert [(each.pooling, count) for each, count in probe.asked] == [("mean", 5), ("last", 5)]
    with pytest.raises(ValueError, match="read-only"):
        select(None)[0, 0] = 3
    before = select(None).copy()
    shared.forget()
    assert not np.array_equal(select(None), before)
    assert shared.of_all("weight") is None


def test_a_weighter_reads_embeddings_of_its_step_and_of_validation_samples() -> None:
    import torch

    probe, pool, held = CountingProbe(), make_pool({"a": 5}), make_pool({"v": 3}, rows=[{"input_ids": [1]}] * 3)
    held.__dict__["content_digest"] = "held"
    source = service(probe, pool, weight=TiltParams()).of_some("weight")
    batch = StepBatch(torch.ones(2), pool=pool, places=torch.tensor([4, 2]), validation_pool=held)
    with pytest.raises(ComponentError, match=r"return Needs\(embeddings=self.params\)"):
        batch.embeddings()
    import dataclasses

    batch = dataclasses.replace(batch, embedding_source=source)
    np.testing.assert_array_equal(batch.embeddings(), [[5, 5], [3, 3]])
    assert batch.embeddings() is batch.embeddings()
    np.testing.assert_array_equal(batch.embeddings(batch.validation)[:, 0], [2, 3, 4])
    assert len(probe.asked) == 2


def test_a_decision_reads_embeddings_from_its_context() -> None:
    with pytest.raises(ComponentError, match=r"return Needs\(embeddings=self.params\)"):
        context(make_pool({"a": 4})).embeddings()
    probe, pool = CountingProbe(), make_pool({"a": 40})
    near = Near(NearParams())
    planner = make_planner(pool, select=near, rounds=1)
    planner.readings = Readings(embeddings=service(probe, pool, select=NearParams()))
    (plan,) = plans(planner, 1, probe)
    assert sorted(plan.indices) == list(range(32, 40))
    assert len(probe.asked) == 1


def test_a_run_gives_embeddings_to_its_components() -> None:
    from dataflex.trainer.run import LoadedRun
    from unit.trainer.test_run import arguments

    case = run_of(select={"method": "test_near", "validation": "v"}, update_steps=4)
    assert list(case.inputs.wanted_embeddings) == ["select"]
    assert run_of(**SELECT).inputs.wanted_embeddings == {}
    run = LoadedRun.of(case.inputs, case.data, case.steps(arguments()))
    assert run.data.pool is not None
    probe = CountingProbe()
    shared = EmbeddingService(case.inputs.wanted_embeddings, run.data.pool, probe)  # type: ignore[arg-type]
    planner = run.make_planner(run.data.pool, "shuffle", lambda: 0.0, {}, shared)
    plans(planner, 1, probe)
    assert len(probe.asked) == 1


def asking(method: str, family: str = "select", **changes: Any) -> RunConfig:
    return split_config({"val_size": 0.1, "dataflex": {family: {"method": method, **changes}}})


def said(config: RunConfig, key: str) -> str:
    return " ".join(each.message for each in problems_of(config) if each.key == key)


def test_embeddings_that_cannot_be_computed_are_refused_before_a_model_is_loaded() -> None:
    assert "must extend dataflex.EmbeddingParams" in said(asking("test_bare_embeddings"), "dataflex.select")
    config = asking("test_near", embedding_text="prompt")
    assert not said(config, "dataflex.select.embedding_text")
    config.llamafactory["train_on_prompt"] = True
    assert "train_on_prompt is set" in said(config, "dataflex.select.embedding_text")
    assert "name an encoder" in said(asking("test_tilt", "weight"), "dataflex.weight.encoder")
    config = asking("test_tilt", "weight", encoder="asset:all-minilm-l6-v2")
    assert not said(config, "dataflex.weight.encoder")
    config.llamafactory["streaming"] = True
    assert "embeds the samples before training" in said(config, "streaming")


def test_a_missing_layer_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    config = asking("test_near", layer=5)
    config.llamafactory["model_name_or_path"] = str(tmp_path)
    for content, is_told in (
        ({"num_hidden_layers": 4}, True),
        ({"text_config": {"n_layer": 4}}, True),
        ({"num_hidden_layers": 5}, False),
        ({"vocab_size": 3}, False),
        ([], False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert ("has 4 layers" in said(config, "dataflex.select.layer")) == is_told
        encoder = asking("test_near", layer=5, encoder=str(tmp_path))
        assert ("has 4 layers" in said(encoder, "dataflex.select.layer")) == is_told


def test_embeddings_of_the_model_in_training_are_a_measurement_of_the_plan() -> None:
    own = Near(NearParams(layer=3, pooling="last", embedding_text="response"))
    (measured,) = measurements_of(own.needs(None))
    assert measured == Embeddings(3, "last", text="response")
    assert measurements_of(Near(NearParams()).needs(None)) == (Embeddings(),)
    assert measurements_of(Near(NearParams(encoder="asset:all-minilm-l6-v2")).needs(None)) == ()
    run = RunOutline(Schedule(0, 5, -1, 20), 8, pool_size=100, validation=6)
    assert expected_forwards(own, own.needs(None), run) == 4 * (100 + 6)  # 4 decisions
    near = Near(NearParams(encoder="asset:all-minilm-l6-v2"))
    assert expected_forwards(near, near.needs(None), run) == 0


def test_the_plan_of_a_run_lists_the_embeddings_of_encoders() -> None:
    near = Near(NearParams(encoder="asset:all-minilm-l6-v2", embedding_folder="vectors"))
    keys = TrainerKeys(max_steps=20, per_device=2)
    plan = plan_of(
        DataFlexConfig(update_steps=5),
        Components(select=only("select", near)),
        keys,
        {"select": near.needs(None)},
        DataOutline(100, {"a": 100}, {"select": 6}),
    )
    (line,) = [line for line in plan.lines() if "embeddings" in line]
    assert line.split(maxsplit=1)[1] == (
        "select: of 100 samples and 6 validation samples by asset:all-minilm-l6-v2, made once before the model is "
        "loaded, kept in vectors"
    )
