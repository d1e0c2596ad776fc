"""Reference models and tables of their losses: wrong ones are refused early, right ones give the model's losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import tiny
from dataflex.api.reference import vocabulary_problem
from dataflex.config.loading import RunConfig
from dataflex.data.pool import Pool
from dataflex.data.token_loss import shifted
from dataflex.errors import ComponentError, ConfigError
from dataflex.mixers.doremi import DoReMiParams
from dataflex.probe.collation import Collation
from dataflex.probe.reference import ReferenceModel, load_reference, losses_of
from dataflex.probe.reference_losses import ReferenceLosses
from dataflex.probe.reference_table import ReferenceTable
from unit.probe.references import CPU, collate, loaded, make, pool, table_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("reference") / "model")


def problems(model: Path, **params: Any) -> dict[str, str]:
    run = RunConfig({"model_name_or_path": str(model)}, None)
    return dict(DoReMiParams(**params).reference_problems(run))


def test_a_reference_model_or_a_table_is_needed() -> None:
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
    with pytest.raises(ConfigError, match=r"--model: .* another tokenizer"):
        load_reference(str(other), AutoTokenizer.from_pretrained(model), CPU, torch.float32, None, {}, "--model")


def test_a_larger_vocabulary_with_the_same_ids_is_fine() -> None:
    assert vocabulary_problem({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}, "ref") is None
    assert "missing in the reference" in str(vocabulary_problem({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1}, "ref"))


def test_a_folder_without_a_table_is_named(model: Path, tmp_path: Path) -> None:
    assert "holds no table" in problems(model, reference_losses=str(tmp_path))["reference_losses"]


def test_a_reference_computes_logits_in_chunks_and_halves_batches(model: Path) -> None:
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


def test_the_losses_of_a_reference_that_caps_its_logits_are_right(model: Path) -> None:
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


def test_a_component_reads_sample_and_token_losses_of_its_reference(model: Path, tmp_path: Path) -> None:
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

    make(table_of(tmp_path / "table", samples), model)
    table = ReferenceLosses("select.1", samples, ReferenceTable(tmp_path / "table", samples, "select.1"), None, compute)
    np.testing.assert_allclose(table.losses(everyone), means, rtol=1e-5)
    with pytest.raises(ComponentError, match=r"dataflex.select.1.reference_losses holds the losses of the training"):
        table.losses(everyone, others)
