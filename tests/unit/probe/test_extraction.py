"""Features on disk: the same as without a store, nothing computed twice after a kill, a folder for every cause."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Sequence, Value, concatenate_datasets, load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dataflex.api.probe import GradientSettings
from dataflex.data.pool import Pool
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import DivergenceError
from dataflex.probe import extraction
from dataflex.probe.gradient_features import GradientFeatures, GradientSimilarities, StoredFeatures
from dataflex.probe.gradient_runs import gradient_batches
from dataflex.probe.model import ModelProbe
from dataflex.probe.moments import Moments
from dataflex.probe.runner import Runner
from dataflex.probe.store import FeatureStore

VOCAB = 41
SAMPLES = 40
UNLABELLED = 7
PLAIN = GradientSettings(dim=96)
Rows = list[dict[str, list[int]]]


def lora(**changes: Any) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
        )
    )  # fmt: skip
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(base, LoraConfig(**options))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    return model


def rows_of(count: int = SAMPLES, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = rng.integers(1, VOCAB, rng.integers(3, 13)).tolist()
        labels = [IGNORE_INDEX, *ids[1:]] if number != UNLABELLED else [IGNORE_INDEX] * len(ids)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def pool_of(rows: Rows) -> Pool:
    return Pool(Dataset.from_list(rows), ("a",), np.array([len(rows)]))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    batch = {key: torch.full((len(rows), width), value) for key, value in filled.items()}
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][number, :length] = torch.tensor(row["input_ids"])
        batch["labels"][number, :length] = torch.tensor(row["labels"])
        batch["attention_mask"][number, :length] = 1
    return batch


def probe_of(model: Any, rows: Rows | None = None, **changes: Any) -> ModelProbe:
    return ModelProbe(
        pool=pool_of(rows or rows_of()),
        model=lambda: model,
        collate=collate,
        autocast=contextlib.nullcontext,
        device=torch.device("cpu"),
        **{"batch_tokens": 40, **changes},
    )


def moments_of(model: Any, seed: int = 0) -> Callable[[], dict[str, Moments]]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            first, second = (torch.randn(value.shape, generator=generator) * 1e-2 for _ in range(2))
            made[name] = Moments(first, second**2, 3, (0.9, 0.999), 1e-8)
    return lambda: made


def kept(settings: GradientSettings, root: Path) -> GradientSettings:
    return GradientSettings(**{**vars(settings), "store": str(root)})


def targets_of(count: int = 3, dim: int = 96) -> np.ndarray:
    rows = np.random.default_rng(1).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return lora()


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "_CHUNK_ROWS", 8)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples whose gradients were taken, in order."""
    indices: list[int] = []
    original = Runner.attempt

    def noting(self: Runner, measure: Any, rows: np.ndarray) -> Any:
        indices.extend(rows.tolist())
        return original(self, measure, rows)

    monkeypatch.setattr(Runner, "attempt", noting)
    return indices


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("preconditioner", ["none", "adam", "adam_less"])
def test_similarities_equal_those_without_a_store(
    model: Any, tmp_path: Path, preconditioner: Any, normalize: bool
) -> None:
    settings = GradientSettings(preconditioner=preconditioner, dim=96, normalize=normalize)
    indices = np.random.default_rng(2).permutation(SAMPLES)[:30]
    indices[4] = UNLABELLED
    indices = np.unique(indices)[::-1].copy()
    probe = probe_of(model, moments=moments_of(model))
    plain = probe.measure(GradientSimilarities(settings, targets_of()), indices)
    stored = probe.measure(GradientSimilarities(kept(settings, tmp_path), targets_of()), indices)
    assert np.isnan(plain[indices == UNLABELLED]).all()
    scale = 1.0 if normalize else float(np.nanmax(np.abs(plain)))
    np.testing.assert_allclose(stored, plain, atol=1e-3 * scale)
    assert np.nanstd(plain) > 0.02 * scale


def test_stored_lengths_equal_those_of_the_features(model: Any, tmp_path: Path) -> None:
    probe, everyone = probe_of(model), np.arange(SAMPLES)
    store = probe.measure(StoredFeatures(kept(PLAIN, tmp_path)), everyone)
    features = probe.measure(GradientFeatures(GradientSettings(dim=96, normalize=False)), everyone)
    lengths = np.linalg.norm(features, axis=1)
    lengths[UNLABELLED] = np.nan
    np.testing.assert_allclose(store.norms(), lengths, rtol=1e-4)
    for positions, block in store.blocks("cpu"):
        expected = features[positions] / np.maximum(np.linalg.norm(features[positions], axis=1, keepdims=True), 1e-12)
        np.testing.assert_allclose(block.numpy(), expected, atol=1e-3)


def test_stored_features_are_not_computed_again(model: Any, tmp_path: Path, measured: list[int]) -> None:
    probe, everyone = probe_of(model), np.arange(SAMPLES)
    first = probe.measure(GradientSimilarities(kept(PLAIN, tmp_path), targets_of()), everyone)
    assert set(measured) == set(range(SAMPLES))
    made = probe.cost.samples
    measured.clear()
    second = probe.measure(GradientSimilarities(kept(PLAIN, tmp_path), targets_of()), everyone)
    assert measured == []
    assert probe.cost.samples == made
    np.testing.assert_array_equal(first, second)


def files(root: Path) -> dict[str, bytes]:
    (folder,) = root.iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("where", ["while writing", "while measuring"])
def test_a_killed_extraction_resumes(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int], where: str
) -> None:
    everyone = np.arange(SAMPLES)
    first = probe_of(model)
    whole = first.measure(StoredFeatures(kept(PLAIN, tmp_path / "whole")), everyone)
    assert len(whole.chunks) >= 4
    calls = 0

    def dying(original: Callable[..., Any], after: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KeyboardInterrupt
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        if where == "while writing":
            patch.setattr(FeatureStore, "write", dying(FeatureStore.write, 2))
        else:
            chunks = extraction._chunks(gradient_batches(Runner(first, StoredFeatures(), everyone)))
            # The look at two samples takes three passes; then into the third chunk.
            passes = 3 + len(chunks[0]) + len(chunks[1])
            patch.setattr(Runner, "attempt", dying(Runner.attempt, passes))
        with pytest.raises(KeyboardInterrupt):
            probe_of(model).measure(StoredFeatures(kept(PLAIN, tmp_path / "cut")), everyone)
    (folder,) = (tmp_path / "cut").iterdir()
    assert len(list(folder.glob("features-*.bin"))) == 2
    done = {int(index) for chunk in (0, 1) for index in whole.positions(chunk)}

    measured.clear()
    probe = probe_of(model)
    probe.measure(StoredFeatures(kept(PLAIN, tmp_path / "cut")), everyone)
    looked_at = 4  # two samples, each alone and both together
    assert sorted(measured[looked_at:]) == sorted(set(range(SAMPLES)) - done)
    assert probe.cost.samples == SAMPLES - len(done)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("weight", ["lora_A", "embed_tokens"])
def test_another_weight_gives_another_folder(tmp_path: Path, weight: str) -> None:
    model, everyone = lora(), np.arange(10)
    first = probe_of(model).measure(StoredFeatures(kept(PLAIN, tmp_path)), everyone).folder
    value = next(value for name, value in model.named_parameters() if weight in name)
    before = value.detach().clone()
    with torch.no_grad():
        value[3, 3] += 1e-6
    assert probe_of(model).measure(StoredFeatures(kept(PLAIN, tmp_path)), everyone).folder != first
    with torch.no_grad():
        value.copy_(before)
    assert probe_of(model).measure(StoredFeatures(kept(PLAIN, tmp_path)), everyone).folder == first


@pytest.mark.parametrize("column", ["input_ids", "labels", "attention_mask", "position_ids"])
def test_another_token_anywhere_gives_another_folder(model: Any, tmp_path: Path, column: str) -> None:
    # The fingerprint looks at the tokens of 512 samples; what is measured are the features of three others.
    rows = [{**row, "attention_mask": [1] * 3, "position_ids": [0, 1, 2]} for row in rows_of(1000)]
    changed = copy.deepcopy(rows)
    changed[501][column][2] = changed[501][column][2] % (VOCAB - 1) + 1
    first, second = probe_of(model, rows), probe_of(model, changed)
    assert first.pool.fingerprint == second.pool.fingerprint
    indices = np.array([3, 501, 900])
    found = [probe.measure(StoredFeatures(kept(PLAIN, tmp_path)), indices) for probe in (first, second)]
    assert found[0].folder != found[1].folder
    assert probe_of(model, rows).measure(StoredFeatures(kept(PLAIN, tmp_path)), indices).folder == found[0].folder


def test_every_input_of_the_collator_is_in_the_digest() -> None:
    ids = [[5, 6, 7], [8, 9]]
    variants: list[dict[str, Any]] = [
        {},
        {"images": [None, ["a.png"]]},
        {"images": [["a.png"], None]},
        {"images": [["a.png"], ["a.png"]]},
        {"images": [["a.png"], ["b.png"]]},
        {"images": [["a.png", "b.png"], []]},
        {"images": [["a.png"], ["b.png", ""]]},
        {"videos": [None, ["a.png"]]},
        {"images": [[{"bytes": b"12", "path": None}], [{"bytes": b"3", "path": "a"}]]},
        {"images": [[{"bytes": b"1", "path": None}], [{"bytes": b"23", "path": "a"}]]},
        {"images": [[{"bytes": b"1", "path": "a"}], [{"bytes": b"23", "path": None}]]},
        {"packing_params": [{"boundaries": [0, 2, 3], "ids": [1]}, {"boundaries": [0, 2], "ids": [1]}]},
        {"packing_params": [{"boundaries": [0, 2], "ids": [3, 1]}, {"boundaries": [0, 2], "ids": [1]}]},
        {"scale": [0.5, 1.0]},
        {"scale": [0.5, 1.5]},
        {"kept": [True, False]},
        {"kept": [True, True]},
        {"position_ids": [[0, 1, 2], [0, 1]]},
        {"position_ids": [[0, 1], [2, 0, 1]]},
    ]
    found = [
        Pool(Dataset.from_dict({"input_ids": ids, **columns}), ("a",), np.array([2])).content_digest
        for columns in variants
    ]
    assert len(set(found)) == len(variants)


def test_the_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    columns = {"input_ids": [[3, 4, 5], [6], [7, 8]], "images": [["x"], None, ["y", "z"]]}
    longer = {name: [values[2], *values, values[0]] for name, values in columns.items()}
    plain = Dataset.from_dict(columns)
    narrow = plain.cast_column("input_ids", Sequence(Value("int32")))
    Dataset.from_dict(longer).save_to_disk(tmp_path)
    same = [
        plain,
        narrow,
        Dataset.from_dict(longer).select(range(1, 4)),
        load_from_disk(tmp_path).select([1, 2, 3]),
        plain.select_columns(["images", "input_ids"]),
        concatenate_datasets([plain.select([0]), plain.select([1, 2])]),
    ]
    assert len({Pool(dataset, ("a",), np.array([3])).content_digest for dataset in same}) == 1
    assert Pool(plain, ("a", "b"), np.array([1, 2])).content_digest != Pool(plain, ("a",), np.array([3])).content_digest


def test_other_trained_parameters_give_another_folder(tmp_path: Path) -> None:
    model, everyone = lora(), np.arange(10)
    first = probe_of(model).measure(StoredFeatures(kept(PLAIN, tmp_path)), everyone).folder
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name and "layers.1." not in name)
    assert probe_of(model).measure(StoredFeatures(kept(PLAIN, tmp_path)), everyone).folder != first
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name)
    assert probe_of(model).measure(StoredFeatures(kept(PLAIN, tmp_path)), everyone).folder == first


@pytest.mark.parametrize("changes", [{"lora_alpha": 32}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}])
def test_another_scaling_of_an_adapter_gives_another_folder(tmp_path: Path, changes: dict[str, Any]) -> None:
    one, other, indices = lora(), lora(**changes), np.arange(10)
    for (name, value), (_, its) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(value, its), name
    features = [probe_of(model).measure(GradientFeatures(PLAIN), indices) for model in (one, other)]
    assert np.abs(features[0] - features[1]).max() > 1e-3
    folders = {
        probe_of(model).measure(StoredFeatures(kept(PLAIN, tmp_path)), indices).folder for model in (one, other, lora())
    }
    assert len(folders) == 2


def test_another_version_of_the_random_map_gives_another_folder(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, settings = probe_of(model), kept(PLAIN, tmp_path)
    first = probe.measure(StoredFeatures(settings), np.arange(6)).folder
    monkeypatch.setattr(extraction, "MAP_VERSION", extraction.MAP_VERSION + 1)
    assert probe.measure(StoredFeatures(settings), np.arange(6)).folder != first


def test_other_settings_give_another_folder(model: Any, tmp_path: Path) -> None:
    indices = np.arange(6)
    variants = [
        {"dim": 64}, {"seed": 1}, {"projection": "rademacher"}, {"projection": "kronecker"}, {"projection": "identity"},
        {"reduction": "sum"}, {"preconditioner": "adam"}, {"preconditioner": "adam_less"},
    ]  # fmt: skip
    probe = probe_of(model, moments=moments_of(model))
    folders = {probe.measure(StoredFeatures(kept(PLAIN, tmp_path)), indices).folder}
    for changes in variants:
        folders.add(
            probe.measure(StoredFeatures(kept(GradientSettings(**{"dim": 96, **changes}), tmp_path)), indices).folder
        )
    assert len(folders) == 1 + len(variants)
    # Length and direction are kept apart, so both uses share a folder.
    probe.measure(StoredFeatures(kept(GradientSettings(dim=96, normalize=False), tmp_path)), indices)
    assert len(list(tmp_path.iterdir())) == len(folders)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step", "betas", "eps"])
def test_other_moments_give_another_folder(model: Any, tmp_path: Path, key: str) -> None:
    settings, indices = kept(GradientSettings(dim=96, preconditioner="adam"), tmp_path), np.arange(6)
    moments = moments_of(model)()
    first = probe_of(model, moments=lambda: moments).measure(StoredFeatures(settings), indices).folder
    name = sorted(moments)[5]
    value = getattr(moments[name], key)
    changes = {"step": 4, "betas": (0.9, 0.99), "eps": 1e-7}
    other = value * 1.001 if isinstance(value, torch.Tensor) else changes[key]
    changed = {**moments, name: Moments(**{**vars(moments[name]), key: other})}
    assert probe_of(model, moments=lambda: changed).measure(StoredFeatures(settings), indices).folder != first
    plain = kept(PLAIN, tmp_path)
    without = [
        probe_of(model, moments=lambda m=m: m).measure(StoredFeatures(plain), indices).folder
        for m in (moments, changed)
    ]
    assert without[0] == without[1]


@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 5, 4]])
def test_other_samples_give_another_folder(model: Any, tmp_path: Path, indices: list[int]) -> None:
    probe = probe_of(model)
    first = probe.measure(StoredFeatures(kept(PLAIN, tmp_path)), np.arange(6)).folder
    assert probe.measure(StoredFeatures(kept(PLAIN, tmp_path)), np.array(indices)).folder != first


def test_a_model_that_mixes_samples_is_extracted_one_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    for name, value in model.named_parameters():
        value.requires_grad_("wte" in name or "wpe" in name or "ln" in name)
    probe, everyone = probe_of(model), np.arange(SAMPLES)
    stored = probe.measure(GradientSimilarities(kept(PLAIN, tmp_path), targets_of()), everyone)
    assert probe.samples_apart is False
    np.testing.assert_allclose(stored, probe.measure(GradientSimilarities(PLAIN, targets_of()), everyone), atol=1e-3)
    (folder,) = tmp_path.iterdir()
    assert FeatureStore.load(folder).chunks == [8] * 5


def broken_at(model: Any, token: int) -> Any:
    """Return a copy whose embedding of one token is NaN, as after training that diverged."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[token] = torch.nan
    return broken


@pytest.mark.parametrize("store", [True, False])
def test_a_gradient_that_is_not_finite_is_an_error(model: Any, tmp_path: Path, store: bool) -> None:
    rows = rows_of()
    for number, row in enumerate(rows):
        row["input_ids"] = [token if token != 5 else 6 for token in row["input_ids"]]
        if number == 23:
            row["input_ids"][1] = 5
    settings = kept(PLAIN, tmp_path) if store else PLAIN
    with pytest.raises(DivergenceError, match=r"gradient of pool index 23 is not finite.* diverged"):
        probe_of(broken_at(model, 5), rows).measure(GradientSimilarities(settings, targets_of()), np.arange(SAMPLES))


def test_a_sample_without_a_label_is_no_error(model: Any) -> None:
    rows = rows_of()
    rows[UNLABELLED]["input_ids"][0] = 5
    for number, row in enumerate(rows):
        if number != UNLABELLED:
            row["input_ids"] = [token if token != 5 else 6 for token in row["input_ids"]]
    found = probe_of(broken_at(model, 5), rows).measure(GradientSimilarities(PLAIN, targets_of()), np.arange(SAMPLES))
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [UNLABELLED]
