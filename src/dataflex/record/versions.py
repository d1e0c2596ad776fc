"""Versions of what a run is made of."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("dataflex", "llamafactory", "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "numpy")


def installed_versions() -> dict[str, str]:
    """Return package -> version of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
