"""Tables of reference losses: they give the model's losses, and wrong, damaged or unfinished ones are told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import tiny
from dataflex.api.reference import TABLE_FILE, NumberType, read_table
from dataflex.data.pool import Pool
from dataflex.data.token_loss import shifted
from dataflex.errors import ComponentError, ConfigError
from dataflex.mixers.doremi import DoReMiParams
from dataflex.probe import loss_code, table_maker
from dataflex.probe.reference_losses import ReferenceLosses
from dataflex.probe.reference_table import ReferenceTable
from dataflex.probe.table_maker import TableMaker, part_ranges
from unit.probe.references import collate, loaded, losses, make, pool, table_of
from unit.ranks import on_two_processes

KINDS: tuple[NumberType, ...] = ("float32", "byte")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("reference") / "model")


def by_hand(model: Path, samples: Pool, indices: np.ndarray) -> list[float]:
    """Return the losses of samples, computed in float64 one after another."""
    raw, found = AutoModelForCausalLM.from_pretrained(model).eval(), []
    for index in indices.tolist():
        row = samples.dataset[index]
        with torch.no_grad():
            logits = raw(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                found.append(math.log(float(logits[position].exp().sum())) - float(logits[position, label]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_holds_the_losses_of_the_model(model: Path, tmp_path: Path, kind: NumberType) -> None:
    samples = pool()
    maker = table_of(tmp_path / "table", samples, kind=kind)
    assert maker.missing(str(model)) == ["alpha", "b/eta, quoted"]
    make(maker, model)
    assert maker.missing(str(model)) == []
    everything = np.array(by_hand(model, samples, np.arange(11)))
    near = {"rtol": 1e-5, "atol": 0.0} if kind == "float32" else {"rtol": 0.0, "atol": everything.max() / 250}
    for indices in (np.arange(11), np.array([9, 3, 0, 7]), np.array([4]), np.array([3])):
        batch = collate(samples.rows(indices))
        targets = shifted(batch.pop("labels"))
        found = ReferenceTable(tmp_path / "table", samples, "mix").losses(batch, targets, indices)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), by_hand(model, samples, indices), **near)


def test_a_table_of_bytes_keeps_the_bound_and_the_means(model: Path, tmp_path: Path) -> None:
    samples, everyone = pool(size=300), np.arange(300)
    for kind in KINDS:
        make(table_of(tmp_path / kind, samples, kind=kind), model)
    tables = {kind: ReferenceTable(tmp_path / kind, samples, "mix") for kind in KINDS}
    exact, coded = (np.concatenate(tables[kind].rows(everyone)) for kind in KINDS)
    errors = coded.astype(np.float64) - exact
    of_beta = int(samples.trained_tokens[:4].sum())
    worst = np.concatenate(
        [np.full(block.size, block.max()) for part in np.split(exact, [of_beta]) for block in blocks(part)]
    )
    assert (np.abs(errors) <= loss_code.error_bound(exact, worst)).all()
    assert np.abs(errors).max() > 0
    entries = json.loads((tmp_path / "byte" / TABLE_FILE).read_text())["domains"]
    assert [entry["tokens"] for entry in entries.values()] == [of_beta, exact.size - of_beta]
    assert entries["b/eta, quoted"]["error"]["rms"] == pytest.approx(np.sqrt((errors[of_beta:] ** 2).mean()))
    assert entries["b/eta, quoted"]["error"]["max"] == pytest.approx(np.abs(errors[of_beta:]).max())
    of = [ReferenceLosses("select", samples, tables[kind], None, losses(samples, loaded(model))) for kind in KINDS]
    means = [each.losses(everyone[::-1]) for each in of]
    np.testing.assert_allclose(means[1], means[0], rtol=2e-7)
    assert np.isnan(means[1][-4])
    for ours, theirs in zip(of[1].token_losses(everyone), tables["byte"].rows(everyone), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    size = sum(path.stat().st_size for path in (tmp_path / "byte").glob("*.u8"))
    assert size == exact.size


def blocks(values: np.ndarray) -> list[np.ndarray]:
    return [values[first : first + loss_code.BLOCK] for first in range(0, values.size, loss_code.BLOCK)]


def test_a_table_of_the_first_format_is_read(model: Path, tmp_path: Path) -> None:
    """Format 1 as it was first written: without a type and without numbers of tokens."""
    samples = pool()
    make(table_of(tmp_path, samples), model)
    file = tmp_path / TABLE_FILE
    written = json.loads(file.read_text())
    assert written["format"] == 1
    old = {key: written[key] for key in ("format", "name", "model", "domains")}
    for entry in old["domains"].values():
        assert set(entry) == {"file", "samples", "samples_sha256", "tokens"}
        del entry["tokens"]
    expected = ReferenceTable(tmp_path, samples, "mix").rows(np.arange(11))
    file.write_text(json.dumps(old))
    found = ReferenceTable(tmp_path, samples, "mix").rows(np.arange(11))
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert table_of(tmp_path, samples, kind="float32").missing(str(model)) == []
    assert DoReMiParams(reference_losses=str(tmp_path)).table_problem(samples.domains) is None
    file.write_text(json.dumps({**old, "format": 3}))
    assert read_table(tmp_path) is None


def test_a_table_keeps_its_number_type(model: Path, tmp_path: Path) -> None:
    samples = pool()
    make(table_of(tmp_path, samples, kind="byte"), model, ["alpha"])
    with pytest.raises(ConfigError, match=r"reference_losses: .* holds losses as byte and not as float32"):
        table_of(tmp_path, samples, kind="float32").missing(None)
    make(table_of(tmp_path, samples), model)  # a run that completes a table takes its type
    assert len(list(tmp_path.glob("*.u8"))) == 2
    assert not list(tmp_path.glob("*.f32"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_other_data_is_refused(model: Path, tmp_path: Path, kind: NumberType) -> None:
    samples, folder = pool(), tmp_path / "table"
    alone = DoReMiParams(reference_losses=str(folder))
    maker = table_of(folder, samples, kind=kind)
    make(maker, model, ["alpha"])
    key, message = alone.table_problem(samples.domains) or ("", "")
    assert key == "reference_losses"
    assert "no losses of b/eta, quoted (it has alpha)" in message
    assert alone.table_problem(("alpha",)) is None
    assert maker.missing(None) == ["b/eta, quoted"]
    with pytest.raises(ConfigError, match="other samples of 'alpha'"):
        table_of(folder, pool(seed=1)).missing(None)
    other = tiny.make_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="another reference"):
        maker.missing(str(other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_other_tokens_is_an_error(model: Path, tmp_path: Path, kind: NumberType) -> None:
    samples = pool()
    make(table_of(tmp_path, samples, kind=kind), model)
    batch = collate(samples.rows(np.array([0, 5])))
    targets = shifted(batch.pop("labels"))
    targets[0, 0] = -100 if targets[0, 0] != -100 else 7
    with pytest.raises(ComponentError, match="losses for a batch with"):
        ReferenceTable(tmp_path, samples, "weight.1").losses(batch, targets, np.array([0, 5]))


def test_a_run_of_one_domain_reads_a_table_of_its_data_sets(model: Path, tmp_path: Path) -> None:
    samples, everyone = pool(), np.arange(11)
    make(table_of(tmp_path / "parts", samples, kind="byte"), model)
    whole = Pool(samples.dataset, ("dataset",), np.array([11]))
    assert table_of(tmp_path / "parts", whole).missing(str(model)) == []
    table = ReferenceTable(tmp_path / "parts", whole, "weight")
    expected = ReferenceTable(tmp_path / "parts", samples, "mix")
    for ours, theirs in zip(table.rows(everyone[::-1]), expected.rows(everyone[::-1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(table.means(everyone), expected.means(everyone))
    turned = Pool(samples.dataset.select(everyone[::-1]), ("dataset",), np.array([11]))
    with pytest.raises(ConfigError, match="other samples of 'alpha'"):
        table_of(tmp_path / "parts", turned).missing(None)
    fewer = Pool(samples.dataset.select(range(10)), ("dataset",), np.array([10]))
    assert table_of(tmp_path / "parts", fewer).missing(None) == ["dataset"]


# Damage and stops


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", ["cut", "lost"])
def test_a_damaged_table_is_refused(model: Path, tmp_path: Path, kind: NumberType, harm: str) -> None:
    samples, alone = pool(), DoReMiParams(reference_losses=str(tmp_path))
    make(table_of(tmp_path, samples, kind=kind), model)
    assert alone.table_problem(samples.domains) is None
    files = [path for path in tmp_path.iterdir() if path.suffix in (".f32", ".u8", ".npy")]
    assert len(files) == {"float32": 4, "byte": 8}[kind]
    for file in files:
        content = file.read_bytes()
        if harm == "cut":
            file.write_bytes(content[:-4])
        else:
            file.unlink()
        with pytest.raises(ConfigError, match=r"weight\.1\.reference_losses: .*(damaged|lacks a file|cannot be read)"):
            ReferenceTable(tmp_path, samples, "weight.1").losses({}, torch.zeros(1, 2), np.arange(11))
        if harm == "lost" or file.suffix != ".npy":  # found before anything is loaded
            for names in (samples.domains, None):
                assert re_found(alone.table_problem(names), file)
            with pytest.raises(ConfigError, match=r"mix\.reference_losses: .*(damaged|lacks a file)"):
                table_of(tmp_path, samples).missing(None)
        file.write_bytes(content)
    assert table_of(tmp_path, samples).missing(None) == []


def test_a_list_without_the_files_of_a_domain_is_refused(model: Path, tmp_path: Path) -> None:
    samples, file = pool(), tmp_path / TABLE_FILE
    make(table_of(tmp_path, samples), model)
    written = json.loads(file.read_text())
    del written["domains"]["alpha"]["file"]
    file.write_text(json.dumps(written))
    key, message = DoReMiParams(reference_losses=str(tmp_path)).table_problem(samples.domains) or ("", "")
    assert key == "reference_losses"
    assert "does not describe the losses of 'alpha'" in message
    with pytest.raises(ConfigError, match=r"mix\.reference_losses: .* does not describe the losses of 'alpha'"):
        table_of(tmp_path, samples).missing(None)


def re_found(problem: tuple[str, str] | None, file: Path) -> bool:
    return problem is not None and problem[0] == "reference_losses" and str(file) in problem[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_table_resumes_with_the_parts_that_exist(
    model: Path, tmp_path: Path, kind: NumberType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_maker, "_PART_TOKENS", 60)
    samples = pool(size=60)
    whole = table_of(tmp_path / "whole", samples, kind=kind)
    make(whole, model)
    maker, compute, asked = table_of(tmp_path / "cut", samples, kind=kind), losses(samples, loaded(model)), []

    def dying(indices: np.ndarray, advance: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(indices.tolist())
        return compute(indices, advance)

    with pytest.raises(KeyboardInterrupt):
        maker.make(maker.missing(None), dying, str(model))
    assert maker.missing(None) == ["b/eta, quoted"]
    before, asked[:] = list(asked), []
    (parts,) = (tmp_path / "cut").glob("*.parts")
    (parts / "7.tmp").write_bytes(b"1234")  # a part that was being written

    def noting(indices: np.ndarray, advance: Any) -> Any:
        asked.append(indices.tolist())
        return compute(indices, advance)

    maker.make(maker.missing(None), noting, str(model))
    assert [index for part in [*before, *asked] for index in part] == list(range(60))
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "cut").glob("*.parts"))


def test_parts_of_other_samples_are_not_used(model: Path, tmp_path: Path) -> None:
    first, second = pool(), pool(seed=1)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableMaker, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            make(table_of(tmp_path, first), model)
    assert len(list(tmp_path.glob("*.parts/0.npz"))) == 1
    make(table_of(tmp_path, second), model)
    found = np.concatenate(ReferenceTable(tmp_path, second, "mix").rows(np.arange(4)))
    np.testing.assert_allclose(found, by_hand(model, second, np.arange(4)), rtol=1e-5)
    assert not list(tmp_path.glob("*.parts"))


def test_parts_have_about_the_same_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_maker, "_PART_TOKENS", 10)
    assert part_ranges(np.array([4, 6, 1, 30, 5, 5, 1], np.int32)) == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]
    assert part_ranges(np.array([0, 0], np.int32)) == [(0, 2)]


def test_a_loss_without_a_code_is_refused(tmp_path: Path) -> None:
    samples = Pool(Dataset.from_dict({"input_ids": [[1, 2, 3]] * 3}), ("a",), np.array([3]))
    for wrong in (np.nan, np.inf, -0.5):
        values = np.array([1, 2, 3, 4, wrong, 6], np.float32)
        with pytest.raises(ConfigError, match=rf"loss on sample 2 of 'a' is {wrong}"):
            table_of(tmp_path / f"{wrong}", samples, kind="byte").make(
                ["a"], lambda indices, advance, values=values: (np.array([2, 2, 2]), values), "some/model"
            )
    table_of(tmp_path / "floats", samples).make(["a"], lambda *_: (np.array([2, 2, 2]), values), "some/model")
    np.testing.assert_array_equal(ReferenceTable(tmp_path / "floats", samples, "mix").rows(np.array([2]))[0], [-0.5, 6])


def test_one_run_at_a_time_makes_a_table(model: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another run is making the table"):
        make(table_of(tmp_path, pool()), model, ["alpha"])


# Two processes


def make_on(rank: int, model: Path, folder: Path) -> None:
    table_maker._PART_TOKENS = 60
    make(table_of(folder, pool(size=60), kind="byte"), model)


def test_two_processes_make_the_table_of_one(model: Path, tmp_path: Path) -> None:
    on_two_processes(make_on, tmp_path, model, tmp_path / "two")
    samples, everyone = pool(size=60), np.arange(60)
    make(table_of(tmp_path / "one", samples, kind="byte"), model)
    one, two = (ReferenceTable(tmp_path / name, samples, "mix") for name in ("one", "two"))
    np.testing.assert_allclose(one.means(everyone), two.means(everyone), rtol=1e-5)
    for ours, theirs in zip(one.rows(everyone), two.rows(everyone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.05)
