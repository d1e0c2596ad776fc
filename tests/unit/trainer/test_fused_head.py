"""The head that computes token losses in a model's forward pass: equal to the losses of all logits, for real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model

from dataflex.api.components import Entry
from dataflex.api.context import StepBatch
from dataflex.api.weighter import Weighter, WeighterParams
from dataflex.data.token_loss import IGNORE_INDEX, shifted
from dataflex.errors import ComponentError, ConfigError
from dataflex.trainer.fused_head import FusedHead
from dataflex.trainer.loss import WeightedLoss, loss_function
from dataflex.trainer.special_losses import SpecialLoss
from dataflex.trainer.statistics import BatchLosses
from dataflex.trainer.step_weights import StepWeights, Weighing

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 3.0}),
    "phi": ("Phi", {}),  # its head has a bias
}


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return a small model with random weights."""
    family, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()


def inputs_of(rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SMALL["vocab_size"], (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, length, generator=generator) < 0.4, IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class OfLosses(Weighter[WeighterParams]):
    """Token weights that depend on the losses of the same forward pass."""

    family, name = "weighter", "of_losses"

    def weigh(self, batch: StepBatch) -> torch.Tensor:
        return torch.sin(3 * batch.token_losses) ** 2


class Given(Weighter[WeighterParams]):
    """Token weights that are known before the forward pass."""

    family, name = "weighter", "given"
    elementwise, reads_losses = True, False

    def weigh(self, batch: StepBatch) -> torch.Tensor:
        assert torch.isnan(batch.losses).all()
        assert batch.places is not None
        return 0.5 + batch.places.to(batch.losses) ** 2


def weights_of(kind: type[Weighter], normalization: str) -> StepWeights:
    component = kind(WeighterParams(normalization=normalization))
    return StepWeights(
        [Weighing(Entry(component, "weight", 1), tokens=kind is OfLosses)],
        lambda losses, places, tokens: StepBatch(losses, 0, 10, places=places, tokens=tokens),
    )


def loss_of(weights: StepWeights | None, **given: Any) -> tuple[WeightedLoss, list[BatchLosses]]:
    seen: list[BatchLosses] = []
    return WeightedLoss(samples_per_step=6, observe=seen.append, weights=weights, places=torch.arange(3), **given), seen


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def both(
    model: Any, make_loss: Callable[[], tuple[WeightedLoss, list[BatchLosses]]], inputs: dict[str, torch.Tensor]
) -> tuple[Any, Any]:
    """Return the loss, the gradients and the statistics of a plain and of a fused forward pass."""
    found = []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for fused in (False, True):
        loss, seen = make_loss()
        loss.fused = FusedHead(base, None if loss.special is None else loss.special.statistic) if fused else None
        with loss_function(base, loss):
            if loss.fused is None:
                value = model(**inputs, num_items_in_batch=40).loss
            else:
                with loss.fused.active(shifted(inputs["labels"]), loss.coefficients_before):
                    value = model(**inputs, num_items_in_batch=40).loss
        found.append((value, gradients(model, value), seen))
    return found[0], found[1]


def check_equal(plain: Any, fused: Any, tolerance: float = 1e-9) -> None:
    assert fused[0].item() == pytest.approx(plain[0].item(), rel=tolerance)
    assert fused[1].keys() == plain[1].keys()
    for name, expected in plain[1].items():
        distance = torch.linalg.vector_norm(fused[1][name] - expected)
        assert distance <= tolerance * torch.linalg.vector_norm(expected), name
    (mine,), (theirs,) = fused[2], plain[2]
    torch.testing.assert_close(mine.per_token, theirs.per_token, rtol=tolerance, atol=tolerance)
    assert torch.equal(mine.counts, theirs.counts)
    if theirs.coefficients is not None:
        assert mine.coefficients == pytest.approx(float(theirs.coefficients), rel=1e-6)


@pytest.mark.parametrize("normalization", ["token", "sample"])
@pytest.mark.parametrize("kind", [None, Given, OfLosses])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_its_gradients_equal_those_of_all_logits(name: str, kind: Any, normalization: str) -> None:
    weights = None if kind is None else lambda: weights_of(kind, normalization)
    plain, fused = both(make(name), lambda: loss_of(None if weights is None else weights()), inputs_of())
    check_equal(plain, fused, 1e-6 if kind is Given else 1e-9)  # given weights are kept in float32


def test_an_adapter_on_the_head_and_a_trained_copy_of_the_head_are_trained() -> None:
    for settings in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = get_peft_model(make("llama"), LoraConfig(r=2, init_lora_weights=False, **settings)).double()
        plain, fused = both(model, lambda: loss_of(weights_of(OfLosses, "token")), inputs_of())
        assert any("lm_head" in key for key in plain[1])
        check_equal(plain, fused)


def test_dropout_on_an_adapted_head_is_the_same_in_both_passes() -> None:
    settings = {"target_modules": ["lm_head"], "lora_dropout": 0.5, "init_lora_weights": False}
    model = get_peft_model(make("llama"), LoraConfig(r=2, **settings)).double()
    inputs = inputs_of()
    base = model.get_base_model()
    loss, _ = loss_of(None)
    loss.fused = FusedHead(base)

    def value() -> torch.Tensor:
        torch.manual_seed(5)
        with loss_function(base, loss), loss.fused.active(shifted(inputs["labels"]), loss.coefficients_before):
            return model(**inputs).loss

    parameter = next(each for name, each in model.named_parameters() if "lora_B" in name)
    slope = gradients(model, value())[next(name for name, each in model.named_parameters() if each is parameter)]
    direction = torch.randn_like(parameter)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * 1e-5 * direction
        values.append(value().item())
        with torch.no_grad():
            parameter -= sign * 1e-5 * direction
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((slope * direction).sum()), rel=1e-6)


@pytest.mark.parametrize("alpha", [None, 1.0, 0.5])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_special_losses_multiply_with_weights(name: str, alpha: float | None) -> None:
    plain, fused = both(
        make(name), lambda: loss_of(weights_of(OfLosses, "token"), special=SpecialLoss(alpha)), inputs_of()
    )
    check_equal(plain, fused)


@pytest.mark.parametrize("alpha", [None, 1.0, 0.5])
def test_special_losses_equal_those_of_llamafactory(alpha: float | None) -> None:
    from llamafactory.train import trainer_utils

    model, inputs = make("llama", torch.float32), inputs_of()
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    theirs = (
        trainer_utils.dft_loss_func(outputs, inputs["labels"], 40)
        if alpha is None
        else trainer_utils.eaft_loss_func(outputs, inputs["labels"], 40, alpha)
    )
    expected = gradients(model, theirs)
    plain, fused = both(model, lambda: loss_of(None, special=SpecialLoss(alpha)), inputs)
    for mine in (plain, fused):
        assert mine[0].item() == pytest.approx(theirs.item(), rel=1e-5)
        for key, each in expected.items():
            assert torch.linalg.vector_norm(mine[1][key] - each) <= 1e-5 * torch.linalg.vector_norm(each), key


def test_a_warm_up_round_is_plain_training() -> None:
    model, inputs = make("llama"), inputs_of()
    _, fused = both(model, lambda: loss_of(weights_of(OfLosses, "sample"), active=False), inputs)
    logits = model(**{key: inputs[key] for key in ("input_ids", "attention_mask")}).logits[:, :-1]
    plain = F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum") / 40
    assert fused[0].item() == pytest.approx(plain.item(), rel=1e-12)


def test_the_model_is_unchanged_afterwards() -> None:
    model, inputs = make("llama"), inputs_of()
    before = model(**inputs)
    both(model, lambda: loss_of(None), inputs)
    assert "forward" not in model.lm_head.__dict__
    after = model(**inputs)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)


def test_a_model_without_a_head_is_refused() -> None:
    config = transformers.LlamaConfig(**SMALL)
    with pytest.raises(ConfigError, match=r"LlamaModel names no head.*fused_loss: false"):
        FusedHead(transformers.LlamaModel(config))


def test_a_model_that_does_not_call_its_head_is_refused() -> None:
    model, inputs = make("llama"), inputs_of()
    loss, _ = loss_of(None)
    loss.fused = FusedHead(make("llama"))  # the head of another model
    with (
        loss_function(model, loss),
        loss.fused.active(shifted(inputs["labels"]), loss.coefficients_before),
        pytest.raises(ComponentError, match="without a call of its head"),
    ):
        model(**inputs)
