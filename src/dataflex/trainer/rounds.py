"""The training data loader: each round gets a separate loader, opened exactly between two optimizer steps.

The Trainer fetches all micro-batches of an optimizer step together. So the code after a round's last batch runs when
the next step requests data: after the optimizer step, its callbacks, its evaluation and its checkpoint. Prefetching,
workers and accelerate's look-ahead never cross the end of a round, because each round has a separate loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer_utils import seed_worker

from dataflex.data.rng import key_of
from dataflex.data.sample_media import collated
from dataflex.data.sampling import IndexArray
from dataflex.planning.planner import Plan

if TYPE_CHECKING:
    from dataflex.trainer.mixin import DynamicTrainerMixin

INDEX_KEY = "dataflex_index"
"""Key of the samples' indices in a batch. It is removed before the model receives the batch."""

Row = dict[str, Any]
_CHUNK = 4096


class IndexedDataset(Dataset):
    """Rows of a map-style data set, paired with their indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Row]]:
        """Return several rows at once. A DataLoader calls this, if it exists, instead of reading row by row."""
        return list(zip(indices, self.dataset.__getitems__(indices), strict=True))


class IndexedCollator:
    """Collator that adds the rows' indices to the batch, counted from ``first``."""

    def __init__(self, collate: Callable[[list[Row]], Row], first: int = 0) -> None:
        self.collate, self.first = collate, first

    def __call__(self, rows: list[tuple[int, Row]]) -> Row:
        """Return the collated batch."""
        indices = [self.first + index for index, _ in rows]
        batch = collated(self.collate, [row for _, row in rows], indices)
        batch[INDEX_KEY] = torch.tensor(indices, dtype=torch.int64)
        return batch


class IndexSampler(Sampler[int]):
    """Sampler of given indices.

    It converts them to Python integers in chunks, so that a long plan needs little memory.
    """

    def __init__(self, indices: IndexArray) -> None:
        self.indices = indices

    def __len__(self) -> int:
        return self.indices.size

    def __iter__(self) -> Iterator[int]:
        for begin in range(0, self.indices.size, _CHUNK):
            yield from self.indices[begin : begin + _CHUNK].tolist()


class RoundStream:
    """All training micro-batches of this process, round after round; the return value of ``get_train_dataloader``.

    Its length is that of the whole run, so the Trainer sees one epoch of ``max_steps`` optimizer steps.
    """

    def __init__(self, trainer: DynamicTrainerMixin) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        args = self._trainer.args
        return args.max_steps * args.gradient_accumulation_steps

    @property
    def dataset(self) -> Any:
        """The samples of the pool. The Trainer logs their number."""
        return self._trainer.train_dataset

    def __iter__(self) -> Iterator[Row]:
        trainer = self._trainer
        while trainer.state.global_step < trainer.args.max_steps:
            plan = trainer.started.planned.plan_for(trainer.state.global_step)
            skipped = trainer.state.global_step - plan.slot.start_step
            wanted = (plan.slot.steps - skipped) * trainer.args.gradient_accumulation_steps
            delivered = 0
            for batch in self._open(plan, skipped):
                delivered += 1
                yield batch
            if delivered != wanted:
                raise RuntimeError(f"round {plan.slot.number} delivered {delivered} micro-batches instead of {wanted}")

    def _open(self, plan: Plan, skipped: int) -> Iterator[Row]:
        """Yield this process's micro-batches of a plan, without those of its first ``skipped`` optimizer steps."""
        trainer, args = self._trainer, self._trainer.args
        workers = args.dataloader_num_workers
        indices = plan.indices[skipped * trainer.dataflex.steps.global_batch_size :]
        # The loader has a separate random generator. A loader draws the base seed of its workers when it is iterated,
        # and a draw from the global stream would make a resumed run differ from an uninterrupted one.
        generator = torch.Generator().manual_seed(key_of(args.seed, "loader", plan.slot.number) % 2**63)
        # `prepare` deals the batches of the plan to the processes in turn.
        loader = trainer.accelerator.prepare(
            DataLoader(
                IndexedDataset(trainer.train_dataset),
                batch_size=trainer._train_batch_size,
                sampler=IndexSampler(indices),
                collate_fn=IndexedCollator(trainer.data_collator),
                num_workers=workers,
                pin_memory=args.dataloader_pin_memory,
                prefetch_factor=args.dataloader_prefetch_factor if workers else None,
                worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
                generator=generator,
            )
        )
        try:
            yield from loader
        finally:
            # `prepare` stores every loader for the life of the accelerator, so a run of many rounds would collect
            # them all.
            loaders = trainer.accelerator._dataloaders
            loaders[:] = [other for other in loaders if other is not loader]
