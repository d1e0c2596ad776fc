"""Weights of the tokens that LLaMA-Factory makes of one conversation.

LLaMA-Factory's own processor does the encoding, with two changes. Its template notes the pieces of text of each message
and their tokens. And the template returns positions instead of token ids, so that truncation, masking and the order of
turns show which token of which message each element of the sample is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.api.given_weights import Mark

Floats = NDArray[np.float64]
Piece = tuple[Any, list[int]]
"""An element of a formatted message (text, or the name of a special token), and its token ids."""

_BASE = 1 << 40
"""Added to a position, so that it differs from every token id."""
_IGNORED = -100
_CONTENT = "\ue000content\ue001"
"""Text from a private area that stands for the content of a message in a template."""


class RowError(ValueError):
    """The weights of a row cannot be computed. The message says why, without the position of the row."""


@dataclass(frozen=True)
class MessageWeight:
    """The weights of a message.

    Attributes:
        weight: weight of all its tokens, template tokens included.
        spans: begin, end and weight of parts of its content, in characters, without overlaps.
        marks: marks that are searched in its text.
    """

    weight: float = 1.0
    spans: Sequence[tuple[int, int, float]] = ()
    marks: Sequence[Mark] = ()

    @property
    def reads_text(self) -> bool:
        """Whether the weights of its tokens differ by their position in the text."""
        return bool(self.spans or self.marks)


@dataclass(frozen=True)
class Encoded:
    """The tokens of a sample, as LLaMA-Factory makes them, with the weights of trained tokens.

    Attributes:
        input_ids: tokens.
        labels: labels, -100 for a token that is not trained on.
        weights: weights of the tokens with a label other than -100.
        marks: how often each mark was found.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    marks: list[int]


def encode(
    processor: Any, row: dict[str, Any], messages: Sequence[MessageWeight], system: float, marks: Sequence[Mark] = ()
) -> Encoded:
    """Encode a conversation with LLaMA-Factory's supervised processor, and return the weights of its tokens.

    Args:
        processor: LLaMA-Factory's processor.
        row: a row in LLaMA-Factory's format, with ``_prompt``, ``_response`` and so on.
        messages: the weights of each message of the prompt and the response.
        system: weight of the system message, of its tools and of the prefix of the template.
        marks: all marks of the run, which are counted.

    Raises:
        RowError: if the weights cannot be computed exactly.
    """
    if any(row[name] for name in ("_images", "_videos", "_audios")):
        raise RowError("it has images, videos or audios; token weights from data are for text alone")
    turns = _Turns(processor.template, processor.tokenizer, messages, system, marks)
    noting = copy.copy(processor)
    noting.template = turns
    found, labels = noting._encode_data_example(
        prompt=row["_prompt"],
        response=row["_response"],
        system=row["_system"],
        tools=row["_tools"],
        images=[],
        videos=[],
        audios=[],
    )
    if len(found) != len(labels):
        raise RowError("LLaMA-Factory's truncation to cutoff_len leaves no token of a turn; raise cutoff_len")
    weights = [turns.weight_of(found, labels, place) for place, label in enumerate(labels) if label != _IGNORED]
    return Encoded(turns.ids_of(found), turns.ids_of(labels), weights, turns.counts)


@dataclass
class _Turns:
    """Stands in for a template in LLaMA-Factory's processor: encodes a conversation to positions.

    Attributes:
        template: LLaMA-Factory's template.
        tokenizer: the tokenizer.
        messages: the weights of each message.
        system: weight of the text before the first message.
        marks: all marks of the run, which are counted.
        ids: token id of each position.
        weights: weight of each position.
        owners: message of each position.
        counts: how often each mark was found.
    """

    template: Any
    tokenizer: Any
    messages: Sequence[MessageWeight]
    system: float
    marks: Sequence[Mark]
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.template, name)

    def encode_multiturn(
        self, tokenizer: Any, messages: list[dict[str, str]], system: str | None, tools: str | None, discard: bool
    ) -> list[tuple[list[int], list[int]]]:
        """Return the positions of the tokens of each prompt and each response."""
        noted: list[list[Piece]] = []
        template = copy.copy(self.template)
        convert = template._convert_elements_to_ids

        def note(tokenizer: Any, elements: list[Any]) -> list[int]:
            pieces = [(element, convert(tokenizer, [element])) for element in elements]
            noted.append(pieces)
            return [token for _, ids in pieces for token in ids]

        template._convert_elements_to_ids = note
        pairs = template.encode_multiturn(tokenizer, messages, system, tools, discard)
        encoded = [ids for pair in pairs for ids in pair]
        if not len(encoded) == len(noted) == len(messages) == len(self.messages):
            raise RowError(f"its {len(self.messages)} messages became {len(encoded)} parts of the template")
        self.counts = [0] * len(self.marks)
        found = []
        for number, (message, pieces, ids) in enumerate(zip(messages, noted, encoded, strict=True)):
            weights = self._message(number, message, pieces, ids)
            found.append([_BASE + len(self.ids) + offset for offset in range(len(ids))])
            self.ids += ids
            self.weights += weights
            self.owners += [number] * len(ids)
        return list(zip(found[::2], found[1::2], strict=True))

    def ids_of(self, values: Sequence[int]) -> list[int]:
        """Return the token ids at positions. Values that are no positions stay."""
        return [self.ids[value - _BASE] if value >= _BASE else value for value in values]

    def weight_of(self, found: Sequence[int], labels: Sequence[int], place: int) -> float:
        """Return the weight of a trained token of the sample.

        A template with ``efficient_eos`` puts the end of a response on the first token of the next prompt, and after
        the last token. Such an end has the weight of its response.
        """
        if labels[place] >= _BASE:
            return self.weights[labels[place] - _BASE]
        if found[place] >= _BASE:
            owner = self.owners[found[place] - _BASE]
            return self.messages[owner - 1 if owner else 0].weight
        before = self.owners[found[place - 1] - _BASE] if place else len(self.messages) - 1
        return self.messages[before | 1].weight  # responses have odd numbers

    def _message(self, number: int, message: dict[str, str], pieces: list[Piece], ids: list[int]) -> list[float]:
        """Return the weights of the tokens of a message: those of its pieces, and of a thought that is added.

        Args:
            number: number of the message. Responses have odd numbers.
            message: the message, before the template changes its content.
            pieces: the pieces that the template makes of it.
            ids: all its tokens.
        """
        weights = self._of_pieces(number, message, pieces)
        count = len(ids) - len(weights)
        if not count:
            return weights
        added = ids[:count] if number % 2 else ids[-count:]  # an empty thought, before a response or after a prompt
        if count < 0 or added != self.template.get_thought_word_ids(self.tokenizer):
            raise RowError("its template adds tokens to a message in an unknown way; use another template")
        text, own = self.template.add_thought(), self.messages[number]
        factors = np.full(len(text), own.weight)
        for mark in own.marks:
            for begin, end in _parts(text, mark, strict=False):
                factors[begin:end] *= mark.weight
        thought = self._of_tokens(text, added, factors)
        return thought + weights if number % 2 else weights + thought

    def _of_pieces(self, number: int, message: dict[str, str], pieces: list[Piece]) -> list[float]:
        """Return the weights of the tokens of a message's pieces."""
        own, template, role = self.messages[number], self.template, message["role"]
        formatter = getattr(template, f"format_{role}")
        weights = list[float]()
        form = _form(formatter, str(number // 2))
        before = len(pieces) - len(form)  # the prefix of the template and the system message
        for place, (element, ids) in enumerate(pieces, -before):
            if place < 0 or not ids:
                weights += [self.system] * len(ids)
                continue
            around = form[place].split(_CONTENT) if isinstance(form[place], str) else list[str]()
            if len(around) != 2 or not (own.reads_text or number == 0):
                weights += [own.weight] * len(ids)
                continue
            start, end = len(around[0]), len(element) - len(around[1])
            if start > end or not element.startswith(around[0]) or not element.endswith(around[1]):
                raise RowError(f"its {role} message is not found in the text that the template makes of it")
            of_characters = np.full(len(element), own.weight)
            of_characters[start:end] = self._of_content(number, message, element[start:end])
            weights += self._of_tokens(element, ids, of_characters)
        return weights

    def _of_content(self, number: int, message: dict[str, str], text: str) -> Floats:
        """Return the weights of the characters of a message's text, as the template has changed it."""
        own, given = self.messages[number], message["content"]
        factors = np.full(len(text), own.weight)
        origins = _origins(given, text, self.template if message["role"] == "assistant" else None)
        if number == 0 and origins is None and text.endswith(given):  # the system message is a part of the first one
            system = len(text) - len(given)
            factors[:system] = self.system
            origins = np.concatenate([np.full(system, -1), np.arange(len(given))])
        if own.spans:
            if origins is None:
                raise RowError(
                    f"its template changes the content of message {number + 1} (of those after the system's), so spans "
                    "in the content are not known in the text that is trained on; use marks"
                )
            for begin, end, weight in own.spans:
                factors[(origins >= begin) & (origins < end)] *= weight
        for mark in own.marks:
            parts = _parts(text, mark)
            for begin, end in parts:
                factors[begin:end] *= mark.weight
            self.counts[self.marks.index(mark)] += len(parts)
        return factors

    def _of_tokens(self, text: str, ids: list[int], factors: Floats) -> list[float]:
        """Return the weights of the tokens of a text: that of a token's first character that is not white space.

        Args:
            text: the text.
            ids: its tokens.
            factors: weights of the characters.
        """
        if not len(text) or (factors == factors[0]).all():
            return [float(factors[0]) if len(text) else 1.0] * len(ids)
        if not getattr(self.tokenizer, "is_fast", False):
            raise RowError(
                "marks and spans need a tokenizer that tells the characters of its tokens; set use_fast_tokenizer: true"
            )
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if found["input_ids"] != ids:
            raise RowError("its text gives other tokens when it is encoded again; use another tokenizer")
        visible = np.array([not character.isspace() for character in text])
        places = np.where(visible, np.arange(len(text)), len(text))
        following = np.minimum.accumulate(places[::-1])[::-1]  # the next character that is not white space
        weights = []
        for begin, end in found["offset_mapping"]:
            begin = min(begin, len(text) - 1)
            first = int(following[begin])
            weights.append(float(factors[first if first < end else begin]))
        return weights


def _form(formatter: Any, number: str) -> list[Any]:
    """Return the elements of a formatted message, with a stand-in for its content.

    Args:
        formatter: LLaMA-Factory's formatter of the role.
        number: number of the turn.
    """
    from llamafactory.data.formatter import StringFormatter

    if not isinstance(formatter, StringFormatter):
        raise RowError(f"its template formats messages with {type(formatter).__name__}; use another template")
    # Formatters of function calls parse the content first, and format the result in the same way.
    return StringFormatter.apply(formatter, content=_CONTENT, idx=number)


def _origins(given: str, text: str, template: Any) -> NDArray[np.int64] | None:
    """Return the character of the given content that each character of the text is, or None if it is not known.

    A template for reasoning may remove thoughts. It is None for messages whose content is never changed in this way.
    """
    if given == text:
        return np.arange(len(text))
    if template is None:
        return None
    begin, end = map(re.escape, template.thought_words)
    kept = np.ones(len(given), dtype=bool)
    for thought in re.finditer(f"{begin}(.*?){end}", given, re.DOTALL):
        kept[thought.start() : thought.end()] = False
    rest = "".join(given[place] for place in np.flatnonzero(kept))
    return np.flatnonzero(kept)[len(rest) - len(text) :] if rest.lstrip("\n") == text else None


def _parts(text: str, mark: Mark, strict: bool = True) -> list[tuple[int, int]]:
    """Return the beginning and the end of each marked part of a text, delimiters included.

    Args:
        text: the text.
        mark: the delimiters.
        strict: whether to refuse delimiters without their counterparts. If not, they are left out.

    Raises:
        RowError: if a part is not closed, begins inside another one of the same mark, or ends without a beginning.
    """
    found, at = list[tuple[int, int]](), 0
    while True:
        begin = text.find(mark.begin, at)
        stray = text.find(mark.end, at, begin if begin >= 0 else None)
        if stray >= 0 and mark.begin != mark.end and strict:
            raise RowError(f"{mark.end!r} (character {stray} of a response) ends no {mark.begin!r}")
        if begin < 0:
            return found
        inside = begin + len(mark.begin)
        end = text.find(mark.end, inside)
        if end < 0:
            if strict:
                raise RowError(f"{mark.begin!r} (character {begin} of a response) is not closed by {mark.end!r}")
            return found
        nested = text.find(mark.begin, inside, end)
        if nested >= 0 and strict:
            raise RowError(f"{mark.begin!r} (character {nested} of a response) begins inside another {mark.begin!r}")
        at = end + len(mark.end)
        found.append((begin, at))
