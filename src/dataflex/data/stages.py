"""What a sample is in each stage of training that has rounds.

What needs LLaMA-Factory or a model is in the stage's adapter, ``integrations/llamafactory/stages.py``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleFields:
    """The fields of a preprocessed sample.

    Attributes:
        tokens: those that hold tokens; all of them together are the sample's length.
        labels: those that hold the labels of tokens. If a data set has none of them, every token is a label.
    """

    tokens: tuple[str, ...] = ("input_ids",)
    labels: tuple[str, ...] = ("labels",)


@dataclass(frozen=True)
class Stage:
    """A stage of training that has rounds.

    Attributes:
        name: LLaMA-Factory's.
        packs: whether it packs rows into samples if ``packing`` is not given.
        fields: those of a sample.
    """

    name: str
    packs: bool = False
    fields: SampleFields = SampleFields()


STAGES = {stage.name: stage for stage in (Stage("sft"), Stage("pt", packs=True))}
"""The stages by name."""


def packs_by_default(stage: str) -> bool:
    """Return whether a stage packs if ``packing`` is not given."""
    return stage in STAGES and STAGES[stage].packs
