"""Images, videos and audio files of samples: the columns that name them, and errors that name the sample and the file.

LLaMA-Factory stores the paths of the files with the samples, and its collator opens them when a batch is made. Its
errors name neither the sample nor, for some files, the path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dataflex.errors import DataFlexError

if TYPE_CHECKING:
    from dataflex.data.pool import Pool

MEDIA_COLUMNS = ("images", "videos", "audios")
"""Columns of preprocessed samples with the files of each sample: a list of paths, or null."""


def media_paths(row: Mapping[str, Any]) -> list[str]:
    """Return the paths of a sample's images, videos and audio files."""
    files = [file for name in MEDIA_COLUMNS for file in row.get(name) or ()]
    return [path for path in map(_path_of, files) if path is not None]


def _path_of(file: Any) -> str | None:
    """Return the path of a file that is given by its path, or as datasets' dictionary; else None."""
    path = file.get("path") if isinstance(file, Mapping) else file
    return path if isinstance(path, str) else None


def media_in(pool: Pool) -> list[str]:
    """Return the columns of a pool in which a sample has files."""
    import pyarrow as pa

    kinds = pool.dataset.features.arrow_schema
    names = [name for name in MEDIA_COLUMNS if name in kinds.names and not pa.types.is_null(kinds.field(name).type)]
    return [name for name in names if any(pool.dataset.data.column(name).is_valid().unique().to_pylist())]


def collated(collate: Callable[[list[dict[str, Any]]], Any], rows: list[dict[str, Any]], indices: Sequence[int]) -> Any:
    """Return ``collate(rows)``; an error of a row's image names the sample and the file.

    Args:
        collate: the training collator. It may take the columns of media from the rows.
        rows: preprocessed samples, (B,).
        indices: index of each sample, (B,).

    Raises:
        DataFlexError: if the collator fails and an image of a row cannot be read.
    """
    images = [row.get("images") or () for row in rows]
    try:
        return collate(rows)
    except Exception as error:  # Pillow raises errors of many types; every other error is raised again
        for index, problem in _unreadable(indices, images):
            raise DataFlexError(f"sample {index}: {problem}") from error
        raise


def _unreadable(indices: Sequence[int], images: Sequence[Sequence[Any]]) -> Iterator[tuple[int, str]]:
    """Yield each sample with an image that cannot be read, and the problem."""
    for index, each in zip(indices, images, strict=True):
        for image in each:
            problem = image_problem(image)
            if problem is not None:
                yield int(index), problem


def image_problem(image: Any) -> str | None:
    """Return why an image cannot be read, with its path; None if it can be read, or if it is not a path."""
    from PIL import Image

    path = _path_of(image)
    if path is None:
        return None
    try:
        with Image.open(path) as opened:
            opened.load()
    except FileNotFoundError:
        return f"the image {path} does not exist."
    except Exception as error:  # noqa: BLE001 - Pillow raises errors of many types, SyntaxError for one
        return f"the image {path} cannot be read ({type(error).__name__}: {error})."
    return None
