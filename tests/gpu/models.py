"""Small random models, samples and a probe, for tests on an accelerator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from dataflex.data.pool import Pool
from dataflex.probe.model import ModelProbe, Tokens
from dataflex.probe.moments import Moments

VOCABULARY = 512
UNTRAINED = 3
"""The sample of every pool that has no trained token."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def make_samples(count: int = 16, low: int = 8, high: int = 48) -> Pool:
    """Return samples of random tokens, a third of each a prompt."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        ids = rng.integers(3, VOCABULARY, int(rng.integers(low, high))).tolist()
        cut = len(ids) if number == UNTRAINED else len(ids) // 3
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * cut + ids[cut:]})
    return Pool.concatenate({"samples": Dataset.from_list(rows)})


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pad rows on the right to a multiple of 8, as LLaMA-Factory's collator does."""
    width = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8

    def padded(key: str, value: int) -> torch.Tensor:
        given = [row.get(key, row["input_ids"] if key == "labels" else [1] * len(row["input_ids"])) for row in rows]
        return torch.tensor([[*each, *[value] * (width - len(each))] for each in given])

    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": padded("attention_mask", 0),
        "labels": padded("labels", -100),
    }


def make_model(kind: str, dtype: torch.dtype, *, checkpoints: bool = False) -> torch.nn.Module:
    """Return a random model: ``lora``, ``full``, ``tied`` (the head is the embedding) or ``experts``."""
    torch.manual_seed(0)
    model: Any
    if kind == "experts":
        config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
        model = MixtralForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied"))
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        torch.manual_seed(1)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.02)
    return model.to(dtype)


def make_probe(
    model: torch.nn.Module,
    device: torch.device,
    samples: Pool | None = None,
    tokens: int = 256,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> ModelProbe:
    """Return a probe of a model, with moments that depend on the parameters' names alone."""
    found = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            draw = torch.Generator().manual_seed(len(name))
            kind = torch.float64 if value.dtype == torch.float64 else torch.float32
            mean, square = torch.randn(value.shape, generator=draw), torch.rand(value.shape, generator=draw)
            moments = ((mean * 1e-3).to(device, kind), (square * 1e-5 + 1e-6).to(device, kind))
            found[name] = Moments(*moments, step=5, betas=(0.9, 0.999), eps=1e-8)
    return ModelProbe(
        samples or make_samples(),
        lambda: model,
        collate,
        autocast,
        device,
        tokens,
        moments=lambda: found,
        tokens=Tokens(pad=0, eos=(2,), decode=str),
    )
