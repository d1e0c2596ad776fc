"""Token losses and weights of some samples of a step, kept on the device until the step is logged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.record.schema import TokensOfSample, TokensOfStep

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dataflex.trainer.statistics import BatchLosses

SAMPLES = 8
"""Most samples of a step that are recorded."""
TOKENS = 4096
"""Most tokens of these samples together."""
STEPS = 200
"""The recorded steps are at least the expected steps of the run divided by this number apart."""


class FirstBatch:
    """Keeps this process's first micro-batch of the running step and of the step before it.

    Nothing is copied, and the device is not waited for, before :meth:`recorded`.
    """

    def __init__(self) -> None:
        self._running: BatchLosses | None = None
        self._ended: BatchLosses | None = None

    def add(self, batch: BatchLosses) -> None:
        """Add a micro-batch of the running step. All but the first of the step are ignored."""
        if self._running is None:
            self._running = batch

    def finish(self) -> None:
        """End the running step."""
        self._ended, self._running = self._running, None

    def recorded(self, step: int) -> TokensOfStep | None:
        """Return the tokens of the first samples of the step that ended last.

        None if no weighter acted in that step, or if its samples are streamed, so that nothing names them.

        Args:
            step: number of optimizer steps done.
        """
        batch = self._ended
        if batch is None or batch.places is None or batch.weights is None:
            return None
        assert batch.labels is not None
        assert batch.per_token is not None
        places, labels, losses, weights = (
            values[:SAMPLES].cpu().numpy() for values in (batch.places, batch.labels, batch.per_token, batch.weights)
        )
        samples, left = [], TOKENS
        for index, label, loss, weight in zip(places.tolist(), labels, losses, weights, strict=True):
            trained = label != IGNORE_INDEX
            number = int(trained.sum())
            if not number or not left:
                continue
            of_tokens = [rounded(weight)] if weight.ndim == 0 else list(map(rounded, weight[trained][:left]))
            samples.append(TokensOfSample(index, number, list(map(rounded, loss[trained][:left])), of_tokens))
            left -= min(left, number)
        return TokensOfStep(step, samples) if samples else None


def is_due(step: int, last: int | None, expected: int) -> bool:
    """Return whether the tokens of a logged step are recorded.

    Args:
        step: number of optimizer steps done.
        last: the step whose tokens were recorded last, if any.
        expected: expected number of steps of the run.
    """
    return last is None or step - last >= expected / STEPS


def rounded(value: float | NDArray) -> float:
    """Return a number with four significant digits."""
    return float(f"{float(value):.4g}")
