"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest

from dataflex.config.checks import packages


@pytest.fixture
def all_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the checks treat every package as installed."""
    monkeypatch.setattr(packages, "_there", lambda module: True)
    monkeypatch.setattr(packages, "_satisfied", lambda requirement: True)
