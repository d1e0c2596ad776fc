"""Tiny models with random weights, a batch of samples, and gradients from one backward for each sample."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dataflex.api.probe import GradientSettings
from dataflex.data.token_loss import IGNORE_INDEX, shifted
from dataflex.probe.gradients import GradientPass, canonical, parameter_names
from dataflex.probe.layers import Contribution, blocks
from dataflex.probe.model import ModelProbe
from unit.fakes import make_pool

VOCAB, PAD = 61, 0
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "attention_dropout": 0.3,
}
CPU = torch.device("cpu")
Model = Any
Rows = dict[str, Tensor]
"""Flattened per-sample gradients by parameter, (B, n)."""


def llama(**changes: Any) -> Model:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def mixtral(**changes: Any) -> Model:
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_experts_per_tok": 2, "num_local_experts": 4, **changes}))


def qwen3_moe(**changes: Any) -> Model:
    sizes = {"head_dim": 4, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **sizes, "norm_topk_prob": True, **changes}))


def opt(**changes: Any) -> Model:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"max_position_embeddings": 64, "word_embed_proj_dim": 16, "pad_token_id": PAD, **changes}
    return OPTForCausalLM(OPTConfig(**sizes, **more))


def gpt2() -> Model:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64))


def lora(model: Model | None = None, **changes: Any) -> Model:
    """Return a model with adapters that change its output (PEFT starts with B = 0)."""
    options = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, "task_type": "CAUSAL_LM", **changes}
    adapted = get_peft_model(llama() if model is None else model, LoraConfig(**options))
    stir(adapted)
    return adapted


def stir(model: Model) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


def two_adapters() -> Model:
    model = lora()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    stir(model)
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and ".other" not in name)
    return model


def only(part: str, model: Model | None = None) -> Model:
    """Return a model of which only parameters with ``part`` in their names are trained."""
    model = llama() if model is None else model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


MODELS: dict[str, Callable[[], Model]] = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "qwen2, biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3, norms of q and k": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=4)),
    "mixtral": mixtral,
    "qwen3 moe": qwen3_moe,
    "opt, learned positions": opt,
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(llama(attention_bias=True), use_dora=True),
    "two adapters, one frozen": two_adapters,
    "lora and a whole head": lambda: lora(modules_to_save=["lm_head"]),
    "lora, whole head and embedding": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "lora on the head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "lora and biases": lambda: lora(llama(attention_bias=True), bias="all", target_modules=["q_proj"]),
    "lora on experts' attention": lambda: lora(mixtral(), target_modules=["q_proj", "v_proj"]),
    "freeze": lambda: only("layers.1."),
    "biases": lambda: only("bias", Qwen2ForCausalLM(Qwen2Config(**SIZES))),
    "embedding": lambda: only("embed_tokens"),
    "head": lambda: only("lm_head"),
    "last norm": lambda: only("model.norm"),
}
"""Models whose head may be applied chunk by chunk."""


def gemma2() -> Model:
    """Return a model with a scaled embedding, norms that multiply with 1 + w, and soft-capped logits."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=4, query_pre_attn_scalar=4, final_logit_softcapping=2.0))


def prepared(model: Model) -> Model:
    """Return the model in float64 and evaluation mode."""
    config = model.config
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # grouped_mm has no float64
    return model.double().eval()


def make(maker: Callable[[], Model]) -> Model:
    torch.manual_seed(0)
    return prepared(maker())


def a_batch(lengths: list[int], side: str = "right", seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs and labels of samples with masked prompts; the pad token also occurs inside them."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full((len(lengths), width), IGNORE_INDEX)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = torch.randint(0, VOCAB, (length,), generator=generator)
        mask[row, place] = 1
        labels[row, place] = ids[row, place]
        labels[row, place][: max(1, length // 3)] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask}, labels


LENGTHS = [9, 5, 14, 7, 2]


def one_by_one(model: Model, inputs: dict[str, Tensor], labels: Tensor, reduction: str = "mean") -> Rows:
    """Return each sample's gradients from a separate backward pass without padding."""
    names = parameter_names(model)
    parameters = [parameter for parameter in model.parameters() if id(parameter) in names]
    rows: dict[str, list[Tensor]] = {names[id(parameter)]: [] for parameter in parameters}
    for row in range(labels.shape[0]):
        real = inputs["attention_mask"][row] == 1
        targets = labels[row][real][1:]
        logits = model(input_ids=inputs["input_ids"][row][real][None]).logits[0, :-1]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        if reduction == "mean":
            loss = loss / max(1, int((targets != IGNORE_INDEX).sum()))
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            filled = torch.zeros_like(parameter) if gradient is None else gradient
            rows[names[id(parameter)]].append(filled.flatten())
    return {name: torch.stack(values) for name, values in rows.items()}


def whole(parts: list[Contribution], elements: int = 150) -> Tensor:
    """Return a parameter's gradients, put together from small blocks."""
    out = torch.zeros(parts[0].batch, parts[0].rows * parts[0].columns, dtype=torch.float64)
    for start, block in blocks(parts, elements):
        out[:, start : start + block.shape[1]] += block
    return out


def together(
    model: Model, inputs: dict[str, Tensor], labels: Tensor, chunked: bool = True, **options: Any
) -> tuple[Rows, Tensor, GradientPass]:
    """Return the gradients and losses of one pass over the batch, and the pass."""
    found: Rows = {}

    def emit(name: str, parts: list[Contribution]) -> None:
        assert name not in found
        found[name] = whole(parts) if parts else torch.zeros(labels.shape[0], 1, dtype=torch.float64)

    reduction, unsupported = options.get("reduction", "mean"), options.get("unsupported", "error")
    probe = GradientPass(model, emit, reduction, chunked, unsupported, CPU)
    losses = probe.run(dict(inputs), shifted(labels))
    return found, losses, probe


def assert_same(found: Rows, expected: Rows, tolerance: float = 1e-5, floor: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    # Some gradients are zero but for rounding (of k_proj.bias: softmax ignores a shift).
    scale = torch.stack([rows.norm(dim=1) for rows in expected.values()]).norm(dim=0)
    for name, rows in expected.items():
        error = (found[name] - rows).norm(dim=1)
        assert (error <= tolerance * (rows.norm(dim=1) + floor * scale) + 1e-14).all(), (name, error, rows.norm(dim=1))


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORE_INDEX}
    batch = {key: torch.full((len(rows), width), value) for key, value in filled.items()}
    for number, row in enumerate(rows):
        for key in ("input_ids", "labels"):
            batch[key][number, : len(row[key])] = torch.tensor(row[key])
        batch["attention_mask"][number, : len(row["input_ids"])] = 1
    return batch


def probe_of(model: Model, inputs: dict[str, Tensor], labels: Tensor, **changes: Any) -> ModelProbe:
    """Return a probe whose pool holds the samples of a batch."""
    rows = []
    for row, mask in enumerate(inputs["attention_mask"] == 1):
        rows.append({"input_ids": inputs["input_ids"][row][mask].tolist(), "labels": labels[row][mask].tolist()})
    pool = make_pool({"a": len(rows)}, lengths=[len(row["input_ids"]) for row in rows], rows=rows)
    given = {"autocast": contextlib.nullcontext, "device": torch.device("cpu"), "batch_tokens": 40, **changes}
    return ModelProbe(pool=pool, model=lambda: model, collate=collate, **given)


def flat(rows: Rows, model: Model) -> np.ndarray:
    """Return gradients in the order of the identity sketch."""
    names = [canonical(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return torch.cat([rows[name] for name in names], 1).numpy()


EXACT = GradientSettings(projection="identity", normalize=False)
