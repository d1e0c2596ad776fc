"""Samples with images in the probe: a vision-language model under LLaMA-Factory's collator, against one at a time."""

from __future__ import annotations

import contextlib
import copy
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

import vision
from dataflex import Embeddings, Losses
from dataflex.api.probe import GradientSettings
from dataflex.data.token_loss import IGNORE_INDEX, shifted
from dataflex.probe.gradient_features import GradientFeatures
from dataflex.probe.gradient_products import GradientProducts
from dataflex.probe.gradients import GradientPass, RoutedRows, parameter_names
from dataflex.probe.media import MediaRows, is_patching, media_modules, patches
from dataflex.probe.model import ModelProbe
from unit.fakes import make_pool
from unit.probe.models import CPU, EXACT, Rows, assert_same, flat, stir, whole

WORDS = "what color is the shape there a in image".split()
KINDS = ("llava", "qwen2_vl")
Row = dict[str, Any]


class Bench:
    """A vision-language model in float64 with LLaMA-Factory's collator and samples.

    Args:
        kind: ``llava`` or ``qwen2_vl``.
        folder: folder for the model.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        from llamafactory.data.collator import SFTDataCollatorWith4DAttentionMask
        from llamafactory.data.template import TEMPLATES
        from transformers import AutoModelForImageTextToText, AutoProcessor

        (vision.make_llava if kind == "llava" else vision.make_qwen2_vl)(folder)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.tokenizer = self.processor.tokenizer
        self.template = TEMPLATES[kind]
        self.whole = AutoModelForImageTextToText.from_pretrained(folder).double().eval()
        torch.manual_seed(1)
        for name, parameter in self.whole.named_parameters():  # else norms are ones, and biases zeros
            if "norm" in name or "bias" in name or "ln_q" in name:
                torch.nn.init.normal_(parameter, mean=float("weight" in name), std=0.2)
        self.collate = SFTDataCollatorWith4DAttentionMask(
            template=self.template,
            model=self.whole,
            tokenizer=self.tokenizer,
            processor=self.processor,
            pad_to_multiple_of=8,
            label_pad_token_id=IGNORE_INDEX,
        )

    def row(self, sizes: list[tuple[int, int]], words: int, seed: int) -> Row:
        """Return a sample with an image of each size, as LLaMA-Factory's preprocessing makes it."""
        rng = random.Random(seed)
        images = [vision.inputs.draw("red", rng.choice(vision.inputs.SHAPES), rng).resize(size) for size in sizes]
        content = "<image>" * len(images) + " ".join(rng.choices(WORDS, k=words))
        asked = self.template.mm_plugin.process_messages(
            [{"role": "user", "content": content}], images, [], [], self.processor
        )[0]["content"]
        prompt, answer = (self.tokenizer.encode(text) for text in (asked, " ".join(rng.choices(WORDS, k=3))))
        ids = prompt + answer
        labels = [IGNORE_INDEX] * len(prompt) + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "images": images}

    def batch(self, rows: list[Row]) -> tuple[dict[str, Any], Tensor]:
        """Return the collator's inputs and shifted labels of copies of rows."""
        found = {
            key: value.double() if value.is_floating_point() else value
            for key, value in self.collate(copy.deepcopy(rows)).items()
        }
        return found, shifted(found.pop("labels"))

    def trained(self, parts: tuple[str, ...]) -> Any:
        """Return a copy of the model of which the parameters with one of the names are trained."""
        model = copy.deepcopy(self.whole)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
        return model

    def alone(self, model: Any, rows: list[Row]) -> Rows:
        """Return each sample's gradients, by one backward pass over a batch of the sample alone."""
        names = parameter_names(model)
        parameters = [parameter for parameter in model.parameters() if id(parameter) in names]
        found: dict[str, list[Tensor]] = {names[id(parameter)]: [] for parameter in parameters}
        for row in rows:
            inputs, labels = self.batch([row])
            loss = F.cross_entropy(model(**inputs).logits[0], labels[0])
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                filled = torch.zeros_like(parameter) if gradient is None else gradient
                found[names[id(parameter)]].append(filled.flatten())
        return {name: torch.stack(values) for name, values in found.items()}

    def together(self, model: Any, rows: list[Row], chunked: bool = True) -> Rows:
        """Return the gradients of one pass over a batch of the samples."""
        found: Rows = {}

        def emit(name: str, parts: list[Any]) -> None:
            found[name] = whole(parts) if parts else torch.zeros(len(rows), 1, dtype=torch.float64)

        inputs, labels = self.batch(rows)
        GradientPass(model, emit, "mean", chunked, "error", CPU).run(inputs, labels)
        return found

    def probe(self, model: Any, rows: list[Row], **changes: Any) -> ModelProbe:
        """Return a probe whose pool holds the samples."""
        pool = make_pool({"a": len(rows)}, lengths=[len(row["input_ids"]) for row in rows], rows=rows)
        given = {"autocast": contextlib.nullcontext, "device": CPU, "batch_tokens": 200, **changes}

        def collate(rows: list[Row]) -> dict[str, Any]:
            inputs, labels = self.batch(rows)
            return {**inputs, "labels": F.pad(labels[:, :-1], (1, 0), value=IGNORE_INDEX)}

        return ModelProbe(pool=pool, model=lambda: model, collate=collate, **given)


@cache
def bench(kind: str) -> Bench:
    import tempfile

    return Bench(kind, Path(tempfile.mkdtemp(prefix="vision_")))


SQUARE, WIDE = (16, 16), (32, 16)
MIXES: dict[str, list[list[tuple[int, int]]]] = {
    "one image each": [[SQUARE], [SQUARE], [SQUARE]],
    "two images and none": [[SQUARE, SQUARE], []],
    "none and two images": [[], [SQUARE, SQUARE]],
    "one, none, two, none": [[SQUARE], [], [WIDE, SQUARE], []],
    "sizes that divide evenly": [[WIDE, SQUARE], [SQUARE]],
    "three and one": [[SQUARE, SQUARE, SQUARE], [SQUARE]],
    "text alone": [[], [], []],
}


def rows_of(which: Bench, sizes: list[list[tuple[int, int]]]) -> list[Row]:
    return [which.row(each, 3 + number % 3, number) for number, each in enumerate(sizes)]


PARTS = {
    "llava": {
        "language model": ("language_model", "lm_head"),
        "and projector": ("language_model", "lm_head", "projector"),
        "projector alone": ("projector",),
        "layers of the tower": ("vision_tower.encoder", "patch_embedding", "pre_layrnorm", "projector", "layers.1"),
    },
    "qwen2_vl": {
        "language model": ("language_model", "lm_head"),
        "projector alone": ("visual.merger",),
        "everything": ("",),
    },
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind in KINDS for part in PARTS[kind]])
def test_gradients_of_a_batch_equal_one_backward_for_each_sample(kind: str, part: str, mix: str) -> None:
    which = bench(kind)
    model, rows = which.trained(PARTS[kind][part]), rows_of(which, MIXES[mix])
    expected = which.alone(model, rows)
    found = which.together(model, rows)
    assert_same({name: _of_size(found[name], values) for name, values in expected.items()}, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_the_tower_have_the_gradients_of_each_sample(kind: str) -> None:
    which, rows = bench(kind), rows_of(bench(kind), MIXES["one, none, two, none"])
    targets = r".*(vision_tower|visual)\..*(q_proj|fc1|qkv)|.*language_model.*(q_proj|down_proj)"
    model = get_peft_model(copy.deepcopy(which.whole), LoraConfig(r=2, target_modules=targets)).double().eval()
    stir(model)
    expected = which.alone(model, rows)
    assert any("vis" in name and values.any() for name, values in expected.items())
    assert_same(which.together(model, rows, chunked=False), expected)


def test_samples_go_one_at_a_time_if_their_rows_are_not_known() -> None:
    """One learned position serves all images, and other models name the sizes of their tiles."""
    which, rows = bench("llava"), rows_of(bench("llava"), MIXES["two images and none"])
    positions = which.trained(("position_embedding",))
    with pytest.raises(RoutedRows, match="position_embedding"):
        which.together(positions, rows)
    found = which.probe(positions, rows).measure(GradientFeatures(EXACT), np.arange(2))
    np.testing.assert_allclose(found, flat(which.alone(positions, rows), positions), rtol=1e-5, atol=1e-9)

    inputs, _ = which.batch(rows)
    assert MediaRows.of(positions, inputs) is not None
    assert MediaRows.of(positions, {**inputs, "image_sizes": torch.tensor([[16, 16], [16, 16]])}) is None


def test_a_wrong_assignment_is_found_by_two_samples_with_different_numbers_of_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    which = bench("llava")
    model, rows = which.trained(("projector",)), rows_of(which, [*MIXES["one image each"], [], [SQUARE, SQUARE]])
    monkeypatch.setattr(MediaRows, "samples", lambda self, rows: torch.arange(rows) * len(self.counts) // rows)
    probe = which.probe(model, rows)
    found = probe.measure(GradientFeatures(EXACT), np.arange(5))
    assert probe.samples_apart is False
    np.testing.assert_allclose(found, flat(which.alone(model, rows), model), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_measurements_of_a_pool_equal_those_of_each_sample(kind: str) -> None:
    which = bench(kind)
    rows = rows_of(which, [sizes for mix in MIXES.values() for sizes in mix])
    part = "projector" if kind == "llava" else "merger"
    model = which.trained((part, "layers.1."))
    everything = np.arange(len(rows))
    probe = which.probe(model, rows)
    for measurement in (Losses(), Embeddings(layer=1), Embeddings(pooling="last"), Embeddings(text="prompt")):
        alone = [which.probe(model, [row]).measure(measurement, np.arange(1))[0] for row in rows]
        np.testing.assert_allclose(probe.measure(measurement, everything), alone, rtol=1e-5, atol=1e-7)
    found = probe.measure(GradientFeatures(EXACT), everything)
    assert probe.samples_apart
    expected = flat(which.alone(model, rows), model)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.linalg.norm(expected, axis=1).max())
    (products,) = probe.measure(GradientProducts(GradientSettings(), sizes=(len(rows),)), everything)
    np.testing.assert_allclose(products, expected @ expected.T, rtol=1e-4, atol=1e-6 * np.abs(products).max())


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_text_are_pooled_apart(kind: str) -> None:
    which = bench(kind)
    rows = rows_of(which, MIXES["one, none, two, none"])
    found = which.probe(which.whole, rows).measure(Embeddings(layer=1, text="image_and_text"), np.arange(4))
    token = which.whole.config.image_token_id
    for vector, row in zip(found, rows, strict=True):
        inputs, _ = which.batch([row])
        hidden = which.whole(**inputs, output_hidden_states=True).hidden_states[1][0].detach().numpy()
        ids, count = inputs["input_ids"][0].numpy(), len(row["input_ids"])
        halves = [hidden[:count][is_wanted[:count]] for is_wanted in (ids == token, ids != token)]
        vectors = [half.mean(0) / np.linalg.norm(half.mean(0)) if len(half) else np.zeros(32) for half in halves]
        expected = np.concatenate(vectors) / np.sqrt(2 if len(halves[0]) else 1)
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-6)


def test_a_loss_equals_the_models_own() -> None:
    which = bench("llava")
    rows = rows_of(which, MIXES["one, none, two, none"])
    found = which.probe(which.whole, rows).measure(Losses(), np.arange(4))
    own = [
        which.whole(**{**which.batch([row])[0], "labels": which.collate(copy.deepcopy([row]))["labels"]})
        for row in rows
    ]
    np.testing.assert_allclose(found, [float(each.loss.detach()) for each in own], rtol=1e-6)


def test_modules_that_read_images_are_outside_the_language_model() -> None:
    model = bench("llava").whole
    inside = {*model.get_decoder().modules(), model.lm_head}
    assert media_modules(model) == {module for module in model.modules() if module._parameters and module not in inside}
    assert media_modules(bench("qwen2_vl").whole).isdisjoint(bench("qwen2_vl").whole.get_decoder().modules())


@pytest.mark.parametrize("size", [(2, 3), (4, 4), (2, 2, 2)])
def test_a_convolution_without_overlap_is_a_product_with_patches(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, *(2 * side + 1 for side in size), dtype=torch.float64)
    weight = torch.randn(5, 3, *size, dtype=torch.float64)
    convolve = F.conv2d if len(size) == 2 else F.conv3d
    expected = convolve(images, weight, stride=size).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(images, size) @ weight.flatten(1).T, expected)
    assert is_patching(weight, size, 0, 1, 1)
    assert not any(
        is_patching(weight, *options)
        for options in ((1, 0, 1, 1), (size, 1, 1, 1), (size, "same", 1, 1), (size, 0, 2, 1), (size, 0, 1, 3))
    )


def _of_size(found: Tensor, like: Tensor) -> Tensor:
    """Return gradients; zeros of the right size stand for a parameter that the batch does not use."""
    return torch.zeros_like(like) if found.shape != like.shape and not found.any() else found
