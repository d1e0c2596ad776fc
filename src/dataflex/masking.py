"""Keeping tokens, keys and passwords out of the files that are written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_SECRET = re.compile(r"token|api_?key|access_?key|private_?key|secret|passw(or)?d|credential|webhook", re.IGNORECASE)
_HARMLESS = frozenset(
    {
        "add_tokens",
        "add_special_tokens",
        "new_special_tokens_config",
        "init_special_tokens",
        "include_num_input_tokens_seen",
        "tokenized_path",
        "tokenizer",
        "tokenizer_name",
        "api_key_env",
    }
)
"""Keys with text in them that is no secret, though their names look like it."""
_TOKEN_OF_TEXT = re.compile(r"(^|_)(bos|eos|eot|pad|unk|cls|sep|mask|image|video|audio|begin|end|stop)_token$")
_SWITCHES = frozenset({"true", "false", "none", "null", "all", "non_padding", "no", "yes"})
_IN_A_URL = re.compile(r"(?<=://)[^/@\s]+@")
_MASK = re.compile(r"^<not recorded: (?P<key>.+)>$")


def is_secret(key: str, value: Any) -> bool:
    """Return whether a value is a secret, by the name of its key: text that is no number and no switch."""
    if not isinstance(value, str) or not value or not _SECRET.search(key.replace("-", "_")):
        return False
    if key in _HARMLESS or _TOKEN_OF_TEXT.search(key) or value.lower() in _SWITCHES or is_mask(value):
        return False
    return not re.fullmatch(r"[+-]?\d{1,9}(\.\d+)?(e[+-]?\d+)?", value)


def masked(value: Any, key: str = "") -> Any:
    """Return plain data with every secret in it replaced by a text that says which key it was of.

    Args:
        value: plain data; not changed.
        key: whose value it is, with the keys around it (``dataflex.select.reward.options.api_key``).
    """
    if isinstance(value, Mapping):
        return {name: masked(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if is_secret(key.rpartition(".")[2], value):
        return f"<not recorded: {key}>"
    return _IN_A_URL.sub("<not recorded>@", value)


def masked_argument(argument: str) -> str:
    """Return an argument of a command line, its value masked where it is ``key=value`` of a secret."""
    key, sign, value = argument.partition("=")
    name = key.lstrip("-")
    return f"{key}={masked(value, name)}" if sign else str(masked(argument))


def is_mask(value: Any) -> bool:
    """Return whether a value stands in the place of a secret."""
    return isinstance(value, str) and ("<not recorded>@" in value or _MASK.match(value) is not None)


def masks(value: Any, key: str = "") -> Iterator[str]:
    """Yield the keys in plain data whose value stands in the place of a secret."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from masks(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from masks(item, key)
    elif is_mask(value):
        yield key
