"""Versions of the packages that a run depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("dataflex", "llamafactory", "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "numpy")


def installed_versions() -> dict[str, str]:
    """Return package -> version, for the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
