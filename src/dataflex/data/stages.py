"""The fields of a sample in each training stage that has rounds.

Code that needs LLaMA-Factory or a model is in the stage's adapter, ``integrations/llamafactory/stages.py``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleFields:
    """The fields of a preprocessed sample.

    Attributes:
        tokens: the fields that hold tokens. The length of a sample is the sum over these fields.
        labels: the fields that hold the labels of tokens. If a data set has none of these fields, every token is a
            label.
    """

    tokens: tuple[str, ...] = ("input_ids",)
    labels: tuple[str, ...] = ("labels",)


@dataclass(frozen=True)
class Stage:
    """A training stage that has rounds.

    Attributes:
        name: LLaMA-Factory's name of the stage.
        packs: whether the stage packs rows into samples if ``packing`` is not set.
        fields: the fields of a sample.
    """

    name: str
    packs: bool = False
    fields: SampleFields = SampleFields()


STAGES = {stage.name: stage for stage in (Stage("sft"), Stage("pt", packs=True))}
"""The stages by name."""


def packs_by_default(stage: str) -> bool:
    """Return whether a stage packs if ``packing`` is not set."""
    return stage in STAGES and STAGES[stage].packs
