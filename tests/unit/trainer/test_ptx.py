"""The samples of text that a step reads."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.trainer.ptx import samples_at


@pytest.mark.parametrize("size", [1, 7, 100])
def test_every_pass_has_every_sample_once_in_an_order_of_its_own(size: int) -> None:
    drawn = samples_at(np.arange(5 * size), size, seed=3).reshape(5, size)
    assert all(sorted(each) == list(range(size)) for each in drawn.tolist())
    assert len({tuple(each) for each in drawn.tolist()}) == (1 if size == 1 else 5)
    assert size == 1 or not np.array_equal(drawn[0], samples_at(np.arange(size), size, seed=4))


def test_a_position_has_its_sample_whatever_is_drawn_with_it() -> None:
    whole = samples_at(np.arange(60), 7, seed=3)
    positions = np.array([59, 0, 13, 14, 13])
    assert samples_at(positions, 7, seed=3).tolist() == whole[positions].tolist()
