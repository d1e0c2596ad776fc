"""Measurements and searches on a pretended accelerator: equal to the CPU, without operations a device refuses."""

from __future__ import annotations

import contextlib
import copy
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import dataflex
from dataflex.api.measurement import available_measurements
from dataflex.api.probe import GenerationSettings, GradientSettings
from dataflex.data.pool import Pool
from dataflex.embedding import densities
from dataflex.embedding.neighbours import nearest
from dataflex.probe.collation import Collation
from dataflex.probe.embeddings import Embeddings
from dataflex.probe.error_norms import ErrorNorms
from dataflex.probe.expert_loads import ExpertLoads
from dataflex.probe.generations import Generations
from dataflex.probe.gradient_features import GradientFeatures, GradientSimilarities, StoredFeatures
from dataflex.probe.gradient_norms import GradientNorms
from dataflex.probe.gradient_products import GradientProducts
from dataflex.probe.logit_norms import LogitNorms, LogitProjections
from dataflex.probe.losses import Losses, LossesByToken
from dataflex.probe.margins import Margins
from dataflex.probe.model import ModelProbe, Tokens
from dataflex.probe.moments import Moments
from dataflex.probe.reference import ReferenceModel, losses_of
from dataflex.probe.stage_references import StageReferences
from dataflex.probe.store import similarities
from pretended_device import Counts, on_device, pretended
from unit.fakes import make_pool
from unit.probe.pairs import Dpo, Simpo, collate_pairs, pairs

VOCABULARY, COUNT, IGNORED = 48, 8, -100
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def rows_of(count: int) -> list[dict[str, list[int]]]:
    """Return samples with a prompt that is not trained on; one has nothing else."""
    rng, rows = np.random.default_rng(1), []
    for number in range(count):
        ids = rng.integers(3, VOCABULARY, int(rng.integers(6, 18))).tolist()
        prompt = len(ids) if number == 3 else len(ids) // 3
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


ROWS = rows_of(COUNT)
INDICES = np.arange(COUNT)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", IGNORED)}


def lora() -> torch.nn.Module:
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), settings)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "lora": lora,
    "full": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "experts": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "bf16": lambda: lora().to(torch.bfloat16),
}


def make_probe(model: torch.nn.Module, place: torch.device) -> ModelProbe:
    def moments() -> dict[str, Moments]:
        found = {}
        for number, (name, value) in enumerate(model.named_parameters()):
            if value.requires_grad:
                stream = torch.Generator().manual_seed(number)
                means = torch.randn(value.shape, generator=stream) * 1e-3
                squares = torch.rand(value.shape, generator=stream) * 1e-5
                found[name] = Moments(means.to(place), squares.to(place), 5, (0.9, 0.999), 1e-8)
        return found

    return ModelProbe(
        pool=Pool.concatenate({"all": Dataset.from_list(ROWS)}),
        model=lambda: model,
        collate=collate,
        autocast=contextlib.nullcontext,
        device=place,
        batch_tokens=64,
        moments=moments,
        tokens=Tokens(pad=0, eos=(2,), decode=str),
    )


def settings(**changes: Any) -> GradientSettings:
    return GradientSettings(**{"preconditioner": "adam", "dim": 64, **changes})


def stored(probe: ModelProbe, folder: Path) -> Any:
    store = probe.measure(StoredFeatures(settings(store=str(folder))), INDICES)
    return similarities(store, torch.ones(2, 64), probe.device), store.norms()


def products(probe: ModelProbe, folder: Path) -> Any:
    asked = GradientProducts(settings(), sizes=(3, 3), validation=probe.pool, others=INDICES[6:])
    return probe.measure(asked, INDICES[:6])


def generated(probe: ModelProbe, folder: Path) -> Any:
    asked = Generations(GenerationSettings(samples=2, max_new_tokens=4))
    return [np.concatenate(each) for each in probe.measure(asked, INDICES[:3])]


def by_token(probe: ModelProbe, folder: Path) -> Any:
    return [np.concatenate(probe.measure(LossesByToken(), INDICES))]


def of_pairs(*measurements: Any) -> Callable[[ModelProbe, Path], Any]:
    """Return a function that measures pairs instead of samples of tokens."""

    def measured(probe: ModelProbe, folder: Path) -> Any:
        rows = pairs(COUNT, vocabulary=VOCABULARY)
        pool = make_pool({"all": COUNT}, lengths=[len(row["chosen_input_ids"]) * 2 for row in rows], rows=rows)
        model = probe.model()
        loss = Dpo() if isinstance(model, PeftModel) else Simpo()
        made = replace(probe, pool=pool, collate=collate_pairs, stage_loss=loss, references=StageReferences())
        return [made.measure(each, INDICES) for each in measurements]

    return measured


def plainly(*measurements: Any) -> Callable[[ModelProbe, Path], Any]:
    return lambda probe, folder: [probe.measure(each, INDICES) for each in measurements]


OTHERS = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)

MEASURED: dict[str, Callable[[ModelProbe, Path], Any]] = {
    "losses": plainly(Losses()),
    "losses_by_token": by_token,
    "margins": of_pairs(Margins(), Losses()),
    "error_norms": plainly(ErrorNorms()),
    "embeddings": plainly(
        Embeddings(),
        Embeddings(layer=1, pooling="weighted_mean", text="response"),
        Embeddings(layer=0, pooling="last", normalize=False),
    ),
    "logit_projections": plainly(LogitProjections(4, 8)),
    "logit_norms": plainly(LogitNorms(LogitProjections(4, 8), OTHERS[:, :32])),
    "expert_loads": plainly(ExpertLoads()),
    "gradient_features": plainly(GradientFeatures(settings())),
    "gradient_similarities": plainly(GradientSimilarities(settings(), OTHERS)),
    "stored_features": stored,
    "gradient_norms": plainly(GradientNorms(settings())),
    "gradient_products": products,
    "generations": generated,
}
"""One way at least to take every measurement that is registered."""


def built_in_measurements() -> set[str]:
    """Return the names of the measurements in DataFlex, after importing what may register one."""
    for package in ("probe", "selectors", "mixers", "orders", "weighters"):
        path = [str(Path(dataflex.__file__).parent / package)]
        for module in pkgutil.iter_modules(path, f"dataflex.{package}."):
            importlib.import_module(module.name)
    return {name for name, kind in available_measurements().items() if kind.__module__.startswith("dataflex.")}


def test_every_built_in_measurement_is_tested_on_the_device() -> None:
    assert built_in_measurements() == set(MEASURED)


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        found[name] = make().eval()
    return found


def taken(
    model: torch.nn.Module, name: str, folder: Path, kind: str = "cuda"
) -> tuple[list[np.ndarray], list[np.ndarray], Counts]:
    """Return what a measurement gives on the CPU and on the pretended device, and what the device did for it."""
    measured = (MEASURED | VARIANTS)[name]
    here = measured(make_probe(model, torch.device("cpu")), folder / "cpu")
    with pretended(kind) as (place, counts):
        there = measured(make_probe(on_device(copy.deepcopy(model), place), place), folder / kind)
    return [np.asarray(each) for each in here], [np.asarray(each) for each in there], counts


VARIANTS: dict[str, Callable[[ModelProbe, Path], Any]] = {
    "rademacher": plainly(GradientFeatures(settings(projection="rademacher"))),
    "identity": plainly(GradientFeatures(settings(projection="identity", preconditioner="adam_less"))),
    "kronecker": plainly(GradientFeatures(settings(projection="kronecker", preconditioner="none"))),
    "of pairs": of_pairs(GradientFeatures(settings())),
    "summed": plainly(GradientFeatures(settings(preconditioner="none", reduction="sum"))),
}
"""Other ways to take gradients, for one model."""

PAIRS = [(model, name) for model in MODELS for name in MEASURED if name != "expert_loads" or model == "experts"]
PAIRS += [("lora", name) for name in VARIANTS]


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_measurements_on_the_device_equal_those_on_the_cpu(
    model: str, name: str, models: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    here, there, counts = taken(models[model], name, tmp_path)
    assert len(here) == len(there)
    for expected, found in zip(here, there, strict=True):
        assert expected.size
        # Stored features are float16: a difference in the last bit of float32 may round to the next float16.
        tolerance = 2e-2 if model == "bf16" else 1e-3 if name == "stored_features" else 2e-5
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.nanmax(np.abs(expected)))
    assert counts.waits
    assert not [line for line in counts.unordered if not line.startswith("transformers/")]


@pytest.mark.parametrize("name", [*(name for name in MEASURED if name != "expert_loads"), *VARIANTS])
def test_measurements_run_on_a_device_without_float64(
    name: str, models: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    here, there, _ = taken(models["lora"], name, tmp_path, "mps")
    for expected, found in zip(here, there, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.nanmax(np.abs(expected)))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbours_on_the_device_equal_those_on_the_cpu(metric: Any, dtype: Any) -> None:
    base = np.random.default_rng(3).standard_normal((300, 12)).astype(dtype)
    expected = nearest(base[:40], base, 5, metric=metric, device="cpu", exclude_self=True)
    for kind in ("cuda", "mps"):
        with pretended(kind) as (place, _):
            found = nearest(base[:40], base, 5, metric=metric, device=place, exclude_self=True)
        assert np.array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_densities_on_the_device_equal_those_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(4).standard_normal((400, 6)).astype(np.float32)
    rows = np.arange(0, 400, 3)
    for exact in (densities._EXACT, 0):  # all vectors compared, and those of near cells
        monkeypatch.setattr(densities, "_EXACT", exact)
        expected = densities.kernel_densities(vectors, rows, 1.5, 50, device="cpu")
        with pretended() as (place, counts):
            found = densities.kernel_densities(vectors, rows, 1.5, 50, device=place)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert counts.waits


def test_reference_losses_on_the_device_equal_those_on_the_cpu(models: dict[str, torch.nn.Module]) -> None:
    pool = Pool.concatenate({"all": Dataset.from_list(ROWS)})
    indices = np.array([4, 0, 3, 6])

    def taken(reference: ReferenceModel, place: torch.device) -> Any:
        return losses_of(pool, indices, reference, Collation(collate), place, 48)

    expected = taken(ReferenceModel(models["full"], contextlib.nullcontext), torch.device("cpu"))
    with pretended() as (place, counts):
        reference = ReferenceModel(on_device(copy.deepcopy(models["full"]), place), contextlib.nullcontext)
        taken(reference, place)  # which looks, once, at how the model's head may be run
        counts.waits.clear()
        found = taken(reference, place)
    assert found[0].tolist() == expected[0].tolist()
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
    batches = sum(count for line, count in counts.waits.items() if "nonzero" in line)
    assert counts.waits.total() <= 2 * batches + 2  # each forward and its positions, and twice what is gathered


def test_the_pretended_device_refuses_the_operations_a_device_refuses() -> None:
    """Else all of this shows nothing."""
    here = torch.ones(2)
    with pretended() as (place, counts):
        there = torch.ones(2, device=place)
        assert there.device == place
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(RuntimeError, match="same device"):
            here[torch.tensor([0])] = there[:1]
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
        assert not counts.waits
        assert (there + 1).sum().item() == 4
        assert bool(there.any())
        assert there[there > 0].tolist() == there.cpu().tolist()
        assert counts.waits.total() == 5  # a mask and tolist are two
        there.index_add_(0, torch.zeros(2, dtype=torch.int64, device=place), there.clone())
        assert counts.unordered.total() == 1
    with pretended("mps") as (place, _), pytest.raises(TypeError, match="float64"):
        torch.ones(2, device=place).double()
