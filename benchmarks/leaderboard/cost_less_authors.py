"""The steps of LESS's authors, in our own words.

For each warm-up checkpoint and each training sample: one backward pass (a batch of 1), Adam's direction
m' / sqrt(v' + 1e-8) from the checkpoint's moments, stored in float16. Every 16 of them are multiplied with a dense
Rademacher matrix of P x k signs, which is made again each time, and scaled to length 1. The same for validation
samples, with the gradient itself. The result is the mean cosine of a training sample with each sub-task.

Facts: Xia et al., LESS (ICML 2024, arXiv 2402.04333), and its published code's settings. The signs are made by a hash
on all cores, which is faster than the generator of the authors' code on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from turns import finished

Sample = dict[str, list[int]]
PairOfMoments = tuple[Tensor, Tensor]

PROJECTED_TOGETHER = 16
PROJECTED_ELEMENTS = 65_536
"""Elements that are projected and timed if the projection's seconds are reckoned."""
SLICE = 1 << 22
"""Elements of stored gradients that are in float32 at a time."""


@dataclass
class Found:
    """What one checkpoint gives.

    Attributes:
        exact: mean cosines of unprojected gradients with each sub-task, (n, S). They take no part in the seconds.
        projected: the same of projected gradients; None if not all elements were projected.
        gradient_seconds: of loading the checkpoint, backward passes and directions.
        projection_seconds: of the dense projection.
        reckoned: whether ``projection_seconds`` was reckoned.
        elements: P.
    """

    exact: NDArray[np.float32]
    projected: NDArray[np.float32] | None
    gradient_seconds: float
    projection_seconds: float
    reckoned: bool
    elements: int


class Steps:
    """The steps on one checkpoint.

    Args:
        model: the model, in evaluation mode; it is given the checkpoint's weights.
        dim: length of a projected gradient, k.
        dtype: type of stored gradients.
        whole: project all elements. Otherwise the projection is timed on the first ``PROJECTED_ELEMENTS`` elements and
            reckoned for all: it is linear in the elements. A block counts by its share of 16 gradients in both cases,
            as if all blocks were full.
    """

    def __init__(
        self, model: torch.nn.Module, dim: int, dtype: torch.dtype = torch.float16, whole: bool = False
    ) -> None:
        self.model, self.dim, self.dtype, self.whole = model, dim, dtype, whole
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.size = sum(value.numel() for value in self.parameters.values())
        self.device = next(iter(self.parameters.values())).device
        self.gradient_seconds = self.projection_seconds = 0.0

    def run(self, folder: Path, pool: Sequence[Sample], subtasks: Mapping[str, Sequence[Sample]]) -> Found:
        """Return the cosines of the pool with the sub-tasks, and the seconds."""
        began = time.perf_counter()
        load_weights(self.model, folder)
        moments = stored_moments(self.model, folder)
        self.gradient_seconds += self._since(began)
        owners = torch.tensor([task for task, part in enumerate(subtasks.values()) for _ in part], device=self.device)
        means = torch.zeros(len(subtasks), self.size, device=self.device)
        projected = []
        validation = [sample for part in subtasks.values() for sample in part]
        for number, block in enumerate(self._blocks(validation, None)):
            projected.append(self._projected(block))
            for row, (vector, length) in enumerate(zip(block, lengths(block).tolist(), strict=True)):
                means[owners[number * PROJECTED_TOGETHER + row]].add_(vector, alpha=1 / length)
        members = (owners == torch.arange(len(subtasks), device=self.device)[:, None]).float()
        members /= members.sum(1, keepdim=True)
        features = members @ torch.cat(projected)
        exact, projected = [], []
        for block in self._blocks(pool, moments):
            projected.append(self._projected(block) @ features.T)
            exact.append(torch.stack([inner(block, mean) / lengths(block) for mean in means], 1))
        exact = torch.cat(exact) * members.amax(1)  # by the number of samples of the sub-task, as its members have it
        return Found(
            exact.cpu().numpy(),
            torch.cat(projected).cpu().numpy() if self.whole else None,
            self.gradient_seconds,
            self.projection_seconds,
            not self.whole,
            self.size,
        )

    def _blocks(self, samples: Sequence[Sample], moments: Mapping[str, PairOfMoments] | None) -> Iterator[Tensor]:
        """Yield the gradients of 16 samples at a time, (b, P), or Adam's directions if there are moments.

        All blocks are in the same memory.
        """
        held = torch.empty(min(PROJECTED_TOGETHER, len(samples)), self.size, dtype=self.dtype, device=self.device)
        for begin in range(0, len(samples), PROJECTED_TOGETHER):
            began = time.perf_counter()
            part = samples[begin : begin + PROJECTED_TOGETHER]
            block = held[: len(part)]
            for row, sample in zip(block, part, strict=True):
                self.vector(sample, moments, row)
            self.gradient_seconds += self._since(began)
            yield block

    def vector(self, sample: Sample, moments: Mapping[str, PairOfMoments] | None, out: Tensor) -> None:
        """Write one sample's gradient, or Adam's direction, to ``out``, (P,)."""
        inputs = {key: torch.tensor([sample[key]], device=self.device) for key in ("input_ids", "labels")}
        loss = self.model(**inputs, use_cache=False).loss
        begin = 0
        values = torch.autograd.grad(loss, list(self.parameters.values()))
        for name, gradient in zip(self.parameters, values, strict=True):
            end = begin + gradient.numel()
            flat = gradient.flatten()
            if moments is not None:
                first, second = moments[name]
                average, square = 0.9 * first + 0.1 * flat, 0.999 * second + 0.001 * flat * flat
                flat = average / (square + 1e-8).sqrt()
            out[begin:end] = flat
            begin = end

    def _projected(self, block: Tensor) -> Tensor:
        """Return projected gradients of length 1, (b, k), and note the seconds."""
        from dataflex.probe.projections import RademacherProjection

        elements = self.size if self.whole else min(self.size, PROJECTED_ELEMENTS)
        began = time.perf_counter()
        out = torch.zeros(len(block), self.dim, device=self.device)
        RademacherProjection(self.dim, 0, self.device).add(out, "all", 0, block[:, :elements].float(), elements)
        out /= out.norm(dim=1, keepdim=True)
        share = len(block) / PROJECTED_TOGETHER
        self.projection_seconds += self._since(began) * share * self.size / elements
        return out

    def _since(self, began: float) -> float:
        finished()
        return time.perf_counter() - began


def lengths(block: Tensor) -> Tensor:
    """Return the lengths of the rows, (b,), float32."""
    parts = [block[:, begin : begin + SLICE].float().square().sum(1) for begin in range(0, block.shape[1], SLICE)]
    return torch.stack(parts).sum(0).sqrt()


def inner(block: Tensor, vector: Tensor) -> Tensor:
    """Return the inner products of the rows with a vector, (b,), float32."""
    cuts = [slice(begin, begin + SLICE) for begin in range(0, block.shape[1], SLICE)]
    return torch.stack([block[:, cut].float() @ vector[cut] for cut in cuts]).sum(0)


def load_model(path: str, adapter: Path | None) -> torch.nn.Module:
    """Return the model in evaluation mode, with a trainable adapter if there is one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model.eval()


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Give the model a checkpoint's weights, of its adapter if it has one."""
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    if isinstance(model, PeftModel):
        found = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    else:
        found = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # a tied head has no entry
    assert not found.unexpected_keys, found.unexpected_keys


def stored_moments(model: torch.nn.Module, folder: Path) -> dict[str, PairOfMoments]:
    """Return Adam's flattened moments in a checkpoint of the Trainer, by the names of the trainable parameters.

    The Trainer's optimizer has two groups: parameters with weight decay, then biases and norms.
    """
    from transformers import Trainer

    stored = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    names = [name for name in parameters if name in decayed] + [name for name in parameters if name not in decayed]
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    found = {}
    for name, number in zip(names, numbers, strict=True):
        state, device = stored["state"][number], parameters[name].device
        assert state["exp_avg"].shape == parameters[name].shape, name
        found[name] = (state["exp_avg"].flatten().to(device), state["exp_avg_sq"].flatten().to(device))
    return found
