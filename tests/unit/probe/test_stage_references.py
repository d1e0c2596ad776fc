"""Values of a stage's reference model: computed once, kept in memory and in a file, the same on every process."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dataflex.errors import ConfigError
from dataflex.probe import stage_references
from dataflex.probe.gradient_features import GradientFeatures
from dataflex.probe.losses import Losses
from dataflex.probe.margins import Margins
from dataflex.probe.model import ModelProbe
from dataflex.probe.stage_references import StageReferences
from unit.fakes import make_pool, products_of
from unit.probe.models import EXACT, lora, make
from unit.probe.pairs import Dpo, Reward, collate_pairs, pairs, probe_of, with_value_head
from unit.ranks import on_two_processes

SOME = np.array([5, 0, 3])
EVERYONE = np.arange(6)
IDENTITY = {"ref_model": "a model", "bf16": "true"}


def probe_in(folder: Path | None, seed: int = 0, identity: dict[str, str] | None = None) -> ModelProbe:
    """Return a probe of new objects, as in a process that starts."""
    references = StageReferences(folder, IDENTITY if identity is None else identity)
    return probe_of(make(lora), Dpo(), pairs(seed=seed), references=references)


def made(probe: ModelProbe) -> int:
    loss: Any = probe.stage_loss
    return int(loss.made)


def test_the_values_of_the_whole_pool_are_computed_once() -> None:
    probe = probe_in(None)
    assert probe.references.kept_reference(SOME) is None
    probe.measure(Losses(), SOME)
    batches = made(probe)
    assert 1 < batches < 6
    assert probe.cost.samples == 6 + 3
    assert probe.cost.tokens == probe.pool.lengths.sum() + probe.pool.lengths[SOME].sum()
    probe.measure(Margins(), EVERYONE)
    probe.measure(GradientFeatures(EXACT), EVERYONE)
    assert made(probe) == batches
    kept = probe.references.kept_reference(torch.tensor(SOME))
    assert kept is not None
    assert kept.dtype == torch.float32
    with torch.no_grad():
        exact = Dpo().reference(probe.model(), collate_pairs([pairs()[index] for index in SOME]))
    torch.testing.assert_close(kept.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_values_are_computed_without_a_measurement_if_training_needs_them() -> None:
    probe = probe_in(None)
    probe.model().train()
    probe.keep_references()
    assert probe.references.kept_reference(SOME) is not None
    assert probe.model().training
    assert made(probe)


def test_the_values_of_validation_pairs_are_those_of_their_pool(tmp_path: Path) -> None:
    for expected in (True, False):
        probe = probe_in(tmp_path)
        others = make_pool({"b": 4}, rows=pairs(4, seed=3))
        probe.measure(Losses(), np.arange(4), others)
        assert probe.references.kept_reference(SOME) is None  # those of training samples are not needed so far
        assert bool(made(probe)) == expected
        probe.measure(Losses(), SOME)
        assert bool(made(probe)) == expected
    assert len(list(tmp_path.iterdir())) == 2


def test_a_resumed_run_reads_the_same_bits(tmp_path: Path) -> None:
    first, second = probe_in(tmp_path / "reference"), probe_in(tmp_path / "reference")
    losses = first.measure(Losses(), SOME)
    assert np.array_equal(second.measure(Losses(), SOME), losses)
    assert (made(second), second.cost.samples) == (0, 3)
    kept = [probe.references.kept_reference(EVERYONE) for probe in (first, second)]
    assert torch.equal(*kept)  # type: ignore[arg-type]
    (file,) = (tmp_path / "reference").iterdir()
    with np.load(file) as stored:
        assert stored["values"].dtype == np.float32
        assert stored["values"].shape == (6, 2)
        assert json.loads(str(stored["key"]))["ref_model"] == "a model"


def test_values_of_other_samples_or_of_another_reference_are_not_read(tmp_path: Path) -> None:
    probe_in(tmp_path).measure(Losses(), SOME)
    for other in (probe_in(tmp_path, seed=7), probe_in(tmp_path, identity={"ref_model": "another"})):
        other.measure(Losses(), SOME)
        assert made(other)
        expected = probe_of(other.model(), Dpo(), [other.pool.dataset[index] for index in range(6)])
        assert np.array_equal(other.measure(Losses(), EVERYONE), expected.measure(Losses(), EVERYONE))


def test_a_broken_file_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses = probe_in(tmp_path).measure(Losses(), SOME)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for broken in (whole[:200], b"", b"no archive"):
        file.write_bytes(broken)
        with caplog.at_level(logging.WARNING, logger=stage_references.__name__):
            assert np.array_equal(probe_in(tmp_path).measure(Losses(), SOME), losses)
        assert f"{file} cannot be read" in caplog.text
        caplog.clear()
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"output_dir: .*file/reference/.*npz cannot be written"):
        probe_in(tmp_path / "file" / "reference").measure(Losses(), SOME)


def test_a_loss_without_a_reference_keeps_nothing(tmp_path: Path) -> None:
    references = StageReferences(tmp_path)
    probe = probe_of(make(lambda: with_value_head(lora())), Reward(), pairs(), references=references)
    probe.measure(Losses(), SOME)
    assert probe.references.kept_reference(SOME) is None
    assert not list(tmp_path.iterdir())
    assert probe.cost.samples == 3


# Two processes


def measured(probe: ModelProbe) -> dict[str, np.ndarray]:
    found = {
        "losses": probe.measure(Losses(), EVERYONE),
        "margins": probe.measure(Margins(), EVERYONE),
        "features": probe.measure(GradientFeatures(EXACT), EVERYONE),
        "products": np.concatenate(products_of(probe, [np.arange(3), np.arange(3, 6)], EXACT, np.array([1]))),
    }
    kept = probe.references.kept_reference(EVERYONE)
    return found if kept is None else {**found, "reference": kept.numpy()}


def work(rank: int, folder: Path) -> None:
    # Only the first process has the files of the second start.
    for name in ("first", "second"):
        probe = probe_in(folder / str(rank))
        values = measured(probe)
        assert bool(made(probe)) == (name == "first")
        np.savez(folder / f"{name}-{rank}.npz", **values)
    np.savez(folder / f"reward-{rank}.npz", **measured(reward()))
    dist.barrier()


def reward() -> ModelProbe:
    return probe_of(make(lambda: with_value_head(lora())), Reward(), pairs())


@pytest.mark.launch
def test_two_processes_have_the_values_of_one(tmp_path: Path) -> None:
    on_two_processes(work, tmp_path, tmp_path)
    assert not (tmp_path / "1").exists()
    for start, probe in (("first", probe_in(None)), ("second", probe_in(None)), ("reward", reward())):
        alone = measured(probe)
        for rank in range(2):
            with np.load(tmp_path / f"{start}-{rank}.npz") as found:
                assert found.keys() == alone.keys()
                for name, expected in alone.items():
                    assert np.array_equal(found[name], expected), name
