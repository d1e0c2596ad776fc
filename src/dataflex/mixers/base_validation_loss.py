"""The loss of each validation domain, shared by the mixers that decide by validation losses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex import (
    ComponentError,
    DivergenceError,
    Losses,
    RoundContext,
)


def validation_losses(ctx: RoundContext) -> NDArray[np.float64]:
    """Return the mean loss per trained token of each validation domain under the current model, shape (M,).

    Costs one forward pass over all validation samples, shared by all ranks.

    Raises:
        ComponentError: if a domain has no trained token.
        DivergenceError: if the loss of a domain is not finite.
    """
    pool = ctx.validation
    losses = ctx.probe.measure(Losses(), np.arange(pool.size, dtype=np.int64), pool).astype(np.float64)
    tokens = pool.trained_tokens.astype(np.float64)
    counts = np.add.reduceat(tokens, pool.offsets[:-1])
    # A sample without a trained token has the loss NaN, which times 0 tokens would still be NaN.
    sums = np.add.reduceat(np.where(tokens > 0, losses, 0.0) * tokens, pool.offsets[:-1])
    for name, count, total in zip(pool.domains, counts, sums, strict=True):
        if count == 0:
            raise ComponentError(
                f"no validation sample of {name!r} has a token that is trained on. Check its template and cutoff_len."
            )
        if not np.isfinite(total):
            raise DivergenceError(f"the summed loss of the validation samples of {name!r} is not finite: {total}")
    means: NDArray[np.float64] = sums / counts
    return means
