"""Parameters of token weights that the data gives: by role, by message, by marks in the text and by spans."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dataflex.api.params import ComponentParams

Role = Literal["assistant", "function", "user", "observation", "system"]
"""Role of a message in LLaMA-Factory."""

PROMPT_ROLES = ("user", "observation", "system")
"""Roles whose tokens are trained on only with ``train_on_prompt``."""


class Mark(ComponentParams):
    """A pair of delimiters and the weight of the text between them."""

    begin: str = Field(min_length=1, description="Text that begins a marked part, as <think>.")
    end: str = Field(min_length=1, description="Text that ends the part, as </think>.")
    weight: float = Field(ge=0, description="Weight of the part, delimiters included.")


class GivenWeightParams(ComponentParams):
    """Parameters of token weights that the data gives. The weight of a token is the product of the four sources.

    Example:
        >>> from dataflex import GivenWeightParams, Needs
        >>> params = GivenWeightParams(roles={"function": 0.5}, marks=[{"begin": "<a>", "end": "</a>", "weight": 0}])
        >>> Needs(given_weights=params).given_weights.marks[0].weight
        0.0
    """

    roles: dict[Role, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="Weights by the role of a message: assistant, function, user, observation, system. Roles that are "
        "left out have weight 1.",
    )
    message_key: str | None = Field(
        None,
        min_length=1,
        description="Key of a message that holds its weight (OpenAI: weight). In alpaca format, the column with the "
        "weight of the response. A message without a value has weight 1.",
    )
    marks: list[Mark] = Field(
        default_factory=list, description="Delimiters in responses, and the weights of the parts between them."
    )
    spans_column: str | None = Field(
        None,
        min_length=1,
        description="Column with a list of {message, begin, end, weight} in each row: weights of parts of the content "
        "of a message, in characters. Alpaca: parts of the response, without message.",
    )
    normalized: bool = Field(
        False, description="Divide the weights by their mean over all trained tokens, so that their mean is 1."
    )

    @model_validator(mode="after")
    def _some_source(self) -> Self:
        if not (self.roles or self.message_key or self.marks or self.spans_column):
            raise ValueError("needs roles, message_key, marks or spans_column")
        pairs = [(mark.begin, mark.end) for mark in self.marks]
        for number, (begin, end) in enumerate(pairs):
            if (begin, end) in pairs[:number]:
                raise ValueError(f"marks: {begin!r} and {end!r} are listed twice; one weight is needed")
        return self

    @property
    def settings(self) -> str:
        """The parameters that the weights depend on, as JSON. Normalization is left out; it is applied afterwards."""
        return self.model_dump_json(include={"roles", "message_key", "marks", "spans_column"})
