"""The values a configuration gives LLaMA-Factory's arguments."""

from __future__ import annotations

import os

from dataflex.config.loading import RunConfig
from dataflex.data.stages import packs_by_default


def number(config: RunConfig, key: str, default: float) -> float:
    """Return a numeric argument; one that is no number is reported as such."""
    value = config.llamafactory.get(key)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def truthy(config: RunConfig, key: str) -> bool:
    """Return whether an argument is given and not false, 0 or none, also where it is written as text."""
    value = config.llamafactory.get(key)
    return bool(value) and str(value).lower() not in ("false", "0", "0.0", "none", "no")


def is_packed(config: RunConfig) -> bool:
    """Return whether rows are packed into samples."""
    if truthy(config, "packing") or truthy(config, "neat_packing"):
        return True
    return config.llamafactory.get("packing") is None and packs_by_default(word(config, "stage", "sft"))


def word(config: RunConfig, key: str, default: str) -> str:
    """Return an argument that is one of some words, or its default."""
    value = config.llamafactory.get(key)
    return default if value is None else str(value)


def enabled(name: str) -> bool:
    """Return whether an environment variable is set, as LLaMA-Factory reads it."""
    return os.environ.get(name, "0").lower() in ("1", "true", "y")


def dataset_names(config: RunConfig, key: str = "dataset") -> tuple[str, ...]:
    """Return the data sets named under ``key``, in order, each once."""
    return tuple(dict.fromkeys(named_data_sets(config, key)))


def named_data_sets(config: RunConfig, key: str = "dataset") -> list[str]:
    """Return the data sets named under ``key`` as they stand there; none where neither text nor a list is given."""
    value = config.llamafactory.get(key)
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(part).strip() for part in parts if str(part).strip()]


def evaluates(config: RunConfig) -> bool:
    """Return whether the run is to evaluate while it trains."""
    return word(config, "eval_strategy", "no") != "no"


def has_evaluation_data(config: RunConfig) -> bool:
    """Return whether there is something to evaluate on."""
    return bool(dataset_names(config, "eval_dataset")) or number(config, "val_size", 0.0) > 1e-6
