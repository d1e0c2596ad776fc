"""Hidden states watched in a training forward: the right ones, without any effect on the training."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex.errors import ComponentError
from dataflex.probe.embeddings import Embeddings
from dataflex.probe.hidden_states import consumer_of, watched


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_watched_states_equal_the_models_and_gradients_are_unchanged(
    model: LlamaForCausalLM, checkpointing: bool
) -> None:
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(0, 31, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    inputs["labels"] = inputs["input_ids"]
    layers = {"last": -1, "embedded": 0, "middle": 2}
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss, [parameter.grad.clone() for parameter in model.parameters()]

    plain, expected = gradients()
    seen: dict[str, torch.Tensor] = {}
    consumers = {name: consumer_of(model, layer) for name, layer in layers.items()}
    with watched(consumers, lambda name, hidden: seen.update({name: hidden.clone()})):
        loss = model(**inputs).loss
    model.zero_grad()
    loss.backward()
    assert torch.equal(loss, plain)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    model.gradient_checkpointing_disable()
    states = model(**inputs, output_hidden_states=True).hidden_states
    for name, layer in layers.items():
        assert not seen[name].requires_grad
        assert torch.equal(seen[name], states[layer].detach()), name
    assert not model.lm_head._forward_pre_hooks


def test_a_missing_layer_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ComponentError, match=r"3 layers.*got 4"):
        consumer_of(model, 4)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "first", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_on_either_side(pooling: str, side: str) -> None:
    """Also with more tokens than bfloat16 can count (257 is 256 there)."""
    torch.manual_seed(2)
    hidden, padding = torch.randn(1, 600, 8), torch.full((1, 90, 8), 1e4)
    parts = [padding, hidden] if side == "left" else [hidden, padding]
    masks = [torch.zeros(1, 90, dtype=torch.bool), torch.ones(1, 600, dtype=torch.bool)]
    embeddings = Embeddings(pooling=pooling)  # type: ignore[arg-type]
    found = embeddings.reduce(torch.cat(parts, 1), torch.cat(masks if side == "left" else masks[::-1], 1))
    numbers = torch.arange(1, 601, dtype=torch.float64).unsqueeze(1)
    expected = {
        "mean": hidden[0].double().mean(0),
        "weighted_mean": (hidden[0].double() * numbers).sum(0) / numbers.sum(),
        "first": hidden[0, 0].double(),
        "last": hidden[0, -1].double(),
    }[pooling]
    torch.testing.assert_close(found[0].double(), expected / expected.norm(), atol=1e-6, rtol=1e-5)
