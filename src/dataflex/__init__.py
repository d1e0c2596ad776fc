"""DataFlex: data-centric dynamic training of LLMs on LLaMA-Factory.

What a component of your own needs is here; everything else is reached through ``dataflex-cli``.
"""

from dataflex.api.component import State
from dataflex.api.context import RoundContext, StepContext, StepStatistics
from dataflex.api.measurement import Measurement
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

__version__ = "0.1.0"

__all__ = [
    "ComponentParams",
    "DomainParams",
    "Group",
    "InputPath",
    "Measurement",
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
    "StepContext",
    "StepStatistics",
    "ValidationParams",
    "Weighter",
    "WeighterParams",
    "__version__",
    "register",
]
