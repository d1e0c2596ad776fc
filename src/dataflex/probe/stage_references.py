"""Values of the frozen reference model of a stage's loss, such as the log probabilities of responses, computed once.

The values of a pool are computed before the first measurement that reads the loss of its samples. They are kept in
memory and in a file, so that a resumed run has bitwise the same values. The batches depend neither on the measured
samples nor on the number of processes.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex import distributed
from dataflex.api.measurement import MeasuredBatch, Measurement
from dataflex.data.pool import Pool
from dataflex.data.samples import Samples
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError, ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.probe.runner import Batch, Part, Runner

if TYPE_CHECKING:
    from dataflex.probe.model import ModelProbe

logger = logging.getLogger(__name__)

_SUMMED_ROWS = 1 << 20
"""Number of samples whose values are sent to the other processes at a time."""


@dataclass(frozen=True)
class _ReferenceValues(Measurement):
    """The values of the reference model for each sample, (n, k). The class is internal, so it is not registered."""

    name: ClassVar[str] = "stage_references"
    quantity: ClassVar[str] = "reference value"

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return the values of a batch, (B, k)."""
        assert isinstance(batch, Batch)
        return batch.reference_values()


@dataclass
class StageReferences:
    """Values of the reference model, by pool.

    Attributes:
        folder: folder of the files; None keeps the values in memory alone.
        identity: settings that name the reference model. Stored values of another reference are not read.
    """

    folder: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    _values: WeakKeyDictionary[Pool, NDArray[np.float32]] = field(default_factory=WeakKeyDictionary, init=False)
    _training: Pool | None = field(default=None, init=False)

    def make(self, probe: ModelProbe, samples: Samples | None) -> None:
        """Read or compute the values of all samples of a pool. Collective.

        The values of a list of rows are not kept: the loss computes them with each batch.
        """
        size = 0 if probe.stage_loss is None else probe.stage_loss.reference_size
        if not size or not isinstance(samples, Pool) or not samples.size or samples in self._values:
            return
        found = self._read(probe, samples, size)
        if found is None:
            runner = Runner(probe, _ReferenceValues(), np.arange(samples.size, dtype=np.int64), samples)
            found = runner.each(runner.measurement.measure)
            if found.shape != (samples.size, size):
                raise ComponentError(
                    f"the reference of the stage gave values of shape {found.shape[1:]}, but {size} of each sample."
                )
            if self.folder is not None:
                distributed.on_main(lambda: self._write(samples, found))
        self._values[samples] = found
        if samples is probe.pool:
            self._training = probe.pool

    def kept_reference(self, indices: IndexArray | Tensor) -> Tensor | None:
        """Return the values of training samples, (n, k), float32, on the CPU; None if they are not computed yet."""
        if self._training is None:
            return None
        places = indices.cpu().numpy() if isinstance(indices, Tensor) else indices
        return self.of_batch([(self._training, places)])

    def of_batch(self, parts: Sequence[Part]) -> Tensor | None:
        """Return the values of the samples of a batch, (B, k), on the CPU; None if those of a part are not kept."""
        found = []
        for samples, indices in parts:
            kept = self._values.get(samples) if isinstance(samples, Pool) else None
            if kept is None:
                return None
            found.append(kept[indices])
        return torch.from_numpy(np.concatenate(found)) if found else None

    def _file(self, samples: Pool) -> Path:
        """Return the file of a pool's values."""
        assert self.folder is not None
        return self.folder / f"{samples.fingerprint[:16]}.npz"

    def _key(self, samples: Pool) -> str:
        """Return everything that the values of a pool depend on, as text."""
        return json_text({"samples": samples.fingerprint, **self.identity}, sort_keys=True)

    def _read(self, probe: ModelProbe, samples: Pool, size: int) -> NDArray[np.float32] | None:
        """Return stored values, (N, k), on every process; None if there are none. The main process reads the file."""
        if self.folder is None:
            return None
        here: list[NDArray[np.float32]] = []

        def read() -> bool:
            """Read the values on the main process, and return whether they are those of these samples."""
            try:
                with np.load(self._file(samples), allow_pickle=False) as stored:
                    values, key = stored["values"], str(stored["key"])
            except FileNotFoundError:
                return False
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                logger.warning("%s cannot be read (%s); its values are computed again.", self._file(samples), error)
                return False
            here.append(values)
            return key == self._key(samples) and values.shape == (samples.size, size)

        if not distributed.on_main(read):
            return None
        # Folders of other nodes may lack the file.
        values = here[0] if here else np.zeros((samples.size, size), dtype=np.float32)
        if distributed.world_size() == 1:
            return values
        parts = torch.from_numpy(values).split(_SUMMED_ROWS)
        return np.concatenate([distributed.all_reduce_sum(part.to(probe.device)).cpu().numpy() for part in parts])

    def _write(self, samples: Pool, values: NDArray[np.float32]) -> None:
        """Write the values of a pool, (N, k)."""
        content = io.BytesIO()
        np.savez(content, values=values, key=np.array(self._key(samples)))
        try:
            write_atomically(self._file(samples), content.getbuffer())
        except OSError as error:
            raise ConfigError(
                f"output_dir: {self._file(samples)} cannot be written ({error.strerror or error})."
            ) from error
