"""Session of a run: its inputs and the data loaded so far, shared between the calls of LLaMA-Factory's workflow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dataflex.data.pool import Pool
from dataflex.embedding.stored import StoredEmbeddings
from dataflex.trainer.inputs import RunData, RunInputs
from dataflex.trainer.mixin import DynamicTrainerMixin, WhenLoaded
from dataflex.trainer.ptx import PtxData
from dataflex.trainer.resume import Resume


class Session:
    """State of a run that the functions installed in LLaMA-Factory fill in, in the order in which it calls them.

    Args:
        inputs: inputs of the run.
        when_loaded: called when everything is loaded; the run then ends without training.
        data_only: whether the run ends when the data is loaded, without the model.
    """

    def __init__(self, inputs: RunInputs, when_loaded: WhenLoaded | None = None, data_only: bool = False) -> None:
        self._inputs, self._data, self._when_loaded, self.data_only = inputs, RunData(), when_loaded, data_only

    @property
    def inputs(self) -> RunInputs:
        """Inputs of the run."""
        return self._inputs

    @property
    def data(self) -> RunData:
        """The data loaded so far."""
        return self._data

    @property
    def trains(self) -> bool:
        """Whether the run trains if LLaMA-Factory's keys say so. False if it only loads."""
        return self._when_loaded is None and not self.data_only

    def go_on(self, resume: Resume) -> None:
        """Make the run resume from a checkpoint."""
        self._inputs = self._inputs.going_on(resume)

    def add_pool(self, pool: Pool) -> None:
        """Store the samples that the run plans."""
        self._data = replace(self._data, pool=pool)

    def add_whole(self, samples: Pool) -> None:
        """Store the samples that LLaMA-Factory draws."""
        self._data = replace(self._data, whole=samples)

    def add_validation(self, key: str, samples: Pool) -> None:
        """Store the validation samples of the component with the configuration key ``key``."""
        self._data = replace(self._data, validation={**self._data.validation, key: samples})

    def add_embeddings(self, embeddings: dict[str, StoredEmbeddings]) -> None:
        """Store the embeddings that encoders computed, by configuration key."""
        self._data = replace(self._data, embeddings=embeddings)

    def add_ptx(self, text: PtxData) -> None:
        """Store the text on which a preference run also trains."""
        self._data = replace(self._data, ptx=text)

    def add_evaluation(self, samples: Pool) -> None:
        """Store the evaluation samples."""
        self._data = replace(self._data, evaluation=samples)

    def trainer(self, kind: type[DynamicTrainerMixin], **arguments: Any) -> DynamicTrainerMixin:
        """Return the trainer of the run.

        Args:
            kind: the mixin over LLaMA-Factory's class.
            arguments: LLaMA-Factory's arguments of the class.
        """
        return kind(inputs=self._inputs, data=self._data, when_loaded=self._when_loaded, **arguments)
