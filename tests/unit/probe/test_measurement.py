"""Measurements: the batch runner under all of them, their registry, and embeddings against Transformers' own states."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
)

import dataflex
from dataflex import Embeddings, HiddenStates, Losses, MeasuredBatch, Measurement, register_measurement
from dataflex.api import measurement as registry
from dataflex.data.pool import Pool
from dataflex.errors import ComponentError, ConfigError
from dataflex.probe import runner
from dataflex.probe.model import ModelProbe
from unit.fakes import make_pool

IGNORED = -100
PAD = 1
VOCAB = 29

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": PAD,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=1),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=3, n_head=2, n_positions=64, initializer_range=0.5),
    "gemma2": lambda: Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, sliding_window=8),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16, init_std=0.5),
    "neox": lambda: GPTNeoXConfig(**SIZES),
}


@pytest.fixture(autouse=True)
def own_registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {name: AutoModelForCausalLM.from_config(config()).eval() for name, config in CONFIGS.items()}


def rows_of(count: int = 9) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(5)
    rows = []
    for number in range(count):
        ids = rng.integers(2, VOCAB, int(rng.integers(2, 15))).tolist()
        labels = [IGNORED] * len(ids) if number == 3 else ids
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


ROWS = rows_of()


def collate(rows: list[dict[str, Any]], left: bool = False) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for key, fill in (("input_ids", PAD), ("attention_mask", 0), ("labels", IGNORED)):
        pads = [[fill] * (width - len(row[key])) for row in rows]
        parts = [pad + row[key] if left else row[key] + pad for pad, row in zip(pads, rows, strict=True)]
        batch[key] = torch.tensor(parts)
    return batch


def pool_of(rows: list[dict[str, Any]]) -> Pool:
    return make_pool({"a": len(rows)}, lengths=[len(row["input_ids"]) for row in rows], rows=rows)


def probe_of(model: Any, budget: int = 40, **changes: Any) -> ModelProbe:
    given = {"pool": pool_of(ROWS), "collate": collate, "autocast": contextlib.nullcontext, **changes}
    return ModelProbe(model=lambda: model, device=torch.device("cpu"), batch_tokens=budget, **given)


# Embeddings


def pooled(hidden: torch.Tensor, pooling: str) -> np.ndarray:
    """Return one sample's embedding from its hidden states (T, H), by the definitions."""
    states = hidden.double().numpy()
    weights = {
        "mean": np.ones(len(states)),
        "weighted_mean": np.arange(1, len(states) + 1),
        "first": np.arange(len(states)) == 0,
        "last": np.arange(len(states)) == len(states) - 1,
    }[pooling].astype(float)
    return weights @ states / weights.sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_and_poolings_are_those_of_transformers_own_hidden_states(models: dict[str, Any], name: str) -> None:
    model = models[name]
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states for row in ROWS
        ]
    assert len(alone[0]) == 4
    sides = [collate] if name in ("gpt2", "opt") else [collate, lambda rows: collate(rows, left=True)]
    for side in sides:  # positions of the first two are absolute, so that padding on the left moves them
        probe = probe_of(model, collate=side)
        for layer in (-4, -2, -1, 0, 1, 3):
            for pooling in ("mean", "weighted_mean", "first", "last"):
                found = probe.measure(Embeddings(layer, pooling, normalize=False), np.arange(9))
                expected = [pooled(states[layer][0], pooling) for states in alone]
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4, err_msg=f"{layer} {pooling}")
    units = probe.measure(Embeddings(1, "last"), np.arange(9))
    expected = np.stack([pooled(states[1][0], "last") for states in alone])
    np.testing.assert_allclose(units, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4)


def half_trained(row: dict[str, list[int]], number: int) -> dict[str, list[int]]:
    """Return a row whose first tokens are a prompt: of row 0 none, of row 1 all."""
    length = len(row["input_ids"])
    prompt = 0 if number == 0 else length if number == 1 else length // 2
    return {**row, "labels": [IGNORED] * prompt + row["input_ids"][prompt:]}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "first", "last"])
def test_parts_of_a_sample_are_pooled_by_which_tokens_are_trained_on(
    models: dict[str, Any], pooling: str, left: bool
) -> None:
    model, rows = models["llama"], [half_trained(row, number) for number, row in enumerate(ROWS)]
    probe = probe_of(model, pool=pool_of(rows), collate=lambda some: collate(some, left))
    for part in ("prompt", "response"):
        found = probe.measure(Embeddings(-1, pooling, False, part), np.arange(9))  # type: ignore[arg-type]
        for number, row in enumerate(rows):
            with torch.no_grad():
                states = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[-1]
            trained = np.array(row["labels"]) != IGNORED
            trained[0] = False  # nothing predicts the first token
            wanted = trained if part == "response" else ~trained
            expected = pooled(states[0][wanted], pooling) if wanted.any() else np.zeros(16)
            np.testing.assert_allclose(found[number], expected, rtol=1e-3, atol=2e-4, err_msg=f"{part} {number}")
    assert not probe.measure(Embeddings(text="response"), np.array([1])).any()


def test_no_other_layer_is_kept_or_returned(models: dict[str, Any]) -> None:
    asked: list[Any] = []
    model = models["llama"]
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)
    probe_of(model).measure(Embeddings(layer=1), np.arange(9))
    handle.remove()
    assert asked
    assert not any(kwargs.get("output_hidden_states") for kwargs in asked)


def test_a_model_of_an_unknown_build_gives_its_layers_itself(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = probe_of(models["llama"]).measure(Embeddings(layer=2), np.arange(9))
    monkeypatch.setattr("dataflex.probe.hidden_states.layers_of", lambda model, count: None)
    np.testing.assert_array_equal(probe_of(models["llama"]).measure(Embeddings(layer=2), np.arange(9)), expected)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there(models: dict[str, Any], layer: int) -> None:
    with pytest.raises(ComponentError, match=rf"has 3 layers.*0 \(the embeddings\) to 3, or -4 to -1; got {layer}"):
        probe_of(models["llama"]).measure(Embeddings(layer), np.arange(2))


def test_padding_does_not_count_under_a_mask_of_positions(models: dict[str, Any]) -> None:
    """Packed samples come with a mask (B, 1, T, T): 0 where one position sees another."""

    def packed(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        real = batch["attention_mask"].bool()
        seen = torch.tril(torch.ones(real.shape[1], real.shape[1], dtype=torch.bool)) & real[:, None, :, None]
        seen = seen & real[:, None, None, :]
        batch["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        return batch

    model = models["llama"]
    for pooling in ("mean", "weighted_mean", "first", "last"):
        measurement = Embeddings(pooling=pooling)
        np.testing.assert_allclose(
            probe_of(model, 10_000, collate=packed).measure(measurement, np.arange(9)),
            probe_of(model).measure(measurement, np.arange(9)),
            atol=1e-5,
        )


def test_a_component_reduces_hidden_states_itself(models: dict[str, Any]) -> None:
    @register_measurement("largest")
    @dataclasses.dataclass(frozen=True)
    class Largest(HiddenStates):
        def reduce(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            assert hidden.dtype == torch.float32
            assert mask.shape == hidden.shape[:2]
            return hidden.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)

    model = models["llama"]
    found = probe_of(model).measure(Largest(layer=2), np.array([4, 0, 4]))
    with torch.no_grad():
        states = [
            model(input_ids=torch.tensor([ROWS[index]["input_ids"]]), output_hidden_states=True).hidden_states[2]
            for index in (4, 0, 4)
        ]
    np.testing.assert_allclose(found, np.stack([part[0].amax(0).numpy() for part in states]), rtol=1e-4, atol=1e-5)


# The runner


@dataclasses.dataclass(frozen=True)
class Sums(Measurement):
    """Sums of the token numbers, times a factor, of samples with a trained token; one of each if none is trained."""

    factor: float = 1.0
    untrained: ClassVar[float | None] = np.nan

    def measure(self, batch: MeasuredBatch) -> torch.Tensor:
        tokens = batch.inputs["input_ids"] * batch.mask
        return torch.stack([tokens.sum(1) * self.factor, batch.mask.sum(1).float()], dim=1)


def sums(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([(sum(row["input_ids"]), len(row["input_ids"])) for row in rows], dtype=np.float32)


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_values_are_in_the_order_of_the_samples(models: dict[str, Any], budget: int) -> None:
    register_measurement("sums")(Sums)
    indices = np.array([7, 3, 0, 7, 8])
    expected = sums([ROWS[index] for index in indices])
    expected[1] = np.nan  # sample 3 has no trained token
    probe = probe_of(models["llama"], budget)
    found = probe.measure(Sums(), indices)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    assert probe.cost.samples == 5
    assert probe.cost.tokens == sum(len(ROWS[index]["input_ids"]) for index in indices)


def test_samples_may_be_the_pool_another_pool_or_a_list_of_rows(models: dict[str, Any]) -> None:
    register_measurement("sums")(Sums)
    others = rows_of(4)[:3]
    bare = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in others]
    probe = probe_of(models["llama"])
    for samples in (pool_of(others), others, bare):
        np.testing.assert_array_equal(probe.measure(Sums(2.0), np.arange(3), samples), sums(others) * [2, 1])
        np.testing.assert_allclose(
            probe.measure(Losses(), np.arange(3), samples), probe.measure(Losses(), np.arange(3)), rtol=1e-5
        )
    with pytest.raises(ComponentError, match="row 1 of the samples to measure has no input_ids"):
        probe.measure(Sums(), np.arange(2), [others[0], {"labels": [1]}])


def test_nothing_has_the_shape_of_values(models: dict[str, Any]) -> None:
    register_measurement("sums")(Sums)
    assert probe_of(models["llama"]).measure(Sums(), np.empty(0, dtype=np.int64)).shape == (0, 2)


def test_many_values_are_kept_in_the_cpus_memory(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = probe_of(models["llama"]).measure(Embeddings(), np.arange(9))
    monkeypatch.setattr(runner, "_DEVICE_VALUES", 0)
    monkeypatch.setattr(runner, "_SUMMED_ROWS", 2)
    np.testing.assert_array_equal(probe_of(models["llama"]).measure(Embeddings(), np.arange(9)), expected)


def test_whole_numbers_stay_whole(models: dict[str, Any]) -> None:
    @register_measurement("big")
    class Big(Measurement):
        def measure(self, batch: MeasuredBatch) -> torch.Tensor:
            return 2**40 + batch.mask.sum(1)

    found = probe_of(models["llama"]).measure(Big(), np.arange(9))
    assert found.dtype == np.int64
    assert found.tolist() == [2**40 + len(row["input_ids"]) for row in ROWS]


def test_a_batch_that_does_not_fit_is_halved(models: dict[str, Any]) -> None:
    seen: list[int] = []

    @register_measurement("greedy")
    class Greedy(Measurement):
        def measure(self, batch: MeasuredBatch) -> torch.Tensor:
            seen.append(len(batch.labels))
            if batch.labels.numel() > 35:
                raise torch.OutOfMemoryError("no memory")
            return batch.mask.sum(1)

    lengths = [len(row["input_ids"]) for row in ROWS]
    probe = probe_of(models["llama"], 10_000)
    assert probe.measure(Greedy(), np.arange(9)).tolist() == lengths
    assert seen[0] == 9
    seen.clear()
    assert probe.measure(Greedy(), np.arange(9)).tolist() == lengths
    assert max(seen) < 9  # it is remembered
    with pytest.raises(ComponentError, match=r"measure greedy of 9 samples.*probe_batch_tokens to less than \d+\."):
        probe_of(models["llama"], 10_000, sharded=True).measure(Greedy(), np.arange(9))


def test_what_is_not_finite_names_the_sample(models: dict[str, Any]) -> None:
    @register_measurement("broken")
    class Broken(Measurement):
        quantity: ClassVar[str] = "logarithm"

        def measure(self, batch: MeasuredBatch) -> torch.Tensor:
            return torch.from_numpy(batch.indices).float().log()

    probe = probe_of(models["llama"])
    place = r"measurement 'broken' \(Broken, .*test_measurement.py, line \d+\)"
    with pytest.raises(ComponentError, match=rf"{place} gives NaN or infinity for pool index 0\. Return finite"):
        probe.measure(Broken(), np.arange(9))
    assert probe.measure(Broken(), np.arange(1, 9)).shape == (8,)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (
            lambda batch: batch.mask.sum(),
            r"measurement 'odd' \(.*line \d+\) returned a tensor of shape \(\) for a batch of \d+ samples",
        ),
        (
            lambda batch: [1.0] * len(batch.labels),
            r"returned list for a batch of \d samples; it must return a torch tensor whose first dimension is \d",
        ),
        (lambda batch: batch.mask, r"measurement 'odd' returned values of shape \(\d+,\) of torch.int64 after"),
    ],
)
def test_values_of_a_wrong_shape(models: dict[str, Any], returned: Callable[[Any], Any], said: str) -> None:
    @register_measurement("odd")
    class Odd(Measurement):
        def measure(self, batch: MeasuredBatch) -> torch.Tensor:
            return returned(batch)

    with pytest.raises(ComponentError, match=said):
        probe_of(models["llama"], 1).measure(Odd(), np.arange(9))


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        (np.array([0, 9]), "'losses' was asked for sample 9 of 9"),
        (np.array([-1]), "'losses' was asked for sample -1"),
        (np.array([[0]]), r"one-dimensional array of whole numbers, got int64 of shape \(1, 1\)"),
        (np.ones(9, dtype=bool), "got bool"),
    ],
)
def test_numbers_that_are_none_of_samples(models: dict[str, Any], indices: np.ndarray, said: str) -> None:
    with pytest.raises(ComponentError, match=said):
        probe_of(models["llama"]).measure(Losses(), indices)


# The registry


def test_names_are_taken_once() -> None:
    with pytest.raises(ConfigError, match=r"'losses' is already registered by Losses \(dataflex.probe.losses\)"):
        register_measurement("losses")(Sums)
    assert dataflex.Losses.name == "losses"


def test_what_cannot_measure_is_no_measurement() -> None:
    with pytest.raises(ConfigError, match="Empty does not define measure"):
        register_measurement("empty")(type("Empty", (Measurement,), {}))
    with pytest.raises(ConfigError, match="does not extend Measurement"):
        register_measurement("odd")(int)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="must be text"):
        register_measurement("")


def test_a_measurement_without_a_name_of_its_own(models: dict[str, Any]) -> None:
    class Mine(Losses):
        pass

    with pytest.raises(
        ComponentError, match=r"Mine, which is no measurement with a name.*register_measurement\(NAME\)"
    ):
        probe_of(models["llama"]).measure(Mine(), np.arange(2))
