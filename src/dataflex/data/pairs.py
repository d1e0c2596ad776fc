"""Samples of preference stages from which little can be learned: pairs of equal responses, responses of one kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.data.pool import Pool
from dataflex.data.sampling import IndexArray

_SCAN_ROWS = 10_000
"""Number of samples per read."""


def notes_on_pairs(pool: Pool) -> Iterator[str]:
    """Yield notes for the user about the samples of a preference stage; none in other stages."""
    if len(pool.fields.tokens) == 2:
        equal = equal_pairs(pool)
        if equal.size:
            one = equal.size == 1
            yield (
                f"{equal.size:,} of {pool.size:,} pairs {'has' if one else 'have'} the same tokens in both responses, "
                f"{'' if one else 'the first '}{_where(pool, equal[:1])}: {'its' if one else 'their'} margin stays 0. "
                "Either the texts are equal, or cutoff_len cuts the difference off."
            )
    elif "kto_tags" in pool.dataset.column_names:
        desired = _desired(pool)
        if desired in (0, pool.size):
            yield (
                f"all {pool.size:,} samples are {'desired' if desired else 'undesired'} (kto_tag), and stage kto needs "
                "both kinds."
            )


def equal_pairs(pool: Pool) -> IndexArray:
    """Return the indices of the pairs whose two responses have the same tokens, ascending."""
    parts, begin = [np.zeros(0, dtype=np.int64)], 0
    for table in pool.dataset.with_format("arrow").iter(batch_size=_SCAN_ROWS):
        chosen, rejected = (table.column(name).combine_chunks() for name in pool.fields.tokens)
        parts.append(begin + np.flatnonzero(_equal(chosen, rejected)))
        begin += len(table)
    return np.concatenate(parts)


def _equal(first: Any, second: Any) -> NDArray[np.bool_]:
    """Return which lists of two arrow arrays are equal, (n,)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.list_value_length(first).to_numpy()
    found = lengths == pc.list_value_length(second).to_numpy()
    mask = pa.array(found)
    differ = first.filter(mask).flatten().to_numpy() != second.filter(mask).flatten().to_numpy()
    owners = np.repeat(np.flatnonzero(found), lengths[found])
    found[owners[differ]] = False
    return found


def _desired(pool: Pool) -> int:
    """Return the number of desired responses."""
    import pyarrow.compute as pc

    tables = pool.dataset.select_columns(["kto_tags"]).with_format("arrow").iter(batch_size=_SCAN_ROWS)
    return sum(pc.sum(table.column(0)).as_py() or 0 for table in tables)


def _where(pool: Pool, index: IndexArray) -> str:
    """Return the name of a sample's domain, and its row if that is known."""
    domain = pool.domains[int(pool.domain_ids(index)[0])]
    rows = pool.row_numbers(index)
    if rows is None or rows[0] < 0:
        return f"sample {index[0]} ({domain})"
    return f"row {rows[0]} (counted from 0) of {pool.rows_of[domain].dataset!r}"
