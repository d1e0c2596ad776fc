"""The attention to the prompt equals that of Transformers' own output, and reading it leaves the training unchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters
from transformers.masking_utils import flash_attention_mask

from dataflex.data.token_loss import IGNORE_INDEX, shifted
from dataflex.errors import ComponentError
from dataflex.probe.mode import probe_mode
from dataflex.probe.prompt_attention import PromptAttention
from unit.probe.models import LENGTHS, SIZES, a_batch, lora

WINDOWED = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3, norms of q and k": ("Qwen3", {"head_dim": 4}),
    "mistral, a sliding window": ("Mistral", {"sliding_window": 4}),
    "gemma2, capped and with a window": ("Gemma2", {"head_dim": 4, "attn_logit_softcapping": 2.0, **WINDOWED}),
    "gpt_oss, sinks": ("GptOss", {"head_dim": 4, **EXPERTS, **WINDOWED}),
    "deepseek, latent": ("DeepseekV2", {**LATENT, "first_k_dense_replace": 2, "num_key_value_heads": 4}),
    "doge, functions of its own": ("Doge", {}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
}


def made(name: str, implementation: str, **more: Any) -> Any:
    """Return a model whose attention is far from uniform, in evaluation mode."""
    kind, changes = KINDS[name]
    torch.manual_seed(0)
    sizes = {**SIZES, "initializer_range": 0.5, **changes, **more}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    config._experts_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def of_the_output(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the same attention from the matrix of probabilities that the model returns."""
    with torch.no_grad():
        matrix = model(**inputs, output_attentions=True, use_cache=False).attentions[-1]
    found = torch.zeros(labels.shape)
    for sample in range(labels.shape[0]):
        for token in range(1, labels.shape[1]):
            if labels[sample, token] != IGNORE_INDEX:
                prompt = labels[sample] == IGNORE_INDEX
                found[sample, token - 1] = matrix[sample].mean(0)[token, prompt].sum()
    return found


def read(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the attention that one forward pass gives."""
    seen: list[Tensor] = []
    with torch.no_grad(), PromptAttention(model).read(labels, seen.append):
        model(**inputs, use_cache=False)
    (found,) = seen
    assert found.dtype == torch.float32
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", KINDS)
def test_the_attention_is_that_of_the_models_output(name: str, side: str) -> None:
    model = made(name, "eager")
    inputs, labels = a_batch(LENGTHS, side)
    expected = of_the_output(model, inputs, labels)
    assert torch.isfinite(expected).all()
    assert expected[expected > 0].std() > 0.05
    torch.testing.assert_close(read(model, inputs, labels), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [name for name in KINDS if "sinks" not in name])
def test_a_fused_attention_function_gives_the_same(name: str, side: str) -> None:
    uncapped = {"attn_logit_softcapping": None} if "capped" in name else {}  # this function does not cap
    model = made(name, "sdpa", **uncapped)
    inputs, labels = a_batch(LENGTHS, side)
    found = read(model, inputs, labels)
    expected = of_the_output(made(name, "eager", **uncapped), inputs, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def flash_like(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention under the conventions of flash attention: it gets the mask of padding, (B, T), or none."""
    width, heads = query.shape[2], query.shape[1] // key.shape[1]
    distance = torch.arange(width)[:, None] - torch.arange(width)
    allowed = (distance >= 0) & (distance < (sliding_window or width))
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        allowed = allowed & attention_mask[:, None, None].bool()
    products = query @ key.repeat_interleave(heads, 1).mT * options["scaling"]
    matrix = products.masked_fill(~allowed, -1e30).softmax(-1)
    return (matrix @ value.repeat_interleave(heads, 1)).transpose(1, 2), None


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral, a sliding window"])
def test_a_function_that_gets_the_mask_of_padding_alone_gives_the_same(name: str, side: str) -> None:
    transformers.AttentionInterface.register("padding_only", flash_like)
    transformers.AttentionMaskInterface.register("padding_only", flash_attention_mask)
    inputs, labels = a_batch(LENGTHS, side)
    found = read(made(name, "padding_only"), inputs, labels)
    torch.testing.assert_close(found, of_the_output(made(name, "eager"), inputs, labels), rtol=1e-5, atol=1e-6)


def test_double_precision_agrees_further() -> None:
    inputs, labels = a_batch(LENGTHS)
    found = read(made("llama", "sdpa").double(), inputs, labels)
    expected = of_the_output(made("llama", "eager").double(), inputs, labels)  # its softmax is in float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-7)


def test_half_precision_is_close() -> None:
    inputs, labels = a_batch(LENGTHS)
    found, expected = (read(made("llama", "sdpa").to(kind), inputs, labels) for kind in (torch.bfloat16, torch.float32))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_all_earlier_untrained_tokens_are_the_prompt() -> None:
    model = made("llama", "sdpa")
    inputs, labels = a_batch([14])
    labels[0] = inputs["input_ids"][0]
    labels[0, :3] = labels[0, 6:9] = IGNORE_INDEX  # two turns
    found = read(model, inputs, labels)
    later = labels.clone()
    later[0, :6] = IGNORE_INDEX
    assert (found[0, 2:5] > 0).all()
    assert (found[0, 5:8] == 0).all()
    assert (found[0, 8:13] > 0).all()
    assert found[0, 13] == 0
    assert (read(model, inputs, later)[0, 8:13] > found[0, 8:13]).all()
    changed = labels.clone()
    changed[0, 9:12] = IGNORE_INDEX  # tokens after the first turn do not change it
    torch.testing.assert_close(read(model, inputs, changed)[0, 2:5], found[0, 2:5], rtol=0, atol=0)
    torch.testing.assert_close(found, of_the_output(made("llama", "eager"), inputs, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_samples_packed_in_one_row_do_not_see_each_other(implementation: str) -> None:
    model = made("llama", implementation)
    lengths = [6, 4, 5]
    inputs, labels = a_batch(lengths)
    alone = read(model, inputs, labels)
    real = inputs["attention_mask"] == 1
    owner = torch.arange(3)[:, None].expand_as(real)[real]
    allowed = (owner[:, None] == owner) & torch.ones(15, 15).tril().bool()
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
    positions = torch.arange(6).expand(3, 6)[real][None]
    row = {"input_ids": inputs["input_ids"][real][None], "attention_mask": mask, "position_ids": positions}
    packed = read(model, row, labels[real][None])[0]
    for sample, part in enumerate(packed.split(lengths)):
        count = lengths[sample] - 1
        torch.testing.assert_close(part[:count], alone[sample, :count], rtol=1e-5, atol=1e-6)


def checkpointed(**options: Any) -> Callable[[Any], None]:
    return lambda model: model.gradient_checkpointing_enable(options)


PREPARATIONS: dict[str, Callable[[Any], None]] = {
    "plain": lambda model: None,
    "checkpointing": checkpointed(use_reentrant=False),
    "reentrant checkpointing": checkpointed(use_reentrant=True),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_training_is_unchanged_and_each_pass_is_read_once(preparation: str, implementation: str) -> None:
    """With dropout: the attention is that without dropout, and no random number is drawn for it."""
    model = made("llama", implementation, num_hidden_layers=1).train()
    PREPARATIONS[preparation](model)
    model.enable_input_require_grads()
    inputs, labels = a_batch(LENGTHS)

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        seen_before = len(seen)
        loss.backward()
        assert len(seen) == seen_before
        return [loss.detach(), *(each.grad.clone() for each in model.parameters())]

    seen: list[Tensor] = []
    expected, attention = gradients(), PromptAttention(model)
    assert not attention.was_read
    for number in (1, 2):
        torch.manual_seed(1)
        model.zero_grad()
        with attention.read(labels, seen.append):
            loss = model(**inputs, labels=labels, use_cache=False).loss
        assert len(seen) == number
        loss.backward()
        found = [loss.detach(), *(each.grad for each in model.parameters())]
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
    assert len(seen) == 2
    assert attention.was_read
    assert not seen[0].requires_grad
    assert "forward" not in model.model.layers[-1].__dict__
    with probe_mode(model):
        torch.testing.assert_close(seen[0], read(model, inputs, labels), rtol=1e-5, atol=1e-6)


def test_an_adapter_and_a_replaced_forward_are_kept() -> None:
    model = lora(made("llama", "sdpa")).eval()
    inputs, labels = a_batch(LENGTHS)
    base = model.get_base_model()
    layer = base.model.layers[-1]
    plain = read(base, inputs, labels)

    @functools.wraps(layer.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = forward  # as a hook of Accelerate does
    torch.testing.assert_close(read(base, inputs, labels), plain, rtol=0, atol=0)
    assert layer.__dict__["forward"] is forward
    with model.disable_adapter():
        assert not torch.allclose(read(base, inputs, labels), plain, atol=1e-3)


def test_a_failing_pass_leaves_no_trace() -> None:
    model = made("llama", "sdpa")
    inputs, labels = a_batch(LENGTHS)
    original = transformers.AttentionInterface.get_interface
    attention, layer = PromptAttention(model), model.model.layers[-1]
    handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), attention.read(labels, lambda found: None):
        model(**inputs)
    handle.remove()
    assert transformers.AttentionInterface.get_interface is original
    assert "forward" not in layer.__dict__
    assert not attention.was_read
    torch.testing.assert_close(read(model, inputs, labels), of_the_output(made("llama", "eager"), inputs, labels))


def hybrid() -> Any:
    kinds = {"layer_types": ["full_attention", "linear_attention"], "num_experts": 2, "num_experts_per_tok": 1}
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**{**SIZES, **kinds}))


REFUSED: dict[str, Callable[[], Any]] = {
    "BloomBlock": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=2)
    ),
    "Qwen3NextDecoderLayer": hybrid,
}


@pytest.mark.parametrize("layer", REFUSED)
def test_a_last_layer_without_an_attention_function_is_an_error(layer: str) -> None:
    inputs, labels = a_batch(LENGTHS)
    with pytest.raises(ComponentError, match=f"cannot be read in {layer}: it calls no attention functions"):
        read(REFUSED[layer](), inputs, labels)


def test_keys_of_other_positions_are_an_error() -> None:
    model = made("llama", "sdpa")
    inputs, labels = a_batch(LENGTHS)
    with pytest.raises(ComponentError, match="attends to 14 positions, and the batch has 13"):
        read(model, inputs, labels[:, 1:])


def test_a_compiled_model_makes_no_graph_after_its_second_step() -> None:
    model = made("llama", "sdpa", attention_dropout=0.0).train()
    expected = read(model, *a_batch(LENGTHS))
    attention, seen = PromptAttention(model), []
    model.compile(backend="eager")

    def step() -> None:
        inputs, labels = a_batch(LENGTHS)
        with attention.read(labels, seen.append):
            loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()

    before = counters["stats"]["unique_graphs"]
    step()
    step()
    made_graphs = counters["stats"]["unique_graphs"]
    assert made_graphs > before
    step()
    step()
    assert counters["stats"]["unique_graphs"] == made_graphs
    assert len(seen) == 4
    for found in seen:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_column_t_is_token_t_plus_1() -> None:
    inputs, labels = a_batch(LENGTHS)
    found = read(made("llama", "sdpa"), inputs, labels)
    assert torch.equal(found > 0, shifted(labels) != IGNORE_INDEX)
    assert (found <= 1 + 1e-6).all()
