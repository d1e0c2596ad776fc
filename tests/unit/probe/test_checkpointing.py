"""Layers that the training recomputes are recomputed in a gradient batch, with the same gradients and less memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from dataflex.data.token_loss import shifted
from dataflex.errors import ComponentError
from dataflex.probe.checkpointing import recomputed_layers
from dataflex.probe.gradients import GradientPass
from dataflex.probe.layers import Contribution, blocks
from unit.probe.models import (
    CPU,
    LENGTHS,
    MODELS,
    SIZES,
    Model,
    a_batch,
    assert_same,
    gpt2,
    llama,
    lora,
    make,
    mixtral,
    one_by_one,
    only,
    together,
)

pytestmark = pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")


def checkpointed(model: Model, reentrant: bool = True) -> Model:
    """Return the model as LLaMA-Factory prepares it for training."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.enable_input_require_grads()
    return model


def runs_of(model: Model) -> list[int]:
    """Return a list that counts the runs of each decoder layer's normalisation or attention."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = next(module for module in base.modules() if isinstance(module, nn.ModuleList))
    counts = [0] * len(layers)

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[number] += 1

        return hook

    for number, layer in enumerate(layers):
        next(layer.children()).register_forward_hook(count(number))
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_gradients_with_and_without_recomputation_are_equal(name: str) -> None:
    model = make(MODELS[name])
    inputs, labels = a_batch(LENGTHS)
    expected = one_by_one(model, inputs, labels)
    plain = together(model, inputs, labels)[0]
    runs = runs_of(checkpointed(model))
    for chunked in (True, False):
        runs[:] = [0] * len(runs)
        found = together(model, inputs, labels, chunked)[0]
        assert runs == [2] * len(runs)
        assert_same(found, expected)
        assert_same(found, plain, 1e-10)


def test_without_checkpointing_no_layer_is_recomputed() -> None:
    model = make(llama)
    runs = runs_of(model)
    together(model, *a_batch(LENGTHS))
    assert runs == [1, 1]


def test_layers_under_the_wrapper_of_fsdp_are_recomputed() -> None:
    model = make(llama)
    inputs, labels = a_batch(LENGTHS)
    expected = one_by_one(model, inputs, labels)
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    assert [type(layer).__name__ for layer in recomputed_layers(model)] == ["LlamaDecoderLayer"] * 2
    counts: list[int] = []
    model.model.layers[0]._checkpoint_wrapped_module.mlp.register_forward_hook(lambda *_: counts.append(1))
    assert_same(together(model, inputs, labels)[0], expected)
    assert len(counts) == 2
    assert "forward" not in model.model.layers[0].__dict__


def test_the_second_forward_has_the_precision_of_the_first() -> None:
    model = lora(llama(initializer_range=0.2)).eval()
    inputs, labels = a_batch(LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = together(model, inputs, labels)[0]
        found = together(checkpointed(model), inputs, labels)[0]
    assert_same(found, plain, 1e-6)


def test_a_backward_in_another_thread_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: neither the precision nor whether gradients are made is that of the forward's thread."""
    model = lora(llama(initializer_range=0.2)).eval()
    inputs, labels = a_batch(LENGTHS)
    grad = torch.autograd.grad

    def in_a_thread(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(grad, *args, **kwargs).result()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = together(model, inputs, labels)[0]
        monkeypatch.setattr(torch.autograd, "grad", in_a_thread)
        found = together(checkpointed(model), inputs, labels)[0]
    assert_same(found, plain, 1e-6)


def test_a_parameter_of_several_layers_has_its_whole_gradient() -> None:
    """It is handed on once, behind the last of the layers that hold it."""
    model = make(lambda: llama(num_hidden_layers=3))
    model.model.layers[2].self_attn = model.model.layers[0].self_attn
    model.config.use_cache = False  # it has a place for each layer
    inputs, labels = a_batch(LENGTHS)
    expected = one_by_one(model, inputs, labels)
    assert_same(together(checkpointed(model), inputs, labels)[0], expected)


def test_further_outputs_of_a_layer_have_their_gradients() -> None:
    sizes = {**SIZES, "num_hidden_layers": 4, "head_dim": 4, "vocab_size_per_layer_input": 61}
    config = Gemma3nTextConfig(
        **sizes,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        laurel_rank=4,
        altup_num_inputs=2,
        layer_types=["full_attention"] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    model = make(lambda: only("k_proj", Gemma3nForCausalLM(config)))
    inputs, labels = a_batch(LENGTHS)
    expected = one_by_one(model, inputs, labels)
    assert_same(together(checkpointed(model), inputs, labels, chunked=False)[0], expected)


def test_parameters_used_behind_every_hook_of_a_recomputed_layer_are_named() -> None:
    model = make(gpt2)
    with pytest.raises(ComponentError, match=r"transformer\.h\.0\.attn\.c_attn\.weight.*Conv1D"):
        together(checkpointed(model), *a_batch(LENGTHS))


# Memory


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes of tensors a function holds at a time, beyond those that are there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    assert events
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


WIDE = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 160}
TRAINED: dict[str, Callable[[], Model]] = {
    "lora": lambda: lora(llama(**WIDE), lora_dropout=0.0),
    "dora": lambda: lora(llama(**WIDE), use_dora=True, lora_dropout=0.0),
    "full, tied": lambda: llama(**WIDE, tie_word_embeddings=True),
    "experts": lambda: mixtral(**WIDE),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_gradient_batch_needs_the_memory_of_a_training_step(name: str) -> None:
    torch.manual_seed(0)
    model = TRAINED[name]().float()
    inputs, labels = a_batch([60] * 6)

    def all_blocks(name: str, parts: list[Contribution]) -> None:
        for _ in blocks(parts, 1 << 14) if parts else ():
            pass

    def measure() -> Tensor:
        return GradientPass(model.eval(), all_blocks, "mean", True, "error", CPU).run(dict(inputs), shifted(labels))

    def step() -> None:
        model.train()
        model(**inputs, labels=labels, use_cache=False).loss.backward()

    measure()  # what is made once is no part of a batch
    kept = peak_bytes(measure)
    checkpointed(model, reentrant=False)
    step()
    of_training, recomputed = peak_bytes(step), peak_bytes(measure)
    assert recomputed <= 1.1 * of_training
    assert kept > 2 * recomputed  # it is the recomputation that does it
