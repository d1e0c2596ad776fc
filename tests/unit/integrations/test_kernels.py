"""Kernels of Liger in a run whose loss DataFlex computes: the plain forward, and an unchanged cross entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dataflex.integrations.llamafactory.kernels import without_loss


@pytest.mark.parametrize("fails", [False, True])
def test_the_plain_forward_is_asked_for_and_cross_entropy_stays(fails: bool) -> None:
    own, calls = torch.nn.functional.cross_entropy, []

    def apply(config: Any, model_args: Any, is_trainable: bool, require_logits: bool) -> None:
        calls.append((config, model_args, is_trainable, require_logits))
        torch.nn.functional.cross_entropy = lambda *_: None  # as Liger's cross_entropy=True does
        if fails:
            raise ValueError("a kernel")

    if fails:
        with pytest.raises(ValueError, match="a kernel"):
            without_loss(apply, "config", "args", True, require_logits=False)
    else:
        without_loss(apply, "config", "args", True, require_logits=False)
    assert calls == [("config", "args", True, True)]
    assert torch.nn.functional.cross_entropy is own


def test_llamafactory_applies_the_kernels_by_the_name_that_is_replaced() -> None:
    import inspect

    from llamafactory.model import loader

    names = list(inspect.signature(loader.apply_liger_kernel).parameters)
    assert names == ["config", "model_args", "is_trainable", "require_logits"]
    source = inspect.getsource(loader.load_model)
    assert "apply_liger_kernel(config, model_args, is_trainable, require_logits=" in source
