"""Stored checkpoints of the model in training: their weights for temporary use, their moments and learning rates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from dataflex.errors import ComponentError, ConfigError
from dataflex.probe.head import language_model
from dataflex.probe.mode import preserved_rng
from dataflex.probe.moments import Moments

_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_KEYS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
)  # fmt: skip
"""Settings of LoRA and OFT that change an adapter's outputs while its weights stay the same."""
_FULL = ("model.safetensors", "model.safetensors.index.json")
_VALUE_HEAD = "value_head.safetensors"
"""File in which LLaMA-Factory stores the value head of a reward model, beside the weights or the adapter."""


@contextmanager
def weights_of(model: torch.nn.Module, folder: Path) -> Iterator[None]:
    """Give the model the weights of a checkpoint while the context is open, then restore every parameter bit by bit.

    Args:
        model: the raw model, with whole parameters on this process.
        folder: a checkpoint of the same model or adapter, in the format of the Trainer.

    Raises:
        ComponentError: if the checkpoint does not hold the trainable parameters.
    """
    kept = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    try:
        load_trained(model, folder)
        yield
    finally:
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in kept:
                    value.copy_(kept[name])


def load_renamed(model: torch.nn.Module, folder: Path) -> None:
    """Load the trainable weights of a checkpoint if its file has other names than the model.

    Transformers stores vision-language models and stacked experts under the names of older releases. Its Trainer, which
    loads a file by the names of the model, leaves out all other names without an error.

    Args:
        model: the raw model, with whole parameters on this process.
        folder: a checkpoint of the same model, in the format of the Trainer.

    Raises:
        ComponentError: if the checkpoint does not hold the trainable parameters.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and not _stored_names(folder) <= model.state_dict().keys():
        load_trained(model, folder)


def _stored_names(folder: Path) -> set[str]:
    """Return the names of the weights in a checkpoint of a whole model; none if there is no file of weights."""
    from safetensors import safe_open

    single, index = (folder / name for name in _FULL)
    if single.is_file():
        with safe_open(single, "pt") as stored:
            return set(stored.keys())
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.is_file() else set()


def adapter_settings(model: torch.nn.Module) -> dict[str, Any]:
    """Return the settings of the active adapter that change its outputs, as JSON values.

    The dictionary is empty if the model has no adapter.
    """
    from peft import PeftModel

    model = language_model(model)
    if not isinstance(model, PeftModel):
        return {}
    given = model.peft_config[model.active_adapter].to_dict()
    settings: dict[str, Any] = json.loads(json.dumps({key: given[key] for key in _ADAPTER_KEYS if key in given}))
    return settings


def load_trained(model: torch.nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights of the trainable parameters, also those of an adapter and of a value head.

    Args:
        model: the raw model, with whole parameters on this process.
        folder: a checkpoint of the same model.

    Raises:
        ComponentError: if the folder cannot be read or is of another model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    inner = language_model(model)
    load = _load_adapter if isinstance(inner, PeftModel) else _load_full
    try:
        strange = load(inner, folder)
        if inner is not model:
            strange += _load_value_head(model, folder)
    except RuntimeError as error:  # torch lists each parameter of another shape on a line of the message
        detail = str(error).splitlines()[-1].strip()
        raise ComponentError(f"checkpoints: {folder} is not of this model: {detail}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ComponentError(f"checkpoints: {folder} cannot be read: {error}") from error
    if strange:
        names = ", ".join(strange[:3])
        raise ComponentError(f"checkpoints: {folder} is not of this model: {names} and others do not match.")


def _load_adapter(model: Any, folder: Path) -> list[str]:
    """Load an adapter's weights; return the names that only the model or only the checkpoint has."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    if not any((folder / name).is_file() for name in _ADAPTER):
        raise ComponentError(f"checkpoints: {folder} holds no adapter, but the model in training has one.")
    _check_adapter(model, folder)
    trainable = _trainable(model)
    found = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), model.active_adapter)
    return sorted(found.unexpected_keys) + [key for key in found.missing_keys if key in trainable]


def _check_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Raise an error if the adapter was stored with settings under which the same weights act differently."""
    path = folder / _ADAPTER_CONFIG
    if not path.is_file():
        raise ComponentError(f"checkpoints: {folder} holds no {_ADAPTER_CONFIG} beside its adapter.")
    stored = json.loads(path.read_text(encoding="utf-8"))
    for key, mine in adapter_settings(model).items():
        theirs = stored.get(key, type(mine)())  # an older peft did not write this setting and did not use it
        if theirs != mine:
            raise ComponentError(
                f"checkpoints: the adapter in {folder} was trained with {key} = {theirs!r}, this run has {mine!r}. "
                "With another value the same weights are another model: use the adapter settings of that run."
            )


def _load_full(model: Any, folder: Path) -> list[str]:
    """Load a whole model's trainable weights; return the names that only the model or only the checkpoint has.

    Transformers loads the folder as a second model in main memory. It stores the weights of some models under other
    names and shapes than those in memory, each expert separately for example. Only Transformers' own loading code
    reverts that.
    """
    if (folder / _ADAPTER_CONFIG).is_file() or not any((folder / name).is_file() for name in _FULL):
        raise ComponentError(f"checkpoints: {folder} holds no model weights ({_FULL[0]} is missing).")
    trainable = _trainable(model)
    with preserved_rng():
        stored, found = type(model).from_pretrained(
            folder,
            config=model.config,
            # A type that holds the values of all trainable parameters, so that loading rounds none of them.
            dtype=reduce(torch.promote_types, [value.dtype for value in trainable.values()]),
            ignore_mismatched_sizes=True,  # raised below, with the name of the parameter
            output_loading_info=True,
            use_safetensors=True,
        )
    for name, there, here in sorted(found["mismatched_keys"]):
        raise ComponentError(
            f"checkpoints: {folder} is not of this model: size mismatch for {name}, which is {tuple(there)} there and "
            f"{tuple(here)} in this model."
        )
    weights = dict(stored.named_parameters())
    unexpected = found["unexpected_keys"] | (weights.keys() - dict(model.named_parameters()).keys())
    missing = trainable.keys() - (weights.keys() - found["missing_keys"])
    if not unexpected | missing:
        with torch.no_grad():
            for name, value in trainable.items():
                value.copy_(weights[name])
    return sorted(unexpected) + sorted(missing)


def _load_value_head(model: torch.nn.Module, folder: Path) -> list[str]:
    """Load the weights of a value head; return the names that only the model or only the checkpoint has."""
    from safetensors.torch import load_file

    if not (folder / _VALUE_HEAD).is_file():
        raise ComponentError(f"checkpoints: {folder} holds no {_VALUE_HEAD}, but the model in training has one.")
    stored, inside = load_file(folder / _VALUE_HEAD), "pretrained_model."
    own = {name: value for name, value in model.named_parameters() if not name.startswith(inside)}
    if stored.keys() == own.keys():
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(stored[name])
    return sorted(stored.keys() ^ own.keys())


def _trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def saved_moments(folder: Path, optimizer: Any, model: torch.nn.Module) -> dict[str, Moments]:
    """Return the Adam moments in a checkpoint's ``optimizer.pt``, by parameter name.

    Args:
        folder: the checkpoint.
        optimizer: an optimizer of the same parameters in the same groups. Only the order of its parameters is used.
        model: the raw model.

    Raises:
        ComponentError: if the folder has no ``optimizer.pt``, or the file holds no Adam moments of these parameters.
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
        if state is None and stored["state"]:  # this parameter never had a gradient, but others had one
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

    The rates are read from the log in each folder's ``trainer_state.json``. The Trainer adds to it every
    ``logging_steps``.

    Raises:
        ConfigError: if a folder has no such log, or the learning rates are all 0.
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
