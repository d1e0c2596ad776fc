"""Checks of token weights that the data gives, before the data is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from dataflex.api.given_weights import PROMPT_ROLES
from dataflex.config.checks.values import truthy
from dataflex.config.loading import SECTION, RunConfig
from dataflex.errors import Problem


def problems_of_given_weights(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of token weights, and the keys that hide from which text a token comes."""
    for key, component in config.build_components().items():
        params = component.needs(config).given_weights
        if params is None:
            continue
        where = f"{SECTION}.{key}"
        stage = str(config.llamafactory.get("stage", "sft"))
        if stage != "sft":
            yield Problem("stage", f"{stage!r} has no messages, and {where} weighs the tokens of messages; use sft.")
        if truthy(config, "streaming"):
            yield Problem(
                "streaming",
                f"{where} keeps a weight of every token, and streamed data has no samples yet; set streaming: false.",
            )
        if str(config.llamafactory.get("mix_strategy", "concat")) != "concat":
            yield Problem(
                "mix_strategy",
                f"{where} reads weights from rows, but interleaving does not tell which row a sample is from; use "
                "concat.",
            )
        unused = [role for role in PROMPT_ROLES if role in params.roles]
        if unused and not truthy(config, "train_on_prompt"):
            yield Problem(
                f"{where}.roles",
                f"tokens of {', '.join(unused)} messages are not trained on; set train_on_prompt: true, or leave the "
                "weight out.",
            )
