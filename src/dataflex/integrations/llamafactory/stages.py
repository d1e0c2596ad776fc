"""Adapters of LLaMA-Factory's stages that can train in rounds.

The form of a sample in a stage (its fields, whether rows are packed) is defined in :mod:`dataflex.data.stages`. An
adapter adds the trainer class to extend, the loss of a sample if the stage has one, and the packing of rows into
samples. A further stage needs an entry there and one here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dataflex.data import stages
from dataflex.integrations.llamafactory.packing import RowsOfSamples, pack_conversations, pack_texts
from dataflex.integrations.llamafactory.preference import (
    DpoLoss,
    DpoTrainer,
    KtoLoss,
    KtoTrainer,
    RewardLoss,
    RewardTrainer,
)
from dataflex.probe.stage_loss import StageLoss

WORKFLOWS = ("sft", "pt", "dpo", "kto", "ppo", "rm")
"""LLaMA-Factory's stages. Each has a separate workflow module."""


@dataclass(frozen=True)
class StageAdapter:
    """The way LLaMA-Factory trains a stage.

    Attributes:
        stage: form of a sample.
        trainer: name of the trainer class in the stage's workflow module. The class is extended.
        collator: name of the collator class in the workflow module. For rows of tokens, masks and labels alone it only
            pads tensors, unless its settings or its template add more.
        note_packing: packs rows with a processor of LLaMA-Factory, and returns the samples and the rows of each. None
            in a stage that does not pack.
        notes_losses: the mixin that notes the losses of samples, in a stage in which a sample has one loss.
        stage_loss: makes the loss of such a stage from the trainer.
    """

    stage: stages.Stage
    trainer: str
    collator: str
    note_packing: Callable[[Any, dict[str, list[Any]]], tuple[dict[str, list[Any]], RowsOfSamples]] | None = None
    notes_losses: type | None = None
    stage_loss: Callable[[Any], StageLoss] | None = None

    @property
    def name(self) -> str:
        """LLaMA-Factory's name of the stage."""
        return self.stage.name


STAGES = {
    adapter.name: adapter
    for adapter in (
        StageAdapter(
            stages.STAGES["sft"], "CustomSeq2SeqTrainer", "SFTDataCollatorWith4DAttentionMask", pack_conversations
        ),
        StageAdapter(stages.STAGES["pt"], "CustomTrainer", "DataCollatorForLanguageModeling", pack_texts),
        StageAdapter(
            stages.STAGES["dpo"],
            "CustomDPOTrainer",
            "PairwiseDataCollatorWithPadding",
            notes_losses=DpoTrainer,
            stage_loss=DpoLoss,
        ),
        StageAdapter(
            stages.STAGES["rm"],
            "PairwiseTrainer",
            "PairwiseDataCollatorWithPadding",
            notes_losses=RewardTrainer,
            stage_loss=RewardLoss,
        ),
        StageAdapter(
            stages.STAGES["kto"],
            "CustomKTOTrainer",
            "KTODataCollatorWithPadding",
            notes_losses=KtoTrainer,
            stage_loss=KtoLoss,
        ),
    )
}


def trainer_module_of(stage: str) -> Any:
    """Return the module in which the workflow of a stage looks up its trainer class."""
    # The workflow of dpo imports its trainer, and with it TRL, only when it runs.
    return import_module(f"llamafactory.train.{stage}.{'trainer' if stage == 'dpo' else 'workflow'}")


def workflow_of(stage: str) -> Any:
    """Return the workflow module of a stage. The workflow looks up the names in this module when it runs."""
    return import_module(f"llamafactory.train.{stage}.workflow")
