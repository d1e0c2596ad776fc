"""Embeddings of the model in training as a measurement, for use before the model is loaded."""

from __future__ import annotations

from typing import Any

from dataflex.api.measurement import Measurement
from dataflex.api.needs import Needs
from dataflex.api.params import EmbeddingParams
from dataflex.probe.embeddings import Embeddings


def model_embeddings(params: EmbeddingParams) -> Embeddings:
    """Return the measurement for the embeddings of the model in training that the parameters describe."""
    pooling = "mean" if params.pooling == "auto" else params.pooling
    return Embeddings(params.layer, pooling, text=params.embedding_text)


def measurements_of(needs: Needs) -> tuple[Measurement[Any], ...]:
    """Return all measurements of a component on the model in training, including its embeddings."""
    params = needs.embeddings
    if params is None or params.encoder is not None:
        return needs.measurements
    return (*needs.measurements, model_embeddings(params))
