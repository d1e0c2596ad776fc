"""The fields of a sample in each training stage that has rounds.

Code that needs LLaMA-Factory or a model is in the stage's adapter, ``integrations/llamafactory/stages.py``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleFields:
    """The fields of a preprocessed sample.

    Attributes:
        tokens: the fields that hold tokens. The length of a sample is the sum over these fields. If there are several,
            as in a pair of responses, measurements of tokens and texts read the first.
        labels: the fields that hold the labels of tokens, in the order of ``tokens``. If a data set has none of these
            fields, every token is a label.
        others: further fields that the loss of a sample depends on.
    """

    tokens: tuple[str, ...] = ("input_ids",)
    labels: tuple[str, ...] = ("labels",)
    others: tuple[str, ...] = ()


PAIR = SampleFields(("chosen_input_ids", "rejected_input_ids"), ("chosen_labels", "rejected_labels"))
"""A prompt with a chosen response, and the same prompt with a rejected one."""

FEEDBACK = SampleFields(others=("kl_input_ids", "kl_labels", "kto_tags"))
"""A prompt with a response that is desired or not.

The stage also reads the prompt with the response of a neighbouring row (``kl_*``), from which it estimates a KL
divergence without a gradient. A sample is not trained on this response, so its tokens are not tokens of the sample.
"""


@dataclass(frozen=True)
class Stage:
    """A training stage that has rounds.

    Attributes:
        name: LLaMA-Factory's name of the stage.
        packs: whether the stage packs rows into samples if ``packing`` is not set.
        fields: the fields of a sample.
        loss_per_sample: whether a sample has one loss, and not one for each token.
        loads: name under which LLaMA-Factory loads the data of the stage; empty for the name of the stage.
    """

    name: str
    packs: bool = False
    fields: SampleFields = SampleFields()
    loss_per_sample: bool = False
    loads: str = ""

    @property
    def loads_as(self) -> str:
        """The stage that LLaMA-Factory is given when it loads the data."""
        return self.loads or self.name

    @property
    def takes_pairs(self) -> bool:
        """Whether a sample is a pair of responses."""
        return len(self.fields.tokens) == 2


STAGES = {
    stage.name: stage
    for stage in (
        Stage("sft"),
        Stage("pt", packs=True),
        Stage("dpo", fields=PAIR, loss_per_sample=True, loads="rm"),
        Stage("rm", fields=PAIR, loss_per_sample=True),
        Stage("kto", fields=FEEDBACK, loss_per_sample=True),
    )
}
"""The stages by name."""


def packs_by_default(stage: str) -> bool:
    """Return whether a stage packs if ``packing`` is not set."""
    return stage in STAGES and STAGES[stage].packs


def loss_per_sample(stage: str) -> bool:
    """Return whether a sample of a stage has one loss, and not one for each token."""
    return stage in STAGES and STAGES[stage].loss_per_sample
