"""DataFlex: data-centric dynamic training of LLMs on LLaMA-Factory.

What a component of your own needs is here; everything else is reached through ``dataflex-cli``.
"""

from dataflex.api.component import State
from dataflex.api.context import RoundContext, StepBatch, StepContext, StepStatistics
from dataflex.api.measurement import MeasuredBatch, Measurement, MeasurementRun, register_measurement
from dataflex.api.mixer import DomainParams, Mixer, MixerParams
from dataflex.api.needs import Needs, RunView
from dataflex.api.order import Order
from dataflex.api.params import ComponentParams, InputPath, OutputPath, ValidationParams
from dataflex.api.reference import ReferenceParams
from dataflex.api.registry import register
from dataflex.api.schedule import RunOutline
from dataflex.api.selection import Group, Selection
from dataflex.api.selector import Selector, SelectorParams
from dataflex.api.weighter import Weighter, WeighterParams
from dataflex.probe.embeddings import Embeddings, HiddenStates
from dataflex.probe.error_norms import ErrorNorms
from dataflex.probe.expert_loads import ExpertLoads
from dataflex.probe.losses import Losses, TokenMeans

__version__ = "0.1.0"

__all__ = [
    "ComponentParams",
    "DomainParams",
    "Embeddings",
    "ErrorNorms",
    "ExpertLoads",
    "Group",
    "HiddenStates",
    "InputPath",
    "Losses",
    "MeasuredBatch",
    "Measurement",
    "MeasurementRun",
    "Mixer",
    "MixerParams",
    "Needs",
    "Order",
    "OutputPath",
    "ReferenceParams",
    "RoundContext",
    "RunOutline",
    "RunView",
    "Selection",
    "Selector",
    "SelectorParams",
    "State",
    "StepBatch",
    "StepContext",
    "StepStatistics",
    "TokenMeans",
    "ValidationParams",
    "Weighter",
    "WeighterParams",
    "__version__",
    "register",
    "register_measurement",
]
