"""Rows that a component gives to a measurement, in the format of the training collator."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.data.samples import RowList
from dataflex.data.stages import PAIR
from dataflex.errors import ComponentError


def test_a_pair_has_the_tokens_and_the_masks_of_both_sides() -> None:
    pair = {"chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1, 2], "rejected_attention_mask": [1, 0]}
    rows = RowList([pair, {"input_ids": [4, 5, 6, 7]}], PAIR)
    assert rows.lengths.tolist() == [5, 4]
    first, second = rows.rows(np.array([0, 1]))
    assert first == {**pair, "chosen_attention_mask": [1, 1, 1]}
    assert second == {"input_ids": [4, 5, 6, 7], "attention_mask": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    "row, name",
    [
        ({"chosen_input_ids": [1]}, "rejected_input_ids"),
        ({"rejected_input_ids": [1]}, "input_ids"),
        ({"input_ids": []}, "input_ids"),
    ],
)
def test_a_row_without_tokens_is_named(row: dict[str, list[int]], name: str) -> None:
    with pytest.raises(ComponentError, match=f"row 1 of the samples to measure has no {name}"):
        RowList([{"input_ids": [1]}, row], PAIR)
