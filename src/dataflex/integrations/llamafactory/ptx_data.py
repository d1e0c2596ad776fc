"""Loading of the text on which a preference run also trains (``dataflex.ptx``)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dataflex.config.loading import SECTION
from dataflex.data.pool import Pool
from dataflex.data.stages import packs_by_default
from dataflex.integrations.llamafactory.preference import token_batch
from dataflex.trainer.ptx import PtxData, Row

if TYPE_CHECKING:
    from dataflex.config.ptx import PtxSettings
    from dataflex.integrations.llamafactory.loading import Loader


def load_ptx(load: Loader, data_args: Any, settings: PtxSettings) -> PtxData:
    """Return the text of a run, as LLaMA-Factory loads it in stage pt or sft.

    Args:
        load: loads the data of the run.
        data_args: LLaMA-Factory's data arguments of the run.
        settings: the settings of ``dataflex.ptx``.

    Raises:
        ConfigError: if the data cannot be loaded.
    """
    key, only = f"{SECTION}.ptx.dataset", copy.copy(data_args)
    only.dataset, only.eval_dataset, only.interleave_probs = list(settings.dataset), None, None
    only.val_size, only.streaming, only.mix_strategy, only.tokenized_path = 0.0, False, "concat", None
    only.packing, only.neat_packing = packs_by_default(settings.stage), False
    of_stage = replace(load, stage=settings.stage)
    samples = Pool.concatenate({"ptx": of_stage(only, key)["train_dataset"]}, key, of_stage.fields)
    return PtxData(samples, _texts if settings.stage == "pt" else _responses)


def _texts(trainer: Any, rows: list[Row]) -> Row:
    """Return a batch of texts, with the collator of LLaMA-Factory's stage pt."""
    from transformers import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(tokenizer=trainer.data_collator.tokenizer, mlm=False)
    return dict(collator(rows))


def _responses(trainer: Any, rows: list[Row]) -> Row:
    """Return a batch of prompts with responses, with the collator that the stage's own collator extends."""
    return dict(token_batch(trainer, rows, ""))
