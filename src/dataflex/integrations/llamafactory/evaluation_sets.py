"""What the Trainer evaluates on, data set by data set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataflex.data.pool import Pool
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory.session import Session
from dataflex.integrations.llamafactory.tokenized import is_stored
from dataflex.trainer.evaluation import TOKEN_WEIGHTED, UNWEIGHTED


def load_evaluation(load: Callable[..., dict[str, Any]], data_args: Any, session: Session, found: Any) -> Any:
    """Return what the Trainer is to evaluate on, and tell the run which sample is from which data set.

    Args:
        load: LLaMA-Factory's loading.
        data_args: its arguments.
        session: of the run.
        found: what was split off the training data or stored with it: a data set, several by name, divided ones, or
            None.
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
        names = data_args.dataset or []  # of the stored ones nobody knows the name any more
        parts = {names[0] if len(names) == 1 and not is_stored(data_args) else "held_out": parts}
    pool = (
        Pool.of_domains(parts, "eval_dataset") if isinstance(parts, list) else Pool.concatenate(parts, "eval_dataset")
    )
    for name in (TOKEN_WEIGHTED, UNWEIGHTED):
        if name in pool.domains:
            raise ConfigError(f"eval_dataset: {name!r} is the name of a mean over the data sets; name it otherwise.")
    session.add_evaluation(pool)
    return parts if data_args.eval_on_each_dataset and data_args.eval_dataset else pool.dataset
