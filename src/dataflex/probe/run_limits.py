"""Measurements that a run cannot make, as far as its configuration shows it before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dataflex.api.needs import RunView
from dataflex.api.probe import GradientSettings

_ADAMS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_apex_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
)
"""Values of ``optim`` whose moments ``probe/moments.py`` can read; the Trainer knows many more Adams."""
_DEEPSPEED_ADAMS = ("adamw_torch", "adamw_torch_fused")
"""The same values under DeepSpeed, which flattens the optimizer's state."""
_DEEPSPEED_OWN_ADAMS = ("adam", "adamw")
"""The same for ``optimizer.type`` in a DeepSpeed configuration, which overrides ``optim``."""
_NO_MOMENTS = {
    "use_galore": "GaLore keeps its moments in a subspace of each gradient",
    "use_apollo": "APOLLO keeps its moments in a subspace of each gradient",
    "use_badam": "BAdam keeps moments of one block at a time",
    "use_adam_mini": "Adam-mini keeps one second moment for many parameters",
    "use_muon": "Muon keeps no second moment",
}
"""LLaMA-Factory keys that choose an optimizer whose state holds no moment for each parameter, and the reasons.

The optimizers' parameters are also in another order.
"""


_OTHER_LAYERS = {
    "use_unsloth": "unsloth computes LoRA and the layers around it in kernels of its own",
    "fp8": "layers in fp8 multiply in kernels of their own",
}
"""LLaMA-Factory keys under which the inputs of trained layers cannot be seen, and the reasons."""


def layer_problems(run: RunView) -> Iterator[tuple[str, str]]:
    """Yield why a run cannot give the gradients of single samples, as pairs of a parameter and the reason."""
    for key in _set(run, _OTHER_LAYERS):
        yield (
            "method",
            f"needs the gradients of single samples, which come from the layers' inputs, but {_OTHER_LAYERS[key]}. "
            f"Remove {key}, or use a method that needs no gradients, such as loss.",
        )


def moment_problems(settings: GradientSettings, run: RunView) -> Iterator[tuple[str, str]]:
    """Yield why a run has no optimizer moments, if the settings need them, as pairs of a parameter and the reason."""
    name = settings.preconditioner
    if name == "none":
        return
    yield from projection_problems(settings)
    if run.warmup_steps == 0 and not run.offline:
        yield (
            "preconditioner",
            f"{name!r} reads the optimizer's moments, which do not exist before the first step. Set "
            "dataflex.warmup_steps to 1 or more (LESS warms up on 5 % of the pool), or preconditioner: none.",
        )
    for key in _set(run, _NO_MOMENTS):
        yield "preconditioner", f"{name!r} cannot be used with {key}: {_NO_MOMENTS[key]}."
    own = _deepspeed_value(run, "optimizer", "type")
    if own is not None and str(own).lower() not in _DEEPSPEED_OWN_ADAMS:
        yield (
            "preconditioner",
            f"{name!r} reads Adam's moments, but the optimizer of the DeepSpeed configuration is {own}; use Adam or "
            "AdamW there, or set preconditioner: none.",
        )
    readable, optimizer = _ADAMS if run.deepspeed is None else _DEEPSPEED_ADAMS, _optimizer(run)
    if own is None and optimizer not in readable:
        where = "" if readable is _ADAMS else "under DeepSpeed "
        yield (
            "preconditioner",
            f"{name!r} reads Adam's moments, but {where}those of optim: {optimizer} cannot be read; use one of "
            f"{', '.join(readable)}, or preconditioner: none.",
        )


def projection_problems(settings: GradientSettings) -> Iterator[tuple[str, str]]:
    """Yield why a projection cannot be combined with a preconditioner."""
    if settings.projection == "kronecker" and settings.preconditioner != "none":
        yield "projection", "kronecker works on the gradient itself; it needs preconditioner: none."


def _optimizer(run: RunView) -> str:
    """Return the run's value of ``optim``, or LLaMA-Factory's default."""
    return str(run.llamafactory.get("optim") or "adamw_torch")


def _set(run: RunView, keys: Iterable[str]) -> list[str]:
    """Return the keys that a run switches on."""
    return [key for key in keys if str(run.llamafactory.get(key, False)).lower() in ("1", "true", "yes")]


def _deepspeed_value(run: RunView, block: str, key: str) -> Any:
    """Return a value from a block of the run's DeepSpeed configuration; None if the value is not set."""
    found = (run.deepspeed or {}).get(block)
    return found.get(key) if isinstance(found, dict) else None
