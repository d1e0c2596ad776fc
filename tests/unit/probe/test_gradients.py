"""Per-sample gradients of a batch against one backward for each sample alone."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

from dataflex.api.probe import GradientSettings
from dataflex.data.token_loss import IGNORE_INDEX, shifted
from dataflex.errors import ComponentError, DivergenceError
from dataflex.probe import gradients as probe_gradients
from dataflex.probe.gradient_features import GradientFeatures, GradientSimilarities
from dataflex.probe.gradients import GradientPass, RoutedRows
from dataflex.probe.layers import Contribution, Outer, blocks, product
from dataflex.probe.mode import probe_mode
from unit.fakes import products_of
from unit.probe.models import (
    CPU,
    EXACT,
    LENGTHS,
    MODELS,
    VOCAB,
    Model,
    Rows,
    a_batch,
    assert_same,
    flat,
    gemma2,
    gpt2,
    llama,
    lora,
    make,
    mixtral,
    one_by_one,
    only,
    probe_of,
    together,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_parameter_equal_one_backward_for_each_sample(name: str) -> None:
    model = make(MODELS[name])
    inputs, labels = a_batch(LENGTHS)
    expected = one_by_one(model, inputs, labels)
    assert all(rows.any() for key, rows in expected.items() if "embed" not in key)
    for chunked in (True, False):
        assert_same(together(model, inputs, labels, chunked)[0], expected)


def test_logits_changed_behind_the_head_give_right_gradients() -> None:
    model = make(gemma2)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.3)
    inputs, labels = a_batch(LENGTHS)
    expected = one_by_one(model, inputs, labels)
    for chunked in (True, False):
        assert_same(together(model, inputs, labels, chunked)[0], expected)


def test_a_frozen_head_is_applied_to_trained_tokens_only() -> None:
    model = make(lambda: lora(gemma2()))
    inputs, labels = a_batch(LENGTHS)
    sizes: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda *given: sizes.append(given[-1].shape[:2].numel())
    )
    found = together(model, inputs, labels, chunked=False)[0]
    handle.remove()
    assert sizes == [int((shifted(labels) != IGNORE_INDEX).sum())]
    assert_same(found, one_by_one(model, inputs, labels))


@pytest.mark.parametrize("name", ["llama tied", "opt, learned positions", "qwen3 moe", "lora"])
def test_padding_on_the_left_gives_the_same_gradients(name: str) -> None:
    model = make(MODELS[name])
    left, right = a_batch(LENGTHS, "left"), a_batch(LENGTHS)
    expected = one_by_one(model, *right)
    assert_same(together(model, *left)[0], expected)
    assert_same(together(model, *left, chunked=False)[0], expected)


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_a_sample_has_the_same_gradient_in_any_batch(size: int) -> None:
    model = make(MODELS["llama tied"])
    inputs, labels = a_batch(np.random.default_rng(0).integers(2, 20, 16).tolist())
    expected = one_by_one(model, inputs, labels)
    for begin in range(0, 16, size):
        part = slice(begin, begin + size)
        found = together(model, {key: value[part] for key, value in inputs.items()}, labels[part])[0]
        assert_same(found, {name: rows[part] for name, rows in expected.items()})


@pytest.mark.parametrize("chunk", [1, 4, 7])
@pytest.mark.parametrize(
    "name", ["llama", "llama tied", "lora and a whole head", "lora on the head", "lora, whole head and embedding"]
)
def test_a_head_in_many_chunks_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch, name: str, chunk: int) -> None:
    monkeypatch.setattr(probe_gradients, "HEAD_CHUNK", chunk)
    model = make(MODELS[name])
    # Samples with equally many labels, and a number of rows their count divides: nothing but order tells them apart.
    inputs, labels = a_batch([9, 9, 9, 5])
    assert_same(together(model, inputs, labels)[0], one_by_one(model, inputs, labels))


def test_a_dora_head_in_many_chunks_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_gradients, "HEAD_CHUNK", 5)
    model = make(lambda: lora(target_modules=["lm_head"], use_dora=True))
    inputs, labels = a_batch(LENGTHS)
    assert_same(together(model, inputs, labels)[0], one_by_one(model, inputs, labels))


@pytest.mark.parametrize("chunked", [True, False])
def test_gradients_of_token_sums_equal_one_backward_for_each_sample(chunked: bool) -> None:
    model = make(llama)
    inputs, labels = a_batch(LENGTHS)
    sums = one_by_one(model, inputs, labels, "sum")
    assert_same(together(model, inputs, labels, chunked, reduction="sum")[0], sums)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_sample_without_a_label_has_a_zero_gradient(chunked: bool) -> None:
    model = make(llama)
    inputs, labels = a_batch(LENGTHS)
    labels[1] = IGNORE_INDEX
    found, losses, _ = together(model, inputs, labels, chunked)
    assert torch.isnan(losses).tolist() == [False, True, False, False, False]
    assert not any(rows[1].any() for rows in found.values())
    assert_same(found, one_by_one(model, inputs, labels))
    nothing, losses, _ = together(model, inputs, torch.full_like(labels, IGNORE_INDEX), chunked)
    assert torch.isnan(losses).all()
    assert nothing.keys() == found.keys()
    assert not any(rows.any() for rows in nothing.values())


@pytest.mark.parametrize("chunked", [True, False])
def test_losses_equal_those_of_the_model(chunked: bool) -> None:
    model = make(llama)
    inputs, labels = a_batch(LENGTHS)
    losses = together(model, inputs, labels, chunked)[1]
    for row, loss in enumerate(losses.tolist()):
        part = {key: value[row : row + 1] for key, value in inputs.items()}
        assert loss == pytest.approx(model(**part, labels=labels[row : row + 1]).loss.item(), rel=1e-6)


# Kinds of computation


def test_experts_in_their_default_implementation_give_right_gradients() -> None:
    torch.manual_seed(0)
    model = mixtral().eval()
    default = model.config._experts_implementation
    inputs, labels = a_batch(LENGTHS)
    found = together(model, inputs, labels)[0]
    assert model.config._experts_implementation == default != "eager"
    expected = one_by_one(copy.deepcopy(model), inputs, labels)
    assert_same(found, {name: rows.double() for name, rows in expected.items()}, 1e-4, floor=0.01)


def test_gradients_in_low_precision_are_close() -> None:
    torch.manual_seed(0)
    model = lora(llama(initializer_range=0.2)).eval()
    inputs, labels = a_batch(LENGTHS)
    exact = torch.cat(list(together(model, inputs, labels)[0].values()), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = torch.cat(list(together(model, inputs, labels)[0].values()), 1)
    cosines = F.cosine_similarity(exact, low)
    assert (cosines > 0.99).all()
    assert (cosines < 1 - 1e-7).all()  # it was in use


def test_the_precision_depends_on_the_computing_device() -> None:
    """Parameters may be kept elsewhere: FSDP offloads them to the CPU."""
    model = lora().eval()
    seen: set[bool] = set()
    inputs, labels = a_batch(LENGTHS)
    device = torch.device("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        emit = lambda name, parts: seen.add(torch.is_autocast_enabled("cuda"))  # noqa: E731
        GradientPass(model, emit, "mean", True, "error", device).run(dict(inputs), shifted(labels))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == {False}


def test_products_are_computed_in_full_precision() -> None:
    model = lora().eval()
    dtypes = set()

    def emit(name: str, parts: list[Contribution]) -> None:
        made = torch.ones(1, 1) @ torch.ones(1, 1)
        dtypes.update({next(blocks(parts, 100))[1].dtype, made.dtype})

    inputs, labels = a_batch(LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        GradientPass(model, emit, "mean", True, "error", CPU).run(inputs, shifted(labels))
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("rows, columns", [(3, 4), (40, 8), (8, 40), (16, 15), (15, 16), (40, 40)])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_products_of_any_shape_are_right(rows: int, columns: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(2, 7, size, generator=generator).to(t) for size, t in zip((rows, columns), dtypes, strict=True)
    )
    found = product(left.transpose(1, 2), right)
    assert found.dtype == torch.float32
    exact = torch.einsum("btr,btc->brc", left.double(), right.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "llama tied", "mixtral"])
def test_factors_are_stored_in_the_type_of_the_product(name: str) -> None:
    """Under autocast a product's float32 input is rounded, as autograd rounds it for the parameter's own gradient."""
    torch.manual_seed(0)
    model = MODELS[name]().float().eval()
    inputs, labels = a_batch(LENGTHS)
    types, shared = set(), {}

    def emit(name: str, parts: list[Contribution]) -> None:
        for part in parts:
            if isinstance(part, Outer):
                types.update({part.inputs.dtype, part.gradients.dtype})
                shared[name] = part.inputs.data_ptr()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = together(model, inputs, labels)[0]
        expected = one_by_one(model, inputs, labels)
        GradientPass(model, emit, "mean", True, "error", torch.device("cpu")).run(inputs, shifted(labels))
    assert types == {torch.bfloat16}
    for parameter, rows in expected.items():
        error = (found[parameter] - rows).norm(dim=1)
        assert (error <= 0.02 * rows.norm(dim=1) + 1e-6).all(), parameter
    if name == "llama tied":
        first = [key for key in shared if "layers.0.self_attn" in key and "o_proj" not in key]
        assert len(first) == 3
        assert len({shared[key] for key in first}) == 1


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    model = make(MODELS["lora"])
    inputs, labels = a_batch(LENGTHS)
    expected = one_by_one(model, inputs, labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    with probe_mode(model):
        found = together(model, inputs, labels)[0]
    assert model.training
    assert_same(found, expected)


def test_attention_implementations_agree() -> None:
    found = []
    for implementation in ("eager", "sdpa"):
        model = make(lambda implementation=implementation: llama(attn_implementation=implementation))
        assert model.config._attn_implementation == implementation
        found.append(together(model, *a_batch(LENGTHS))[0])
    assert_same(*found)


def test_adapters_on_a_quantised_base_have_right_gradients() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = llama(hidden_size=64, intermediate_size=64)
    for layer in base.model.layers:
        for holder in (layer.self_attn, layer.mlp):
            for name, linear in list(holder.named_children()):
                if isinstance(linear, nn.Linear):
                    made = bitsandbytes.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        compute_dtype=torch.float32,
                        quant_type="nf4",
                    )
                    made.load_state_dict(linear.state_dict())
                    setattr(holder, name, made.to("cpu"))
    model = lora(base).eval()
    model.enable_input_require_grads()  # as in training; without, bitsandbytes takes a coarser product
    assert base.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    inputs, labels = a_batch(LENGTHS)
    found = together(model, inputs, labels)[0]
    expected = one_by_one(model, inputs, labels)
    assert len(found) == 28
    assert_same(found, {name: rows.double() for name, rows in expected.items()}, 1e-4, floor=0.01)


# No trace


def trace(model: Model) -> dict[str, Any]:
    modules = list(model.modules())
    return {
        "modes": [module.training for module in modules],
        "hooks": [(len(module._forward_hooks), len(module._backward_hooks)) for module in modules],
        "attributes": [sorted(module.__dict__) for module in modules],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "wanted": [parameter.requires_grad for parameter in model.parameters()],
        "versions": [parameter._version for parameter in model.parameters()],
        "functions": (F.linear, F.embedding),
        "enabled": torch.is_grad_enabled(),
        "experts": getattr(model.config, "_experts_implementation", None),
    }


@pytest.mark.parametrize("name", ["llama tied", "mixtral", "dora", "opt, learned positions", "lora and a whole head"])
@pytest.mark.parametrize("fails", ["never", "in the forward", "in the backward"])
def test_a_gradient_batch_leaves_no_trace(name: str, fails: str) -> None:
    model = make(MODELS[name])
    if name == "mixtral":
        model.config._experts_implementation = "grouped_mm"
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = trace(model)
    inputs, labels = a_batch(LENGTHS)
    if fails == "in the forward":
        inputs["input_ids"][0, 0] = VOCAB + 1

    def emit(name: str, parts: list[Contribution]) -> None:
        if fails == "in the backward":
            raise InterruptedError

    probe = GradientPass(model, emit, "mean", True, "error", CPU)
    with contextlib.nullcontext() if fails == "never" else pytest.raises((InterruptedError, IndexError)):
        probe.run(inputs, shifted(labels))
    after = trace(model)
    gradients = zip(before.pop("gradients"), after.pop("gradients"), strict=True)
    assert all(one is other for one, other in gradients)
    assert next(model.parameters()).grad.eq(1).all()
    assert after == before


def test_a_pass_can_be_used_after_a_failed_batch() -> None:
    model = make(llama)
    inputs, labels = a_batch(LENGTHS)
    found: Rows = {}
    probe = GradientPass(model, lambda name, parts: found.update({name: whole(parts)}), "mean", True, "error", CPU)
    with pytest.raises(IndexError):
        probe.run({**inputs, "input_ids": inputs["input_ids"] + VOCAB}, shifted(labels))
    probe.run(inputs, shifted(labels))
    assert_same(found, one_by_one(model, inputs, labels))


# What has no rule


def test_parameters_of_an_unknown_kind_are_named() -> None:
    model = make(gpt2)
    inputs, labels = a_batch(LENGTHS)
    with pytest.raises(
        ComponentError, match=r"transformer\.h\.0\.attn\.c_attn\.weight.*Conv1D.*unsupported_parameters"
    ):
        together(model, inputs, labels)


def test_unsupported_parameters_are_left_out_and_the_others_right() -> None:
    model = make(gpt2)
    inputs, labels = a_batch([9])
    found, _, probe = together(model, inputs, labels, unsupported="ignore")
    expected = one_by_one(model, inputs, labels)
    convolutions = {f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert probe.left_out == {f"{name}.{key}" for name in convolutions for key in ("weight", "bias")}
    assert_same(found, {name: rows for name, rows in expected.items() if name not in probe.left_out})


@pytest.mark.parametrize("chunked", [True, False])
def test_parameters_used_behind_every_hook_are_named(chunked: bool) -> None:
    model = make(lambda: lora(target_modules=["q_proj", "embed_tokens"]))
    inputs, labels = a_batch(LENGTHS)
    with pytest.raises(ComponentError, match=r"lora_embedding_A.*ParameterDict"):
        together(model, inputs, labels, chunked)
    found, _, probe = together(model, inputs, labels, chunked, unsupported="ignore")
    assert len(probe.left_out) == 2
    expected = one_by_one(model, inputs, labels)
    assert_same(found, {name: rows for name, rows in expected.items() if name not in probe.left_out})


def test_an_unused_parameter_has_no_gradient() -> None:
    model = make(MODELS["lora"])
    model.add_adapter("idle", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    inputs, labels = a_batch(LENGTHS)
    found = together(model, inputs, labels)[0]
    idle = {name for name in found if ".idle" in name}
    assert len(idle) == 4
    assert not any(found[name].any() for name in idle)
    assert_same({**found, **{name: torch.zeros(5, 1) for name in idle}}, one_by_one(model, inputs, labels))


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ComponentError, match="no trainable parameter"):
        GradientPass(only("nothing"), lambda name, parts: None, "mean", True, "error", CPU)


def test_positions_shared_by_all_samples_have_right_gradients() -> None:
    model = make(lambda: only("wpe", gpt2()))
    with pytest.raises(RoutedRows, match="wpe"):
        together(model, *a_batch(LENGTHS))
    alone = a_batch([9])
    assert_same(together(model, *alone)[0], one_by_one(model, *alone))


@pytest.mark.parametrize("name", ["llama tied", "lora and a whole head"])
def test_a_probe_gives_every_sample_its_gradient(name: str) -> None:
    model = make(MODELS[name]).train()
    inputs, labels = a_batch(LENGTHS)
    labels[3] = IGNORE_INDEX
    probe = probe_of(model, inputs, labels)
    order = np.array([4, 0, 3, 2, 1])
    found = probe.measure(GradientFeatures(EXACT), order)
    assert probe.samples_apart
    expected = flat(one_by_one(model.eval(), inputs, labels), model)
    np.testing.assert_allclose(found, expected[order], rtol=1e-5, atol=1e-6)
    assert not found[2].any()


def test_a_probe_of_a_model_that_mixes_samples_takes_one_at_a_time() -> None:
    model = make(lambda: only("w", gpt2()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("wte" in name or "wpe" in name or "ln" in name)
    inputs, labels = a_batch(LENGTHS)
    probe = probe_of(model, inputs, labels)
    found = probe.measure(GradientFeatures(EXACT), np.arange(5))
    assert probe.samples_apart is False
    np.testing.assert_allclose(found, flat(one_by_one(model, inputs, labels), model), rtol=1e-5, atol=1e-6)
    with pytest.raises(ComponentError, match="wpe mixes the rows"):
        products_of(probe, [np.arange(3)], EXACT, np.arange(1))


def test_one_sample_cannot_show_if_the_model_mixes_samples() -> None:
    model = make(lambda: only("wpe", gpt2()))
    inputs, labels = a_batch(LENGTHS)
    probe = probe_of(model, inputs, labels)
    exact = flat(one_by_one(model, inputs, labels), model)
    np.testing.assert_allclose(probe.measure(GradientFeatures(EXACT), np.array([2])), exact[[2]], rtol=1e-5, atol=1e-6)
    assert probe.samples_apart is None
    np.testing.assert_allclose(probe.measure(GradientFeatures(EXACT), np.arange(5)), exact, rtol=1e-5, atol=1e-6)
    assert probe.samples_apart is False


def test_samples_without_a_label_cannot_show_if_the_model_mixes_samples() -> None:
    model = make(lambda: only("wpe", gpt2()))
    inputs, labels = a_batch(LENGTHS)
    labels[1:] = IGNORE_INDEX
    probe = probe_of(model, inputs, labels)
    exact = flat(one_by_one(model, inputs, labels), model)
    np.testing.assert_allclose(probe.measure(GradientFeatures(EXACT), np.arange(5)), exact, rtol=1e-5, atol=1e-6)
    assert probe.samples_apart is None


def test_products_of_samples_without_a_label_are_nan() -> None:
    model = make(MODELS["llama tied"])
    inputs, labels = a_batch(LENGTHS)
    labels[[1, 4]] = IGNORE_INDEX
    probe = probe_of(model, inputs, labels)
    (found,) = products_of(probe, [np.arange(4)], EXACT, np.array([4, 0]))
    exact = flat(one_by_one(model, inputs, labels), model)
    exact = exact[:4] @ exact[[0, 1, 2, 3, 4, 0]].T
    exact[1], exact[:, [1, 4]] = np.nan, np.nan
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-6)


def test_products_that_are_not_finite_are_an_error() -> None:
    model = make(MODELS["llama tied"])
    inputs, labels = a_batch(LENGTHS)
    probe = probe_of(model, inputs, labels)
    products_of(probe, [np.arange(3)], EXACT, np.arange(1))
    with torch.no_grad():
        model.lm_head.weight[1] = 1e200  # finite, but its gradients' products are not
    with pytest.raises(DivergenceError, match="has training diverged"):
        products_of(probe, [np.arange(3)], EXACT, np.arange(1))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(DivergenceError, match="has training diverged"):
        products_of(probe_of(model, inputs, labels), [np.arange(3)], EXACT, np.arange(1))


def test_a_group_that_does_not_fit_into_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(MODELS["llama tied"])
    probe = probe_of(model, *a_batch(LENGTHS))

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(GradientPass, "_forward", full)
    with pytest.raises(ComponentError, match=r"4 samples of .* tokens, which are one batch\. Set a smaller group_size"):
        products_of(probe, [np.arange(3)], EXACT, np.arange(1))


def test_similarities_are_computed_in_full_precision() -> None:
    model = make(MODELS["llama tied"]).float()
    inputs, labels = a_batch(LENGTHS)
    autocast = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    probe = probe_of(model, inputs, labels, **autocast)
    settings = GradientSettings(dim=64, normalize=True)
    features = probe.measure(GradientFeatures(settings), np.arange(5))
    targets = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    exact = features.astype(np.float64) @ targets.T
    np.testing.assert_allclose(
        probe.measure(GradientSimilarities(settings, targets), np.arange(5)), exact, rtol=1e-5, atol=1e-5
    )


def test_a_trained_heads_gradients_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long sample among short ones: what is kept of the head's gradients is a row for each token that counts."""
    monkeypatch.setattr(probe_gradients, "HEAD_CHUNK", 8)
    model = make(llama)
    inputs, labels = a_batch([40, 4, 4, 4, 4, 4])
    kept: list[int] = []

    def emit(name: str, parts: list[Contribution]) -> None:
        if name == "lm_head.weight":
            kept.extend(part.gradients.numel() for part in parts)

    probe = GradientPass(model.eval(), emit, "mean", True, "error", CPU)
    probe.run(inputs, shifted(labels))
    assert sum(kept) == int((shifted(labels) != IGNORE_INDEX).sum()) * VOCAB
