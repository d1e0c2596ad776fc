"""Training on plain text or on instructions beside a preference loss, as PPO-ptx of InstructGPT does.

The loss of a step is L = L_preference + coefficient * L_ptx (Ouyang et al., arXiv 2203.02155, equation 2). L_ptx is the
mean loss of the tokens of the step's text on all processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dataflex import distributed
from dataflex.data.pool import Pool
from dataflex.data.rng import key_of
from dataflex.data.sampling import IndexArray, KeyedPermutation
from dataflex.data.token_loss import IGNORE_INDEX, shifted, token_losses

if TYPE_CHECKING:
    from dataflex.config.ptx import PtxSettings
    from dataflex.trainer.mixin import DynamicTrainerMixin

Row = dict[str, Any]


@dataclass(frozen=True)
class PtxData:
    """The text of a run.

    Attributes:
        samples: the samples.
        collate: makes a batch with labels from rows, with the trainer's tokenizer.
    """

    samples: Pool
    collate: Callable[[Any, list[Row]], Row]


class Ptx:
    """Adds the gradient of the text to that of the preference loss.

    The samples of a step depend on the step number and the seed alone, so a resumed run needs no state.

    Args:
        trainer: trainer of the run.
        settings: the settings of ``dataflex.ptx``.
        data: the text.
    """

    def __init__(self, trainer: DynamicTrainerMixin, settings: PtxSettings, data: PtxData) -> None:
        self._trainer, self._settings, self._data = trainer, settings, data
        self._size = settings.batch_size or trainer.args.per_device_train_batch_size
        self._waiting: deque[Row] = deque()
        """Batches of the micro-batches of the step that have not been trained on."""
        self._tokens = torch.ones((), device=trainer.args.device)
        """Tokens of the step's text on all processes that count in the loss, at least 1."""
        self._total = torch.zeros((), device=trainer.args.device)
        """Sum of this process's parts of L_ptx of the steps since the last log."""
        self._steps = 0

    def begin(self, step: int, micro_batches: int) -> None:
        """Read the text of a step. Collective.

        Args:
            step: number of the step, from 0.
            micro_batches: micro-batches of the step on this process.
        """
        if not micro_batches:  # the Trainer asks once more at the end of an epoch
            return
        args, samples = self._trainer.args, self._data.samples
        width = self._size * args.world_size
        first = step * args.gradient_accumulation_steps * width + args.process_index * self._size
        positions = first + width * np.arange(micro_batches)[:, None] + np.arange(self._size)
        places = samples_at(positions.ravel(), samples.size, self._trainer.dataflex.inputs.settings.seed)
        rows = samples.dataset.__getitems__(places.tolist())
        batches = [rows[begin : begin + self._size] for begin in range(0, len(rows), self._size)]
        self._waiting = deque(self._data.collate(self._trainer, batch) for batch in batches)
        own = sum(int((shifted(batch["labels"]) != IGNORE_INDEX).sum()) for batch in self._waiting)
        self._tokens = distributed.all_reduce_sum(torch.tensor(own, device=args.device)).clamp(min=1)
        self._steps += 1

    def add_gradient(self, model: torch.nn.Module) -> None:
        """Add the gradient of one micro-batch of text, before the gradient of the preference loss.

        This is a forward and a backward pass of its own. Reentrant gradient checkpointing allows no two forward passes
        of one backward pass under DDP and ZeRO. The processes average their gradients in the backward pass of the
        preference loss.

        Args:
            model: the wrapped model.
        """
        trainer = self._trainer
        batch = trainer._prepare_inputs(self._waiting.popleft())
        labels = shifted(batch.pop("labels"))
        _to_training(model, trainer.optimizer)
        deepspeed = {"scale_wrt_gas": False} if trainer.is_deepspeed_enabled else {}
        with _without_synchronization(trainer.accelerator, model):
            with trainer.compute_loss_context_manager():
                logits = model(**batch, use_cache=False, return_dict=True)[0]
            loss = token_losses(logits, labels).sum() / self._tokens
            # Gradients are averaged over the processes, and this loss is a part of a sum over them.
            share = self._settings.coefficient * trainer.args.world_size * loss
            trainer.accelerator.backward(share, **deepspeed)
        self._total = self._total + loss.detach().float()

    def take(self) -> float | None:
        """Return the mean of L_ptx over the steps since the last call, or None if there was no step. Collective."""
        if not self._steps:
            return None
        mean = float(distributed.all_reduce_sum(self._total.clone())) / self._steps
        self._total, self._steps = torch.zeros_like(self._total), 0
        return mean


def samples_at(positions: IndexArray, size: int, seed: int) -> IndexArray:
    """Return the samples at positions of an endless sequence of passes, each of which has every sample once.

    Args:
        positions: positions in the sequence, (n,), >= 0.
        size: number of samples.
        seed: the seed of the run.
    """
    numbers, places = np.divmod(positions, size)
    found = np.empty_like(positions)
    for number in np.unique(numbers):
        of_pass = numbers == number
        found[of_pass] = KeyedPermutation(size, key_of(seed, "ptx", int(number)))(places[of_pass])
    return found


def _to_training(model: torch.nn.Module, optimizer: Any) -> None:
    """Put the model and an optimizer that has such a mode into training mode, as a step of the Trainer does first."""
    model.train()
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()


@contextmanager
def _without_synchronization(accelerator: Any, model: torch.nn.Module) -> Iterator[None]:
    """Collect gradients of a backward pass on each process, and make no optimizer step.

    Under DeepSpeed accelerate makes the step in the backward pass of the last micro-batch, so that this one must not
    count as the last.
    """
    state, synchronizes = accelerator.gradient_state, accelerator.sync_gradients
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(synchronizes)
