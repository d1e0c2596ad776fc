"""Adam's running moments of the model in training, in full shape and under the parameters' own names.

Reading changes nothing. Under ZeRO and FSDP the moments are sharded over the processes and gathered here. Gathering is
collective: every process must call at the same point. Gathered moments take 8 bytes per trainable parameter on every
process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.tensor import DTensor

from dataflex.errors import ComponentError
from dataflex.probe.mode import reshard

_ADAMS = {
    "torch": {"Adam", "AdamW"},
    "deepspeed": {"FusedAdam", "DeepSpeedCPUAdam"},
    "apex": {"FusedAdam"},
    "bitsandbytes": {
        f"{paged}{name}{bits}"
        for paged in ("", "Paged")
        for name in ("Adam", "AdamW")
        for bits in ("", "8bit", "32bit")
    },
}
"""Optimizers that store the moments of the published Adam, by package."""
_BITSANDBYTES_BLOCK = 256
"""Number of elements of an 8-bit state that share one scale."""
_FSDP1_WRAPPER = "_fsdp_wrapped_module."


@dataclass(frozen=True)
class Moments:
    """Adam's running moments of one parameter. Do not change the tensors, which may be the optimizer's own.

    Attributes:
        exp_avg: running mean of the gradient, in the parameter's full shape. It is float32 if it was gathered from
            several processes or dequantised; otherwise it is the optimizer's own tensor.
        exp_avg_sq: running mean of the squared gradient, in the same form.
        step: number of optimizer steps that this parameter has had.
        betas: decay rates of the two means.
        eps: term added to the denominator.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    betas: tuple[float, float]
    eps: float


def read_moments(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Moments]:
    """Return the moments of every trainable parameter.

    If a parameter has never had a gradient but others have, its moments are zeros and its step is 0. Adam itself starts
    on such a parameter with these values. ZeRO steps such a parameter with zero gradients, so under ZeRO it has the
    step of the others.

    Args:
        optimizer: the Trainer's optimizer after preparation, that is, wrapped by accelerate, and under ZeRO by
            DeepSpeed.
        model: the module inside the wrapper of DDP or DeepSpeed; under FSDP the wrapped root.

    Returns:
        The moments by name in ``model.named_parameters()``. Tied parameters have one entry, under the first name.

    Raises:
        ComponentError: if the optimizer is no Adam, has not made a step yet, or lacks one of the parameters.
    """
    inner: Any = optimizer
    while isinstance(inner, AcceleratedOptimizer):
        inner = inner.optimizer
    reshard(model)  # the optimizer's state belongs to FSDP2's shards, not to gathered parameters
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not isinstance(inner, torch.optim.Optimizer):
        return _from_deepspeed(inner, parameters)
    _check_is_adam(inner)
    if isinstance(model, FullyShardedDataParallel):
        return _from_fsdp1(inner, model, parameters)
    return _from_states(inner, parameters)


def _from_states(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Moments]:
    """Read an optimizer over the model's own parameters: one process, DDP, and FSDP2 with its DTensors."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    if not any(optimizer.state.get(parameter) for parameter in parameters.values()):
        raise _no_step_yet()
    moments = {}
    for name, parameter in parameters.items():
        if id(parameter) not in groups:
            raise _missing(name)
        group = groups[id(parameter)]
        state = optimizer.state.get(parameter)
        if state:
            pair = _first(state, parameter.device), _second(state, parameter.device)
            moments[name] = _read(*pair, state, group)
        else:
            zeros = torch.zeros(parameter.shape, device=parameter.device)
            moments[name] = _read(zeros, zeros, {"step": 0}, group)
    return moments


def _from_fsdp1(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, parameters: Mapping[str, Tensor]
) -> dict[str, Moments]:
    """Read an optimizer over FSDP1's flattened shards, through FSDP's full optimizer state."""
    if any(parameter.device.type == "cpu" for parameter in parameters.values()):
        # In this case torch 2.11 returns exp_avg_sq instead of exp_avg, without an error.
        raise ComponentError(
            "Adam's moments cannot be read under FSDP version 1 on CPU; use FSDP version 2, or set preconditioner: none"
        )
    if not optimizer.state:
        raise _no_step_yet()
    with FullyShardedDataParallel.state_dict_type(
        model,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),
    ):
        gathered = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    groups = {name: group for group in gathered["param_groups"] for name in group["params"]}
    moments = {}
    for name in parameters:
        clean = name.replace(_FSDP1_WRAPPER, "")
        if clean not in gathered["state"] or clean not in groups:
            raise _missing(name)
        state = gathered["state"][clean]
        moments[name] = _read(state["exp_avg"].float(), state["exp_avg_sq"].float(), state, groups[clean])
    return moments


def _from_deepspeed(zero: Any, parameters: Mapping[str, Tensor]) -> dict[str, Moments]:
    """Read DeepSpeed's optimizer of ZeRO-1, 2 or 3; the real optimizer inside it holds flattened partitions."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.utils import safe_get_full_optimizer_state

    if not isinstance(zero, ZeROOptimizer):
        raise _unreadable(zero)
    inner = zero.optimizer
    _check_is_adam(inner)
    states = [state for state in inner.state.values() if state]
    if not states:
        raise _no_step_yet()
    if any("exp_avg" not in state for state in states):
        raise _unreadable(inner)
    group = inner.param_groups[0]
    if any((other["betas"], other["eps"]) != (group["betas"], group["eps"]) for other in inner.param_groups):
        raise ComponentError(
            "Adam's moments can be read under DeepSpeed only if all parameter groups have the same betas and eps; "
            "use the same values in all groups, or set preconditioner: none"
        )
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        # ZeRO-1 and 2 link states to parameters once, in the first step of the first group, when the other groups have
        # no states yet. So the links are made again.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    last = max(states, key=lambda state: int(state["step"]))
    moments = {}
    for name, parameter in parameters.items():
        pair = [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
        if any(tensor is None for tensor in pair):
            raise _missing(name)
        moments[name] = _read(pair[0].float(), pair[1].float(), last, group)
    return moments


def _read(exp_avg: Tensor, exp_avg_sq: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Moments:
    """Return the moments and settings of one parameter."""
    step = state["step"] if "step" in state else group["step"]  # apex counts steps by group
    return Moments(exp_avg, exp_avg_sq, int(step), (float(group["betas"][0]), float(group["betas"][1])), group["eps"])


def _first(state: Mapping[str, Any], device: torch.device) -> Tensor:
    """Return the whole running mean of the gradient."""
    return _whole(state["exp_avg"]) if "exp_avg" in state else _dequantised(state, 1, device)


def _second(state: Mapping[str, Any], device: torch.device) -> Tensor:
    """Return the whole running mean of the squared gradient."""
    return _whole(state["exp_avg_sq"]) if "exp_avg_sq" in state else _dequantised(state, 2, device)


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor in full: the tensor itself, or gathered if FSDP2 shards it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Offloaded shards are on the CPU, but collectives need tensors on the mesh's device.
    return tensor.to(tensor.device_mesh.device_type).full_tensor().float()


def _dequantised(state: Mapping[str, Any], number: int, device: torch.device) -> Tensor:
    """Return state 1 or 2 of bitsandbytes, which stores large states in 8 bits and small states unquantised.

    Paged states are CPU tensors in memory that CPU and GPU share.
    """
    values = state[f"state{number}"]
    if values.device != device:
        torch.cuda.synchronize(device)  # the GPU may still write to the shared memory of a paged state
        values = values.to(device)
    if values.dtype != torch.uint8:
        return values
    from bitsandbytes.functional import dequantize_blockwise

    absmax, code = state[f"absmax{number}"].to(device), state[f"qmap{number}"].to(device)
    return dequantize_blockwise(values, absmax=absmax, code=code, blocksize=_BITSANDBYTES_BLOCK)


def _check_is_adam(optimizer: Any) -> None:
    """Raise an error unless the optimizer is a known Adam without amsgrad."""
    kind = type(optimizer)
    if kind.__name__ not in _ADAMS.get(kind.__module__.partition(".")[0], ()):
        raise _unreadable(optimizer)
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ComponentError(
            f"{kind.__name__} with amsgrad divides by the largest second moment so far, which the preconditioner does "
            "not do; train without amsgrad, or set preconditioner: none"
        )


def _unreadable(optimizer: Any) -> ComponentError:
    kind = type(optimizer)
    return ComponentError(
        f"the optimizer {kind.__module__}.{kind.__qualname__} keeps no Adam moments that can be read; train with an "
        "Adam (for example optim: adamw_torch), or set preconditioner: none"
    )


def _no_step_yet() -> ComponentError:
    return ComponentError(
        "Adam has no moments before the first optimizer step; set dataflex.warmup_steps to at least 1, or "
        "preconditioner: none"
    )


def _missing(name: str) -> ComponentError:
    return ComponentError(
        f"the optimizer has no moments of the trainable parameter {name}; freeze it or let the optimizer train it, or "
        "set preconditioner: none"
    )
