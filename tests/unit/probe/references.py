"""Samples, a collator and a loaded reference, for the tests of references and their tables."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from dataflex.data.pool import Pool
from dataflex.probe.collation import Collation
from dataflex.probe.reference import Advance, ReferenceModel, load_reference, losses_of
from dataflex.probe.table_maker import TableMaker

CPU = torch.device("cpu")


def pool(seed: int = 0, size: int = 11) -> Pool:
    """Return samples of two to eight tokens in two domains; nothing of sample 3 is trained on."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(size):
        tokens = rng.integers(5, 90, rng.integers(2, 9)).tolist()
        labels = [-100 if rng.random() < 0.4 else token for token in tokens]
        rows.append({"input_ids": tokens, "labels": labels})
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    return Pool(Dataset.from_list(rows), ("alpha", "b/eta, quoted"), np.array([4, size - 4]))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([list(row[key]) + [fill] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 2), "labels": padded("labels", -100), "attention_mask": mask}


def loaded(model: Path) -> ReferenceModel:
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = load_reference(str(model), tokenizer, CPU, torch.float32, None, {}, "dataflex.mix.reference_model")
    assert not any(parameter.requires_grad for parameter in found.parameters())
    return ReferenceModel(found, torch.no_grad)


def losses(samples: Pool, reference: ReferenceModel, batch_tokens: int = 20) -> Any:
    """Return the function that computes losses of samples for a table."""

    def compute(indices: np.ndarray, advance: Advance) -> Any:
        return losses_of(samples, indices, reference, Collation(collate), CPU, batch_tokens, advance)

    return compute


def make(maker: TableMaker, model: Path, domains: list[str] | None = None) -> None:
    """Add domains to a table; all that it lacks if none are named."""
    wanted = maker.missing(None) if domains is None else domains
    maker.make(wanted, losses(maker.pool, loaded(model)), str(model))


table_of = partial(TableMaker, setting="dataflex.mix.reference_losses")
"""Returns the maker of a table, given its folder and its pool."""
