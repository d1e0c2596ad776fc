"""The embeddings of a run that encoders make: before the model is loaded, once, for all components that ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.api.params import EmbeddingParams
from dataflex.data.pool import Pool
from dataflex.embedding.encoders import EncoderChoice, choose
from dataflex.embedding.making import EncoderRun, told
from dataflex.embedding.store import EmbeddingStore
from dataflex.embedding.texts import SampleTexts, TextList
from dataflex.errors import ComponentError, ConfigError, DataFlexError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

FOLDER = "embeddings"
"""In the output folder, where no other is named."""


@dataclass(frozen=True, eq=False)
class StoredEmbeddings:
    """What one component reads of an encoder's embeddings.

    Attributes:
        pool: the samples of the run.
        of_pool: their embeddings, on disk.
        validation: the component's validation samples; None: it asks for none.
        of_validation: their embeddings.
    """

    pool: Pool
    of_pool: EmbeddingStore
    validation: Pool | None = None
    of_validation: EmbeddingStore | None = None

    def of(self, samples: Pool | None) -> NDArray[np.floating[Any]]:
        """Return the embeddings of all samples of a pool, a memory map; None: of the run's.

        Raises:
            ComponentError: if they are other samples than those of the run and of the component's validation set.
        """
        if samples is None or samples is self.pool:
            return self.of_pool.array()
        if self.of_validation is None or samples is not self.validation:
            raise ComponentError(
                "an encoder's embeddings are those of the run's pool and of the component's validation samples; ask "
                "for ctx.embeddings() or ctx.embeddings(ctx.validation)."
            )
        return self.of_validation.array()


class RunEncoders:
    """The encoders that the components of a run ask for; each is loaded at most once.

    Args:
        wanted: which embeddings components ask for, by configuration key.
        output_dir: of the run.
        device: where encoders run on this process.
        progress: whether to show progress bars.

    Raises:
        DataFlexError: if an encoder is not there, or a service does not answer.
    """

    def __init__(
        self, wanted: Mapping[str, EmbeddingParams], output_dir: Path, device: torch.device | str, progress: bool
    ) -> None:
        self._wanted = {key: params for key, params in wanted.items() if params.encoder is not None}
        self._runs: dict[tuple[EncoderChoice, Path], EncoderRun] = {}
        self._run_of: dict[str, EncoderRun] = {}
        for key, params in self._wanted.items():
            choice = _named(key, partial(choose, params))
            root = Path(params.embedding_folder).expanduser() if params.embedding_folder else output_dir / FOLDER
            run = self._runs.setdefault((choice, root), EncoderRun(choice, root, device, progress))
            self._run_of[key] = run
            if choice.backend == "openai":  # whether it answers shows now
                _named(key, run.open)

    def make(self, pool: Pool, validation: Mapping[str, Pool]) -> dict[str, StoredEmbeddings]:
        """Return what each component reads, by configuration key, after making what is missing. Collective.

        Args:
            pool: the samples of the run.
            validation: the validation samples of the components that asked for some.

        Raises:
            ConfigError: if none of the samples, or of the validation samples, has text.
            DataFlexError: if an encoder or the disk fails.
        """
        made: dict[tuple[int, int, str], EmbeddingStore] = {}

        def of(key: str, samples: Pool, what: str) -> EmbeddingStore:
            run, part = self._run_of[key], self._wanted[key].embedding_text
            place = id(run), id(samples), part
            if place not in made:
                made[place] = told(partial(run.embed, SampleTexts(samples, part), what), what)
            return made[place]

        found = {}
        try:
            with distributed.together():
                for key in self._wanted:
                    of_pool, held = of(key, pool, "samples"), validation.get(key)
                    of_held = None if held is None else of(key, held, "validation samples")
                    found[key] = StoredEmbeddings(pool, of_pool, held, of_held)
                    for store, what in ((of_pool, "sample"), (of_held, "validation sample")):
                        if store is not None and not np.any(store.array()):
                            part = self._wanted[key].embedding_text
                            raise ConfigError(
                                f"dataflex.{key}.embedding_text: no {what} has text to embed ({part}); check the data."
                            )
        finally:
            for run in self._runs.values():
                run.close()
        return found


def _named(key: str, function: Callable[[], T]) -> T:
    """Return a function's value on this process, after all have called it; errors name the component's key.

    Raises:
        ConfigError: in the place of the function's errors, which begin with a parameter.
    """
    found: list[T] = []
    try:
        distributed.on_each(lambda: found.append(function()))
    except DataFlexError as error:
        raise ConfigError(f"dataflex.{key}.{' '.join(str(error).split())}") from error
    return found[0]


def embed_texts(
    texts: Sequence[str], params: EmbeddingParams, folder: Path, device: torch.device | str = "cpu"
) -> NDArray[np.floating[Any]]:
    """Return an encoder's embeddings of texts, a memory map, (n, H); made once and kept in a folder. Collective.

    Args:
        texts: one without anything but white space has a row of zeros.
        params: name the encoder; the part of a sample and the folder in them are not read.
        folder: where the stores are.
        device: where the encoder runs on this process.

    Raises:
        DataFlexError: if the encoder or the disk fails; finished chunks stay.
    """
    run = EncoderRun(choose(params), Path(folder), device)
    try:
        return run.embed(TextList(texts)).array()
    finally:
        run.close()
