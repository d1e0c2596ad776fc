"""The stages of LLaMA-Factory that can train rounds.

A stage says which class of which workflow trains it. What else differs between stages is kept here too, so that another
stage is another entry of :data:`STAGES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dataflex.integrations.llamafactory.packing import RowsOfSamples, pack_conversations, pack_texts

WORKFLOWS = ("sft", "pt", "dpo", "kto", "ppo", "rm")
"""LLaMA-Factory's stages, each with a workflow module of its own."""


@dataclass(frozen=True)
class Stage:
    """A stage that can train rounds.

    Attributes:
        name: LLaMA-Factory's.
        trainer: name of the trainer class in its workflow module.
        note_packing: makes packed samples of rows with a processor of LLaMA-Factory, and says which rows each holds.
    """

    name: str
    trainer: str
    note_packing: Callable[[Any, dict[str, list[Any]]], tuple[dict[str, list[Any]], RowsOfSamples]]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("sft", "CustomSeq2SeqTrainer", note_packing=pack_conversations),
        Stage("pt", "CustomTrainer", note_packing=pack_texts),
    )
}


def workflow_of(stage: str) -> Any:
    """Return the workflow module of a stage, whose names are looked up when it runs."""
    return import_module(f"llamafactory.train.{stage}.workflow")
