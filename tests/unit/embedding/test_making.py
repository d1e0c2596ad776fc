"""Embeddings on disk: computed once, kept after a kill, shared by processes; bad stores are refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dataflex import EmbeddingParams, distributed, embed_texts
from dataflex.data.pool import Pool
from dataflex.data.stages import STAGES
from dataflex.embedding import making, stored
from dataflex.embedding.encoders import EncoderChoice
from dataflex.embedding.making import EncoderRun
from dataflex.embedding.store import EmbeddingStore
from dataflex.embedding.stored import RunEncoders
from dataflex.embedding.texts import SampleTexts, TextList
from dataflex.errors import ComponentError, ConfigError, DataFlexError

TEXTS = [f"{'abcdefgh'[number % 8] * (number % 5)}" for number in range(23)]


class Letters:
    """Its vector of a text is how often it has each of eight letters; it can stop after some texts."""

    says = "letters"

    def __init__(self, dim: int = 8, until: int = 10_000) -> None:
        self.dim, self.until = dim, until
        self.read: list[str] = []
        self.is_closed = False

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if len(self.read) + len(texts) > self.until:
            raise KeyboardInterrupt
        self.read += texts
        return np.array([[text.count(letter) for letter in "abcdefghij"[: self.dim]] for text in texts], np.float32)

    def close(self) -> None:
        self.is_closed = True


class FixedChoice:
    """Stands for the choice of an encoder; loaded at most once in a run."""

    backend = "transformers"

    def __init__(self, encoder: Any, name: str = "letters") -> None:
        self.encoder, self.name, self.loads = encoder, name, 0

    def key(self) -> dict[str, Any]:
        return {"name": self.name}

    def load(self, device: Any) -> Any:
        self.loads += 1
        return self.encoder


def run_of(root: Path, encoder: Any = None, name: str = "letters") -> EncoderRun:
    choice: Any = FixedChoice(encoder or Letters(), name)
    return EncoderRun(choice, root, chunk_rows=4)


def units() -> NDArray[np.float64]:
    counts = np.array([[text.count(letter) for letter in "abcdefgh"] for text in TEXTS], dtype=float)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def test_rows_are_unit_vectors_in_the_order_of_the_texts(tmp_path: Path) -> None:
    found = run_of(tmp_path).embed(TextList(TEXTS)).array()
    assert isinstance(found, np.memmap)
    assert (found.dtype, found.shape, found.flags.writeable) == (np.float16, (23, 8), False)
    np.testing.assert_array_equal(found, units())
    assert not found[[number for number, text in enumerate(TEXTS) if not text]].any()


def test_stored_embeddings_are_neither_computed_nor_loaded_again(tmp_path: Path) -> None:
    first = run_of(tmp_path).embed(TextList(TEXTS))
    again = run_of(tmp_path)
    assert again.embed(TextList(TEXTS)) == first
    assert again.choice.loads == 0  # type: ignore[attr-defined]
    assert again.embed(TextList(TEXTS[:-1])).folder != first.folder
    assert run_of(tmp_path, name="other").embed(TextList(TEXTS)).folder != first.folder


def test_an_encoder_leaves_random_streams_unchanged(tmp_path: Path) -> None:
    import torch

    class Drawing(Letters):
        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            torch.rand(3)
            return super().encode(texts)

    run = run_of(tmp_path, Drawing())
    choice: Any = run.choice
    load = choice.load
    choice.load = lambda device: (torch.rand(3), load(device))[1]
    before = torch.get_rng_state()
    run.embed(TextList(TEXTS))
    assert torch.equal(torch.get_rng_state(), before)


def test_finished_chunks_survive_a_kill(tmp_path: Path) -> None:
    encoder = Letters(until=8)
    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path, encoder).embed(TextList(TEXTS))
    assert encoder.read == [text for text in TEXTS[:8] if text]
    rest = Letters()
    found = run_of(tmp_path, rest).embed(TextList(TEXTS))
    assert rest.read == [text for text in TEXTS[8:] if text]
    np.testing.assert_array_equal(found.array(), units())


def test_a_half_written_chunk_is_computed_again(tmp_path: Path) -> None:
    store = run_of(tmp_path).embed(TextList(TEXTS))
    (store.folder / "done" / "2").unlink()
    with (store.folder / "embeddings.npy").open("r+b") as stream:
        stream.seek(store.offset + 9 * 16)
        stream.write(b"\xff" * 16)
    encoder = Letters()
    run_of(tmp_path, encoder).embed(TextList(TEXTS))
    assert encoder.read == [text for text in TEXTS[8:12] if text]
    np.testing.assert_array_equal(store.array(), units())


def test_processes_share_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run_of(tmp_path / "one").embed(TextList(TEXTS)).array()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    encoders = [Letters(), Letters()]
    runs = [run_of(tmp_path / "two", encoder) for encoder in encoders]
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    key, folder, is_complete = runs[0]._found(TextList(TEXTS))
    assert not is_complete
    missing = runs[0]._begun(key, folder, len(TEXTS), "texts")
    for rank, run in enumerate(runs):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        run._make(folder, TextList(TEXTS), missing, "texts")
    assert [len(encoder.read) for encoder in encoders] == [10, 8]
    store = EmbeddingStore.load(folder)
    assert store is not None
    assert not store.missing()
    np.testing.assert_array_equal(store.array(), alone)


def test_a_second_run_waits_for_the_same_embeddings(tmp_path: Path) -> None:
    second, others = Letters(), list[threading.Thread]()

    class First(Letters):
        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            if not others:
                others.append(threading.Thread(target=run_of(tmp_path, second).embed, args=[TextList(TEXTS)]))
                others[0].start()
                others[0].join(0.2)
                assert others[0].is_alive()
            return super().encode(texts)

    store = run_of(tmp_path, First()).embed(TextList(TEXTS))
    others[0].join()
    assert second.read == []
    np.testing.assert_array_equal(store.array(), units())


def test_a_service_that_serves_another_model_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path).embed(TextList(TEXTS))
    run = run_of(tmp_path, Letters(dim=5))
    run.open()  # as a service is, to see that it answers
    with pytest.raises(
        DataFlexError, match=r"holds embeddings of length 8, and letters gives length 5: the encoder has changed"
    ):
        run.embed(TextList(TEXTS))


def test_bad_stores_and_encoders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = run_of(tmp_path).embed(TextList(TEXTS))
    (store.folder / "done" / "1").unlink()
    with pytest.raises(DataFlexError, match=r"holds embeddings of length 8.*has changed. Delete"):
        run_of(tmp_path, Letters(dim=5)).embed(TextList(TEXTS))

    class Broken(Letters):
        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return np.where(np.array(texts)[:, None] == TEXTS[6], np.nan, super().encode(texts))

    with pytest.raises(DataFlexError, match="not finite for text 6"):
        run_of(tmp_path, Broken()).embed(TextList(TEXTS))
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert (manifest["encoder"], manifest["of"]) == ("letters", "texts")
    for content, said in (("{", "cannot be read"), ('{"format": 7}', "has format 7"), (None, "is damaged")):
        text = json.dumps({**manifest, "rows": 24}) if content is None else content
        (store.folder / "manifest.json").write_text(text)
        with pytest.raises(DataFlexError, match=said):
            EmbeddingStore.load(store.folder)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(DataFlexError, match="needs 368 bytes for its embeddings, and 100 are free"):
        run_of(tmp_path / "full").embed(TextList(TEXTS))
    assert run_of(tmp_path / "none").embed(TextList([])).array().shape == (0, 8)


# Samples

LETTERS = {number: letter for number, letter in enumerate(" abcdefgh")}


def pool_of(rows: list[tuple[list[int], list[int]]]) -> Pool:
    from datasets import Dataset

    rows_ = [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    pool = Pool(Dataset.from_list(rows_), ("a",), np.array([len(rows)]))
    pool.decode = lambda tokens: "".join(LETTERS[token] for token in tokens)
    return pool


ROWS = [([1, 2, 3], [-100, 2, 3]), ([4, 5], [4, 5]), ([6, 7], [-100, -100])]


def test_labels_decide_which_part_of_a_sample_is_embedded() -> None:
    pool = pool_of(ROWS)
    assert SampleTexts(pool).read(0, 3) == ["abc", "de", "fg"]
    assert SampleTexts(pool, "prompt").read(0, 3) == ["a", "", "fg"]
    assert SampleTexts(pool, "response").read(0, 3) == ["bc", "de", ""]
    digests = {SampleTexts(pool, part).digest for part in ("all", "prompt", "response")}  # type: ignore[arg-type]
    digests |= {SampleTexts(pool_of(ROWS[:2])).digest}
    other = pool_of(ROWS)
    other.decode = lambda tokens: "x" * len(tokens)
    assert len(digests | {SampleTexts(other).digest}) == 5
    assert SampleTexts(pool_of(ROWS)).digest in digests
    pool.decode = None
    with pytest.raises(ValueError, match="no tokenizer"):
        SampleTexts(pool).read(0, 1)


def test_a_pair_is_embedded_as_its_prompt_with_the_chosen_response() -> None:
    from datasets import Dataset

    row = {"chosen_input_ids": [1, 2, 3], "chosen_labels": [-100, 2, 3], "rejected_input_ids": [1, 4, 5, 6]}
    rows = Dataset.from_list([{**row, "rejected_labels": [-100, 4, 5, 6]}])
    pool = Pool(rows, ("a",), np.array([1]), STAGES["dpo"].fields)
    pool.decode = lambda tokens: "".join(LETTERS[token] for token in tokens)
    assert [SampleTexts(pool, part).read(0, 1) for part in ("all", "prompt", "response")] == [["abc"], ["a"], ["bc"]]  # type: ignore[arg-type]


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    encoder = Letters()
    monkeypatch.setattr(stored, "choose", lambda params: EncoderChoice("transformers", str(params.encoder)))
    monkeypatch.setattr(EncoderChoice, "load", lambda self, device: encoder)
    monkeypatch.setattr(EncoderChoice, "key", lambda self: {"place": self.place})
    return encoder


def test_a_run_computes_each_embedding_once_for_all_components(letters: Letters, tmp_path: Path) -> None:
    pool, held = pool_of(ROWS), pool_of([([8, 8], [8, 8])])
    params = EmbeddingParams(encoder="x")
    wanted = {
        "select": params,
        "order": params,
        "mix": EmbeddingParams(),
        "weight": EmbeddingParams(encoder="x", embedding_text="response", embedding_folder=str(tmp_path / "own")),
    }
    found = RunEncoders(wanted, tmp_path, "cpu", False).make(pool, {"select": held, "mix": held})
    assert list(found) == ["select", "order", "weight"]
    assert letters.read == ["abc", "de", "fg", "hh", "bc", "de"]
    assert letters.is_closed
    assert found["select"].of(None).tolist() == found["order"].of(pool).tolist()
    assert np.argmax(found["select"].of(held)) == 7
    assert not found["weight"].of(None)[2].any()
    assert [path.name for path in tmp_path.iterdir()].count("embeddings") == 1
    assert len(list((tmp_path / "own").iterdir())) == 1
    with pytest.raises(ComponentError, match="of the run's pool and of the component's validation samples"):
        found["order"].of(held)


def test_samples_without_any_text_are_refused(letters: Letters, tmp_path: Path) -> None:
    pool, empty = pool_of(ROWS), pool_of([([8, 8], [-100, -100])])
    wanted = {"select": EmbeddingParams(encoder="x", embedding_text="response")}
    for samples, held, what in ((pool, {"select": empty}, "validation sample"), (empty, {}, "sample")):
        with pytest.raises(ConfigError, match=rf"select.embedding_text: no {what} has text to embed \(response\)"):
            RunEncoders(wanted, tmp_path, "cpu", False).make(samples, held)
    assert letters.is_closed


def test_components_read_an_encoders_embeddings_by_their_service(letters: Letters, tmp_path: Path) -> None:
    from dataflex.embedding.service import EmbeddingService

    pool = pool_of(ROWS)
    wanted = {"select": EmbeddingParams(encoder="x")}
    made = RunEncoders(wanted, tmp_path, "cpu", False).make(pool, {})
    service = EmbeddingService(wanted, pool, None, made)  # type: ignore[arg-type]
    source, some = service.of_all("select"), service.of_some("select")
    assert source is not None
    assert some is not None
    service.forget()
    assert isinstance(source(None), np.memmap)
    np.testing.assert_array_equal(some(np.array([2, 0]), None), source(None)[[2, 0]])


def test_an_encoder_must_return_a_vector_for_each_text(tmp_path: Path) -> None:
    class Short(Letters):
        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return super().encode(texts)[:1]

    with pytest.raises(DataFlexError, match=r"gave vectors of shape \(1, 8\) for 2 texts"):
        making.unit_vectors(Short(), ["a", "b"])
    run = run_of(tmp_path)
    run.close()
    assert replace(run).root == tmp_path


def test_texts_that_are_not_samples_can_be_embedded(letters: Letters, tmp_path: Path) -> None:
    found = embed_texts(["ab", " "], EmbeddingParams(encoder="x"), tmp_path)
    np.testing.assert_allclose(found[0, :2], 2**-0.5, atol=1e-3)
    assert not found[1].any()
    assert letters.is_closed


def test_a_service_that_is_down_is_named_before_anything_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("dataflex.embedding.openai_encoder.time.sleep", pauses.append)
    wanted = {"select": EmbeddingParams(encoder="http://127.0.0.1:9/v1#small")}
    with pytest.raises(DataFlexError, match=r"^dataflex.select.encoder: http://127.0.0.1:9/v1/emb.* after 5 tries"):
        RunEncoders(wanted, tmp_path, "cpu", False)
    assert pauses == [1, 2, 4, 8]
    assert not list(tmp_path.iterdir())
