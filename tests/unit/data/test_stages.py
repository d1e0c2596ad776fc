"""Training stages: the length of a sample, its trained tokens, and if rows are packed."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from dataflex.config.checks.values import is_packed
from dataflex.config.loading import split_config
from dataflex.data.pool import Pool
from dataflex.data.stages import STAGES, SampleFields
from dataflex.integrations.llamafactory.stages import STAGES as ADAPTERS


def test_every_stage_has_an_adapter() -> None:
    assert list(ADAPTERS) == list(STAGES)
    assert all(adapter.stage is STAGES[name] for name, adapter in ADAPTERS.items())


def test_a_sample_of_several_token_fields_is_as_long_as_all_of_them() -> None:
    """As the pairs of answers of preference training are."""
    rows = Dataset.from_dict(
        {
            "chosen_input_ids": [[1, 2, 3, 4], [1, 2]],
            "chosen_labels": [[-100, -100, 3, 4], [-100, 2]],
            "rejected_input_ids": [[1, 2, 5], [1, 2, 6, 7, 8]],
            "rejected_labels": [[-100, -100, 5], [-100, -100, -100, -100, -100]],
        }
    )
    fields = SampleFields(("chosen_input_ids", "rejected_input_ids"), ("chosen_labels", "rejected_labels"))
    pool = Pool.concatenate({"pairs": rows}, fields=fields)
    assert pool.lengths.tolist() == [7, 7]
    assert pool.trained_tokens.tolist() == [3, 1]
    assert pool.domain_tokens.tolist() == [14]
    other = rows.map(lambda row: {"rejected_input_ids": [9, *row["rejected_input_ids"][1:]]})
    assert Pool.concatenate({"pairs": other}, fields=fields).fingerprint != pool.fingerprint
    pool.decode = lambda tokens: " ".join(map(str, tokens))
    assert pool.text(1) == "1 2\n1 2 6 7 8"


@pytest.mark.parametrize(
    "given, packed",
    [
        ({}, False),
        ({"stage": "pt"}, True),
        ({"stage": "pt", "packing": False}, False),
        ({"packing": "true"}, True),
        ({"neat_packing": True}, True),
        ({"stage": "dpo"}, False),
    ],
)
def test_stage_and_keys_decide_if_rows_are_packed(given: dict[str, Any], packed: bool) -> None:
    assert is_packed(split_config(given)) is packed
