"""Tests on an accelerator; skipped without one.

``DATAFLEX_TEST_DEVICE=cpu`` runs them on the CPU, which shows that the tests themselves are right.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, and skip it if there is no device."""
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if "DATAFLEX_TEST_DEVICE" not in os.environ and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device under test; products in float32 are exact there."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(os.environ.get("DATAFLEX_TEST_DEVICE", "cuda:0"))


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """Return the device under test if it is CUDA's."""
    if device.type != "cuda":
        pytest.skip("measures what only CUDA reports")
    return device
