"""Shared base of the methods that compare embeddings of samples with embeddings of validation samples."""

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
    """Parameters of selectors that compare embeddings of samples with embeddings of validation samples."""


TargetT = TypeVar("TargetT", bound=TargetParams, covariant=True)


class TargetSelector(Selector[TargetT]):
    """Base of selectors that compare embeddings of samples with embeddings of validation samples, the queries."""

    def needs(self, run: RunView) -> Needs:
        """Return the embeddings and the validation samples."""
        return Needs(embeddings=self.params, validation=self.params)

    def queries(self, ctx: RoundContext) -> tuple[EmbeddingArray, IndexArray]:
        """Return the embeddings of the validation samples that have text, (M, H), and the sub-task of each, (M,).

        Raises:
            ComponentError: if no validation sample has text.
        """
        vectors = ctx.embeddings(ctx.validation)
        rows = np.flatnonzero(np.any(vectors != 0, axis=1))
        if not rows.size:
            raise ComponentError(
                f"selector {self.name!r}: no validation sample has text to embed. Check the data and embedding_text."
            )
        return vectors[rows], ctx.validation.domain_ids(rows)


class NeighbourParams(TargetParams):
    """Parameters of selectors that search the nearest candidates of every validation sample."""

    search: Literal["auto", "exact", "faiss"] = Field(
        "auto",
        description="Search for neighbours: exact; faiss, an approximate index; auto, faiss above two million "
        "candidates if it is installed, else exact.",
    )


NeighbourT = TypeVar("NeighbourT", bound=NeighbourParams, covariant=True)


class NeighbourSelector(TargetSelector[NeighbourT]):
    """Base of selectors that search the nearest candidates of every validation sample."""

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield a problem if ``search: faiss`` is set and faiss is not installed."""
        yield from super().problems(run)
        if self.params.search == "faiss" and find_spec("faiss") is None:
            yield "search", "faiss is not installed. Run pip install 'dataflex[embeddings]', or set search: exact."

    def neighbours(
        self,
        ctx: RoundContext,
        base: EmbeddingArray,
        k: int,
        metric: Literal["cosine", "l2"],
        measured: int | None = None,
    ) -> tuple[IndexArray, NDArray[np.float32]]:
        """Return the ``k`` nearest rows of ``base`` to each query, and their distances, both of shape (M, k).

        Args:
            ctx: the round.
            base: embeddings of the candidates, shape (N, H).
            k: number of neighbours of each query; if ``base`` has fewer rows, the shape is (M, N).
            metric: ``cosine`` (1 - cosine) or ``l2`` (the Euclidean distance).
            measured: the first neighbours of each query whose order is exact; the others are ordered up to rounding.
                None means all.
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
        ComponentError: if these are fewer than ``count``.
    """
    trained = candidates[ctx.pool.trained[candidates]]
    if trained.size < count:
        raise ComponentError(
            f"selector {selector.name!r}: {count} samples are wanted, and only {trained.size} of {candidates.size} "
            "have a token to train on. Lower update_steps or check the data."
        )
    return trained


def vectors_of(ctx: RoundContext, samples: IndexArray) -> EmbeddingArray:
    """Return the embeddings of some samples of the pool, shape (n, H); those of the whole pool without a copy."""
    vectors = ctx.embeddings()
    return vectors if samples.size == ctx.pool.size else vectors[samples]


def scanned(table: NDArray[np.integer]) -> tuple[IndexArray, IndexArray]:
    """Return the distinct entries of a table, read column by column, and the position of each in that reading.

    Args:
        table: one row per query, nearest neighbour first, shape (M, k).

    Returns:
        The entries in the order of their first occurrence, and the positions of these occurrences, both of shape (n,).
    """
    reading = np.asarray(table).T.ravel()
    numbers, first = np.unique(reading, return_index=True)
    order = np.argsort(first, kind="stable")
    return numbers[order].astype(np.int64), first[order]


def array_file(path: str, dimensions: int) -> NDArray[Any]:
    """Return the array in a ``.npy`` file as a memory map.

    Raises:
        ConfigError: if the file cannot be read, or its array is empty, not numeric, or not of ``dimensions``
            dimensions.
    """
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path!r} cannot be read as a .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ConfigError(f"{path!r} holds several arrays; a single one is needed, as numpy.save writes it.")
    if array.ndim != dimensions or not array.size or not np.issubdtype(array.dtype, np.number):
        raise ConfigError(
            f"{path!r} holds an array of {array.dtype} of shape {array.shape}; a non-empty array of numbers with "
            f"{dimensions} dimension{'s' if dimensions > 1 else ''} is needed."
        )
    return array


def file_problems(parameter: str, path: str, dimensions: int) -> Iterator[tuple[str, str]]:
    """Yield a problem if a ``.npy`` file does not exist or :func:`array_file` cannot read it."""
    if not Path(path).is_file():
        yield parameter, f"there is no file {path!r}."
        return
    try:
        array_file(path, dimensions)
    except ConfigError as error:
        yield parameter, str(error)
