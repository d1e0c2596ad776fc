"""DataFlex: data-centric dynamic training of LLMs on LLaMA-Factory.

What a component of your own needs is here; everything else is reached through ``dataflex-cli``.
"""

from dataflex.components import (
    ComponentParams,
    DomainParams,
    Group,
    InputPath,
    Mixer,
    MixerParams,
    Order,
    OutputPath,
    RoundContext,
    Selection,
    Selector,
    SelectorParams,
    StepContext,
    StepStatistics,
    Weighter,
    WeighterParams,
)
from dataflex.registry import register
from dataflex.schedule import RunOutline

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
