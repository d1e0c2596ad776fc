"""What a run cannot measure, as far as its configuration shows it before a model is loaded."""

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
"""The same, where DeepSpeed flattens the optimizer's state."""
_DEEPSPEED_OWN_ADAMS = ("adam", "adamw")
"""The same, of ``optimizer.type`` in a DeepSpeed configuration, which then wins over ``optim``."""
_NO_MOMENTS = {
    "use_galore": "GaLore keeps its moments in a subspace of each gradient",
    "use_apollo": "APOLLO keeps its moments in a subspace of each gradient",
    "use_badam": "BAdam keeps moments of one block at a time",
    "use_adam_mini": "Adam-mini keeps one second moment for many parameters",
    "use_muon": "Muon keeps no second moment",
}
"""LLaMA-Factory keys that choose an optimizer whose state holds no moment for each parameter.

They also have their parameters in another order.
"""


_OTHER_LAYERS = {
    "use_unsloth": "unsloth computes LoRA and the layers around it in kernels of its own",
    "fp8": "layers in fp8 multiply in kernels of their own",
}
"""LLaMA-Factory keys under which the inputs of trained layers are never seen -> why."""


def layer_problems(run: RunView) -> Iterator[tuple[str, str]]:
    """Yield why the gradients of single samples cannot be taken in a run: a parameter, the reason."""
    for key in _set(run, _OTHER_LAYERS):
        yield (
            "method",
            f"takes the gradients of single samples from the layers' inputs, and {_OTHER_LAYERS[key]}. Remove {key}, "
            "or use a method that takes no gradients, such as loss.",
        )


def moment_problems(settings: GradientSettings, run: RunView) -> Iterator[tuple[str, str]]:
    """Yield why the optimizer's moments cannot be had in a run, if the settings want them: a parameter, the reason."""
    name = settings.preconditioner
    if name == "none":
        return
    yield from projection_problems(settings)
    if run.warmup_steps == 0 and not run.offline:
        yield (
            "preconditioner",
            f"{name!r} reads the optimizer's moments, and before the first step there are none. Set "
            "dataflex.warmup_steps to 1 or more (LESS warms up on 5 % of the pool), or preconditioner: none.",
        )
    for key in _set(run, _NO_MOMENTS):
        yield "preconditioner", f"{name!r} does not go with {key}: {_NO_MOMENTS[key]}."
    own = _deepspeed_value(run, "optimizer", "type")
    if own is not None and str(own).lower() not in _DEEPSPEED_OWN_ADAMS:
        yield (
            "preconditioner",
            f"{name!r} reads Adam's moments, and the DeepSpeed configuration has the optimizer {own}; name Adam or "
            "AdamW there, or set preconditioner: none.",
        )
    readable, optimizer = _ADAMS if run.deepspeed is None else _DEEPSPEED_ADAMS, _optimizer(run)
    if own is None and optimizer not in readable:
        where = "" if readable is _ADAMS else "under DeepSpeed "
        yield (
            "preconditioner",
            f"{name!r} reads Adam's moments, and {where}those of optim: {optimizer} cannot be read; use one of "
            f"{', '.join(readable)}, or preconditioner: none.",
        )


def projection_problems(settings: GradientSettings) -> Iterator[tuple[str, str]]:
    """Yield why a projection does not go with a preconditioner."""
    if settings.projection == "kronecker" and settings.preconditioner != "none":
        yield "projection", "kronecker works on the gradient itself; it needs preconditioner: none."


def _optimizer(run: RunView) -> str:
    return str(run.llamafactory.get("optim") or "adamw_torch")


def _set(run: RunView, keys: Iterable[str]) -> list[str]:
    """Return which of some switches a run has on."""
    return [key for key in keys if str(run.llamafactory.get(key, False)).lower() in ("1", "true", "yes")]


def _deepspeed_value(run: RunView, block: str, key: str) -> Any:
    """Return a value of a block of a run's DeepSpeed configuration, None if it is not there."""
    found = (run.deepspeed or {}).get(block)
    return found.get(key) if isinstance(found, dict) else None
