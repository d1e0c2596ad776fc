"""Training stages: the length of a sample, its trained tokens, and if rows are packed."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from dataflex.config.checks.values import is_packed
from dataflex.config.loading import split_config
from dataflex.data.pool import Pool
from dataflex.data.stages import STAGES
from dataflex.integrations.llamafactory.stages import STAGES as ADAPTERS


def test_every_stage_has_an_adapter() -> None:
    assert list(ADAPTERS) == list(STAGES)
    assert all(adapter.stage is STAGES[name] for name, adapter in ADAPTERS.items())


def test_a_pair_is_as_long_as_both_of_its_responses() -> None:
    rows = Dataset.from_dict(
        {
            "chosen_input_ids": [[1, 2, 3, 4], [1, 2]],
            "chosen_labels": [[-100, -100, 3, 4], [-100, 2]],
            "rejected_input_ids": [[1, 2, 5], [1, 2, 6, 7, 8]],
            "rejected_labels": [[-100, -100, 5], [-100, -100, -100, -100, -100]],
        }
    )
    fields = STAGES["dpo"].fields
    pool = Pool.concatenate({"pairs": rows}, fields=fields)
    assert pool.lengths.tolist() == [7, 7]
    assert pool.trained_tokens.tolist() == [3, 1]
    assert pool.domain_tokens.tolist() == [14]
    other = rows.map(lambda row: {"rejected_input_ids": [9, *row["rejected_input_ids"][1:]]})
    assert Pool.concatenate({"pairs": other}, fields=fields).fingerprint != pool.fingerprint
    pool.decode = lambda tokens: " ".join(map(str, tokens))
    assert pool.text(0) == "1 2 3 4"  # the prompt with the chosen response, as measurements of tokens read it


def test_feedback_differs_if_its_label_or_its_other_response_does() -> None:
    def fingerprint(tag: bool, other: int) -> str:
        row = {"input_ids": [1, 2], "labels": [-100, 2], "kl_input_ids": [1, other], "kl_labels": [-100, other]}
        rows = Dataset.from_dict({name: [value] for name, value in {**row, "kto_tags": tag}.items()})
        pool = Pool.concatenate({"a": rows}, fields=STAGES["kto"].fields)
        assert (pool.lengths.tolist(), pool.trained_tokens.tolist()) == ([2], [1])
        return pool.fingerprint

    assert len({fingerprint(tag, other) for tag in (True, False) for other in (3, 4)}) == 4


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
