"""A compiled model: steps and decisions compile no further graph, and losses equal those of the model as written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex.api.probe import GradientSettings
from dataflex.data.token_loss import shifted
from dataflex.probe.embeddings import Embeddings
from dataflex.probe.gradient_features import GradientFeatures
from dataflex.probe.losses import Losses
from dataflex.probe.model import ModelProbe
from dataflex.trainer.fused_head import FusedHead
from dataflex.trainer.loss import WeightedLoss, loss_function
from dataflex.trainer.step_weights import StepWeights
from dataflex.weighters.loss import LossWeighter
from unit.fakes import build, make_pool
from unit.trainer.test_loss import weights_of

LENGTHS = (8, 12, 5, 9)


@pytest.fixture
def model() -> Iterator[LlamaForCausalLM]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    yield LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).train()
    torch._dynamo.reset()


def graphs() -> int:
    """Return how many graphs have been made."""
    return int(counters["stats"]["unique_graphs"])


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def probe_of(model: LlamaForCausalLM) -> ModelProbe:
    rows = [{"input_ids": [1 + (3 * n + i) % 28 for i in range(size)]} for n, size in enumerate(LENGTHS)]
    pool = make_pool({"a": len(rows)}, LENGTHS, rows)
    return ModelProbe(pool, lambda: model, collate, contextlib.nullcontext, torch.device("cpu"), 24)


def measured(model: LlamaForCausalLM) -> list[np.ndarray]:
    probe, everyone = probe_of(model), np.arange(len(LENGTHS))
    settings = GradientSettings(projection="identity", normalize=False)
    return [probe.measure(each, everyone) for each in (Losses(), Embeddings(), GradientFeatures(settings))]


def step(model: LlamaForCausalLM, function: WeightedLoss) -> float:
    ids = torch.randint(1, 29, (2, 10), generator=torch.Generator().manual_seed(function.step))
    fused = function.fused
    fusing = contextlib.nullcontext() if fused is None else fused.active(shifted(ids), function.coefficients_before)
    with fusing, loss_function(model, function):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    function.step += 1
    return float(loss.detach())


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("weighs", [False, True])
def test_steps_and_decisions_compile_no_further_graph(model: LlamaForCausalLM, weighs: bool, fuses: bool) -> None:
    head = FusedHead(model) if fuses else None

    def function() -> WeightedLoss:
        weights: StepWeights | None = weights_of(build(LossWeighter)) if weighs else None
        return WeightedLoss(2, lambda losses: None, weights, fused=head)

    written = [step(model, plain) for plain in [function()] for _ in range(6)]
    values = measured(model)
    model.zero_grad()
    model.compile(backend="eager")
    before, compiled = graphs(), function()
    found = [step(model, compiled)]
    made = graphs()
    assert made > before
    found += [step(model, compiled) for _ in range(2)]
    for now, then in zip(measured(model), values, strict=True):
        np.testing.assert_array_equal(now, then)
    found += [step(model, compiled) for _ in range(2)]
    measured(model)
    found.append(step(model, compiled))
    assert graphs() == made
    assert found == written
