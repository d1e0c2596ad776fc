"""Notes on pairs of equal responses and on feedback of one kind."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from dataflex.data import pairs
from dataflex.data.pool import Pool
from dataflex.data.stages import FEEDBACK, PAIR


def test_equal_pairs_are_those_whose_lists_are_equal(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(pairs, "_SCAN_ROWS", 7)
    rng = np.random.default_rng(0)
    rows = [[rng.integers(1, 3, rng.integers(0, 4)).tolist() for _ in range(2)] for _ in range(60)]
    pool = Pool.concatenate(
        {
            "a": Dataset.from_dict({name: [row[side] for row in rows[:25]] for side, name in enumerate(PAIR.tokens)}),
            "b": Dataset.from_dict({name: [row[side] for row in rows[25:]] for side, name in enumerate(PAIR.tokens)}),
        },
        fields=PAIR,
    )
    expected = [number for number, (chosen, rejected) in enumerate(rows) if chosen == rejected]
    assert 5 < len(expected) < 40
    assert pairs.equal_pairs(pool).tolist() == expected
    (note,) = pairs.notes_on_pairs(pool)
    assert f"{len(expected)} of 60 pairs have the same tokens" in note
    assert f"the first sample {expected[0]} (" in note


def test_feedback_of_one_kind_is_noted() -> None:
    def noted(*tags: bool) -> list[str]:
        rows = {"input_ids": [[1, 2]] * len(tags), "labels": [[1, 2]] * len(tags), "kto_tags": list(tags)}
        return list(pairs.notes_on_pairs(Pool.concatenate({"a": Dataset.from_dict(rows)}, fields=FEEDBACK)))

    assert noted(True, False) == []
    assert "all 2 samples are desired" in noted(True, True)[0]
    assert "all 1 samples are undesired" in noted(False)[0]


def test_samples_of_other_stages_have_no_notes() -> None:
    assert list(pairs.notes_on_pairs(Pool.concatenate({"a": Dataset.from_dict({"input_ids": [[1, 2]]})}))) == []
