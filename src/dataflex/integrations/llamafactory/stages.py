"""Adapters of LLaMA-Factory's stages that can train in rounds.

The form of a sample in a stage (its fields, whether rows are packed) is defined in :mod:`dataflex.data.stages`. An
adapter adds the trainer class to extend, the computation of a batch's losses, and the packing of rows into samples. A
further stage needs an entry there and one here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dataflex.data import stages
from dataflex.integrations.llamafactory.packing import RowsOfSamples, pack_conversations, pack_texts
from dataflex.trainer.stage_losses import BatchLosses, causal_losses

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
        batch_losses: computes the losses of a batch.
        note_packing: packs rows with a processor of LLaMA-Factory, and returns the samples and the rows of each.
    """

    stage: stages.Stage
    trainer: str
    collator: str
    batch_losses: BatchLosses
    note_packing: Callable[[Any, dict[str, list[Any]]], tuple[dict[str, list[Any]], RowsOfSamples]]

    @property
    def name(self) -> str:
        """LLaMA-Factory's name of the stage."""
        return self.stage.name


STAGES = {
    adapter.name: adapter
    for adapter in (
        StageAdapter(
            stages.STAGES["sft"],
            "CustomSeq2SeqTrainer",
            "SFTDataCollatorWith4DAttentionMask",
            causal_losses,
            pack_conversations,
        ),
        StageAdapter(
            stages.STAGES["pt"], "CustomTrainer", "DataCollatorForLanguageModeling", causal_losses, pack_texts
        ),
    )
}


def workflow_of(stage: str) -> Any:
    """Return the workflow module of a stage. The workflow looks up the names in this module when it runs."""
    return import_module(f"llamafactory.train.{stage}.workflow")
