"""Groups of samples to choose from, and the samples that a selector chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray, PassSampler, Walk
from dataflex.errors import ComponentError


@dataclass
class Group:
    """A contiguous range of the pool, from which ``budget`` samples are chosen: the whole pool or one domain.

    Example:
        >>> from dataflex import Group
        >>> from dataflex.data.sampling import PassSampler
        >>> group = Group("math", start=100, stop=104, budget=2, sampler=PassSampler(4, seed=1, name="math"))
        >>> group.candidates
        array([100, 101, 102, 103])
        >>> sorted(int(index) for index in [*group.draw(2), *group.draw(2)])
        [100, 101, 102, 103]
    """

    name: str
    """The name of the domain, or of the pool."""
    start: int
    """Pool index of the first sample."""
    stop: int
    """Pool index after the last sample."""
    budget: int
    """Number of samples to choose."""
    sampler: PassSampler
    """The state of the passes over this group. All rounds of the run share it."""

    @property
    def size(self) -> int:
        """Number of samples in the group."""
        return self.stop - self.start

    @property
    def candidates(self) -> IndexArray:
        """Pool indices of the group, ascending, shape (size,)."""
        return np.arange(self.start, self.stop, dtype=np.int64)

    def draw(self, count: int, walk: Walk | None = None) -> IndexArray:
        """Return the next ``count`` pool indices of the group's running pass. A ``walk`` may determine their order."""
        drawn = self.sampler.draw(count, walk)
        drawn += self.start
        return drawn

    def draw_passes(self, walk: Walk | None = None) -> Selection:
        """Return the next ``budget`` samples of the group's running pass, in random order or in the order of a walk."""
        begin = self.sampler.drawn
        numbers = np.arange(begin, begin + self.budget, dtype=np.int64) // self.size
        return Selection(self.draw(self.budget, walk), shuffled=True, passes=numbers)


@dataclass(frozen=True)
class Selection:
    """The samples that a selector chose.

    Attributes:
        indices: pool indices, shape (budget,).
        scores: the scores of the samples in the same order, or None if the selector has no scores.
        unscored: number of candidates that were left out because they have no score (no trained token).
        shuffled: whether the indices are already in random order.
        ranks: rank of each sample among the candidates of its group, in the same order, int64. Rank 1 is the best. The
            rule that chose the samples also breaks ties. Rank 0 marks a sample that was included without a choice. None
            if nothing is ranked.
        ranked: number of candidates that were ranked.
        passes: for each sample, the number of the pass over its group, in the same order, int64. A sample of a later
            pass is trained after those of an earlier pass, unless an order moves it. None without passes.
        undecided: why these samples do not follow the method of the selector; None if they do.

    Example:
        >>> import numpy as np
        >>> from dataflex import Selection
        >>> chosen = Selection(np.array([3, 8]), scores=np.array([0.9, 0.4], dtype=np.float32))
        >>> chosen.indices.size, chosen.shuffled
        (2, False)
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
    """Check that a return value is a selection of numpy arrays.

    Raises:
        ComponentError: if the value has another type. The message names the component and that type.
    """
    if not isinstance(selection, Selection):
        raise ComponentError(f"{label} returned a {type(selection).__name__}; a dataflex.Selection is needed.")
    parts = {"indices": selection.indices, "scores": selection.scores, "ranks": selection.ranks}
    for name, part in parts.items():
        if not isinstance(part, np.ndarray) and (part is not None or name == "indices"):
            raise ComponentError(
                f"{label} returned a Selection whose {name} are a {type(part).__name__}; a numpy array is needed."
            )


def with_whole_passes(candidates: IndexArray, budget: int, choose: Callable[[IndexArray, int], Selection]) -> Selection:
    """Return ``budget`` samples: all candidates once per whole pass in the budget, and a choice for the rest."""
    passes, rest = divmod(budget, candidates.size)
    whole = Selection(np.tile(candidates, passes), passes=np.repeat(np.arange(passes), candidates.size))
    if not rest:
        return replace(whole, undecided="every sample is taken")
    chosen = choose(candidates, rest)
    if not passes:
        return chosen
    return join([whole, replace(chosen, passes=np.full(rest, passes))])


def join(parts: list[Selection]) -> Selection:
    """Return several selections as one. For a part without scores the samples have NaN; without ranks or passes, 0."""
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
