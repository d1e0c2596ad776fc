"""Runs weighted by ss_token, and the gradient of a step by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import composed_loss
import numpy as np
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

import tiny

SHARE, GAMMA, TEMPERATURE = 0.45, 0.4, 0.4
UNIFORM = {"warmup_steps": 1, "weight": {"method": "uniform"}}
SPREAD = ("fsdp2", "zero3")
AHEAD = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
KINDS: dict[str, dict[str, Any]] = {
    "sdpa": {"flash_attn": "sdpa"},
    "eager": {"flash_attn": "disabled", "disable_gradient_checkpointing": True},
    "fused": {},
    "ahead": AHEAD,
}
"""Settings of the runs. With two micro-batches, weights of a chain are decided in forward passes before the step."""


def make_attentive(folder: Path, source: Path) -> Path:
    """Write a copy of a model whose attention is far from uniform."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 40
            layer.self_attn.k_proj.weight *= 40
    model.save_pretrained(folder)
    copy_tokenizer(folder, source)
    return folder


def copy_tokenizer(folder: Path, source: Path) -> None:
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())


def make_bloom(folder: Path, source: Path) -> Path:
    """Write a model whose layers compute attention without Transformers' attention functions."""
    vocabulary = AutoModelForCausalLM.from_pretrained(source).config.vocab_size
    BloomForCausalLM(BloomConfig(vocab_size=vocabulary, hidden_size=16, n_layer=2, n_head=2)).save_pretrained(folder)
    copy_tokenizer(folder, source)
    return folder


def run_of(model: Path, history: Path, kind: str, **changes: Any) -> dict[str, Any]:
    weight: list[dict[str, Any]] = [
        {"method": "ss_token", "reference_model": str(history), "share": SHARE, "gamma": GAMMA}
    ]
    if kind == "ahead":
        weight.append({"method": "loss", "temperature": TEMPERATURE})
    return {
        "model_name_or_path": str(model),
        "dataset": "alpha,beta",
        "finetuning_type": "full",
        "dataflex": {"warmup_steps": 1, "weight": weight, "fused_loss": kind == "fused"},
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        **KINDS.get(kind, {}),
        **changes,
    }


def make_models(folder: Path, source: Path) -> None:
    """Write the model, the history model and a model that cannot be read."""
    make_attentive(folder / "model", source)
    tiny.make_model(folder / "history", seed=1)
    make_bloom(folder / "bloom", source)


def add_runs(workshop: Any, folder: Path, processes: int) -> None:
    """Add the runs of a number of processes, with the models of a folder."""
    model, history, longer = folder / "model", folder / "history", {"max_steps": 4, "learning_rate": 0.003}
    if processes == 2:
        for kind, changes in zip(SPREAD, (tiny.FSDP2, tiny.zero(folder, 3)), strict=True):
            run = run_of(model, history, "", per_device_train_batch_size=4, **longer, **changes)
            workshop.add(f"ss_token-{kind}", **run)
        return
    for kind in KINDS:
        run = run_of(model, history, kind, max_grad_norm=0.0, learning_rate=0.0)
        workshop.add(f"ss_token-{kind}", keep=1, **run)
    workshop.add("ss_token-one", **run_of(model, history, "", **longer))
    workshop.add("ss_token-uniform", **{**run_of(model, history, "", **longer), "dataflex": UNIFORM})
    workshop.add("ss_token-bloom", **run_of(folder / "bloom", workshop.model, ""))


def scores(
    model: torch.nn.Module, history: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor, *, own_row: bool = True
) -> np.ndarray:
    """Return the scores of one sample's trained tokens, from the matrix of attention probabilities."""
    counted = torch.nonzero(labels != -100).flatten()
    with torch.no_grad():
        theirs = composed_loss.token_losses(history, ids, labels).double()
        improved = (theirs - composed_loss.token_losses(model, ids, labels)).numpy()
        matrix = model(input_ids=ids[None], output_attentions=True).attentions[-1][0].mean(0)
    attention = matrix[counted if own_row else counted - 1][:, labels == -100].sum(1).numpy()
    return GAMMA * (improved - improved.min()) / (np.ptp(improved) + 1e-8) + (1 - GAMMA) * attention


def gradient_by_hand(
    folder: Path, model: Path, history: Path, kind: str, *, own_row: bool = True
) -> dict[str, torch.Tensor]:
    """Return the gradient of the kept step's loss, in float64."""
    (kept,) = composed_loss.kept(folder, 1)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    frozen = AutoModelForCausalLM.from_pretrained(history, dtype=torch.float32)
    losses, factors = [], []
    for batch in kept["batches"]:
        for row in range(len(batch["labels"])):
            real = batch["attention_mask"][row] != 0
            ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
            losses.append(composed_loss.token_losses(trained, ids, labels))
            found = scores(trained, frozen, ids, labels, own_row=own_row)
            count = math.ceil(SHARE * found.size)
            weights = torch.zeros(found.size, dtype=torch.float64)
            weights[np.argsort(-found, kind="stable")[:count].copy()] = found.size / count
            factors.append(weights)
    assert len(losses) == 8
    of_samples = [1.0] * 8
    if kind == "ahead":
        means = [float(each.detach().mean()) for each in losses]
        low, high = min(means), max(means)
        powers = [math.exp(min((2 * mean - high - low) / (high - low) + 1, 1) / TEMPERATURE) for mean in means]
        of_samples = [8 * power / sum(powers) for power in powers]
    tokens = sum(each.numel() for each in losses)
    parts = zip(losses, factors, of_samples, strict=True)
    torch.stack([(factor * scale * loss).sum() / tokens for loss, factor, scale in parts]).sum().backward()
    return {name: each.grad for name, each in trained.named_parameters()}
