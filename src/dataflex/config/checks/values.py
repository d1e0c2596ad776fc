"""Readers for the values that a configuration gives to LLaMA-Factory's arguments."""

from __future__ import annotations

import os

from dataflex.config.arguments import is_on
from dataflex.config.loading import RunConfig
from dataflex.data.stages import STAGES, packs_by_default


def number(config: RunConfig, key: str, default: float) -> float:
    """Return a numeric argument, or ``default`` if it is not set or not a number, which another check reports."""
    value = config.llamafactory.get(key)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def truthy(config: RunConfig, key: str) -> bool:
    """Return whether an argument is set and is not false, 0 or none, written as a value or as text."""
    return is_on(config.llamafactory.get(key))


def is_packed(config: RunConfig) -> bool:
    """Return whether rows are packed into samples."""
    if truthy(config, "packing") or truthy(config, "neat_packing"):
        return True
    return config.llamafactory.get("packing") is None and packs_by_default(word(config, "stage", "sft"))


def word(config: RunConfig, key: str, default: str) -> str:
    """Return an argument whose value is a word, or ``default`` if it is not set."""
    value = config.llamafactory.get(key)
    return default if value is None else str(value)


def enabled(name: str) -> bool:
    """Return whether an environment variable is switched on, as LLaMA-Factory reads it."""
    return os.environ.get(name, "0").lower() in ("1", "true", "y")


def dataset_names(config: RunConfig, key: str = "dataset") -> tuple[str, ...]:
    """Return the names of the data sets under ``key``, in order, without repetitions."""
    return tuple(dict.fromkeys(named_data_sets(config, key)))


def named_data_sets(config: RunConfig, key: str = "dataset") -> list[str]:
    """Return the names of the data sets under ``key`` as written; empty if the value is neither text nor a list."""
    value = config.llamafactory.get(key)
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(part).strip() for part in parts if str(part).strip()]


def evaluates(config: RunConfig) -> bool:
    """Return whether the run evaluates during training."""
    return word(config, "eval_strategy", "no") != "no"


def measures(config: RunConfig) -> tuple[str, ...]:
    """Return the measures that a run with a section gives of each evaluation set."""
    stage = STAGES.get(word(config, "stage", "sft"))
    if stage is None or not stage.loss_per_sample:
        return ("loss", "perplexity", "bits_per_byte")
    return ("loss", "accuracy", "margin") if stage.takes_pairs else ("loss",)


def has_evaluation_data(config: RunConfig) -> bool:
    """Return whether the run has evaluation data."""
    # LLaMA-Factory itself ignores a val_size up to 1e-6.
    return bool(dataset_names(config, "eval_dataset")) or number(config, "val_size", 0.0) > 1e-6
