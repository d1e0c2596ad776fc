"""What a run of ours is given and has loaded so far, from one call of LLaMA-Factory's workflow to the next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dataflex.data.pool import Pool
from dataflex.embedding.stored import StoredEmbeddings
from dataflex.trainer.inputs import RunData, RunInputs
from dataflex.trainer.mixin import DynamicTrainerMixin, WhenLoaded
from dataflex.trainer.resume import Resume


class Session:
    """Is filled by the functions that stand in LLaMA-Factory's places, in the order in which it calls them.

    Args:
        inputs: what the run is given.
        when_loaded: what is called when everything is loaded; nothing is then trained.
        data_only: whether to leave when the data is loaded, without the model.
    """

    def __init__(self, inputs: RunInputs, when_loaded: WhenLoaded | None = None, data_only: bool = False) -> None:
        self._inputs, self._data, self._when_loaded, self.data_only = inputs, RunData(), when_loaded, data_only

    @property
    def inputs(self) -> RunInputs:
        """What the run is given."""
        return self._inputs

    @property
    def data(self) -> RunData:
        """What is loaded so far."""
        return self._data

    @property
    def trains(self) -> bool:
        """Whether the run is to train if LLaMA-Factory's keys say so, and is not only loaded."""
        return self._when_loaded is None and not self.data_only

    def go_on(self, resume: Resume) -> None:
        """Have the run go on from a checkpoint."""
        self._inputs = self._inputs.going_on(resume)

    def add_pool(self, pool: Pool) -> None:
        """Take the samples the run plans."""
        self._data = replace(self._data, pool=pool)

    def add_whole(self, samples: Pool) -> None:
        """Take the samples LLaMA-Factory draws."""
        self._data = replace(self._data, whole=samples)

    def add_validation(self, key: str, samples: Pool) -> None:
        """Take the validation samples of a component, named by its configuration key."""
        self._data = replace(self._data, validation={**self._data.validation, key: samples})

    def add_embeddings(self, embeddings: dict[str, StoredEmbeddings]) -> None:
        """Take the embeddings that encoders made, by configuration key."""
        self._data = replace(self._data, embeddings=embeddings)

    def add_evaluation(self, samples: Pool) -> None:
        """Take the evaluation samples."""
        self._data = replace(self._data, evaluation=samples)

    def trainer(self, kind: type[DynamicTrainerMixin], **arguments: Any) -> DynamicTrainerMixin:
        """Return the trainer of the run.

        Args:
            kind: the mixin over LLaMA-Factory's class.
            arguments: LLaMA-Factory's.
        """
        return kind(inputs=self._inputs, data=self._data, when_loaded=self._when_loaded, **arguments)
