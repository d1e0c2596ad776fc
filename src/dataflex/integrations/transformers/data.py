"""The samples of a run from a Trainer's data sets: the pool, the validation samples and the evaluation samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from dataflex.config.loading import RunConfig
from dataflex.data.columns import (
    ColumnArray,
    check_column,
    join_columns,
    lacking,
    read_column,
    refuse_values,
    values_of,
)
from dataflex.data.pool import Pool
from dataflex.data.stages import SampleFields
from dataflex.errors import ConfigError, unknown
from dataflex.trainer.evaluation import TOKEN_WEIGHTED, UNWEIGHTED

HELD_OUT = "held_out"
"""Name of an evaluation data set that is given without a name."""

Prepare = Callable[[Any, str], Any]
"""Returns the samples that a Trainer makes from a data set, given the data set and its name."""


_HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
"""Names of splits that are not for training."""


def named_sets(given: Any, argument: str, alone: str) -> dict[str, Any]:
    """Return data sets by name.

    Args:
        given: a data set, or several by name.
        argument: the Trainer's argument, for messages.
        alone: name of a data set that is given without a name.

    Raises:
        ConfigError: if a value is no map-style data set of the ``datasets`` library.
    """
    from datasets import Dataset, IterableDataset

    found = dict(given) if isinstance(given, Mapping) else {alone: given}
    if not found:
        raise ConfigError(f"{argument}: holds no data set.")
    for name, each in found.items():
        where = f"{argument}[{name!r}]" if isinstance(given, Mapping) else argument
        if isinstance(each, IterableDataset):
            raise ConfigError(
                f"{where}: an IterableDataset has no length, and DataFlex plans with the number and the lengths of all "
                "samples. Make a Dataset of it (Dataset.from_generator)."
            )
        if not isinstance(each, Dataset):
            raise ConfigError(
                f"{where}: must be a datasets.Dataset, got {type(each).__name__}. Dataset.from_list makes one of rows."
            )
        if not len(each):
            raise ConfigError(f"{where}: has no row.")
    return {str(name): each for name, each in found.items()}


def training_sets(given: Any) -> dict[str, Any]:
    """Return the training data sets by domain.

    Raises:
        ConfigError: as :func:`named_sets`, and if the names are those of the splits of one data set.
    """
    found = named_sets(given, "train_dataset", "train")
    held_out = [name for name in found if name in _HELD_OUT_SPLITS]
    if "train" in found and held_out:
        raise ConfigError(
            f"train_dataset: has the splits {', '.join(map(repr, found))}. All its keys are domains to train on. Pass "
            f"train_dataset=data['train'], and {held_out[0]!r} as eval_dataset or in validation."
        )
    return found


def divided(sets: dict[str, Any], column: str | None, setting: str) -> dict[str, Any]:
    """Return data sets divided by the values of a column, in the order of the values.

    The name of a part is its value. With several data sets, the name of the data set precedes it: ``wiki/science``.

    Args:
        sets: data sets by name.
        column: name of the column. None leaves the data sets whole.
        setting: setting that names the column, for messages.
    """
    if column is None:
        return sets
    found: dict[str, Any] = {}
    for name, each in sets.items():
        values, codes = values_of(each, column, setting, name)
        for number, value in enumerate(values):
            found[f"{name}/{value}" if len(sets) > 1 else value] = each.select(np.flatnonzero(codes == number))
    return found


def raw_columns(config: RunConfig, sets: dict[str, Any]) -> dict[str, ColumnArray]:
    """Return the raw columns that a run keeps with its samples, by name, domain after domain.

    Raises:
        ConfigError: if a data set lacks a column, or a component cannot use its values.
    """
    found: dict[str, ColumnArray] = {}
    for column, wanted in config.wanted_columns().items():
        parts = []
        for name, each in sets.items():
            if column not in each.column_names:
                raise ConfigError(f"{wanted.key}: {lacking(column, name, each.column_names)}")
            check_column(each, column, wanted.key, name)
            values = read_column(each, column)
            refuse_values(wanted, column, values, partial(_place, name))
            parts.append((name, values))
        found[column] = join_columns(parts, column, wanted.key)
    return found


def _place(name: str, row: int) -> str:
    return f"row {row} of {name!r}"


def check_samples(sets: dict[str, Any], argument: str, fields: SampleFields) -> None:
    """Check that samples are tokenized, and that those of all data sets have the same columns.

    Raises:
        ConfigError: naming the data set and its columns.
    """
    first = next(iter(sets))
    for name, each in sets.items():
        missing = [field for field in fields.tokens if field not in each.column_names]
        if missing:
            raise ConfigError(
                f"{argument}: {name!r} has no column {missing[0]!r}, only {', '.join(each.column_names)}. The samples "
                "must be tokenized."
            )
        if set(each.column_names) != set(sets[first].column_names):
            raise ConfigError(
                f"{argument}: {name!r} has the columns {', '.join(sorted(each.column_names))}, and {first!r} "
                f"{', '.join(sorted(sets[first].column_names))}. All data sets need the same columns."
            )


def validation_pools(
    config: RunConfig, wanted: Mapping[str, Any], sets: dict[str, Any], prepare: Prepare, fields: SampleFields
) -> dict[str, Pool]:
    """Return the validation samples by configuration key of the component that needs them.

    Args:
        config: configuration of the run.
        wanted: parameters of the validation samples, by configuration key.
        sets: data sets that can be named: those of ``validation`` and of ``eval_dataset``.
        prepare: makes samples from a data set.
        fields: the fields of a sample.

    Raises:
        ConfigError: if a name is unknown, or if no data set is given.
    """
    found: dict[str, Pool] = {}
    evaluation = config.llamafactory.get("eval_dataset") or []
    for key, params in wanted.items():
        setting = f"dataflex.{key}.validation"
        names = list(dict.fromkeys(params.validation or evaluation))
        for name in names:
            if name not in sets:
                raise ConfigError(f"{setting}: {unknown('validation data set', name, sets)} Pass it as validation=.")
        parts = divided({name: sets[name] for name in names}, params.subtask_column, f"dataflex.{key}.subtask_column")
        ready = {name: prepare(each, name) for name, each in parts.items()}
        check_samples(ready, setting, fields)
        found[key] = Pool.concatenate(ready, setting, fields)
    return found


def evaluation_pool(sets: dict[str, Any], fields: SampleFields) -> Pool:
    """Return the evaluation samples, one domain for each data set.

    Raises:
        ConfigError: if a data set has a name that the logs need.
    """
    for name in (TOKEN_WEIGHTED, UNWEIGHTED):
        if name in sets:
            raise ConfigError(f"eval_dataset: {name!r} is reserved for a mean over the data sets. Rename the data set.")
    return Pool.concatenate(sets, "eval_dataset", fields)
