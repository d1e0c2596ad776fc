"""Download of a package from the package index for the files in it, without installing the package."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dataflex.errors import ConfigError


class DownloadError(ConfigError):
    """A package cannot be downloaded from the package index."""


def download(requirement: str, folder: Path) -> None:
    """Download a package into ``folder`` without its dependencies, as a wheel or as the unpacked files of one.

    Raises:
        DownloadError: If neither pip nor uv is found, or if the package index does not deliver the package.
    """
    failures: list[str] = []
    for command in download_commands(requirement, folder):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            failures.append(f"{command[0]}: {error}")
            continue
        if done.returncode == 0:
            return
        failures.append(f"{' '.join(command)}\n{done.stderr.strip()[-600:]}")
    reason = "\n".join(failures) or "neither pip nor uv was found"
    raise DownloadError(
        f"could not download {requirement} from the package index; check the network and the index settings:\n{reason}"
    )


def download_commands(requirement: str, folder: Path) -> Iterator[list[str]]:
    """Yield the commands that can download a package, in the order in which they are tried.

    They use pip, then uv, then the pip of the Python installation from which this virtual environment was created. All
    of them read the user's settings of index, proxy and certificates.
    """
    pip = [
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        requirement,
    ]
    if importlib.util.find_spec("pip") is not None:
        yield [sys.executable, *pip]
    # The Makefile of a checkout installs uv under .tools if the machine has no uv.
    local = [Path.cwd() / ".tools" / "bin" / "uv", Path(sys.prefix).parent / ".tools" / "bin" / "uv"]
    found = [shutil.which("uv"), *(str(path) for path in local if path.is_file())]
    for uv in dict.fromkeys(path for path in found if path):
        yield [
            uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            sys.executable,
            "--no-deps",
            "--target",
            str(folder),
            requirement,
        ]
    base = shutil.which("python3", path=str(Path(sys.base_prefix) / "bin"))
    if sys.prefix != sys.base_prefix and base:
        yield [base, *pip]
