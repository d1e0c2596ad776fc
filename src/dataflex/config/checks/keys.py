"""Checks of single keys: unknown and misplaced keys, and values that an argument does not accept."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

from dataflex.api import registry
from dataflex.config.arguments import Argument, llamafactory_arguments, templates
from dataflex.config.checks.forms import v1_name
from dataflex.config.checks.values import enabled
from dataflex.config.loading import DataFlexConfig, RunConfig
from dataflex.config.misplaced import belongs, unknown_at_top
from dataflex.errors import ConfigError, Problem, did_you_mean, unknown

_AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "cutoff_len",
    "max_samples", "buffer_size", "preprocessing_batch_size", "preprocessing_num_workers", "eval_num_beams",
    "eval_accumulation_steps", "dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb",
    "generation_max_length", "generation_num_beams", "lora_rank", "lora_alpha", "galore_rank", "galore_update_interval",
    "apollo_rank", "apollo_update_interval", "early_stopping_steps", "image_max_pixels", "image_min_pixels",
    "video_max_pixels", "video_min_pixels", "video_maxlen", "audio_sampling_rate", "num_beams", "ppo_epochs",
    "ppo_buffer_size", "torch_empty_cache_steps",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "learning_rate", "num_train_epochs", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay",
    "dataloader_num_workers", "seed", "data_seed", "val_size", "neftune_noise_alpha", "moe_aux_loss_coef", "pref_beta",
    "pref_ftx", "loraplus_lr_embedding", "temperature", "oft_rank", "oft_block_size", "simpo_gamma", "asft_alpha",
    "eaft_alpha",
)  # fmt: skip
_SHARES = ("label_smoothing_factor", "warmup_ratio", "dpo_label_smoothing")
_BELOW_ONE = ("adam_beta1", "adam_beta2", "lora_dropout", "module_dropout")
_POSITIVE = (
    "logging_steps", "save_steps", "eval_steps", "video_fps", "galore_scale", "apollo_scale", "repetition_penalty",
    "loraplus_lr_ratio",
)  # fmt: skip
_POSITIVE_SHARES = ("top_p", "badam_update_ratio")

RANGES: dict[str, tuple[float, bool, float, bool]] = {
    **dict.fromkeys(_AT_LEAST_ONE, (1, True, math.inf, False)),
    **dict.fromkeys(_AT_LEAST_ZERO, (0, True, math.inf, False)),
    **dict.fromkeys(_SHARES, (0, True, 1, True)),
    **dict.fromkeys(_BELOW_ONE, (0, True, 1, False)),
    **dict.fromkeys(_POSITIVE, (0, False, math.inf, False)),
    **dict.fromkeys(_POSITIVE_SHARES, (0, False, 1, True)),
    "save_total_limit": (-1, True, math.inf, False),
    "seed": (0, True, 2**32, False),
}
"""Numeric key -> (lower bound, whether it is allowed, upper bound, whether it is allowed)."""

_FILES_OR_MAPPINGS = ("deepspeed", "fsdp_config", "accelerator_config")

_NAMES = {
    "str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list",
    "dict": "a mapping",
}  # fmt: skip


def problems_of_keys(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of single keys and of their values."""
    yield from _unknown_keys(config)
    yield from _values(config)


def _unknown_keys(config: RunConfig) -> Iterator[Problem]:
    known = llamafactory_arguments()
    strangers = [key for key in config.llamafactory if key not in known]
    if not known or not strangers or enabled("ALLOW_EXTRA_ARGS"):
        return
    with contextlib.suppress(ConfigError):  # of an installed package; reported when methods are looked up
        registry.load_components([])
    own = list(DataFlexConfig.model_fields)
    section = None if config.dataflex is None else config.dataflex.model_dump()
    for key in strangers:
        place = belongs(key, "", own, section)
        place = place or v1_name(key)
        where = None if place is None else f"not a LLaMA-Factory argument; {place}"
        yield Problem(key, where or unknown_at_top(key, own))


def _values(config: RunConfig) -> Iterator[Problem]:
    """Yield the values that LLaMA-Factory's annotations or our ranges do not allow, and unknown templates."""
    for key, argument in llamafactory_arguments().items():
        if key in config.llamafactory:
            message = _value(key, argument, config.llamafactory[key])
            if message is not None:
                yield Problem(key, message)
    template = config.llamafactory.get("template")
    if isinstance(template, str) and templates() and template not in templates():
        yield Problem("template", f"unknown template {template!r}{did_you_mean(template, templates()) or '.'}")


def _value(key: str, argument: Argument, value: Any) -> str | None:
    """Return the problem of a key's value; None if the value is allowed."""
    types = argument.types
    if "any" in types or (value is None and ("None" in types or types == {"bool"})):
        return None
    if value is None:
        return "has no value; set one, or remove the key."
    other = _kind(value) in types and not isinstance(value, str)
    if argument.choices and not other and not isinstance(value, dict | list):
        words = str(value).split() if key in ("debug", "fsdp") else [str(value)]
        for word in words:
            if word not in argument.choices:
                return unknown("value", word, argument.choices)
        return None
    kind = _kind(value)
    if kind == "bool" and "bool" in types:
        return None
    if kind in ("int", "float") and types & {"int", "float"}:
        return _number(key, value, whole="float" not in types)
    # LLaMA-Factory reads 0 and 1 as false and true.
    if kind == "int" and value in (0, 1) and types <= {"bool", "None"}:
        return None
    if kind not in types:
        return _wrong_type(types, value)
    if kind == "str" and "dict" in types and key not in _FILES_OR_MAPPINGS and not _is_mapping(value):
        return f"must be a mapping, got {value!r}."
    if kind == "list":
        others = [item for item in value if not isinstance(item, str)]
        return f"must be a list of texts, but one item is {others[0]!r}." if others else None
    return None


def _kind(value: Any) -> str:
    for kind in (bool, int, float, str, list, dict):
        if isinstance(value, kind):
            return kind.__name__
    return "other"


def _wrong_type(types: frozenset[str], value: Any) -> str:
    asked = [name for kind, name in _NAMES.items() if kind in types and not (kind == "int" and "float" in types)]
    hint = "."
    if "str" in types and isinstance(value, bool):
        words = "yes and on as true" if value else "no and off as false"
        hint = f"; YAML reads {words}. If you mean the word, write it in quotes."
    elif "str" in types and _kind(value) in ("int", "float"):
        hint = f'; if you mean the text, write it in quotes: "{value}".'
    elif isinstance(value, str) and types & {"int", "float"}:
        hint = "; write it without quotes." if _is_number(value) else "."
        asked = ["a number"]
    elif isinstance(value, str) and "bool" in types and value.lower() in ("true", "false"):
        hint = "; write it without quotes, because LLaMA-Factory reads any text as true."
    return f"must be {' or '.join(asked)}, got {value!r}{hint}"


def _number(key: str, value: float, whole: bool) -> str | None:
    if not math.isfinite(value):
        return f"must be a finite number, got {value}."
    if whole and not isinstance(value, int):
        return f"must be a whole number, got {value}{f'; write {int(value)}.' if value == int(value) else '.'}"
    if key == "max_steps" and value != -1 and value < 1:
        return f"must be at least 1, or -1 to train for num_train_epochs, got {value}."
    low, at_low, high, at_high = RANGES.get(key, (-math.inf, False, math.inf, False))
    if (value < low or (value == low and not at_low)) or (value > high or (value == high and not at_high)):
        lower = f"{'at least' if at_low else 'above'} {low:g}"
        upper = f" and {'at most' if at_high else 'below'} {high:g}" if high < math.inf else ""
        return f"must be {lower}{upper}, got {value}."
    return None


def _is_mapping(value: str) -> bool:
    """Return whether a text is a JSON object, the form in which a command line gives a mapping."""
    try:
        return isinstance(json.loads(value), dict)
    except ValueError:
        return False


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
