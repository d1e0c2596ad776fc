"""DataFlex: data-centric dynamic training of LLMs on LLaMA-Factory.

What a component of your own needs is here; everything else is reached through ``dataflex-cli``.
"""

from dataflex.api.context import RoundContext, StepContext, StepStatistics
from dataflex.api.mixer import DomainParams, Mixer, MixerParams
from dataflex.api.order import Order
from dataflex.api.params import ComponentParams, InputPath, OutputPath
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
    "Mixer",
    "MixerParams",
    "Order",
    "OutputPath",
    "RoundContext",
    "RunOutline",
    "Selection",
    "Selector",
    "SelectorParams",
    "StepContext",
    "StepStatistics",
    "Weighter",
    "WeighterParams",
    "__version__",
    "register",
]
