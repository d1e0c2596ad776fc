"""Checks of the embeddings that components need, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from dataflex.api.weighter import Weighter
from dataflex.config.checks.values import truthy
from dataflex.config.loading import SECTION, RunConfig
from dataflex.embedding.encoders import problems_of_encoder
from dataflex.errors import Problem


def problems_of_embeddings(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of the embeddings that components need."""
    for key, component in config.build_components().items():
        params = component.needs(config).embeddings
        if params is None:
            continue
        for parameter, message in problems_of_encoder(params):
            yield Problem(f"{SECTION}.{key}.{parameter}", message)
        if truthy(config, "streaming"):
            yield Problem(
                "streaming",
                f"{SECTION}.{key} embeds the samples before training, and streamed data has none yet; set "
                "streaming: false.",
            )
        if params.encoder is None and isinstance(component, Weighter) and component.elementwise:
            yield Problem(
                f"{SECTION}.{key}.encoder",
                f"{component.name!r} weighs the samples of each process separately, but the model in training embeds "
                "the samples of all processes together; name an encoder.",
            )
