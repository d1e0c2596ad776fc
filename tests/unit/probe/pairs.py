"""Losses of pairs and of single responses, written by hand, with the tiny models and the samples that they measure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import llamafactory.extras.packages  # noqa: F401 - before TRL, which takes every package for installed without it
import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from trl import AutoModelForCausalLMWithValueHead

from dataflex.data.stages import PAIR
from dataflex.probe.gradients import canonical, parameter_names
from dataflex.probe.model import ModelProbe
from dataflex.probe.stage_loss import StageLosses
from unit.fakes import make_pool
from unit.probe.models import CPU, VOCAB, Model, collate

BETA = 0.3
SIDES = ("chosen", "rejected")


def sequence(prompt: list[int], response: list[int], name: str = "") -> dict[str, list[int]]:
    """Return the fields of a prompt with a response."""
    ids, labels = [*prompt, *response], [-100] * len(prompt) + response
    return {f"{name}input_ids": ids, f"{name}attention_mask": [1] * len(ids), f"{name}labels": labels}


def pairs(count: int = 6, seed: int = 0, untrained: int | None = None, vocabulary: int = VOCAB) -> list[dict[str, Any]]:
    """Return pairs of responses of different lengths; one may have no trained token."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        prompt = rng.integers(1, vocabulary, int(rng.integers(1, 6))).tolist()
        row: dict[str, Any] = {}
        for side in SIDES:
            response = rng.integers(1, vocabulary, int(rng.integers(1, 9))).tolist()
            row |= sequence(prompt, response, f"{side}_")
        if number == untrained:
            row |= {f"{side}_labels": [-100] * len(row[f"{side}_labels"]) for side in SIDES}
        found.append(row)
    return found


def feedback(count: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Return responses that are desired or not, each with the response of the sample before it."""
    rng, found = np.random.default_rng(seed), []
    prompts = [rng.integers(1, VOCAB, int(rng.integers(1, 6))).tolist() for _ in range(count)]
    for number, prompt in enumerate(prompts):
        own, other = (rng.integers(1, VOCAB, int(rng.integers(2, 9))).tolist() for _ in range(2))
        found.append({**sequence(prompt, own), **sequence(prompt, other, "kl_"), "kto_tags": number % 3 != 1})
    return found


def part(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name: row[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels")}


def collate_pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the chosen responses, and then the rejected ones."""
    return collate([part(row, f"{side}_") for side in SIDES for row in rows])


def collate_feedback(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    others = {f"kl_{name}": value for name, value in collate([part(row, "kl_") for row in rows]).items()}
    tags = torch.tensor([row["kto_tags"] for row in rows])
    return {**collate([part(row, "") for row in rows]), **others, "kto_tags": tags}


def log_probabilities(model: Model, batch: Mapping[str, Any], prefix: str = "") -> Tensor:
    """Return the sum of the log probabilities of the trained tokens of each row."""
    inputs = {name: batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask")}
    labels = batch[f"{prefix}labels"][:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1)


@contextlib.contextmanager
def without_adapter(model: Model) -> Any:
    with torch.no_grad(), model.disable_adapter():
        yield


class Dpo:
    """DPO's loss. The reference is a frozen model, or the model without its adapter."""

    rows, reference_size, has_margins = 2, 2, True

    def __init__(self, frozen: Model | None = None) -> None:
        self.frozen, self.made = frozen, 0

    def __call__(self, model: Model, batch: Mapping[str, Any], reference: Tensor | None = None) -> StageLosses:
        policy = torch.stack(log_probabilities(model, batch).chunk(2), 1)
        if reference is None:
            reference = self.reference(model, batch)
        assert not reference.requires_grad
        chosen, rejected = (BETA * (policy - reference)).unbind(1)
        return StageLosses(-F.logsigmoid(chosen - rejected), (chosen - rejected).detach())

    def reference(self, model: Model, batch: Mapping[str, Any]) -> Tensor:
        self.made += 1
        frozen, context = (model, without_adapter(model)) if self.frozen is None else (self.frozen, torch.no_grad())
        with context:
            return torch.stack(log_probabilities(frozen, batch).chunk(2), 1)

    def token_batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate([part(row, "chosen_") for row in rows])


class Simpo(Dpo):
    """A loss without a reference that is not finite if a response has no trained token."""

    reference_size = 0

    def __call__(self, model: Model, batch: Mapping[str, Any], reference: Tensor | None = None) -> StageLosses:
        assert reference is None
        means = log_probabilities(model, batch) / (batch["labels"][:, 1:] != -100).sum(1)
        chosen, rejected = means.chunk(2)
        return StageLosses(-F.logsigmoid(BETA * (chosen - rejected)), (BETA * (chosen - rejected)).detach())


class Reward(Dpo):
    """The loss of a reward model: the score of a response is the value of its last token."""

    reference_size = 0

    def __call__(self, model: Model, batch: Mapping[str, Any], reference: Tensor | None = None) -> StageLosses:
        assert reference is None
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        values = model(**inputs, output_hidden_states=True, return_dict=True, use_cache=False)[2]
        scores = values.gather(1, batch["attention_mask"].sum(1, keepdim=True) - 1)[:, 0]
        chosen, rejected = scores.chunk(2)
        return StageLosses(-F.logsigmoid(chosen - rejected), (chosen - rejected).detach())


class Kto:
    """KTO's loss, with the KL divergence of each sample's other response, which has no gradient."""

    rows, reference_size, has_margins = 1, 2, False

    def __call__(self, model: Model, batch: Mapping[str, Any], reference: Tensor | None = None) -> StageLosses:
        policy = log_probabilities(model, batch)
        with torch.no_grad():
            other = log_probabilities(model, batch, "kl_")
        own, of_other = (self.reference(model, batch) if reference is None else reference).unbind(1)
        gain, distance = policy - own, (other - of_other).clamp(min=0)
        sign = torch.where(batch["kto_tags"], 1, -1)
        return StageLosses(1 - torch.sigmoid(BETA * sign * (gain - distance)))

    def reference(self, model: Model, batch: Mapping[str, Any]) -> Tensor:
        with without_adapter(model):
            return torch.stack([log_probabilities(model, batch, prefix) for prefix in ("", "kl_")], 1)

    def token_batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate([part(row, "") for row in rows])


def with_value_head(model: Model) -> Model:
    """Return a reward model as LLaMA-Factory prepares it."""
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    nn.init.normal_(wrapped.v_head.summary.weight, std=0.5)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        # As in LLaMA-Factory, which finds no embeddings in a model with an adapter.
        found = None if isinstance(model, PeftModel) else getattr(model, name)()
        setattr(wrapped, name, lambda found=found: found)
    return wrapped


def probe_of(model: Model, loss: Any, rows: list[dict[str, Any]], **changes: Any) -> ModelProbe:
    """Return a probe whose pool holds pairs, or single responses."""
    paired = "chosen_input_ids" in rows[0]
    names = [f"{side}_input_ids" for side in SIDES] if paired else ["input_ids"]
    pool = make_pool({"a": len(rows)}, lengths=[sum(len(row[name]) for name in names) for row in rows], rows=rows)
    if paired:
        pool.fields = PAIR
    given = {"autocast": contextlib.nullcontext, "device": CPU, "batch_tokens": 60, **changes}
    gather = collate_pairs if paired else collate_feedback
    return ModelProbe(pool=pool, model=lambda: model, collate=gather, stage_loss=loss, **given)


def one_by_one(model: Model, loss: Any, rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Return losses, margins and flattened gradients, each from a separate backward pass over one sample."""
    names = parameter_names(model)
    parameters = [value for _, value in model.named_parameters() if id(value) in names]
    gather = collate_pairs if "chosen_input_ids" in rows[0] else collate_feedback
    losses, margins, gradients = [], [], []
    for row in rows:
        batch = gather([row])
        # The probe keeps the values of the reference in float32.
        kept = loss.reference(model, batch).float() if loss.reference_size else None
        found = loss(model, batch, kept)
        losses.append(found.losses.item())
        margins.append(None if found.margins is None else found.margins.item())
        each = torch.autograd.grad(found.losses.sum(), parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, each, strict=True)]
        gradients.append(torch.cat([value.flatten() for value in filled]))
    order = [canonical(name) for name, value in model.named_parameters() if value.requires_grad]
    assert len(order) == len(parameters)
    return np.array(losses), None if margins[0] is None else np.array(margins), torch.stack(gradients).numpy()
