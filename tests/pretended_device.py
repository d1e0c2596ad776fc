"""A pretended accelerator: tensors that report the device ``cuda:0`` and compute on the CPU.

Every operator runs on the CPU, so that code which depends on values (masks, ``.item()``) runs as it does on a device.
An operator that a device refuses is refused here: tensors of two devices together, ``.numpy()``, float64 on ``mps``.
Three things are counted, each with the line of code that causes it: waits of the CPU for the device, additions of
floats that a device does in no fixed order, and operators on float64.

A pretended device does not show asynchronous errors, the precision of a device's products, its autocast and its memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import dataflex

CPU = torch.device("cpu")
OURS = f"{Path(dataflex.__file__).parent}/"
THEIRS = ("transformers/", "peft/", "accelerate/", "llamafactory/", "torch/optim/")

WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_linalg_eigh",
}
UNORDERED = {
    "cumsum",
    "histc",
    "index_add",
    "index_add_",
    "kthvalue",
    "median",
    "put_",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "scatter_reduce_",
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPIES = {"_to_copy", "copy_"}


@dataclass
class Counts:
    """Counts of the device's work, by the line of code that causes it: ``probe/head.py:43 nonzero``.

    Lines of DataFlex are paths in its package. Inside a model, the Trainer or an optimizer it is their line.
    """

    waits: Counter[str] = field(default_factory=Counter)
    unordered: Counter[str] = field(default_factory=Counter)
    doubles: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        for each in (self.waits, self.unordered, self.doubles):
            each.clear()


_counts = Counts()


def _line() -> str:
    """Return the innermost running line of DataFlex, or of the libraries in ``THEIRS``."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return f"{name.removeprefix(OURS)}:{frame.f_lineno}"
        if "site-packages/" in name and (inside := name.split("site-packages/")[1]).startswith(THEIRS):
            return f"{inside}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _is_of_autograd() -> bool:
    """Return whether autograd itself runs an operator, and not a hook in it; its zeros are where C++ takes us to be."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.endswith(("torch/_compile.py", "eval_frame.py", "_python_dispatch.py")):
            return name.endswith("torch/autograd/graph.py")
        frame = frame.f_back
    return False


class DeviceTensor(Tensor):
    """A tensor on the pretended device. C++ takes it for one on the CPU, so that autograd needs no driver."""

    numbers: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, real: Tensor, place: torch.device) -> DeviceTensor:
        if place.type == "mps" and real.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it.")
        self: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device=CPU,
            requires_grad=False,
        )
        self.numbers, self.place = real, place
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def is_cuda(self) -> bool:
        return self.place.type == "cuda"

    @property
    def is_cpu(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.place})"

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def tolist(self) -> Any:
        _counts.waits[f"{_line()} tolist"] += 1
        return self.numbers.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operator, args, kwargs or {})


def _of_device(value: Any) -> bool:
    """Return whether an argument names a pretended device, in any form."""
    if isinstance(value, str):
        return value.split(":")[0] in ("cuda", "mps")
    return isinstance(value, torch.device) and value.type in ("cuda", "mps")


def _place_named(value: Any) -> torch.device | None:
    """Return the device that an argument of ``Tensor.to`` names, itself or by being a tensor there; None if none."""
    if isinstance(value, Tensor):
        return value.device
    if isinstance(value, torch.device):
        return value
    return torch.device(value) if isinstance(value, str) else None


def _run(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator on the CPU's numbers, after refusing what a device refuses and counting what it costs."""
    name = operator.overloadpacket.__name__
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    there = [each for each in tensors if isinstance(each, DeviceTensor)]
    here = [each for each in tensors if not isinstance(each, DeviceTensor)]
    made = kwargs.get("device")
    if not there and not _of_device(made):
        return operator(*args, **kwargs)
    place = there[0].place if there else made
    if there and name not in COPIES:
        # CPU indices into a tensor on the device are copied there; numbers go along as numbers.
        indices = here if name in INDEXED and isinstance(args[0], DeviceTensor) else []
        wrong = [each for each in here if each.dim() and not any(each is index for index in indices)]
        wrong = wrong or [each for each in indices if name != "index" and each.dim() and each is args[2]]
        if wrong and not _is_of_autograd():
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {place} and cpu! "
                f"({operator}, {_line()})"
            )
    _count(name, operator, there, args)
    real = {key: CPU if key == "device" else _real(value) for key, value in kwargs.items()}
    real.pop("pin_memory", None)
    found = _computed(operator, [_real(each) for each in args], real)
    if name == "copy_" and not isinstance(args[0], DeviceTensor):
        _counts.waits[f"{_line()} copy_"] += 1
        return args[0]
    if operator._schema.is_mutable and name.endswith("_"):
        return args[0]
    return tree_map(lambda each: DeviceTensor(each, place) if isinstance(each, Tensor) else each, found)


def _computed(operator: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Return the result of an operator on the CPU."""
    if operator is torch.ops.aten.bmm.dtype:  # a product with a type of its own, which the CPU has not
        return torch.bmm(args[0].to(args[2]), args[1].to(args[2]))
    if operator is torch.ops.aten.histc.default and not args[0].is_floating_point():  # devices alone count integers
        return operator(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return operator(*args, **kwargs)


def _real(value: Any) -> Any:
    return tree_map(lambda each: each.numbers if isinstance(each, DeviceTensor) else each, value)


def _count(name: str, operator: Any, there: list[DeviceTensor], args: Sequence[Any]) -> None:
    indices = [each for each in args[1] if isinstance(each, DeviceTensor)] if name in INDEXED else []
    by_mask = any(each.dtype in (torch.bool, torch.uint8) for each in indices)
    if name in WAITS or by_mask:
        _counts.waits[f"{_line()} {'mask' if by_mask else name}"] += 1
    if name in UNORDERED and there and there[0].is_floating_point():
        _counts.unordered[f"{_line()} {name}"] += 1
    if any(each.dtype == torch.float64 and each.numel() > 1 for each in there) and not operator.is_view:
        _counts.doubles[f"{_line()} {name}"] += 1


class _Made(TorchDispatchMode):
    """Catches operators that create tensors on the device without an input on the device."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operator, args, kwargs or {})


class _Called(TorchFunctionMode):
    """Catches functions of torch that would call a driver, or that C++ would run on the CPU."""

    def __init__(self, place: torch.device) -> None:
        super().__init__()
        self.place = place

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        if function is Tensor.cpu:
            return self._moved(args[0], CPU, None)
        if function is Tensor.cuda:
            return self._moved(args[0], self.place, None)
        if function is Tensor.pin_memory:  # asks the driver
            return args[0]
        if function is Tensor.to:
            return self._to(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor) and _of_device(kwargs.get("device")):
            if args and isinstance(args[0], Tensor):
                return self._moved(args[0], self.place, kwargs.get("dtype"))
            return DeviceTensor(function(*args, **{**kwargs, "device": CPU}), self.place)
        if function is Tensor.new_tensor and isinstance(args[0], DeviceTensor):
            return DeviceTensor(function(_real(args[0]), *args[1:], **kwargs), self.place)
        if function is nn.functional.one_hot and isinstance(args[0], DeviceTensor):
            if len(args) < 2 and "num_classes" not in kwargs:
                _counts.waits[f"{_line()} one_hot"] += 1
            return DeviceTensor(function(_real(args[0]), *args[1:], **kwargs), self.place)
        # A kind of device without a number would have torch ask the driver for the current one.
        args = [self.place if _of_device(each) else each for each in args]
        return function(*args, **{key: self.place if _of_device(each) else each for key, each in kwargs.items()})

    def _to(self, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *(each for key, each in kwargs.items() if key in ("device", "dtype", "other"))]
        dtypes = [each.dtype if isinstance(each, Tensor) else each for each in given]
        dtype = next((each for each in dtypes if isinstance(each, torch.dtype)), None)
        place = next((found for each in given if (found := _place_named(each)) is not None), None)
        return self._moved(value, place, dtype)

    def _moved(self, value: Tensor, place: torch.device | None, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor on another device, in another type, as autograd's own function if it stays."""
        goes = place is not None and _of_device(place)
        if isinstance(value, DeviceTensor) and place is not None and not goes:
            _counts.waits[f"{_line()} to cpu"] += 1
            value = value.numbers.detach().clone()
        elif not isinstance(value, DeviceTensor) and goes:
            if dtype is not None:
                value = value.to(dtype)
            value = DeviceTensor(value.detach().clone(), self.place)
        return value if dtype is None or dtype == value.dtype else Tensor.to(value, dtype)


def on_device(module: nn.Module, place: torch.device) -> nn.Module:
    """Put a module's parameters and buffers on the pretended device, in place; tied ones stay tied."""
    moved: dict[int, nn.Parameter] = {}
    kept = []
    for inner in module.modules():
        for key, value in inner._parameters.items():
            if value is None or isinstance(value, DeviceTensor):
                continue
            if id(value) not in moved:
                there = DeviceTensor(value.detach().clone(), place)
                moved[id(value)] = nn.Parameter(there, requires_grad=value.requires_grad)
                kept.append(value)  # an id is free for others once its tensor is gone
            inner._parameters[key] = moved[id(value)]
        for key, value in inner._buffers.items():
            if value is not None and not isinstance(value, DeviceTensor):
                inner._buffers[key] = DeviceTensor(value.detach().clone(), place)
    return module


@contextmanager
def pretended(kind: str = "cuda") -> Iterator[tuple[torch.device, Counts]]:
    """Pretend for a while that there is a device; returns it, and what is counted from now on.

    Args:
        kind: ``cuda``, or ``mps``, which has no float64.
    """
    place = torch.device(kind, 0)
    to = nn.Module.to

    def module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if any(_of_device(each) for each in [*args, *kwargs.values()]):
            return on_device(module, place)
        return to(module, *args, **kwargs)

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (nn.Module, "to", module_to),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    _counts.clear()
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        with _Called(place), _Made():
            yield place, _counts
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
