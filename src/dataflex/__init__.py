"""DataFlex: data-centric dynamic training of LLMs on LLaMA-Factory.

The package exports everything that a custom component needs. All other features are commands of ``dataflex-cli``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dataflex.api.component import Component, State
from dataflex.api.context import (
    EmbeddingArray,
    RoundContext,
    StepBatch,
    StepContext,
    StepStart,
    StepStatistics,
    TokenLosses,
)
from dataflex.api.given_weights import GivenWeightParams
from dataflex.api.measurement import MeasuredBatch, Measurement, MeasurementRun, register_measurement
from dataflex.api.mixer import DomainParams, Mixer, MixerParams
from dataflex.api.needs import Needs, RunView
from dataflex.api.order import Order
from dataflex.api.params import (
    ComponentParams,
    EmbeddingParams,
    InputPath,
    OutputPath,
    Shares,
    ValidationParams,
    shares_of,
    shares_problem,
)
from dataflex.api.probe import GenerationSettings, GradientSettings, Probe
from dataflex.api.reference import Reference, ReferenceParams
from dataflex.api.registry import register
from dataflex.api.schedule import RunOutline
from dataflex.api.selection import Group, Selection
from dataflex.api.selector import Selector, SelectorParams, check_scores
from dataflex.api.weighter import Weighter, WeighterParams
from dataflex.data.columns import ColumnArray, Wrong, unusable_score
from dataflex.data.domain_names import by_domain
from dataflex.data.pool import IGNORE_INDEX, Pool
from dataflex.data.rng import derive_rng, key_of
from dataflex.data.rules import (
    ScoreArray,
    quantiles,
    ranks_among,
    ranks_among_scored,
    sample_softmax,
    sample_without_replacement,
)
from dataflex.data.sampling import IndexArray, KeyedPermutation, exactly
from dataflex.distributed import on_main
from dataflex.embedding.approximate import find_neighbours
from dataflex.embedding.clusters import spherical_kmeans
from dataflex.embedding.densities import kernel_densities
from dataflex.embedding.neighbours import nearest
from dataflex.embedding.stored import embed_texts
from dataflex.errors import CheckpointError, ComponentError, ConfigError, DivergenceError, Problem, unknown
from dataflex.files import distinct, write_atomically
from dataflex.probe.embeddings import Embeddings, HiddenStates
from dataflex.probe.error_norms import ErrorNorms
from dataflex.probe.expert_loads import ExpertLoads
from dataflex.probe.generations import Generations
from dataflex.probe.gradient_features import GradientFeatures, GradientSimilarities, StoredFeatures
from dataflex.probe.gradient_norms import GradientNorms
from dataflex.probe.gradient_products import GradientProducts
from dataflex.probe.logit_norms import LogitNorms, LogitProjections
from dataflex.probe.losses import Losses, LossesByToken, TokenMeans
from dataflex.probe.margins import Margins

if TYPE_CHECKING:
    from dataflex.probe.mode import preserved_rng
    from dataflex.probe.store import FeatureStore

__version__ = "0.2.0"

EXPORTS = {
    "CheckpointError": "dataflex.errors",
    "ColumnArray": "dataflex.data.columns",
    "Component": "dataflex.api.component",
    "ComponentError": "dataflex.errors",
    "ComponentParams": "dataflex.api.params",
    "ConfigError": "dataflex.errors",
    "DivergenceError": "dataflex.errors",
    "DomainParams": "dataflex.api.mixer",
    "EmbeddingArray": "dataflex.api.context",
    "EmbeddingParams": "dataflex.api.params",
    "Embeddings": "dataflex.probe.embeddings",
    "ErrorNorms": "dataflex.probe.error_norms",
    "ExpertLoads": "dataflex.probe.expert_loads",
    "FeatureStore": "dataflex.probe.store",
    "GenerationSettings": "dataflex.api.probe",
    "Generations": "dataflex.probe.generations",
    "GivenWeightParams": "dataflex.api.given_weights",
    "GradientFeatures": "dataflex.probe.gradient_features",
    "GradientNorms": "dataflex.probe.gradient_norms",
    "GradientProducts": "dataflex.probe.gradient_products",
    "GradientSettings": "dataflex.api.probe",
    "GradientSimilarities": "dataflex.probe.gradient_features",
    "Group": "dataflex.api.selection",
    "HiddenStates": "dataflex.probe.embeddings",
    "IGNORE_INDEX": "dataflex.data.pool",
    "IndexArray": "dataflex.data.sampling",
    "InputPath": "dataflex.api.params",
    "KeyedPermutation": "dataflex.data.sampling",
    "LogitNorms": "dataflex.probe.logit_norms",
    "LogitProjections": "dataflex.probe.logit_norms",
    "Losses": "dataflex.probe.losses",
    "LossesByToken": "dataflex.probe.losses",
    "Margins": "dataflex.probe.margins",
    "MeasuredBatch": "dataflex.api.measurement",
    "Measurement": "dataflex.api.measurement",
    "MeasurementRun": "dataflex.api.measurement",
    "Mixer": "dataflex.api.mixer",
    "MixerParams": "dataflex.api.mixer",
    "Needs": "dataflex.api.needs",
    "Order": "dataflex.api.order",
    "OutputPath": "dataflex.api.params",
    "Pool": "dataflex.data.pool",
    "Probe": "dataflex.api.probe",
    "Problem": "dataflex.errors",
    "Reference": "dataflex.api.reference",
    "ReferenceParams": "dataflex.api.reference",
    "RoundContext": "dataflex.api.context",
    "RunOutline": "dataflex.api.schedule",
    "RunView": "dataflex.api.needs",
    "ScoreArray": "dataflex.data.rules",
    "Selection": "dataflex.api.selection",
    "Selector": "dataflex.api.selector",
    "SelectorParams": "dataflex.api.selector",
    "Shares": "dataflex.api.params",
    "State": "dataflex.api.component",
    "StepBatch": "dataflex.api.context",
    "StepContext": "dataflex.api.context",
    "StepStart": "dataflex.api.context",
    "StepStatistics": "dataflex.api.context",
    "StoredFeatures": "dataflex.probe.gradient_features",
    "TokenLosses": "dataflex.api.context",
    "TokenMeans": "dataflex.probe.losses",
    "ValidationParams": "dataflex.api.params",
    "Weighter": "dataflex.api.weighter",
    "WeighterParams": "dataflex.api.weighter",
    "Wrong": "dataflex.data.columns",
    "by_domain": "dataflex.data.domain_names",
    "check_scores": "dataflex.api.selector",
    "derive_rng": "dataflex.data.rng",
    "distinct": "dataflex.files",
    "embed_texts": "dataflex.embedding.stored",
    "exactly": "dataflex.data.sampling",
    "kernel_densities": "dataflex.embedding.densities",
    "find_neighbours": "dataflex.embedding.approximate",
    "key_of": "dataflex.data.rng",
    "nearest": "dataflex.embedding.neighbours",
    "on_main": "dataflex.distributed",
    "preserved_rng": "dataflex.probe.mode",
    "quantiles": "dataflex.data.rules",
    "ranks_among": "dataflex.data.rules",
    "ranks_among_scored": "dataflex.data.rules",
    "register": "dataflex.api.registry",
    "register_measurement": "dataflex.api.measurement",
    "sample_softmax": "dataflex.data.rules",
    "sample_without_replacement": "dataflex.data.rules",
    "shares_of": "dataflex.api.params",
    "shares_problem": "dataflex.api.params",
    "spherical_kmeans": "dataflex.embedding.clusters",
    "unknown": "dataflex.errors",
    "unusable_score": "dataflex.data.columns",
    "write_atomically": "dataflex.files",
}
"""The name of every export, and the module that defines it."""

__all__ = [
    "IGNORE_INDEX",
    "CheckpointError",
    "ColumnArray",
    "Component",
    "ComponentError",
    "ComponentParams",
    "ConfigError",
    "DivergenceError",
    "DomainParams",
    "EmbeddingArray",
    "EmbeddingParams",
    "Embeddings",
    "ErrorNorms",
    "ExpertLoads",
    "FeatureStore",
    "GenerationSettings",
    "Generations",
    "GivenWeightParams",
    "GradientFeatures",
    "GradientNorms",
    "GradientProducts",
    "GradientSettings",
    "GradientSimilarities",
    "Group",
    "HiddenStates",
    "IndexArray",
    "InputPath",
    "KeyedPermutation",
    "LogitNorms",
    "LogitProjections",
    "Losses",
    "LossesByToken",
    "Margins",
    "MeasuredBatch",
    "Measurement",
    "MeasurementRun",
    "Mixer",
    "MixerParams",
    "Needs",
    "Order",
    "OutputPath",
    "Pool",
    "Probe",
    "Problem",
    "Reference",
    "ReferenceParams",
    "RoundContext",
    "RunOutline",
    "RunView",
    "ScoreArray",
    "Selection",
    "Selector",
    "SelectorParams",
    "Shares",
    "State",
    "StepBatch",
    "StepContext",
    "StepStart",
    "StepStatistics",
    "StoredFeatures",
    "TokenLosses",
    "TokenMeans",
    "ValidationParams",
    "Weighter",
    "WeighterParams",
    "Wrong",
    "__version__",
    "by_domain",
    "check_scores",
    "derive_rng",
    "distinct",
    "embed_texts",
    "exactly",
    "find_neighbours",
    "kernel_densities",
    "key_of",
    "nearest",
    "on_main",
    "preserved_rng",
    "quantiles",
    "ranks_among",
    "ranks_among_scored",
    "register",
    "register_measurement",
    "sample_softmax",
    "sample_without_replacement",
    "shares_of",
    "shares_problem",
    "spherical_kmeans",
    "unknown",
    "unusable_score",
    "write_atomically",
]


def __getattr__(name: str) -> Any:
    """Return an export whose module imports torch. It is imported on first use because ``check`` runs without torch."""
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)
