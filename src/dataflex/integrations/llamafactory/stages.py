"""The adapters of LLaMA-Factory's stages that can train rounds.

What a sample of a stage is (its fields, whether rows are packed) is in :mod:`dataflex.data.stages`. An adapter adds
which class of which workflow is extended, how the losses of a batch are computed, and how rows become packed samples.
A further stage is an entry there and one here.
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
"""LLaMA-Factory's stages, each with a workflow module of its own."""


@dataclass(frozen=True)
class StageAdapter:
    """How LLaMA-Factory trains a stage.

    Attributes:
        stage: what a sample is.
        trainer: name of the trainer class in the stage's workflow module, which is extended.
        collator: name of the collator class in the workflow module. Of rows with nothing but tokens, masks and labels
            it makes nothing but padded tensors, unless its settings or its template have more to add.
        batch_losses: computes the losses of a batch.
        note_packing: makes packed samples of rows with a processor of LLaMA-Factory, and says which rows each holds.
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
    """Return the workflow module of a stage, whose names are looked up when it runs."""
    return import_module(f"llamafactory.train.{stage}.workflow")
