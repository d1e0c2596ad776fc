"""Folders of tokenized data (``tokenized_path``): a folder for all data, or one for each data set."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.data.columns import ColumnArray, WantedColumn, refuse_values
from dataflex.data.pool import Pool
from dataflex.data.stages import SampleFields
from dataflex.errors import ConfigError
from dataflex.files import write_atomically

_KEPT = "dataflex_columns.parquet"
"""Name of the file beside tokenized data that holds raw columns, with one value per training sample."""
_SAMPLES = b"dataflex_samples"
"""Key in the file's metadata for the fingerprint of the samples that the values belong to."""


def is_stored(data_args: Any) -> bool:
    """Return whether ``tokenized_path`` holds one tokenized data set, not a folder for each data set."""
    root = data_args.tokenized_path
    return root is not None and any((Path(root) / name).exists() for name in ("dataset_dict.json", "state.json"))


def refuse_foreign_folder(data_args: Any) -> None:
    """Raise an error if ``tokenized_path`` is not empty and does not hold one tokenized data set of all data."""
    root = data_args.tokenized_path
    if root is not None and Path(root).is_dir() and any(Path(root).iterdir()) and not is_stored(data_args):
        raise ConfigError(
            f"tokenized_path: {root} is not empty and does not hold one tokenized data set (a run with several data "
            "sets saves each in a separate subfolder, and a run that only evaluates saves the evaluation sets). Name "
            "an empty folder."
        )


def keep_columns(folder: Path, samples: Any, fields: SampleFields, columns: Mapping[str, ColumnArray]) -> None:
    """Write raw columns beside the tokenized samples that they belong to."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(values, pa.string()) if values.dtype == object else pa.array(values)
        for name, values in columns.items()
    }
    fingerprint = Pool.concatenate({"samples": samples}, fields=fields).fingerprint
    stream = io.BytesIO()
    pq.write_table(pa.table(arrays).replace_schema_metadata({_SAMPLES: fingerprint.encode()}), stream)
    write_atomically(folder / _KEPT, stream.getvalue())


def kept_columns(
    folder: Path, samples: Any, fields: SampleFields, wanted: Mapping[str, WantedColumn]
) -> dict[str, ColumnArray]:
    """Return the raw columns that are stored beside tokenized samples.

    Args:
        folder: folder of the tokenized data.
        samples: training samples loaded from the folder.
        fields: the fields of a sample.
        wanted: the wanted columns, by name.

    Raises:
        ConfigError: if a column does not exist, or was stored for other samples.
    """
    import pyarrow.parquet as pq

    key, file = next(iter(wanted.values())).key, folder / _KEPT
    again = "Remove the folder, or name an empty one, so that the data is tokenized again from its raw rows."
    if not file.is_file():
        raise ConfigError(
            f"{key}: {folder} (tokenized_path) holds tokenized samples without raw columns. They are stored there only "
            f"if {', '.join(map(repr, wanted))} is requested when the data is tokenized. {again}"
        )
    table = pq.read_table(file)
    for name, each in wanted.items():
        if name not in table.column_names:
            there = ", ".join(map(repr, table.column_names))
            raise ConfigError(f"{each.key}: {file} holds the raw columns {there}, not {name!r}. {again}")
    fingerprint = Pool.concatenate({"samples": samples}, fields=fields).fingerprint
    if (table.schema.metadata or {}).get(_SAMPLES) != fingerprint.encode():
        raise ConfigError(f"{key}: {file} was written for other samples than the folder holds now. {again}")
    kept = {name: _values(table.column(name)) for name in wanted}
    for name, each in wanted.items():
        refuse_values(each, name, kept[name], lambda sample: f"{folder}, sample {sample} (counted from 0)")
    return kept


def _values(column: Any) -> ColumnArray:
    """Return a column as an array: text as objects, numbers as float64."""
    import pyarrow as pa

    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=object)
    return np.asarray(column.to_numpy(), dtype=np.float64)
