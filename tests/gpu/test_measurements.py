"""Measurements on an accelerator: equal to float64 on the CPU, the same bits twice, no trace in the training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.api.measurement import available_measurements
from dataflex.api.probe import GradientSettings
from dataflex.embedding.neighbours import nearest
from dataflex.probe.embeddings import Embeddings
from dataflex.probe.error_norms import ErrorNorms
from dataflex.probe.expert_loads import ExpertLoads
from dataflex.probe.gradient_features import GradientFeatures, GradientSimilarities, StoredFeatures
from dataflex.probe.gradient_norms import GradientNorms
from dataflex.probe.gradient_products import GradientProducts
from dataflex.probe.logit_norms import LogitNorms, LogitProjections
from dataflex.probe.losses import Losses, LossesByToken
from dataflex.probe.model import ModelProbe
from gpu.models import collate, make_model, make_probe, make_samples

EVERYONE = np.arange(16)
KINDS = ("lora", "full", "tied", "experts")
PLAIN, ADAM = GradientSettings("none", "count", 256), GradientSettings("adam", "count", 256)
BOUND = {torch.float32: 2e-4, torch.bfloat16: 0.06}
OF_ADAM = {torch.float32: 2e-4, torch.bfloat16: 0.3}
"""Adam's direction divides by the root of small numbers, which bfloat16 does not hold well."""


def measurements(probe: ModelProbe, folder: Path) -> dict[str, tuple[bool, Callable[[], Any]]]:
    """Return what is measured: whether it follows Adam's direction, and how."""
    others = np.ones((3, 256), dtype=np.float32)

    def of(measurement: Any, rows: Any = EVERYONE) -> Callable[[], Any]:
        return lambda: probe.measure(measurement, rows)

    def stored() -> Any:
        store = probe.measure(StoredFeatures(GradientSettings("adam", "count", 256, store=str(folder))), EVERYONE)
        found = np.zeros((store.size, 256), dtype=np.float32)
        for rows, features in store.blocks(device="cpu"):
            found[rows] = features.numpy()
        return found

    products = GradientProducts(PLAIN, sizes=(4, 4), validation=probe.pool, others=EVERYONE[8:])
    return {
        "losses": (False, of(Losses())),
        "losses_by_token": (False, of(LossesByToken())),
        "error_norms": (False, of(ErrorNorms())),
        "embeddings": (False, of(Embeddings())),
        "expert_loads": (False, of(ExpertLoads())),
        "logit_projections": (False, of(LogitProjections())),
        "logit_norms": (False, of(LogitNorms())),
        "gradient_features": (False, of(GradientFeatures(PLAIN))),
        "gradient_features adam": (True, of(GradientFeatures(ADAM))),
        "gradient_features adam_less": (True, of(GradientFeatures(GradientSettings("adam_less", "count", 256)))),
        "gradient_features rademacher": (False, of(GradientFeatures(GradientSettings("none", "rademacher", 64)))),
        "gradient_features kronecker": (False, of(GradientFeatures(GradientSettings("none", "kronecker", 64)))),
        "gradient_features identity": (True, of(GradientFeatures(GradientSettings("adam", "identity", 64)))),
        "gradient_norms": (True, of(GradientNorms(GradientSettings("adam")))),
        "gradient_products": (False, of(products, EVERYONE[:8])),
        "gradient_similarities": (True, of(GradientSimilarities(ADAM, others))),
        "stored_features": (True, stored),
    }


def distance(found: Any, wanted: Any) -> float:
    """Return the largest relative distance between arrays, or lists of them."""
    worst = 0.0
    for got, want in zip(*([each] if isinstance(each, np.ndarray) else each for each in (found, wanted)), strict=True):
        assert got.shape == want.shape
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        left, right = (np.nan_to_num(each).astype(np.float64) for each in (got, want))
        worst = max(worst, float(np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-30)))
    return worst


def names_of(kind: str) -> list[str]:
    """Return the measurements of a kind of model; only a mixture of experts has loads of experts."""
    names = list(measurements(make_probe(make_model(kind, torch.float32), torch.device("cpu")), Path()))
    return [name for name in names if (name == "expert_loads") <= (kind == "experts")]


def test_every_built_in_measurement_is_tested_on_the_device() -> None:
    covered = {name.split()[0] for name in names_of("experts")}
    # Samples of this file have no margins; `test_preference.py` has pairs.
    assert covered | {"generations", "margins"} >= {name for name in available_measurements() if "." not in name}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Return the values of a kind of model in float64 on the CPU."""
    known: dict[str, dict[str, Any]] = {}

    def values(kind: str) -> dict[str, Any]:
        if kind not in known:
            probe = make_probe(make_model(kind, torch.float64), torch.device("cpu"))
            made = measurements(probe, tmp_path_factory.mktemp("exact"))
            known[kind] = {name: made[name][1]() for name in names_of(kind)}
        return known[kind]

    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_measurements_agree_with_float64_on_the_cpu(
    kind: str, dtype: torch.dtype, device: torch.device, exact: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    if kind == "experts" and dtype == torch.bfloat16:
        pytest.skip("the router chooses other experts in bfloat16")
    probe = make_probe(make_model(kind, dtype).to(device), device)
    made, far = measurements(probe, tmp_path), {}
    for name in names_of(kind):
        of_adam, measure = made[name]
        if distance(found := measure(), exact(kind)[name]) >= (OF_ADAM if of_adam else BOUND)[dtype]:
            far[name] = distance(found, exact(kind)[name])
    assert not far


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "checkpointed"])
def test_features_under_autocast_are_the_gradients_of_one_backward_each(
    checkpoints: bool, device: torch.device
) -> None:
    model: Any = make_model("lora", torch.bfloat16, checkpoints=checkpoints).to(device)
    trained = [value for value in model.parameters() if value.requires_grad]
    for value in trained:
        value.data = value.data.float()

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16)

    probe, rows = make_probe(model, device, autocast=autocast), np.array([0, 1, 2, 4])
    found = probe.measure(GradientFeatures(GradientSettings("none", "identity", 64, normalize=False)), rows)
    model.eval()
    wanted = []
    for row in rows:
        batch = {key: value.to(device) for key, value in collate(probe.pool.rows(np.array([row]))).items()}
        with autocast():
            loss = model(**batch, use_cache=False).loss
        gradients = torch.autograd.grad(loss, trained)
        wanted.append(np.concatenate([each.float().flatten().cpu().numpy() for each in gradients]))
    assert distance(found, np.stack(wanted)) < 0.03


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_repeated_measurements_give_the_same_bits(kind: str, device: torch.device) -> None:
    probe = make_probe(make_model(kind, torch.bfloat16).to(device), device, make_samples(64, 8, 400), 4096)
    rows = np.arange(64)

    def measured() -> list[Any]:
        return [probe.measure(each, rows) for each in (Losses(), ErrorNorms(), GradientFeatures(ADAM), Embeddings())]

    first = measured()
    for _ in range(5):
        for before, now in zip(first, measured(), strict=True):
            np.testing.assert_array_equal(before, now)


def test_with_deterministic_algorithms_no_operator_is_refused(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    probe = make_probe(make_model("tied", torch.bfloat16).to(device), device)
    made = measurements(probe, tmp_path)
    torch.use_deterministic_algorithms(True)
    try:
        for name in names_of("tied"):
            assert distance(made[name][1](), made[name][1]()) == 0, name
    finally:
        torch.use_deterministic_algorithms(False)


def test_measuring_changes_no_bit(device: torch.device) -> None:
    ends = []
    for measures in (False, True):
        model: Any = make_model("lora", torch.float32).to(device).train()
        torch.manual_seed(7)
        trained = [value for value in model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=device.type == "cuda")
        probe = make_probe(model, device)
        for step in range(3):
            rows = probe.pool.rows(np.arange(4) + 4 * step)
            batch = {key: value.to(device) for key, value in collate(rows).items()}
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if measures:
                probe.measure(Losses(), EVERYONE)
                probe.measure(GradientFeatures(ADAM), EVERYONE[:8])
                probe.measure(GradientNorms(PLAIN), EVERYONE[:4])
        state = [value.cpu() for each in optimizer.state.values() for value in each.values()]
        drawn = [torch.rand(8, device=device).cpu(), torch.rand(8)]
        ends.append([*(value.detach().cpu() for value in model.parameters()), *state, *drawn])
    for before, after in zip(*ends, strict=True):
        assert torch.equal(before, after)


@contextlib.contextmanager
def memory_above(extra: int) -> Iterator[None]:
    """Leave this process so many bytes more than it holds."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + extra) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_batch_that_does_not_fit_is_halved(cuda: torch.device) -> None:
    model, samples, rows = make_model("full", torch.bfloat16).to(cuda), make_samples(64, 900, 1024), np.arange(64)
    wanted = make_probe(model, cuda, samples, 2048).measure(GradientFeatures(PLAIN), rows)
    with memory_above(1 << 30):
        probe = make_probe(model, cuda, samples, 65536)
        found = probe.measure(GradientFeatures(PLAIN), rows)
        probe.measure(Losses(), rows)
    most = probe.limits["gradient_features"].tokens
    assert most is not None
    assert most < 65536
    assert distance(found, wanted) < 0.05


@pytest.mark.parametrize("kind", ["lora", "full", "experts"])
def test_a_gradient_batch_needs_the_memory_of_a_training_step(cuda: torch.device, kind: str) -> None:
    model: Any = make_model(kind, torch.bfloat16, checkpoints=True).to(cuda)
    model.enable_input_require_grads()
    samples = make_samples(8, 900, 1024)
    batch = {name: value.to(cuda) for name, value in collate(samples.rows(np.arange(8))).items()}
    probe = make_probe(model, cuda, samples, 8 * 1024)

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()

    def most(work: Callable[[], Any]) -> int:
        """Return the bytes some work takes beyond those that are there before it."""
        work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    model.train()
    of_training = most(step)
    of_probe = most(lambda: probe.measure(GradientFeatures(PLAIN), np.arange(8)))
    assert probe.limits["gradient_features"].tokens is None
    assert of_probe <= 1.1 * of_training


def test_a_gradient_batch_waits_for_the_device_a_bounded_number_of_times(cuda: torch.device) -> None:
    probe = make_probe(make_model("lora", torch.bfloat16).to(cuda), cuda, tokens=100_000)
    probe.measure(GradientFeatures(PLAIN), EVERYONE)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            probe.measure(GradientFeatures(PLAIN), EVERYONE)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in seen if "synchroniz" in str(each.message)]
    # The batch goes to the device, positions that count are found, and the features come back.
    assert len(waits) <= 20, [f"{each.filename}:{each.lineno}" for each in waits]


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_neighbours_on_the_device_equal_those_on_the_cpu(metric: Any, device: torch.device) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((5000, 96), dtype=np.float32)
    base[4000:] = base[:1000]  # equal distances
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # as a run with `tf32: true` leaves it
    try:
        found = nearest(base[:300], base, 20, metric=metric, device=device)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    wanted = nearest(base[:300], base, 20, metric=metric, device="cpu")
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])
