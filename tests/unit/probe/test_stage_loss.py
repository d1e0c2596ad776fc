"""Losses, margins and gradients of samples that have one loss each, against one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dataflex.api.probe import GradientSettings
from dataflex.errors import ComponentError, DivergenceError
from dataflex.probe.embeddings import Embeddings
from dataflex.probe.error_norms import ErrorNorms
from dataflex.probe.gradient_features import GradientFeatures, StoredFeatures
from dataflex.probe.gradient_norms import GradientNorms
from dataflex.probe.gradient_products import GradientProducts
from dataflex.probe.losses import Losses, LossesByToken
from dataflex.probe.margins import Margins
from unit.fakes import make_pool, products_of
from unit.probe.models import EXACT, MODELS, PAD, Model, gpt2, llama, lora, make, only
from unit.probe.models import probe_of as token_probe
from unit.probe.pairs import (
    Dpo,
    Kto,
    Reward,
    Simpo,
    collate_pairs,
    feedback,
    one_by_one,
    pairs,
    part,
    probe_of,
    with_value_head,
)
from unit.probe.test_checkpointing import checkpointed, runs_of

pytestmark = pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")

EVERYONE = np.arange(6)
Made = tuple[Model, Any, list[dict[str, Any]]]
"""A model, its loss, and samples."""


def frozen_beside(model: Model) -> Model:
    """Return a reference model that differs from a model."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    return other.requires_grad_(False)


def dpo(name: str) -> Made:
    model = make(MODELS[name])
    return model, Dpo(None if "lora" in name or "dora" in name else frozen_beside(model)), pairs()


def reward(name: str) -> Made:
    return make(lambda: with_value_head(MODELS[name]())), Reward(), pairs()


def kto(name: str) -> Made:
    return make(MODELS[name]), Kto(), feedback()


NAMES = {
    dpo: [
        "llama",
        "llama tied",
        "qwen2, biases",
        "qwen3, norms of q and k",
        "mixtral",
        "qwen3 moe",
        "opt, learned positions",
        "lora",
        "dora",
        "lora, whole head and embedding",
        "lora on the head",
        "lora and biases",
        "lora on experts' attention",
        "freeze",
        "last norm",
    ],
    reward: ["llama", "llama tied", "mixtral", "lora", "dora", "biases", "head"],
    kto: ["lora", "dora", "lora, whole head and embedding", "lora on experts' attention"],
}
CASES = [(stage, name) for stage, names in NAMES.items() for name in names]


def assert_close(found: NDArray[Any], expected: NDArray[Any], tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("stage", "name"), CASES)
def test_losses_margins_and_gradients_are_those_of_one_sample_at_a_time(
    stage: Callable[[str], Made], name: str
) -> None:
    model, loss, rows = stage(name)
    losses, margins, gradients = one_by_one(model, loss, rows)
    probe = probe_of(model, loss, rows)
    order = np.array([4, 0, 3, 2, 5, 1])
    assert_close(probe.measure(Losses(), order), losses[order])
    if margins is not None:
        assert_close(probe.measure(Margins(), order), margins[order])
    assert_close(probe.measure(GradientFeatures(EXACT), order), gradients[order])
    assert probe.samples_apart
    assert_close(probe.measure(GradientNorms(), order), np.linalg.norm(gradients, axis=1)[order])
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("stage", "name"), [(dpo, "lora"), (dpo, "llama tied"), (reward, "lora"), (kto, "lora")])
def test_recomputed_layers_run_again_for_the_pass_with_gradients_alone(stage: Callable[[str], Made], name: str) -> None:
    model, loss, rows = stage(name)
    gradients = one_by_one(model, loss, rows)[2]
    inner = model.pretrained_model if stage is reward else model
    checkpointed(inner)
    probe = probe_of(model, loss, rows, batch_tokens=30)
    probe.measure(GradientFeatures(EXACT), EVERYONE)  # which also computes the values of the reference
    runs = runs_of(inner)
    found = probe.measure(GradientFeatures(EXACT), EVERYONE)
    batches = runs[0] // (3 if stage is kto else 2)
    assert batches > 1
    assert runs == [batches * (3 if stage is kto else 2)] * 2
    assert_close(found, gradients)


@pytest.mark.parametrize(("stage", "name"), [(dpo, "lora"), (reward, "mixtral"), (kto, "lora")])
def test_values_do_not_depend_on_the_batches(stage: Callable[[str], Made], name: str) -> None:
    model, loss, rows = stage(name)
    alone, together = (probe_of(model, loss, rows, batch_tokens=tokens) for tokens in (1, 10_000))
    for measurement in (Losses(), GradientFeatures(EXACT)):
        assert_close(together.measure(measurement, EVERYONE), alone.measure(measurement, EVERYONE), 1e-6)


def test_the_reduction_has_no_effect() -> None:
    model, loss, rows = dpo("lora")
    probe = probe_of(model, loss, rows)
    mean, total = (
        probe.measure(GradientFeatures(GradientSettings(projection="identity", reduction=each)), EVERYONE)
        for each in ("mean", "sum")
    )
    assert np.array_equal(mean, total)


def test_rows_outside_a_pool_are_measured() -> None:
    """Nothing is kept of them, so the loss computes the values of the reference with the batch."""
    model, loss, rows = dpo("lora")
    probe = probe_of(model, loss, rows)
    given = [{name: values for name, values in row.items() if "mask" not in name} for row in rows]
    for measurement in (Losses(), Margins(), GradientFeatures(EXACT)):
        expected = probe.measure(measurement, EVERYONE)
        made = loss.made
        assert_close(probe.measure(measurement, EVERYONE, given), expected)
        assert loss.made > made
    with pytest.raises(ComponentError, match="row 1 of the samples to measure has no rejected_input_ids"):
        probe.measure(Losses(), np.arange(2), [rows[0], {**rows[1], "rejected_input_ids": []}])


def test_products_with_validation_pairs() -> None:
    model, loss, rows = dpo("lora")
    others = pairs(3, seed=1)
    gradients = one_by_one(model, loss, rows + others)[2]
    probe = probe_of(model, loss, rows)
    validation = make_pool({"b": 3}, rows=others)
    asked = GradientProducts(EXACT, sizes=(4, 2), validation=validation, others=np.array([2, 0]))
    first, second = probe.measure(asked, np.array([3, 1, 0, 2, 5, 4]))
    for found, own in ((first, [3, 1, 0, 2]), (second, [5, 4])):
        columns = gradients[[*own, 8, 6]]
        assert_close(found, gradients[own] @ columns.T)
    made = loss.made
    probe.measure(asked, np.array([3, 1, 0, 2, 5, 4]))
    assert loss.made == made  # the values of the reference are kept of the pool and of the validation pairs


def test_products_within_pairs_of_the_pool() -> None:
    model, loss, rows = reward("lora")
    gradients = one_by_one(model, loss, rows)[2]
    (found,) = products_of(probe_of(model, loss, rows), [np.arange(4)], EXACT, np.array([5]))
    assert_close(found, gradients[:4] @ gradients[[0, 1, 2, 3, 5]].T)


def test_a_pair_without_a_trained_token_has_the_loss_of_training() -> None:
    model = make(MODELS["lora"])
    rows, loss = pairs(untrained=2), Dpo()
    losses, margins, gradients = one_by_one(model, loss, rows)
    assert losses[2] == pytest.approx(np.log(2))
    assert not gradients[2].any()
    probe = probe_of(model, loss, rows)
    assert_close(probe.measure(Losses(), EVERYONE), losses)
    assert margins is not None
    assert_close(probe.measure(Margins(), EVERYONE), margins)
    assert_close(probe.measure(GradientFeatures(EXACT), EVERYONE), gradients)
    assert np.isfinite(probe.measure(GradientNorms(), EVERYONE)).all()


def test_a_loss_that_is_not_finite_names_its_sample() -> None:
    model = make(MODELS["lora"])
    probe = probe_of(model, Simpo(), pairs(untrained=2))
    for measurement, what in (
        (Losses(), "the loss of pool index 2 is not finite"),
        (Margins(), "the reward margin of pool index 2 is not finite"),
        (GradientNorms(), r"the gradient of pool index 2 is not finite \(its loss is inf\)"),
    ):
        with pytest.raises(DivergenceError, match=what):
            probe.measure(measurement, EVERYONE)


def test_a_model_that_mixes_rows_takes_one_pair_at_a_time() -> None:
    model = make(lambda: only("w", gpt2()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("wte" in name or "wpe" in name or "ln" in name)
    loss, rows = Simpo(), pairs()
    probe = probe_of(model, loss, rows)
    assert_close(probe.measure(GradientFeatures(EXACT), EVERYONE), one_by_one(model, loss, rows)[2])
    assert probe.samples_apart is False


@pytest.mark.parametrize("measurement", [Losses(), GradientFeatures(EXACT)])
def test_batches_are_halved_if_memory_runs_out(measurement: Any) -> None:
    model, loss, rows = dpo("lora")
    expected = probe_of(model, loss, rows).measure(measurement, EVERYONE)

    class Small(Dpo):
        def __call__(self, model: Model, batch: Any, reference: Any = None) -> Any:
            if len(batch["input_ids"]) > 4:
                raise torch.OutOfMemoryError
            return super().__call__(model, batch, reference)

    probe = probe_of(model, Small(), rows, batch_tokens=10_000)
    assert_close(probe.measure(measurement, EVERYONE), expected, 1e-6)
    assert probe.limits[measurement.name].tokens is not None


@pytest.mark.parametrize("stage", [dpo, reward])
def test_measurements_of_tokens_read_the_chosen_responses(stage: Callable[[str], Made]) -> None:
    model, loss, rows = stage("lora")
    model.float()  # a value head rounds logits to float32
    chosen = [part(row, "chosen_") for row in rows]
    batch = {name: torch.full((6, 20), PAD if name == "input_ids" else 0) for name in ("input_ids", "attention_mask")}
    labels = torch.full((6, 20), -100)
    for number, row in enumerate(chosen):
        for name, values in batch.items():
            values[number, : len(row[name])] = torch.tensor(row[name])
        labels[number, : len(row["labels"])] = torch.tensor(row["labels"])
    inner = model.pretrained_model if stage is reward else model
    plain, probe = token_probe(inner, batch, labels), probe_of(model, loss, rows)
    for measurement in (ErrorNorms(), Embeddings(), Embeddings(layer=1), Embeddings(text="response")):
        assert_close(probe.measure(measurement, EVERYONE), plain.measure(measurement, EVERYONE))
    found, expected = (each.measure(LossesByToken(), EVERYONE) for each in (probe, plain))
    assert_close(np.concatenate(found), np.concatenate(expected))
    assert probe.chunked_head
    probe.chunked_head = False
    assert_close(probe.measure(ErrorNorms(), EVERYONE), plain.measure(ErrorNorms(), EVERYONE))
    assert not getattr(loss, "made", 0)  # no measurement of tokens reads the reference


def test_margins_need_pairs() -> None:
    view: Any = SimpleNamespace(llamafactory={"stage": "kto"})
    ((key, text),) = Margins().problems(view)
    assert key == "method"
    assert "stages dpo and rm" in text
    assert "the stage is kto" in text
    for stage in ("dpo", "rm"):
        assert not list(Margins().problems(SimpleNamespace(llamafactory={"stage": stage})))  # type: ignore[arg-type]
    with pytest.raises(ComponentError, match="need pairs of responses"):
        probe_of(make(lora), Kto(), feedback()).measure(Margins(), EVERYONE)


def test_features_are_stored_for_one_loss_and_one_reference(tmp_path: Path) -> None:
    model = make(llama)
    first, second = frozen_beside(model), frozen_beside(frozen_beside(model))
    settings = GradientSettings(dim=64, store=str(tmp_path))
    kept = set()
    for reference, stage in ((first, "0.3"), (first, "0.3"), (second, "0.3"), (first, "0.1")):
        probe = probe_of(model, Dpo(reference), pairs(), stage_settings={"pref_beta": stage})
        probe.pool.__dict__["content_digest"] = "these pairs"
        store = probe.measure(StoredFeatures(settings), EVERYONE)
        kept.add(store.folder)
        exact = probe.measure(GradientFeatures(GradientSettings(dim=64)), EVERYONE)
        found = np.zeros_like(exact)
        for places, features in store.blocks(device="cpu"):
            found[places] = features.numpy()
        assert_close(found, exact, 2e-3)
    assert len(kept) == 3


def test_the_collator_of_a_stage_is_always_called() -> None:
    """The fast path of rows of tokens is for collators that only pad."""
    model, loss, rows = dpo("lora")
    probe = probe_of(model, loss, rows)
    called: list[int] = []

    def collate(some: list[dict[str, Any]]) -> Any:
        called.append(len(some))
        return collate_pairs(some)

    probe.collate = collate
    probe.plain_collators = (type(collate),)
    probe.measure(Losses(), EVERYONE)
    assert sum(called) == 12  # once for the reference and once for the losses
