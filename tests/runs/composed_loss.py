"""The gradient of a loss that several components weigh, computed by hand in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

ETA, TEMPERATURE, SHARE = 0.5, 0.4, 0.6
"""Parameters of group_dro, of the weighter of samples, and of the weighter of tokens."""


def section(reference: Path, plugin: Path) -> dict:
    """Return a section with a weighter of samples, one of tokens, the mean over samples, and weights of the domains."""
    return {
        "plugins": [str(plugin)],
        "warmup_steps": 1,
        "update_steps": 2,
        "mix": {"method": "group_dro", "eta": ETA},
        "weight": [
            {"method": "loss", "temperature": TEMPERATURE, "normalization": "sample"},
            {"method": "excess_tokens", "reference_model": str(reference), "share": SHARE},
        ],
    }


def kept(folder: Path, processes: int) -> list[dict]:
    """Return the micro-batches and the gradient that every process stored of the step."""
    return [torch.load(folder / f"kept-{rank}.pt", weights_only=True) for rank in range(processes)]


def token_losses(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the losses of one sample's trained tokens."""
    logits = model(input_ids=ids[None]).logits[0, :-1]
    counted = labels[1:] != -100
    return -torch.log_softmax(logits, -1)[counted, labels[1:][counted]]


def gradient_by_hand(
    folder: Path, processes: int, model: Path, reference: Path, *, without: str = ""
) -> dict[str, torch.Tensor]:
    """Return the gradient of (1 / N) sum of coefficients times token losses.

    Args:
        folder: Folder of the run.
        processes: Number of processes of the run.
        model: Model that was trained.
        reference: Reference model of the weighter of tokens.
        without: Factor of the coefficients to leave out: samples, tokens, domains or means. Empty means none.
    """
    found = kept(folder, processes)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    frozen = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    losses, theirs, domains = [], [], []
    for batch in (batch for part in found for batch in part["batches"]):
        for row, place in enumerate(batch["dataflex_index"].tolist()):
            real = batch["attention_mask"][row] != 0
            ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
            losses.append(token_losses(trained, ids, labels))
            with torch.no_grad():
                theirs.append(token_losses(frozen, ids, labels).double())
            domains.append(int(np.searchsorted(found[0]["offsets"].numpy(), place, side="right")) - 1)
    means = [float(each.detach().mean()) for each in losses]
    tokens = sum(each.numel() for each in losses)
    of_domain = {
        domain: [loss for loss, own in zip(losses, domains, strict=True) if own == domain] for domain in set(domains)
    }
    raised = [
        math.exp(ETA * float(torch.cat(of_domain[domain]).detach().mean())) if domain in of_domain else 1.0
        for domain in range(found[0]["offsets"].numel() - 1)
    ]
    low, high = min(means), max(means)
    positions = [min((2 * mean - high - low) / (high - low) + 1, 1) for mean in means]
    powers = [math.exp(position / TEMPERATURE) for position in positions]
    excess = [(mine.detach() - other).numpy() for mine, other in zip(losses, theirs, strict=True)]
    least = np.quantile(np.concatenate(excess), 1 - SHARE)
    chosen = sum(int((values >= least).sum()) for values in excess)
    total = torch.zeros((), dtype=torch.float64)
    for number, (loss, domain) in enumerate(zip(losses, domains, strict=True)):
        factors = {
            "samples": len(losses) * powers[number] / sum(powers),
            "tokens": torch.from_numpy((excess[number] >= least) * (tokens / chosen)),
            "domains": raised[domain] / sum(raised) * tokens / sum(each.numel() for each in of_domain[domain]),
            "means": tokens / (len(losses) * loss.numel()),
        }
        factors.pop(without, None)
        total = total + (math.prod(factors.values()) * loss).sum() / tokens
    total.backward()
    return {name: each.grad for name, each in trained.named_parameters()}


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the length of the difference of two gradients, relative to that of the second."""
    assert first.keys() == second.keys()
    apart = sum(float((first[name] - second[name]).square().sum()) for name in second)
    return math.sqrt(apart / sum(float(each.square().sum()) for each in second.values()))
