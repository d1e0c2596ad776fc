"""The selector of tests/plugins/near_validation.py, compared with hidden states measured one by one."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex import Needs, Selector
from dataflex.api import measurement, registry
from dataflex.data.pool import Pool
from dataflex.probe.model import ModelProbe
from unit.fakes import build, context, make_pool

PLUGIN = Path(__file__).parents[2] / "plugins" / "near_validation.py"
PAD, IGNORED, VOCAB = 0, -100, 31
UNTRAINED = (2, 9)
HALF_LIFE, MOMENTUM = 3.0, 0.25


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Selector]]:
    registry.load_components([])
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(measurement, "_registered", dict(measurement._registered))
    modules = dict(sys.modules)
    registry.load_components([str(PLUGIN)])
    yield registry.get("selector", "near_validation")
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]


def rows_of(count: int, seed: int, untrained: tuple[int, ...] = ()) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = rng.integers(1, VOCAB, int(rng.integers(2, 14))).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * len(ids) if number in untrained else ids})
    return rows


def pool_of(rows: list[dict[str, list[int]]], sizes: dict[str, int]) -> Pool:
    pool = make_pool(sizes, lengths=[len(row["input_ids"]) for row in rows], rows=rows)
    pool.__dict__["trained"] = np.array([max(row["labels"]) > 0 for row in rows])
    return pool


ROWS, HELD = rows_of(20, 1, UNTRAINED), rows_of(7, 2, (1,))
POOL, VALIDATION = pool_of(ROWS, {"a": 8, "b": 12}), pool_of(HELD, {"sums": 4, "rhymes": 3})


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch that is padded on the left, where a model of relative positions gives the same."""
    width = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": PAD, "labels": IGNORED}
    batch = {
        key: torch.tensor([[fill] * (width - len(row[key])) + row[key] for row in rows]) for key, fill in filled.items()
    }
    return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).eval()


def probe_of(model: LlamaForCausalLM) -> ModelProbe:
    return ModelProbe(
        model=lambda: model,
        device=torch.device("cpu"),
        batch_tokens=40,
        pool=POOL,
        collate=collate,
        autocast=contextlib.nullcontext,
    )


def vector(model: LlamaForCausalLM, row: dict[str, list[int]]) -> np.ndarray:
    with torch.no_grad():
        given = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
    states = given.hidden_states[1][0].double().numpy()
    total = sum(0.5 ** ((len(states) - 1 - place) / HALF_LIFE) * state for place, state in enumerate(states))
    return total / np.linalg.norm(total)


def centre(model: LlamaForCausalLM, rows: list[dict[str, list[int]]]) -> np.ndarray:
    return np.mean([vector(model, row) for row in rows], axis=0)


def by_hand(models: list[LlamaForCausalLM]) -> np.ndarray:
    """Return the scores in the last decision of one with each model."""
    centres = [[centre(model, [HELD[0], *HELD[2:4]]), centre(model, HELD[4:])] for model in models]
    tasks = centres[0]
    for now in centres[1:]:
        tasks = [MOMENTUM * old + (1 - MOMENTUM) * new for old, new in zip(tasks, now, strict=True)]
    units = [task / np.linalg.norm(task) for task in tasks]
    scores = [max(float(vector(models[-1], row) @ unit) for unit in units) for row in ROWS]
    return np.where(np.isin(np.arange(20), UNTRAINED), np.nan, scores)


def made(cls: type[Selector], **params: Any) -> Any:
    return build(cls, layer=1, half_life=HALF_LIFE, momentum=MOMENTUM, **params)


def test_the_plugin_imports_only_dataflex_numpy_and_torch() -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(PLUGIN.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert imported - {"__future__", "collections.abc", "dataclasses", "math", "typing"} == {
        "dataflex",
        "numpy",
        "torch",
    }


def test_scores_equal_those_of_hidden_states_measured_one_by_one(plugin: type[Selector]) -> None:
    models = [model_of(seed) for seed in (1, 2)]
    selector = made(plugin)
    needs: Needs = selector.needs(None)
    assert [each.name for each in needs.measurements] == ["ends"]
    assert needs.validation is selector.params
    for count, model in enumerate(models, 1):
        ctx = dataclasses.replace(context(POOL), probe=probe_of(model), validation_pool=VALIDATION)
        selector.begin(ctx)
        expected = by_hand(models[:count])
        np.testing.assert_allclose(selector.score(ctx, np.arange(20)), expected, atol=1e-5)
        some = np.array([7, 2, 19, 3])
        np.testing.assert_allclose(selector.score(ctx, some), expected[some], atol=1e-5)
        restored = made(plugin)
        restored.load_state_dict(selector.state_dict())
        selector = restored
    assert np.nanmax(np.abs(by_hand(models) - by_hand(models[1:]))) > 0.01  # the first decision counts in the second
