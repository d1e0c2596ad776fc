"""Loading of the evaluation data, data set by data set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataflex.data.pool import Pool
from dataflex.data.stages import SampleFields
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory.session import Session
from dataflex.integrations.llamafactory.tokenized import is_stored
from dataflex.trainer.evaluation import TOKEN_WEIGHTED, UNWEIGHTED


def load_evaluation(
    load: Callable[..., dict[str, Any]], fields: SampleFields, data_args: Any, session: Session, found: Any
) -> Any:
    """Return the evaluation data for the Trainer, and register each evaluation set with the run.

    Args:
        load: loads data with LLaMA-Factory.
        fields: the fields of a sample.
        data_args: LLaMA-Factory's data arguments.
        session: session of the run.
        found: evaluation data that was split off the training data or stored with it: a data set, several by name,
            divided ones, or None.
    """
    parts = found
    if found is None and data_args.eval_dataset:
        parts = {}
        for name in dict.fromkeys(data_args.eval_dataset):
            only = copy.copy(data_args)
            only.dataset, only.eval_dataset, only.interleave_probs, only.val_size = None, [name], None, 0.0
            only.eval_on_each_dataset = False
            only.tokenized_path = only.tokenized_path and str(Path(only.tokenized_path) / "eval" / name)
            parts[name] = load(only, "eval_dataset")["eval_dataset"]
    if parts is None:
        return None
    if not isinstance(parts, dict | list):
        names = data_args.dataset or []  # a stored data set has lost its name
        parts = {names[0] if len(names) == 1 and not is_stored(data_args) else "held_out": parts}
    pool = (
        Pool.of_domains(parts, "eval_dataset", fields)
        if isinstance(parts, list)
        else Pool.concatenate(parts, "eval_dataset", fields)
    )
    for name in (TOKEN_WEIGHTED, UNWEIGHTED):
        if name in pool.domains:
            raise ConfigError(f"eval_dataset: {name!r} is reserved for a mean over the data sets. Rename the data set.")
    session.add_evaluation(pool)
    return parts if data_args.eval_on_each_dataset and data_args.eval_dataset else pool.dataset
