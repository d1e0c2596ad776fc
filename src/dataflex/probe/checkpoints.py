"""Stored checkpoints of the model in training: their weights for a while, their moments, their learning rates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dataflex.errors import ComponentError, ConfigError
from dataflex.probe.moments import Moments

_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_INDEX = "model.safetensors.index.json"


@contextmanager
def weights_of(model: torch.nn.Module, folder: Path) -> Iterator[None]:
    """Give the model a checkpoint's weights for a while; afterwards every parameter has its own bits back.

    Args:
        model: the raw model, its parameters whole on this process.
        folder: a checkpoint of the same model or adapter, as the Trainer writes it.

    Raises:
        ComponentError: if the checkpoint does not hold the trainable parameters.
    """
    kept = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    try:
        _load(model, folder)
        yield
    finally:
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in kept:
                    value.copy_(kept[name])


def _load(model: torch.nn.Module, folder: Path) -> None:
    from peft import PeftModel
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    try:
        if isinstance(model, PeftModel):
            if not any((folder / name).is_file() for name in _ADAPTER):
                raise ComponentError(f"checkpoints: {folder} holds no adapter, but the model in training has one.")
            found = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), model.active_adapter)
            unexpected = sorted(found.unexpected_keys)
        else:
            weights = _full_weights(folder)
            found = model.load_state_dict({name: weights[name] for name in trainable & weights.keys()}, strict=False)
            unexpected = sorted(weights.keys() - model.state_dict().keys())
    except RuntimeError as error:  # torch's, of parameters of another shape, one to a line
        detail = str(error).splitlines()[-1].strip()
        raise ComponentError(f"checkpoints: {folder} is not of this model: {detail}") from error
    missing = [key for key in found.missing_keys if key in trainable]
    if unexpected or missing:
        names = ", ".join((unexpected + missing)[:3])
        raise ComponentError(f"checkpoints: {folder} is not of this model: {names} and others do not match.")


def _full_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    names = ["model.safetensors"]
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ComponentError(f"checkpoints: {folder} holds no model weights ({name} is missing).")
        weights.update(load_file(folder / name))
    return weights


def saved_moments(folder: Path, optimizer: Any, model: torch.nn.Module) -> dict[str, Moments]:
    """Return the moments a checkpoint's ``optimizer.pt`` holds, by parameter name.

    Args:
        folder: the checkpoint.
        optimizer: an optimizer of the same parameters in the same groups; only its order is used.
        model: the raw model.

    Raises:
        ComponentError: if there is no such file, or it holds no Adam moments of these parameters.
    """
    path = folder / "optimizer.pt"
    hint = "Use a checkpoint folder saved by the Trainer without DeepSpeed or FSDP, or preconditioner: none."
    if not path.is_file():
        raise ComponentError(f"the moments of {folder} are needed, but there is no optimizer.pt. {hint}")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    names = {id(value): name for name, value in model.named_parameters() if value.requires_grad}
    ordered = [value for group in optimizer.param_groups for value in group["params"]]
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    groups = [group for group in stored["param_groups"] for _ in group["params"]]
    if len(ordered) != len(numbers):
        raise ComponentError(
            f"{path} holds the state of {len(numbers)} parameters, the model has {len(ordered)} trainable ones. {hint}"
        )
    found = {}
    for value, number, group in zip(ordered, numbers, groups, strict=True):
        state = stored["state"].get(number)
        if state is None and stored["state"]:  # it never had a gradient while others have
            zeros = torch.zeros_like(value)
            state = {"exp_avg": zeros, "exp_avg_sq": zeros, "step": 0}
        if not state or "exp_avg" not in state or state["exp_avg"].shape != value.shape:
            raise ComponentError(f"{path} holds no Adam moments of {names[id(value)]}. {hint}")
        found[names[id(value)]] = Moments(
            exp_avg=state["exp_avg"].to(value.device),
            exp_avg_sq=state["exp_avg_sq"].to(value.device),
            step=int(state["step"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=float(group["eps"]),
        )
    return found


def learning_rates(folders: list[Path]) -> list[float]:
    """Return the mean learning rate of the steps between each checkpoint and the one before it, scaled to sum 1.

    Read from the log in every folder's ``trainer_state.json``, which the Trainer fills every ``logging_steps``.

    Raises:
        ConfigError: if a folder has no such log.
    """
    rates, before = [], 0
    for folder in folders:
        path = folder / "trainer_state.json"
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"dataflex.select.checkpoints: {path} cannot be read ({error}); set checkpoint_weights."
            ) from error
        logged = [
            entry["learning_rate"]
            for entry in state["log_history"]
            if "learning_rate" in entry and before < entry["step"] <= state["global_step"]
        ]
        if not logged:
            raise ConfigError(
                f"dataflex.select.checkpoints: {path} has no learning rate logged after step {before}; set "
                "checkpoint_weights, or train with fewer logging_steps."
            )
        rates.append(sum(logged) / len(logged))
        before = int(state["global_step"])
    total = sum(rates)
    if total <= 0:
        raise ConfigError("dataflex.select.checkpoints: their learning rates are all 0; set checkpoint_weights.")
    return [rate / total for rate in rates]
