"""What the methods share that compare embeddings of samples with those of validation samples."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    ComponentError,
    ConfigError,
    EmbeddingArray,
    EmbeddingParams,
    IndexArray,
    Needs,
    RoundContext,
    RunView,
    Selector,
    ValidationParams,
    find_neighbours,
)


class TargetParams(ValidationParams, EmbeddingParams):
    """Parameters of selectors that compare embeddings of samples with those of validation samples."""


TargetT = TypeVar("TargetT", bound=TargetParams, covariant=True)


class TargetSelector(Selector[TargetT]):
    """Base of selectors that compare embeddings of samples with those of validation samples, the queries."""

    def needs(self, run: RunView) -> Needs:
        """Return the embeddings and the validation samples."""
        return Needs(embeddings=self.params, validation=self.params)

    def queries(self, ctx: RoundContext) -> tuple[EmbeddingArray, IndexArray]:
        """Return the embeddings of the validation samples that have text, and the sub-task of each.

        Raises:
            ComponentError: if none has.
        """
        vectors = ctx.embeddings(ctx.validation)
        rows = np.flatnonzero(np.any(vectors != 0, axis=1))
        if not rows.size:
            raise ComponentError(
                f"selector {self.name!r}: no validation sample has text to embed; check the data and embedding_text."
            )
        return vectors[rows], ctx.validation.domain_ids(rows)


class NeighbourParams(TargetParams):
    """Parameters of selectors that look up the nearest candidates of every validation sample."""

    search: Literal["auto", "exact", "faiss"] = Field(
        "auto",
        description="How neighbours are found: exactly, by an index of faiss, or exactly up to two million candidates.",
    )


NeighbourT = TypeVar("NeighbourT", bound=NeighbourParams, covariant=True)


class NeighbourSelector(TargetSelector[NeighbourT]):
    """Base of selectors that look up the nearest candidates of every validation sample."""

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield that faiss is not installed."""
        yield from super().problems(run)
        if self.params.search == "faiss" and find_spec("faiss") is None:
            yield "search", "faiss is not installed; pip install 'dataflex[embeddings]', or set search: exact."

    def neighbours(
        self,
        ctx: RoundContext,
        base: EmbeddingArray,
        k: int,
        metric: Literal["cosine", "l2"],
        measured: int | None = None,
    ) -> tuple[IndexArray, NDArray[np.float32]]:
        """Return the ``k`` nearest of some embeddings to each validation sample's, and the distances, both (M, k).

        ``measured``: of how many the order is exact, and not only up to rounding; None: of all.
        """
        queries, _ = self.queries(ctx)
        found = find_neighbours(queries, base, k, metric=metric, search=self.params.search, measured=measured)
        if found.recall is not None:
            ctx.note(
                f"select {self.name}: faiss found {100 * found.recall:.1f} % of the {found.indices.shape[1]} nearest "
                f"neighbours among {len(base)} candidates, compared with an exact search for some of the "
                f"{len(queries)} validation samples."
            )
        return found.indices, found.distances


def usable(selector: Selector[Any], ctx: RoundContext, candidates: IndexArray, count: int) -> IndexArray:
    """Return the candidates that have a token to train on.

    Raises:
        ComponentError: if they are fewer than are wanted.
    """
    trained = candidates[ctx.pool.trained[candidates]]
    if trained.size < count:
        raise ComponentError(
            f"selector {selector.name!r}: {count} samples are wanted, and only {trained.size} of {candidates.size} "
            "have a token to train on. Shorten update_steps or check the data."
        )
    return trained


def vectors_of(ctx: RoundContext, samples: IndexArray) -> EmbeddingArray:
    """Return the embeddings of some samples of the pool, shape (n, H); of all of them without a copy."""
    vectors = ctx.embeddings()
    return vectors if samples.size == ctx.pool.size else vectors[samples]


def scanned(table: NDArray[np.integer]) -> tuple[IndexArray, IndexArray]:
    """Return the distinct numbers of a table, column by column, and the place of each in that reading.

    Args:
        table: a row for each query, nearest first, shape (M, k).
    """
    reading = np.asarray(table).T.ravel()
    numbers, first = np.unique(reading, return_index=True)
    order = np.argsort(first, kind="stable")
    return numbers[order].astype(np.int64), first[order]


def array_file(path: str, dimensions: int) -> NDArray[Any]:
    """Return the array in a ``.npy`` file, as a memory map.

    Raises:
        ConfigError: if there is no such file, or it holds no array of numbers with so many dimensions.
    """
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path!r} cannot be read as a .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ConfigError(f"{path!r} holds several arrays; one is needed, as numpy.save writes it.")
    if array.ndim != dimensions or not array.size or not np.issubdtype(array.dtype, np.number):
        raise ConfigError(
            f"{path!r} holds {array.dtype} of shape {array.shape}; needed are numbers in {dimensions} "
            f"dimension{'s' if dimensions > 1 else ''}."
        )
    return array


def file_problems(parameter: str, path: str, dimensions: int) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a ``.npy`` file, and with its name."""
    if not Path(path).is_file():
        yield parameter, f"there is no file {path!r}."
        return
    try:
        array_file(path, dimensions)
    except ConfigError as error:
        yield parameter, str(error)
