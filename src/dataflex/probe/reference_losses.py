"""Access of a component to its reference at a decision: losses of samples and of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dataflex.data.pool import Pool
from dataflex.data.rules import ScoreArray
from dataflex.data.samples import Samples
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError
from dataflex.probe.mode import preserved_rng
from dataflex.probe.reference import ReferenceModel
from dataflex.probe.reference_table import ReferenceTable

_BLOCK = 4096
"""Number of samples whose token losses are in memory at a time while their means are computed."""

Compute = Callable[[Samples, IndexArray, ReferenceModel], tuple[NDArray[np.int64], NDArray[np.float32]]]
"""Returns the number of losses of each sample, and the losses sample after sample."""


@dataclass
class ReferenceLosses:
    """The reference of a component; implements :class:`~dataflex.api.reference.Reference`.

    Attributes:
        key: configuration key of the component, for messages.
        pool: the run's samples.
        table: table of the pool's losses, if the component names one.
        model: returns the frozen model, which it loads at the first use; None if the component names only a table.
        compute: runs the model on samples.
    """

    key: str
    pool: Pool
    table: ReferenceTable | None
    model: Callable[[], ReferenceModel] | None
    compute: Compute
    _means: dict[int, tuple[Samples, ScoreArray, NDArray[np.bool_]]] = field(default_factory=dict)
    """The pool, its mean losses and whether each is known, by ``id`` of the pool; a frozen model's means stay valid."""

    def losses(self, indices: IndexArray, samples: Samples | None = None) -> ScoreArray:
        """Return the reference's token-mean loss of each sample, (n,), float32; NaN without a trained token."""
        pool = samples or self.pool
        if id(pool) not in self._means:
            self._means[id(pool)] = pool, np.full(pool.size, np.nan, np.float32), np.zeros(pool.size, dtype=bool)
        _, means, known = self._means[id(pool)]
        missing = np.unique(indices[~known[indices]])
        for begin in range(0, missing.size, _BLOCK):
            block = missing[begin : begin + _BLOCK]
            stored = self.table.means(block) if self.table is not None and pool is self.pool else None
            if stored is not None:
                means[block] = stored
            else:
                for index, losses in zip(block.tolist(), self.token_losses(block, samples), strict=True):
                    if losses.size:
                        means[index] = losses.mean(dtype=np.float64)
            known[block] = True
        return means[indices]

    def token_losses(self, indices: IndexArray, samples: Samples | None = None) -> list[NDArray[np.float32]]:
        """Return the reference's losses of the trained tokens of each sample, from left to right.

        Raises:
            ComponentError: if the component has only a table and the samples are not in the pool, or if a loss is not
                finite.
        """
        pool = samples or self.pool
        if self.table is not None and pool is self.pool:
            found = self.table.rows(indices)
        elif self.model is None:
            raise ComponentError(
                f"dataflex.{self.key}.reference_losses holds the losses of the training samples only, but the "
                f"component needs the losses of other samples; set reference_model, too."
            )
        else:
            with preserved_rng():
                counts, values = self.compute(pool, indices, self.model())
            found = np.split(values, np.cumsum(counts)[:-1])
        broken = next((index for index, each in zip(indices, found, strict=True) if not np.isfinite(each).all()), None)
        if broken is not None:
            of = "pool index" if pool is self.pool else "validation sample"
            raise ComponentError(
                f"dataflex.{self.key}: the reference's loss on {of} {broken} is not finite: the reference model "
                "overflows in this precision, or the table of its losses is damaged."
            )
        return found
