"""Reader of ``loss_weights.csv``: the weights of the domains in the loss of each optimizer step."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow
import pyarrow.csv
from numpy.typing import NDArray

from dataflex.errors import ConfigError
from dataflex.record.files import one_line

KEPT_STEPS = 2000
"""Largest number of steps that are returned of a file. They are evenly spread and include the first and the last."""

_BLOCK = 1 << 23
"""Number of bytes read at once."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of K domains in the loss over the steps of a run, thinned to at most :data:`KEPT_STEPS` steps."""

    names: list[str]
    steps: NDArray[np.int64]
    """Optimizer steps of the values, counted from 1, ascending, shape (steps,)."""
    values: NDArray[np.float64]
    """Weights of the domains in these steps, shape (steps, K)."""
    total: int
    """Number of steps in the file."""
    mean: NDArray[np.float64]
    """Mean over all steps in the file, shape (K,)."""


def read_loss_weights(path: Path) -> LossWeights | None:
    """Return the weights. Only one block of the file is in memory at a time, however long the file is.

    An incomplete last line is skipped. Steps that a resumed run repeats are equal to the earlier ones and count once.

    Returns:
        None if there is no file, or if it holds no step yet.

    Raises:
        ConfigError: if the file is malformed.
    """
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        names = _header(stream, path)
        if names is None:
            return None
        steps, values = np.zeros(0, dtype=np.int64), np.zeros((0, len(names)))
        total, every, reached = 0, 1, -1
        sums, last = np.zeros(len(names)), np.zeros(len(names))
        for block in _blocks(stream):
            at, weights = _parsed(block, len(names), path)
            first = at > np.maximum.accumulate(np.concatenate([[reached], at[:-1]]))
            at, weights = at[first], weights[first]
            if not at.size:
                continue
            # Every `every`-th step of the file is returned. When too many are collected, half of them are dropped and
            # `every` doubles, so the steps stay evenly spread without knowing the length of the file.
            chosen = np.arange(-total % every, at.size, every)
            steps, values = np.concatenate([steps, at[chosen]]), np.concatenate([values, weights[chosen]])
            while steps.size >= KEPT_STEPS:
                steps, values, every = steps[::2], values[::2], 2 * every
            total, reached, last = total + at.size, int(at[-1]), weights[-1]
            sums += weights.sum(axis=0)
    if not total:
        return None
    if steps[-1] != reached:
        steps, values = np.append(steps, reached), np.vstack([values, last])
    return LossWeights(names, steps, values, total, sums / total)


def _header(stream: BinaryIO, path: Path) -> list[str] | None:
    """Return the names of the domains, and leave the stream behind them; None if the header is not complete yet."""
    try:
        header = next(csv.reader(line.decode() for line in iter(stream.readline, b"")), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not readable CSV ({one_line(error)}).") from error
    if not header:
        return None
    stream.seek(-1, io.SEEK_CUR)
    if stream.read(1) != b"\n":
        return None
    names = header[1:]
    if header[0] != "step" or not names or len(set(names)) < len(names):
        raise ConfigError(f"{path}: expected the header step,DOMAIN,... with different domains, found {header[:5]}.")
    return names


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the rest of the file in blocks of whole lines, without an incomplete last line."""
    rest = b""
    while read := stream.read(_BLOCK):
        block = rest + read
        end = block.rfind(b"\n") + 1
        rest = block[end:]
        if end:
            yield block[:end]


def _parsed(block: bytes, num_domains: int, path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the steps of some lines, shape (lines,), and their weights, shape (lines, K)."""
    names = [str(i) for i in range(num_domains + 1)]
    kinds = {name: pyarrow.float64() for name in names} | {"0": pyarrow.int64()}
    try:
        table = pyarrow.csv.read_csv(
            pyarrow.BufferReader(block),
            read_options=pyarrow.csv.ReadOptions(column_names=names),
            convert_options=pyarrow.csv.ConvertOptions(column_types=kinds, null_values=[]),
        )
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(
            f"{path}: expected a step and {num_domains} numbers in each line ({one_line(error)})."
        ) from error
    columns = [np.from_dlpack(column.chunk(0)) for column in table.combine_chunks().columns]  # to_numpy imports Pandas
    return np.asarray(columns[0], dtype=np.int64), np.column_stack(columns[1:])
