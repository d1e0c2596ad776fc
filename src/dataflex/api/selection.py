"""Groups of samples to choose from, and the samples that were chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray, PassSampler, Walk
from dataflex.errors import ComponentError


@dataclass
class Group:
    """A contiguous range of the pool out of which ``budget`` samples are wanted: the whole pool, or one domain."""

    name: str
    start: int
    stop: int
    budget: int
    sampler: PassSampler
    """Where this group's passes stand; shared by all rounds of the run."""

    @property
    def size(self) -> int:
        """Number of samples in the group."""
        return self.stop - self.start

    @property
    def candidates(self) -> IndexArray:
        """Pool indices of the group, ascending, shape (size,)."""
        return np.arange(self.start, self.stop, dtype=np.int64)

    def draw(self, count: int, walk: Walk | None = None) -> IndexArray:
        """Return the next ``count`` pool indices of the group's running pass, which ``walk`` may put in order."""
        drawn = self.sampler.draw(count, walk)
        drawn += self.start
        return drawn

    def draw_passes(self, walk: Walk | None = None) -> Selection:
        """Return the next ``budget`` samples of the group's running pass, in random order already or in a walk's."""
        begin = self.sampler.drawn
        numbers = np.arange(begin, begin + self.budget, dtype=np.int64) // self.size
        return Selection(self.draw(self.budget, walk), shuffled=True, passes=numbers)


@dataclass(frozen=True)
class Selection:
    """The samples a selector chose.

    Attributes:
        indices: pool indices, shape (budget,).
        scores: their scores in the same order, or None where the selector has none.
        unscored: candidates left out because they have no score (no token to train on).
        shuffled: whether the indices are in random order already.
        ranks: the rank of each among the candidates of its group, in the same order, int64: 1 is the best, ties broken
            as the rule that chose breaks them; 0 for a sample taken without a choice. None where nothing is ranked.
        ranked: candidates the ranks are among.
        passes: which pass over its group each is of, in the same order, int64; a sample of a later pass is not trained
            before those of an earlier one, unless an order moves it. None where there are no passes.
        undecided: why these samples do not follow from what the selector is for; None where they do.
    """

    indices: IndexArray
    scores: ScoreArray | None = None
    unscored: int = 0
    shuffled: bool = False
    ranks: IndexArray | None = None
    ranked: int = 0
    passes: IndexArray | None = None
    undecided: str | None = None


def check_form(label: str, selection: Selection) -> None:
    """Check that somebody's selection is one, of arrays.

    Raises:
        ComponentError: naming what chose and what it returned.
    """
    if not isinstance(selection, Selection):
        raise ComponentError(f"{label} returned a {type(selection).__name__}; needed is a dataflex.Selection.")
    parts = {"indices": selection.indices, "scores": selection.scores, "ranks": selection.ranks}
    for name, part in parts.items():
        if not isinstance(part, np.ndarray) and (part is not None or name == "indices"):
            raise ComponentError(
                f"{label} returned a Selection whose {name} are a {type(part).__name__}; needed is a numpy array."
            )


def with_whole_passes(candidates: IndexArray, budget: int, choose: Callable[[IndexArray, int], Selection]) -> Selection:
    """Return ``budget`` of the candidates: all of them while the budget exceeds their number, then a choice."""
    passes, rest = divmod(budget, candidates.size)
    whole = Selection(np.tile(candidates, passes), passes=np.repeat(np.arange(passes), candidates.size))
    if not rest:
        return replace(whole, undecided="every sample is taken")
    chosen = choose(candidates, rest)
    if not passes:
        return chosen
    return join([whole, replace(chosen, passes=np.full(rest, passes))])


def join(parts: list[Selection]) -> Selection:
    """Return selections one after another; of a part without scores, ranks or passes a sample has NaN or 0 there."""
    if len(parts) == 1:
        return parts[0]
    scores = ranks = passes = None
    if any(part.scores is not None for part in parts):
        scores = np.concatenate(
            [np.full(part.indices.size, np.nan, np.float32) if part.scores is None else part.scores for part in parts]
        )
    if any(part.ranks is not None for part in parts):
        ranks = np.concatenate(
            [np.zeros(part.indices.size, np.int64) if part.ranks is None else part.ranks for part in parts]
        )
    if any(part.passes is not None for part in parts):
        passes = np.concatenate(
            [np.zeros(part.indices.size, np.int64) if part.passes is None else part.passes for part in parts]
        )
    return Selection(
        np.concatenate([part.indices for part in parts]),
        scores,
        sum(part.unscored for part in parts),
        ranks=ranks,
        ranked=sum(part.ranked for part in parts),
        passes=passes,
    )
