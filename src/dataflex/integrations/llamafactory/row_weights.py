"""Weights that a raw row gives to its messages: by role, by a key of the message, and by spans of its content."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dataflex.api.given_weights import GivenWeightParams
from dataflex.integrations.llamafactory.turn_weights import MessageWeight, RowError

SPAN_KEYS = ("begin", "end", "weight")
"""Keys that every span has."""


@dataclass(frozen=True)
class RowReader:
    """Reads the weights that a raw row gives to its messages.

    Attributes:
        params: the parameters of the weights.
        attributes: LLaMA-Factory's description of the data set.
        trains_prompt: whether prompts are trained on.
    """

    params: GivenWeightParams
    attributes: Any
    trains_prompt: bool

    @property
    def columns(self) -> list[str]:
        """The raw columns that weights are read from."""
        named = [self.params.spans_column]
        named.append(self.params.message_key if self.attributes.formatting == "alpaca" else self.attributes.messages)
        return list(dict.fromkeys(name for name in named if name is not None))

    def read(self, row: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> tuple[list[MessageWeight], float]:
        """Return the weights of the messages, and the weight of the system message.

        Args:
            row: the raw columns of the row.
            messages: the messages in LLaMA-Factory's format.

        Raises:
            RowError: if the row gives weights that cannot be used.
        """
        groups, system = self._origins(row, len(messages))
        factors, of_system = self._factors(row, groups, system)
        spans = self._spans(row, messages, groups)
        found = []
        for number, message in enumerate(messages):
            weight = self.params.roles.get(message["role"], 1.0) * factors[number]  # type: ignore[call-overload]
            marks = tuple(self.params.marks) if message["role"] in ("assistant", "function") else ()
            found.append(MessageWeight(weight, spans.get(number, ()), marks))
        return found, self.params.roles.get("system", 1.0) * of_system

    def _origins(self, row: Mapping[str, Any], count: int) -> tuple[list[list[int]], int | None]:
        """Return the raw messages that each message is made of, and the raw system message."""
        attributes = self.attributes
        if attributes.formatting == "alpaca":
            return [[]] * count, None
        raw, tag = row[attributes.messages], attributes.role_tag
        roles = [message[tag] for message in raw]
        system = 0 if attributes.system_tag and roles[:1] == [attributes.system_tag] else None
        groups, results = list[list[int]](), list[int]()
        for number in range(0 if system is None else 1, len(raw)):
            if attributes.formatting == "openai" and roles[number] == attributes.observation_tag:
                results.append(number)  # LLaMA-Factory joins consecutive results of tools
                continue
            if results:
                groups.append(results)
                results = []
            groups.append([number])
        if len(groups) != count:
            raise RowError(f"its {len(raw)} messages became {count} messages in an unknown way")
        return groups, system

    def _factors(
        self, row: Mapping[str, Any], groups: list[list[int]], system: int | None
    ) -> tuple[list[float], float]:
        """Return the messages' own weights, and that of the system message."""
        key, none = self.params.message_key, [1.0] * len(groups)
        if key is None:
            return none, 1.0
        if self.attributes.formatting == "alpaca":
            return [*none[1:], _weight(row.get(key), repr(key))], 1.0
        given = [
            _weight(message.get(key), f"{key!r} of message {number}")
            for number, message in enumerate(row[self.attributes.messages])
        ]
        for group in groups:
            if self.trains_prompt and len({given[number] for number in group}) > 1:
                raise RowError(
                    f"messages {group[0]} to {group[-1]} (counted from 0) are results of tools that become one "
                    f"message, and their {key!r} differs; use one weight"
                )
        return [given[group[0]] for group in groups], 1.0 if system is None else given[system]

    def _spans(
        self, row: Mapping[str, Any], messages: Sequence[Mapping[str, str]], groups: list[list[int]]
    ) -> dict[int, list[tuple[int, int, float]]]:
        """Return the spans of each message, sorted."""
        column = self.params.spans_column
        given = None if column is None else row.get(column)
        if not given:
            return {}
        if not isinstance(given, list) or not all(isinstance(span, dict) for span in given):
            raise RowError(f"{column!r} must be a list of mappings with {', '.join(SPAN_KEYS)}")
        numbers = {group[0]: number for number, group in enumerate(groups) if len(group) == 1}
        found: dict[int, list[tuple[int, int, float]]] = {}
        for place, span in enumerate(given):
            where = f"span {place} of {column!r}"
            number = self._message_of(span, where, numbers, len(messages))
            found.setdefault(number, []).append(_span(span, where, len(messages[number]["content"])))
        for number, spans in found.items():
            spans.sort()
            for (begin, end, _), (other, last, _) in pairwise(spans):
                if other < end:
                    raise RowError(
                        f"the spans {begin} to {end} and {other} to {last} of {column!r} overlap in one message"
                    )
            if messages[number]["role"] == "function":
                raise RowError(
                    f"{column!r} has a span in a function call, whose text the template changes; use marks, or the "
                    "weight of the message"
                )
        return found

    def _message_of(self, span: Mapping[str, Any], where: str, numbers: Mapping[int, int], count: int) -> int:
        """Return the message that a span belongs to."""
        given = span.get("message")
        if self.attributes.formatting == "alpaca":
            if given is not None:
                raise RowError(f"{where} names message {given}; in alpaca format spans are those of the response")
            return count - 1
        if isinstance(given, bool) or not isinstance(given, int):
            raise RowError(f"{where} needs message: the number of a message, from 0; it is {given!r}")
        if given not in numbers:
            known = ", ".join(map(str, numbers))
            raise RowError(
                f"{where} names message {given}; spans can be in the messages {known} (not in the system message, and "
                "not in results of tools that become one message)"
            )
        return numbers[given]


def _weight(value: Any, where: str) -> float:
    """Return a weight of a row; 1 if there is none."""
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"{where} is {value!r}; a number of 0 or more is needed")
    if not (math.isfinite(value) and value >= 0):
        raise RowError(f"{where} is {value}; a finite number of 0 or more is needed")
    return float(value)


def _span(span: Mapping[str, Any], where: str, size: int) -> tuple[int, int, float]:
    """Return the begin, end and weight of a span of a content of ``size`` characters."""
    bounds = []
    for key in ("begin", "end"):
        value = span.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise RowError(f"{where} needs {key}: a number of characters; it is {value!r}")
        bounds.append(value)
    begin, end = bounds
    if not 0 <= begin < end <= size:
        raise RowError(f"{where} is from {begin} to {end}, and the content of its message has {size} characters")
    if span.get("weight") is None:
        raise RowError(f"{where} has no weight")
    return begin, end, _weight(span["weight"], f"the weight of {where}")
