"""Metrics of evaluation sets of preference stages by hand: one sample at a time, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BETA, FTX = 0.5, 0.3


class Scorer:
    """Scores responses under LLaMA-Factory's template ``default``.

    Args:
        folder: Folder of the model.
        tokenizer: Folder of the tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        file = folder / "value_head.safetensors"
        self.head = load_file(file) if file.is_file() else {}

    def ids(self, prompt: str, response: str) -> tuple[torch.Tensor, int]:
        """Return the tokens of a prompt and a response, and the number of tokens of the response."""
        first, middle, second = (
            self.tokenizer(text, add_special_tokens=False).input_ids
            for text in (f"Human: {prompt}", "\nAssistant:", response)
        )
        end = self.tokenizer.eos_token_id
        return torch.tensor([[*first, end, *middle, *second, end]]), len(second) + 1

    def logp(self, prompt: str, response: str) -> float:
        """Return the log probability of a response."""
        ids, counted = self.ids(prompt, response)
        with torch.no_grad():
            found = self.model(ids).logits[0, :-1].log_softmax(-1)
        return sum(found[at - 1, ids[0, at]].item() for at in range(ids.shape[1] - counted, ids.shape[1]))

    def reward(self, prompt: str, response: str) -> float:
        """Return the value of the head at the last token."""
        ids, _ = self.ids(prompt, response)
        with torch.no_grad():
            hidden = self.model.model(ids).last_hidden_state[0, -1]
        weight, bias = (self.head[f"v_head.summary.{name}"].double() for name in ("weight", "bias"))
        return float(weight[0] @ hidden + bias[0])


def pair_values(stage: str, rows: list[dict[str, Any]], model: Scorer, frozen: Scorer) -> list[tuple[float, float]]:
    """Return the loss and the margin of each pair in stage dpo or rm."""
    found = []
    for row in rows:
        chosen, rejected = ((row["instruction"], row[side]) for side in ("chosen", "rejected"))
        if stage == "rm":
            margin = model.reward(*chosen) - model.reward(*rejected)
        else:
            gain = model.logp(*chosen) - frozen.logp(*chosen)
            margin = BETA * (gain - (model.logp(*rejected) - frozen.logp(*rejected)))
        found.append((math.log1p(math.exp(-margin)), margin))
    return found


def kto_losses(rows: list[dict[str, Any]], model: Scorer, frozen: Scorer) -> list[float]:
    """Return the loss of each response in stage kto, with ``pref_ftx``.

    The other response of a row, which the KL divergence is estimated from, is that of the row before.
    """
    found = []
    for before, row in zip([rows[-1], *rows[:-1]], rows, strict=True):
        own, other = (row["instruction"], row["output"]), (row["instruction"], before["output"])
        gain = model.logp(*own) - frozen.logp(*own)
        distance = max(0.0, model.logp(*other) - frozen.logp(*other))
        margin = gain - distance if row["label"] else distance - gain
        loss = 1 - 1 / (1 + math.exp(-BETA * margin))
        found.append(loss - FTX * model.logp(*own) / model.ids(*own)[1] * bool(row["label"]))
    return found


def metrics(stage: str, data: Path, name: str, model: Scorer, frozen: Scorer) -> dict[str, Any]:
    """Return the metrics of an evaluation set."""
    rows = json.loads((data / f"{name}.json").read_text())
    of_pairs: dict[str, Any] = {}
    if stage == "kto":
        losses = kto_losses(rows, model, frozen)
    else:
        values = pair_values(stage, rows, model, frozen)
        losses, margins = [loss for loss, _ in values], [margin for _, margin in values]
        of_pairs = {"accuracy": float(np.mean([each > 0 for each in margins])), "margin": float(np.mean(margins))}
    error = float(np.std(losses, ddof=1) / math.sqrt(len(losses)))
    none = dict.fromkeys(("perplexity", "bits_per_byte", "tokens", "bytes"))
    return {**none, "loss": float(np.mean(losses)), "loss_stderr": error, **of_pairs, "samples": len(rows)}
