"""Runs with token weights from the data, and their gradients by hand from the text."""

from __future__ import annotations

import random
from itertools import groupby
from pathlib import Path
from typing import Any

import composed_loss
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from workshop import Workshop

import tiny

WEIGHTS = {"the": 0.0, "cat": 0.5, "sun": 2.0}
"""The first word of a response -> the weight of its message. It is 1 for other words."""
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
INPUTS = ("input_ids", "attention_mask", "position_ids")
SPAN: dict[str, Any] = {
    "method": "span",
    "message_key": "weight",
    "spans_column": "spans",
    "marks": [{"begin": "<", "end": ">", "weight": 0.25}],
}
"""In every response a part in angle brackets has weight 0.25, and the word moon 3. The weights multiply."""


def conversation(rng: random.Random) -> dict[str, Any]:
    """Return a row whose weights follow from the words of its responses."""
    messages, spans = [], []
    words = [word for word in tiny.WORDS if word != "moon"]
    for _ in range(rng.randint(1, 3)):
        marked = f" < {rng.choice(words)} {rng.choice(['moon', 'tree'])} > " if rng.random() < 0.7 else " "
        content = rng.choice([*WEIGHTS, "dog"]) + marked + rng.choice(words)
        messages += [
            {"role": "user", "content": tiny.sentence(rng)},
            {"role": "assistant", "content": content, "weight": WEIGHTS.get(content.split()[0])},
        ]
        if "moon" in content:
            begin = content.index("moon")
            spans.append({"message": len(messages) - 1, "begin": begin, "end": begin + 4, "weight": 3.0})
    return {"messages": messages, "spans": spans}


def weights_by_hand(words: list[str]) -> list[float]:
    """Return the weights of the tokens of a response, its end included."""
    own, found, inside = WEIGHTS.get(words[0], 1.0), [], False
    for word in words:
        inside = inside or word == "<"
        found.append(own * (0.25 if inside else 1.0) * (3.0 if word == "moon" else 1.0))
        inside = inside and word != ">"
    return found


def gradient_by_hand(folder: Path, processes: int, model: Path, weighted: bool = True) -> dict[str, torch.Tensor]:
    """Return the gradient of (1 / N) sum of the weights times the token losses, in float64."""
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model)
    total, tokens, seen = torch.zeros((), dtype=torch.float64), 0, set[float]()
    for batch in (batch for part in composed_loss.kept(folder, processes) for batch in part["batches"]):
        for row in range(len(batch["labels"])):
            inputs = {name: batch[name][row : row + 1] for name in INPUTS if name in batch}
            labels = batch["labels"][row]
            weights = list[float]()
            for is_trained, places in groupby(labels.tolist(), lambda label: label != -100):
                if is_trained:
                    weights += weights_by_hand([tokenizer.decode([token]) for token in places])
            counted = labels[1:] != -100
            scores = torch.log_softmax(trained(**inputs).logits[0, :-1], -1)
            losses = -scores[counted, labels[1:][counted]]
            total = total + (torch.tensor(weights if weighted else [1.0] * len(weights)) * losses).sum()
            tokens += losses.numel()
            seen |= set(weights)
    assert len(seen) > 5
    (total / tokens).backward()
    return {name: each.grad for name, each in trained.named_parameters()}


GRADIENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one batch": (1, {"per_device_train_batch_size": 16}),
    "accumulated": (1, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}),
    "fused": (1, {"per_device_train_batch_size": 16, "dataflex": {"fused_loss": True, "weight": SPAN}}),
    "packed": (1, {"per_device_train_batch_size": 4, "packing": True, "cutoff_len": 96}),
    "planned": (1, {"per_device_train_batch_size": 16, "dataflex": {"order": {"method": "shuffle"}, "weight": SPAN}}),
    "two processes": (2, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
}


def run_of(**changes: Any) -> dict[str, Any]:
    return {"dataset": "talks", "dataflex": {"weight": SPAN}, "template": "llama2", "cutoff_len": 128, **changes}


def add_data(folder: Path) -> None:
    """Add the conversations to a folder of data."""
    rng = random.Random(5)
    rows = [conversation(rng) for _ in range(64)]
    tiny.add_data(folder, "talks", rows, formatting="openai", columns={"messages": "messages"}, tags=TAGS)


def add_runs(workshop: Workshop, processes: int) -> None:
    """Add the runs of a number of processes."""
    for name, (needed, changes) in GRADIENTS.items():
        if needed == processes:
            still = {"finetuning_type": "full", "learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 1}
            workshop.add(name, keep=0, **run_of(**still, **changes))
    if processes == 1:
        saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "gradient_accumulation_steps": 2}
        workshop.add("span-whole", **run_of(**saved))
        workshop.add("span-cut", stop_at=5, **run_of(**saved))
        workshop.add("span-resumed", into="span-cut", **run_of(**saved))
