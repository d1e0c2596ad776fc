"""Encoder embeddings of a run: computed once before the model is loaded, for all components that need them."""

from __future__ import annotations

import logging
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
from dataflex.data.sample_media import media_in
from dataflex.embedding.encoders import EncoderChoice, choose
from dataflex.embedding.making import EncoderRun, told
from dataflex.embedding.store import EmbeddingStore
from dataflex.embedding.texts import SampleTexts, TextList
from dataflex.errors import ComponentError, ConfigError, DataFlexError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

logger = logging.getLogger(__name__)

FOLDER = "embeddings"
"""Default folder for embeddings, inside the output folder."""


@dataclass(frozen=True, eq=False)
class StoredEmbeddings:
    """The encoder embeddings of one component.

    Attributes:
        pool: the samples of the run.
        of_pool: embeddings of the pool, on disk.
        validation: the component's validation samples, or None.
        of_validation: embeddings of the validation samples, or None.
    """

    pool: Pool
    of_pool: EmbeddingStore
    validation: Pool | None = None
    of_validation: EmbeddingStore | None = None

    def of(self, samples: Pool | None) -> NDArray[np.floating[Any]]:
        """Return the embeddings of all samples of a pool, as a memory map. None means the pool of the run.

        Raises:
            ComponentError: if ``samples`` is neither the run's pool nor the component's validation samples.
        """
        if samples is None or samples is self.pool:
            return self.of_pool.array()
        if self.of_validation is None or samples is not self.validation:
            raise ComponentError(
                "an encoder gives embeddings of the run's pool and of the component's validation samples only; call "
                "ctx.embeddings() or ctx.embeddings(ctx.validation)."
            )
        return self.of_validation.array()


class RunEncoders:
    """The encoders that the components of a run need. Each encoder is loaded at most once.

    Args:
        wanted: the embedding parameters of the components, by configuration key.
        output_dir: the output folder of the run.
        device: the device of the encoders on this process.
        progress: whether to show progress bars.

    Raises:
        DataFlexError: if an encoder does not exist, or a service does not answer.
    """

    def __init__(
        self, wanted: Mapping[str, EmbeddingParams], output_dir: Path, device: torch.device | str, progress: bool
    ) -> None:
        self._wanted = {key: params for key, params in wanted.items() if params.encoder is not None}
        self._runs: dict[tuple[EncoderChoice, Path], EncoderRun] = {}
        """One run per encoder and folder, which components share."""
        self._run_of: dict[str, EncoderRun] = {}
        """The run of each component, by configuration key."""
        for key, params in self._wanted.items():
            choice = _named(key, partial(choose, params))
            root = Path(params.embedding_folder).expanduser() if params.embedding_folder else output_dir / FOLDER
            run = self._runs.setdefault((choice, root), EncoderRun(choice, root, device, progress))
            self._run_of[key] = run
            if choice.backend == "openai":  # an unreachable service is reported before any other work
                _named(key, run.open)

    def make(self, pool: Pool, validation: Mapping[str, Pool]) -> dict[str, StoredEmbeddings]:
        """Return the embeddings of each component, by configuration key. Collective.

        Missing embeddings are computed first.

        Args:
            pool: the samples of the run.
            validation: the validation samples of the components that need them, by configuration key.

        Raises:
            ConfigError: if none of the samples, or none of the validation samples, has text.
            DataFlexError: if an encoder or the disk fails.
        """
        made: dict[tuple[int, int, str], EmbeddingStore] = {}

        def of(key: str, samples: Pool, what: str) -> EmbeddingStore:
            run, part = self._run_of[key], self._wanted[key].embedding_text
            place = id(run), id(samples), part
            if place not in made:
                if media_in(samples):
                    logger.warning(
                        "dataflex.%s.encoder reads the text of samples alone; their %s do not count.",
                        key,
                        " and ".join(media_in(samples)),
                    )
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
    """Return a function's value on this process, after all processes have called it. Errors name the component's key.

    Raises:
        ConfigError: instead of an error of the function. The text of such an error begins with a parameter.
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
    """Return an encoder's embeddings of texts as a memory map, (n, H). Collective.

    The embeddings are computed once and stored in a folder.

    Args:
        texts: the texts. A text of only white space has a row of zeros.
        params: the parameters that name the encoder. Their text part and folder are not used.
        folder: the folder of the stores.
        device: the device of the encoder on this process.

    Raises:
        DataFlexError: if the encoder or the disk fails. Finished chunks stay on disk.

    Example:
        A selector that prefers samples whose text is similar to a topic:

        >>> from pathlib import Path
        >>> from dataflex import EmbeddingParams, Needs, Selector, SelectorParams, embed_texts
        >>> class TopicParams(SelectorParams, EmbeddingParams):
        ...     topic: str = "proofs in number theory"
        >>> class Topic(Selector[TopicParams]):
        ...     def needs(self, run):
        ...         return Needs(embeddings=self.params)
        ...     def begin(self, ctx):
        ...         self.direction = embed_texts([self.params.topic], self.params, Path("topics"))[0]
        ...     def score(self, ctx, candidates):
        ...         return ctx.embeddings()[candidates] @ self.direction
    """
    run = EncoderRun(choose(params), Path(folder), device)
    try:
        return run.embed(TextList(texts)).array()
    finally:
        run.close()
