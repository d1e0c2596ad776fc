"""Masking of access tokens, keys and passwords, so that they do not get into the files of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_SECRET = re.compile(
    r"""(?:[a-z0-9]*tokens?|[a-z0-9]*secrets?|[a-z0-9]*passw(?:or)?ds?|passphrase|credentials?|webhook
        |[a-z0-9]*apikey|(?:api|access|auth|private|signing|encryption)_key)(?:_|$)""",
    re.VERBOSE,
)
"""Words in the name of a key that mark its value as a secret. ``tokenizer`` and ``tokenized_path`` do not match."""

_NAMES_ONE = re.compile(r"_(?:env|file|path|column|type|id|config)$")
"""Ends of keys whose value only names the source of a secret, such as ``api_key_env``."""

_OF_TEXTS = re.compile(
    r"(?:^|_)(?:bos|eos|eot|pad|unk|cls|sep|mask|image|video|audio|begin|end|stop|bad|extra|special|add|num|max|min|new"
    r"|input|output|train|prompt|average|effective)_tokens?(?:_|$)"
)
"""Keys whose ``token`` is a token of text, not an access token."""

_SWITCHES = frozenset({"true", "false", "none", "null", "all", "non_padding", "no", "yes"})
"""Values that are no secrets: truth values, and the words of keys such as ``include_num_input_tokens_seen``."""
_IN_A_URL = re.compile(r"(?<=://)[^/@\s]+@")
"""User name and password in a URL."""
_MASK = re.compile(r"<not recorded: [^>]+>|(?<=://)<not recorded>@")

HANDED_ON = "DATAFLEX_SECRETS"
"""Environment variable that passes secrets to a child process.

The child reads a configuration file in which the secrets are masked, and fills them in from this variable.
"""


def is_secret(key: str, value: Any) -> bool:
    """Return whether the name of a key marks its value as a secret. Numbers, truth values and masks are no secrets."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-.\s]+", "_", key).lower()
    if not isinstance(value, str) or not value or not _SECRET.search(words):
        return False
    if _NAMES_ONE.search(words) or _OF_TEXTS.search(words) or value.lower() in _SWITCHES or is_mask(value):
        return False
    return not re.fullmatch(r"[+-]?\d{1,9}(\.\d+)?(e[+-]?\d+)?", value)


def is_mask(value: Any) -> bool:
    """Return whether a value is the mask of a secret, or contains one."""
    return isinstance(value, str) and _MASK.search(value) is not None


def masked(value: Any) -> Any:
    """Return plain data with every secret replaced by a mask. The mask names the key of the secret."""
    return _replaced(value, _mask)


def secrets(value: Any) -> dict[str, str]:
    """Return the texts that :func:`masked` replaces, by dotted key."""
    return {key: text for key, text in _texts(value, "") if _mask(key, text) != text}


def masks(value: Any) -> list[str]:
    """Return the dotted keys in plain data whose value is the mask of a secret."""
    return [key for key, text in _texts(value, "") if is_mask(text)]


def handed_on(value: Any) -> dict[str, str]:
    """Return the environment variable that passes a configuration's secrets to a process; empty without secrets."""
    found = secrets(value)
    return {HANDED_ON: json.dumps(found)} if found else {}


def filled(value: Any, variable: str | None) -> Any:
    """Return plain data in which masks are replaced by the secrets, as far as ``variable`` has them.

    Args:
        value: plain data; not changed.
        variable: content of the environment variable :data:`HANDED_ON`; None if it is not set.
    """
    known: dict[str, str] = json.loads(variable) if variable else {}
    return _replaced(value, lambda key, text: known.get(key, text) if is_mask(text) else text)


def masked_argument(argument: str) -> str:
    """Return a command-line argument with its value masked if it is ``key=value`` of a secret."""
    key, sign, value = argument.partition("=")
    return f"{key}={_mask(key.lstrip('-'), value)}" if sign else _mask("", argument)


def _mask(key: str, text: str) -> str:
    name = next((part for part in reversed(key.split(".")) if not part.isdigit()), "")
    return f"<not recorded: {key}>" if is_secret(name, text) else _IN_A_URL.sub("<not recorded>@", text)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text in plain data with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, _dotted(key, name))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _texts(item, _dotted(key, number))


def _replaced(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """Return plain data with every text replaced by ``change(dotted key, text)``."""
    if isinstance(value, str):
        return change(key, value)
    if isinstance(value, Mapping):
        return {name: _replaced(item, change, _dotted(key, name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, change, _dotted(key, number)) for number, item in enumerate(value)]
    return value


def _dotted(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
