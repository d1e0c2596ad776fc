"""Fixture with the trainings that tests share."""

from __future__ import annotations

import pytest
from workshop import Workshop

import tiny


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    root = tmp_path_factory.mktemp("runs")
    inputs = tmp_path_factory.mktemp("inputs")
    return Workshop(
        root=root,
        model=tiny.make_model(inputs / "model"),
        dropout_model=tiny.make_model(inputs / "dropout", dropout=0.1),
        data=tiny.make_data(inputs / "data"),
    )
