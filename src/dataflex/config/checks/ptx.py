"""Checks of ``dataflex.ptx``."""

from __future__ import annotations

from collections.abc import Iterator

from dataflex.config.checks.values import truthy, word
from dataflex.config.loading import SECTION, RunConfig
from dataflex.data.stages import STAGES
from dataflex.errors import Problem

_STEPS_IN_BACKWARD = ("galore_layerwise", "apollo_layerwise")
_OPTIMIZERS_IN_BACKWARD = ("lomo", "adalomo")


def problems_of_ptx(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of a preference run that also trains on text."""
    if config.dataflex is None or config.dataflex.ptx is None:
        return
    stage = word(config, "stage", "sft")
    if stage in STAGES and not STAGES[stage].loss_per_sample:
        names = ", ".join(config.dataflex.ptx.dataset)
        yield Problem(
            f"{SECTION}.ptx",
            f"is for the preference stages (dpo, rm, kto), and this run has stage {stage}. Mix the data as a domain: "
            f"add {names} to dataset, and set its share with {SECTION}.mix.",
        )
    for key in _STEPS_IN_BACKWARD:
        if truthy(config, key):
            yield Problem(key, f"{_why()}; remove it.")
    if word(config, "optim", "") in _OPTIMIZERS_IN_BACKWARD:
        yield Problem("optim", f"{word(config, 'optim', '')!r}: {_why()}; use another optimizer.")


def _why() -> str:
    return f"the optimizer steps inside each backward pass, and {SECTION}.ptx makes two of them in a step"
