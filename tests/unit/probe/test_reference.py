"""Reference models and tables of their losses: refused before loading where wrong; the model's own losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from dataflex.api.reference import TABLE_FILE, vocabulary_problem
from dataflex.config.loading import RunConfig
from dataflex.data.pool import Pool
from dataflex.data.token_loss import shifted
from dataflex.errors import ComponentError, ConfigError
from dataflex.mixers.doremi import DoReMiParams
from dataflex.probe.collation import Collation
from dataflex.probe.reference import ReferenceModel, ReferenceTable, TableMaker, load_reference, losses_of
from dataflex.probe.reference_losses import ReferenceLosses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("reference") / "model")


def problems(model: Path, **params: Any) -> dict[str, str]:
    run = RunConfig({"model_name_or_path": str(model)}, None)
    return dict(DoReMiParams(**params).reference_problems(run))


def pool(seed: int = 0) -> Pool:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(11):
        tokens = rng.integers(5, 90, rng.integers(2, 9)).tolist()
        labels = [-100 if rng.random() < 0.4 else token for token in tokens]
        rows.append({"input_ids": tokens, "labels": labels})
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])  # nothing of it is trained on
    return Pool(Dataset.from_list(rows), ("alpha", "b/eta, quoted"), np.array([4, 7]))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([list(row[key]) + [fill] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 2), "labels": padded("labels", -100), "attention_mask": mask}


def maker(folder: Path, samples: Pool) -> TableMaker:
    return TableMaker(folder, samples, Collation(collate), CPU, batch_tokens=20, key="mix")


def loaded(model: Path) -> ReferenceModel:
    raw = AutoModelForCausalLM.from_pretrained(model)
    found = load_reference(str(model), AutoTokenizer.from_pretrained(model), CPU, torch.float32, raw, {}, "mix")
    assert not any(parameter.requires_grad for parameter in found.parameters())
    return ReferenceModel(found, torch.no_grad)


def test_one_of_the_two_is_needed() -> None:
    with pytest.raises(ValueError, match="reference_model, reference_losses or both"):
        DoReMiParams()


def test_a_folder_without_a_model_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(model, reference_model=str(model)) == {}
    for absent in (tmp_path, tmp_path / "nowhere"):
        assert "no config.json" in problems(model, reference_model=str(absent))["reference_model"]
    assert problems(model, reference_model="some/hub-name") == {}
    (tmp_path / "saves").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no config.json" in problems(model, reference_model="saves/nowhere")["reference_model"]


def test_another_tokenizer_is_found_before_loading(model: Path, tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other")
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    file.write_text(json.dumps(content))
    message = problems(model, reference_model=str(other))["reference_model"]
    assert "another tokenizer" in message
    assert "'cat'" in message or "'dog'" in message
    with pytest.raises(ConfigError, match="another tokenizer"):
        load_reference(
            str(other), AutoTokenizer.from_pretrained(model), CPU, torch.float32, torch.nn.Linear(1, 1), {}, "select"
        )


def test_a_larger_vocabulary_with_the_same_ids_is_fine() -> None:
    assert vocabulary_problem({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}, "ref") is None
    assert "missing in the reference" in str(vocabulary_problem({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1}, "ref"))


def test_the_table_is_the_models_losses(model: Path, tmp_path: Path) -> None:
    samples, reference = pool(), loaded(model)
    params = DoReMiParams(reference_model=str(model), reference_losses=str(tmp_path / "table"))
    table = maker(tmp_path / "table", samples)
    assert table.missing(params) == ["alpha", "b/eta, quoted"]
    table.make(table.missing(params), reference, str(model))
    assert table.missing(params) == []
    raw = AutoModelForCausalLM.from_pretrained(model).eval()
    for indices in (np.arange(11), np.array([9, 3, 0, 7]), np.array([4])):
        batch = collate(samples.rows(indices))
        targets = shifted(batch.pop("labels"))
        expected = []
        for index in indices.tolist():
            row = samples.dataset[index]
            with torch.no_grad():
                logits = raw(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
            for position, label in enumerate(row["labels"][1:]):
                if label != -100:
                    expected.append(math.log(float(logits[position].exp().sum())) - float(logits[position, label]))
        for source in (ReferenceTable(tmp_path / "table", samples, "mix"), reference):
            np.testing.assert_allclose(source.losses(batch, targets, indices).numpy(), expected, rtol=1e-5)


def test_what_a_table_does_not_fit_is_refused(model: Path, tmp_path: Path) -> None:
    samples, folder = pool(), tmp_path / "table"
    alone = DoReMiParams(reference_losses=str(folder))
    assert "holds no table" in problems(model, reference_losses=str(folder))["reference_losses"]
    table = maker(folder, samples)
    table.make(["alpha"], loaded(model), str(model))
    key, message = alone.table_problem(samples.domains) or ("", "")
    assert key == "reference_losses"
    assert "no losses of b/eta, quoted (it has alpha)" in message
    assert alone.table_problem(("alpha",)) is None
    assert table.missing(alone) == ["b/eta, quoted"]
    with pytest.raises(ConfigError, match="other samples of 'alpha'"):
        maker(folder, pool(seed=1)).missing(alone)
    other = tiny.make_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="another reference"):
        table.missing(DoReMiParams(reference_model=str(other), reference_losses=str(folder)))


def test_a_batch_of_other_tokens_is_an_error(model: Path, tmp_path: Path) -> None:
    samples = pool()
    table = maker(tmp_path, samples)
    table.make(list(samples.domains), loaded(model), str(model))
    batch = collate(samples.rows(np.array([0, 5])))
    targets = shifted(batch.pop("labels"))
    targets[0, 0] = -100 if targets[0, 0] != -100 else 7
    with pytest.raises(ComponentError, match="losses for a batch with"):
        ReferenceTable(tmp_path, samples, "weight.1").losses(batch, targets, np.array([0, 5]))


def test_no_forward_of_a_reference_makes_all_logits_and_batches_are_halved(model: Path) -> None:
    samples, reference, sizes, tokens = pool(), loaded(model), [], []
    everyone = np.arange(samples.size)
    expected = losses_of(samples, everyone, loaded(model), Collation(collate), CPU, 20)
    head, forward = reference.model.get_output_embeddings(), reference.model.forward
    reference.losses(
        {key: value for key, value in collate(samples.rows(everyone[:2])).items() if key != "labels"},
        (shifted(collate(samples.rows(everyone[:2]))["labels"])),
    )
    handle = head.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))

    def short_of_memory(**inputs: Any) -> Any:
        tokens.append(inputs["input_ids"].numel())
        if tokens[-1] > 30:
            raise torch.OutOfMemoryError
        return forward(**inputs)

    reference.model.forward = short_of_memory
    found = losses_of(samples, everyone, reference, Collation(collate), CPU, 1000)
    handle.remove()
    assert max(tokens) > 30
    assert reference.limit.tokens is not None
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)


def test_a_reference_that_caps_its_logits(model: Path) -> None:
    """Its losses are those of its own forward, whether or not its configuration tells."""
    samples = pool()
    batch = collate(samples.rows(np.arange(3)))
    labels = shifted(batch.pop("labels"))
    for configured in (True, False):
        reference = loaded(model)
        raw, cap = reference.model, 0.5
        original = raw.forward
        raw.lm_head.weight *= 50

        def capped(original: Any = original, cap: float = cap, **inputs: Any) -> Any:
            output = original(**inputs)
            if output.logits.shape[-1] > 1:
                output.logits = cap * torch.tanh(output.logits / cap)
            return output

        raw.forward = capped
        if configured:
            raw.config.final_logit_softcapping = cap
        logits = raw(**batch).logits[labels != -100]
        expected = torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="none")
        torch.testing.assert_close(reference.losses(batch, labels), expected)
        assert reference._chunked is configured


def test_a_domain_cut_off_is_made_again(model: Path, tmp_path: Path) -> None:
    samples, reference = pool(), loaded(model)
    table = maker(tmp_path, samples)
    table.make(["alpha"], reference, str(model))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != TABLE_FILE}
    (tmp_path / "half.tmp").write_bytes(b"1234")
    params = DoReMiParams(reference_losses=str(tmp_path))
    table.make(table.missing(params), reference, str(model))
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert table.missing(params) == []


def test_a_damaged_table_is_found(model: Path, tmp_path: Path) -> None:
    samples = pool()
    maker(tmp_path, samples).make(list(samples.domains), loaded(model), str(model))
    for file in tmp_path.glob("*.f32"):
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ConfigError, match="it is damaged"):
        ReferenceTable(tmp_path, samples, "weight.1").losses({}, torch.zeros(1, 2), np.array([0]))


def test_one_run_at_a_time_makes_a_table(model: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another run is making the table"):
        maker(tmp_path, pool()).make(["alpha"], loaded(model), str(model))


def test_what_a_component_reads_of_its_reference(model: Path, tmp_path: Path) -> None:
    samples, others = pool(), pool()
    reference, runs = loaded(model), []

    def compute(of: Pool, indices: np.ndarray, frozen: ReferenceModel) -> tuple[np.ndarray, np.ndarray]:
        runs.append((of, indices.tolist()))
        return losses_of(of, indices, frozen, Collation(collate), CPU, 20)

    found = ReferenceLosses("select", samples, None, lambda: reference, compute)
    everyone = np.arange(samples.size)
    means, tokens = found.losses(everyone), found.token_losses(everyone[:3])
    for index, each in enumerate(tokens):
        assert each.size == samples.trained_tokens[index]
        assert means[index] == pytest.approx(float(each.mean()) if each.size else np.nan, rel=1e-5, nan_ok=True)
    del runs[:]
    assert np.array_equal(found.losses(everyone[::-1]), means[::-1], equal_nan=True)
    assert not runs  # a frozen model's losses are known from the first time
    np.testing.assert_array_equal(found.losses(everyone[:2], others), means[:2])
    assert [of for of, _ in runs] == [others]

    making = maker(tmp_path / "table", samples)
    making.make(making.missing(DoReMiParams(reference_model=str(model))), reference, str(model))
    table = ReferenceLosses("select.1", samples, ReferenceTable(tmp_path / "table", samples, "select.1"), None, compute)
    np.testing.assert_allclose(table.losses(everyone), means, rtol=1e-5)
    with pytest.raises(ComponentError, match=r"dataflex.select.1.reference_losses holds the losses of the training"):
        table.losses(everyone, others)
