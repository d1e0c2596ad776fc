"""Losses of preference samples one at a time, and the gradient of a step's weighed loss, by hand in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from composed_loss import kept
from transformers import AutoModelForCausalLM

ETA, TEMPERATURE, BETA = 0.5, 0.4, 0.5
"""Parameters of group_dro, of the weighter and of the losses."""


def section() -> dict:
    """Return a section with weights of samples and of the domains."""
    return {
        "warmup_steps": 1,
        "update_steps": 2,
        "mix": {"method": "group_dro", "eta": ETA},
        "weight": {"method": "loss", "temperature": TEMPERATURE},
    }


def log_probability(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the log probability of one row's trained tokens."""
    ids, labels = ids[mask != 0], labels[mask != 0]
    logits = model(input_ids=ids[None]).logits[0, :-1].double()
    counted = labels[1:] != -100
    return torch.log_softmax(logits, -1)[counted, labels[1:][counted]].sum()


class Reward(torch.nn.Module):
    """A causal model with a linear layer that gives the reward of the last token."""

    def __init__(self, model: torch.nn.Module, head: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.pretrained_model, self.summary = model, torch.nn.Linear(model.config.hidden_size, 1).double()
        self.summary.load_state_dict(head)

    def score(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.pretrained_model.model(input_ids=ids[mask != 0][None]).last_hidden_state
        return self.summary(hidden[0, -1])[0]


def pair_losses(stage: str, model: torch.nn.Module, frozen: torch.nn.Module | None, batch: dict) -> list[torch.Tensor]:
    """Return the losses of the pairs of a micro-batch in stage dpo or rm, one pair at a time."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    pairs = len(batch["dataflex_index"])
    found = []
    for chosen, rejected in zip(range(pairs), range(pairs, 2 * pairs), strict=True):
        if stage == "rm":
            margin = model.score(ids[chosen], mask[chosen]) - model.score(ids[rejected], mask[rejected])
        else:
            of_model, of_frozen = (
                [log_probability(each, ids[row], mask[row], labels[row]) for row in (chosen, rejected)]
                for each in (model, frozen)
            )
            margin = BETA * (of_model[0] - of_model[1] - (of_frozen[0] - of_frozen[1]).detach())
        found.append(-F.logsigmoid(margin))
    return found


def kto_losses(model: torch.nn.Module, frozen: torch.nn.Module, batches: list[dict]) -> list[list[torch.Tensor]]:
    """Return the losses of the samples of the processes' micro-batches of one place in the step, one at a time."""

    def ratios(batch: dict, prefix: str) -> list[torch.Tensor]:
        fields = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels"))
        return [
            log_probability(model, *row) - log_probability(frozen, *row).detach() for row in zip(*fields, strict=True)
        ]

    with torch.no_grad():
        distance = max(0.0, float(torch.stack([each for batch in batches for each in ratios(batch, "kl_")]).mean()))
    return [
        [
            1 - torch.sigmoid(BETA * (ratio - distance if good else distance - ratio))
            for ratio, good in zip(ratios(batch, ""), batch["kto_tags"].tolist(), strict=True)
        ]
        for batch in batches
    ]


def gradient_by_hand(
    stage: str, folder: Path, processes: int, model: torch.nn.Module, reference: Path
) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean over a step's samples of coefficients times losses.

    Args:
        stage: LLaMA-Factory's stage.
        folder: Folder of the run.
        processes: Number of processes of the run.
        model: The model that was trained, in float64.
        reference: The frozen model.
    """
    found = kept(folder, processes)
    frozen = None if stage == "rm" else AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float64)
    losses, domains = [], []
    for batches in zip(*(part["batches"] for part in found), strict=True):
        of_batches = (
            kto_losses(model, frozen, list(batches))
            if stage == "kto"
            else [pair_losses(stage, model, frozen, batch) for batch in batches]
        )
        for batch, values in zip(batches, of_batches, strict=True):
            losses += values
            places = batch["dataflex_index"].tolist()
            domains += [int(np.searchsorted(found[0]["offsets"].numpy(), place, side="right")) - 1 for place in places]
    numbers, count = [float(loss.detach()) for loss in losses], len(losses)
    of_domain = {each: [n for n, own in zip(numbers, domains, strict=True) if own == each] for each in set(domains)}
    raised = [math.exp(ETA * float(np.mean(of_domain[each]))) for each in range(2)]
    low, high = min(numbers), max(numbers)
    powers = [math.exp(min((2 * each - high - low) / (high - low) + 1, 1) / TEMPERATURE) for each in numbers]
    coefficients = [
        count * power / sum(powers) * raised[domain] / sum(raised) * count / len(of_domain[domain])
        for power, domain in zip(powers, domains, strict=True)
    ]
    total = sum(coefficient * loss for coefficient, loss in zip(coefficients, losses, strict=True)) / count
    total.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
