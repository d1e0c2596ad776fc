"""Parameters of token weights that the data gives, and the keys of LLaMA-Factory that they exclude."""

from __future__ import annotations

from typing import Any

import pytest

from dataflex.config.checks.given_weights import problems_of_given_weights
from dataflex.config.loading import split_config
from dataflex.errors import ConfigError

ROLES = {"roles": {"assistant": 0.5, "function": 2}}


def problems(section: dict[str, Any], **keys: Any) -> dict[str, str]:
    config = split_config({**keys, "dataflex": {"weight": {"method": "span", **section}}})
    return {problem.key: problem.message for problem in problems_of_given_weights(config)}


@pytest.mark.parametrize(
    "section",
    [
        ROLES,
        {"message_key": "weight", "normalized": True},
        {"marks": [{"begin": "<a>", "end": "</a>", "weight": 0}, {"begin": "<a>", "end": "</b>", "weight": 1}]},
        {"spans_column": "spans", "normalization": "sample"},
    ],
)
def test_good_parameters_have_no_problem(section: dict[str, Any]) -> None:
    assert problems(section) == {}
    assert problems({"roles": {"user": 0.5, "system": 0, "observation": 1}}, train_on_prompt=True) == {}


@pytest.mark.parametrize(
    ("section", "keys", "key", "text"),
    [
        (ROLES, {"stage": "pt"}, "stage", "'pt' has no messages, and dataflex.weight weighs the tokens of messages"),
        (ROLES, {"streaming": True}, "streaming", "keeps a weight of every token"),
        (ROLES, {"mix_strategy": "interleave_under"}, "mix_strategy", "interleaving does not tell which row"),
        ({"roles": {"user": 1, "system": 1}}, {}, "dataflex.weight.roles", "tokens of user, system messages are not"),
        ({"roles": {"user": 1}}, {"train_on_prompt": "false"}, "dataflex.weight.roles", "set train_on_prompt: true"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(
    section: dict[str, Any], keys: dict[str, Any], key: str, text: str
) -> None:
    found = problems(section, **keys)
    assert list(found) == [key]
    assert text in found[key]


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({}, "needs roles, message_key, marks or spans_column"),
        ({"roles": {"gpt": 1}}, "roles"),
        ({"roles": {"assistant": -1}}, "roles.assistant"),
        ({"roles": {"assistant": float("nan")}}, "roles.assistant"),
        ({"message_key": ""}, "message_key"),
        ({"marks": [{"begin": "<a>", "weight": 1}]}, "marks.0.end"),
        ({"marks": [{"begin": "<a>", "end": "", "weight": 1}]}, "marks.0.end"),
        ({"marks": [{"begin": "a", "end": "b", "weight": 1}] * 2}, "'a' and 'b' are listed twice"),
    ],
)
def test_wrong_parameters_are_refused(section: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        problems(section)
    assert text in str(error.value)
