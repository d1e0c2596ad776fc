"""The probe of a trainer: how many tokens a batch may have, and the files of a stage's reference."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dataflex.probe.model import ModelProbe
from dataflex.trainer.probing import make_probe
from unit.fakes import make_pool
from unit.probe.pairs import Dpo

LONGEST, PER_DEVICE = 100, 3


def probe_of(
    folder: Path, stage_loss: Any, *, sharded: bool = False, given: int | None = None, trains: bool = True
) -> ModelProbe:
    """Return the probe of a trainer with samples of at most 100 tokens and micro-batches of 3 samples."""
    args = SimpleNamespace(
        per_device_train_batch_size=PER_DEVICE,
        device=torch.device("cpu"),
        output_dir=str(folder),
        process_index=0,
        disable_tqdm=True,
    )
    keys = {"stage": "dpo", "pref_beta": 0.3, "ref_model": "another", "learning_rate": 1e-3}
    inputs = SimpleNamespace(
        settings=SimpleNamespace(probe_batch_tokens=given), config=SimpleNamespace(llamafactory=keys)
    )
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1, decode=str)
    trainer: Any = SimpleNamespace(
        args=args,
        stage_loss=stage_loss,
        dataflex=SimpleNamespace(inputs=inputs, steps=SimpleNamespace(plan=object() if trains else None)),
        is_fsdp_enabled=sharded,
        zero_stage=lambda: 0,
        causal_model=lambda: SimpleNamespace(is_gradient_checkpointing=False),
        raw_model=lambda: None,
        data_collator=None,
        accelerator=SimpleNamespace(autocast=None),
        processing_class=tokenizer,
        stop_tokens=None,
        plain_collators=(),
    )
    return make_probe(trainer, make_pool({"a": 2}, lengths=[LONGEST, 20]))


@pytest.mark.parametrize(
    ("stage_loss", "sharded", "forward", "gradients"),
    [
        (None, False, 4 * PER_DEVICE * LONGEST, PER_DEVICE * LONGEST),
        (None, True, 4 * PER_DEVICE * LONGEST, PER_DEVICE * LONGEST),
        (Dpo(), False, PER_DEVICE * LONGEST, PER_DEVICE * LONGEST),
        (Dpo(), True, PER_DEVICE * LONGEST // 2, PER_DEVICE * LONGEST // 2),
    ],
)
def test_a_batch_of_pairs_has_no_more_logits_than_a_training_step(
    tmp_path: Path, stage_loss: Any, sharded: bool, forward: int, gradients: int
) -> None:
    probe = probe_of(tmp_path, stage_loss, sharded=sharded)
    assert (probe.batch_tokens, probe.gradient_batch_tokens) == (forward, gradients)
    chosen = probe_of(tmp_path, stage_loss, sharded=sharded, given=77)
    assert (chosen.batch_tokens, chosen.gradient_batch_tokens) == (77, 77)


def test_values_of_the_reference_are_files_of_a_run_that_trains(tmp_path: Path) -> None:
    probe = probe_of(tmp_path, Dpo())
    assert probe.references.folder == tmp_path / "dataflex" / "reference"
    assert probe.references.identity == {"ref_model": "another"}
    assert probe.stage_settings == {"stage": "dpo", "pref_beta": "0.3"}
    assert probe_of(tmp_path, Dpo(), trains=False).references.folder is None
    assert probe_of(tmp_path, None).stage_settings == {}
