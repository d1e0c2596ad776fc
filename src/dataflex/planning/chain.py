"""Running a chain of selectors: filters keep a part of the candidates, the last selector chooses the round's samples.

Every selector of a chain decides once in ``every`` decisions. Between two decisions of a filter, the samples that it
kept last are used again. Between two decisions of the last selector, its scores are used again, and every round is
chosen anew from them. A stored result includes the effect of all selectors before it, so these are not called either.

Samples are chosen from each group separately. A group is the pool, or each domain if there is a mixer. A filter keeps
its share of each group. A selector that compares samples ``within`` their domain gets each domain of the pool as a
separate group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.api.component import State
from dataflex.api.components import Entry
from dataflex.api.context import RoundContext
from dataflex.api.selection import Group, Selection, with_whole_passes
from dataflex.api.selector import (
    Selector,
    check_scores,
    checked_choice,
    choice_by_scores,
    compares_in_domains,
    overrides,
    too_few_scores,
)
from dataflex.data.apportion import apportion
from dataflex.data.pool import Pool
from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError, ConfigError
from dataflex.planning.overhead import LimitedScoring

logger = logging.getLogger(__name__)

ContextOf = Callable[[Entry[Selector], str], RoundContext]
"""Returns the context of an entry for a group, given by name."""


@dataclass(frozen=True)
class StageOutcome:
    """Result of one filter of a chain in a round.

    Attributes:
        key: configuration key of the filter.
        method: name of the filter.
        candidates: number of samples that reached the filter, by group.
        kept: number of samples that the filter kept, by group.
        unscored: number of candidates without a score.
        of_update: number of the decision that the result is of, by group. An earlier decision if the filter did not
            decide in this round.
        samples: the candidates of the groups that the filter decided about, ascending. Empty if it did not decide.
        scores: scores of ``samples``, NaN for a sample without a score. None if the method returns no scores.
        ranks: ranks of ``samples`` in their group, 1 is the best, 0 for a sample without a rank. None if nothing is
            ranked.
        is_kept: whether each of ``samples`` was kept for the next selector.
    """

    key: str
    method: str
    candidates: dict[str, int]
    kept: dict[str, int]
    unscored: int
    of_update: dict[str, int]
    samples: IndexArray
    scores: ScoreArray | None
    ranks: IndexArray | None
    is_kept: NDArray[np.bool_]


@dataclass(frozen=True)
class _Held:
    """Stored result of a selector for a group, used until the selector decides again."""

    update: int
    """Number of the decision that the result is of."""
    start: int
    stop: int
    """Range of the group in the pool: from ``start`` to ``stop`` - 1."""
    samples: IndexArray
    """The samples that a filter kept, or the candidates of the last selector. Ascending."""
    scores: ScoreArray | None = None
    """Scores of the candidates, for the last selector only."""
    came: int = 0
    """Number of candidates of a filter."""

    def state(self) -> State:
        """Return the stored result as plain data for a checkpoint."""
        # One bit for each sample of the group: smaller in a checkpoint than indices.
        inside = np.zeros(self.stop - self.start, dtype=bool)
        inside[self.samples - self.start] = True
        return {
            "update": self.update,
            "range": [self.start, self.stop],
            "samples": np.packbits(inside),
            "scores": self.scores,
            "came": self.came,
        }

    @classmethod
    def of(cls, state: State) -> _Held:
        start, stop = map(int, state["range"])
        inside = np.unpackbits(state["samples"], count=stop - start).astype(bool)
        samples = np.flatnonzero(inside) + start
        return cls(int(state["update"]), start, stop, samples, state["scores"], int(state["came"]))


@dataclass
class _Beginning:
    """Calls a selector's ``begin`` at most once in a decision, right before the first score or choice."""

    selector: Selector
    done: bool = False

    def __call__(self, ctx: RoundContext) -> None:
        if not self.done:
            self.done = True
            self.selector.begin(ctx)


@dataclass
class _Part:
    """A group on its way through the chain."""

    group: Group
    candidates: IndexArray
    begin_at: int = 0
    """Number of the first entry that is called for the group."""
    held: _Held | None = None
    """Stored result of the last entry, if that entry is not called."""


class SelectorChain:
    """The selectors of a run, and the stored results of selectors that do not decide every time.

    Args:
        entries: at least one. All but the last have ``keep``.
        pool: the samples.
        limit: scores in the last selector's place if its cost is limited.
    """

    def __init__(self, entries: tuple[Entry[Selector], ...], pool: Pool, limit: LimitedScoring | None = None) -> None:
        self.entries, self.pool, self.limit = entries, pool, limit
        self.outcomes: list[StageOutcome] = []
        """Result of each filter in the present round."""
        self.standing: list[str] = []
        """Keys of the entries that did not decide in the present round, so that their stored results were used."""
        self._held: dict[str, dict[str, _Held]] = {}
        """Stored results, by configuration key and name of the group."""
        self._limited_at: int | None = None
        """Number of the last decision in which the last entry was allowed to score, under a limit."""
        self._owed = np.zeros(len(pool.domains))
        """Rounding error of each domain so far, in samples, if the last entry compares within domains. Shape (K,)."""

    def select(
        self, groups: list[Group], update: int, size: int, context: ContextOf
    ) -> tuple[list[Group], list[Selection]]:
        """Choose the samples of a round.

        Args:
            groups: groups with the number of samples wanted from each.
            update: number of the decision.
            size: samples of the round.
            context: returns the context of an entry for a group.

        Returns:
            The groups that samples were chosen from, and the selection of each. The groups are domains if the last
            selector compares within domains.

        Raises:
            ConfigError: if the filters keep fewer samples of the pool than the round needs.
        """
        self.outcomes = []
        parts = [self._entering(group, update) for group in groups]
        for number, entry in enumerate(self.entries[:-1]):
            self.outcomes.append(self._filter(number, entry, parts, update, context))
        self.standing = [outcome.key for outcome in self.outcomes if not outcome.samples.size]
        if len(self.entries) > 1 and len(groups) == 1 and groups[0].size == self.pool.size:
            self._check_enough(parts[0], size)
        return self._choose(self.entries[-1], parts, update, context)

    def _entering(self, group: Group, update: int) -> _Part:
        """Return the group as a part that enters the chain after the last entry with a stored result."""
        for number in reversed(range(len(self.entries))):
            held = self._standing(self.entries[number], group.name, update)
            if held is None:
                continue
            if number == len(self.entries) - 1:
                return _Part(group, held.samples, number + 1, held)
            return _Part(group, held.samples, number + 1)
        return _Part(group, group.candidates)

    def _standing(self, entry: Entry[Selector], group: str, update: int) -> _Held | None:
        """Return the stored result of an entry for a group. None if the entry is to decide."""
        held = self._held.get(entry.key, {}).get(group)
        return None if held is None or update - held.update >= entry.every else held

    def _hold(self, entry: Entry[Selector], group: Group, update: int, **found: Any) -> None:
        """Store an entry's result for a group, if the entry does not decide in every decision."""
        if entry.every > 1:
            held = _Held(update, group.start, group.stop, **found)
            self._held.setdefault(entry.key, {})[group.name] = held

    def _contexts(self, entry: Entry[Selector], parts: list[_Part], context: ContextOf) -> list[RoundContext]:
        """Return the context of each part.

        All contexts have the candidates of all parts, and share one list of reasons for which nothing was decided.
        """
        everyone = parts[0].candidates if len(parts) == 1 else np.concatenate([part.candidates for part in parts])
        undecided: list[str] = []
        return [replace(context(entry, part.group.name), candidates=everyone, undecided=undecided) for part in parts]

    def _filter(
        self, number: int, entry: Entry[Selector], parts: list[_Part], update: int, context: ContextOf
    ) -> StageOutcome:
        """Run a filter on the parts it decides about, and reduce their candidates to those that it keeps."""
        acting = [part for part in parts if part.begin_at <= number]
        divided = [_divided(part, self.pool) if compares_in_domains(entry.component) else [part] for part in acting]
        own = [each for these in divided for each in these]
        came = {part.group.name: part.candidates.size for part in own}
        begin, tables = _Beginning(entry.component), []
        counts = _counts_kept(entry, [part.candidates.size for part in own])
        is_divided = len(own) > len(acting)
        contexts = self._contexts(entry, own, context) if own else []
        for part, ctx, count in zip(own, contexts, counts, strict=True):
            begin(ctx)
            table = _kept_by(entry, ctx, part, count, is_divided)
            tables.append(table)
            part.candidates = table.samples[table.is_kept]
        kept = {part.group.name: part.candidates.size for part in own}
        of_update = dict.fromkeys(kept, update)
        for part, these in zip(acting, divided, strict=True):
            came_here = sum(came[each.group.name] for each in these)
            part.candidates = np.concatenate([each.candidates for each in these])
            self._hold(entry, part.group, update, samples=part.candidates, came=came_here)
        for part in parts:
            held = self._held.get(entry.key, {}).get(part.group.name)
            if part not in acting and held is not None and part.begin_at == number + 1:
                name = part.group.name
                of_update[name], came[name], kept[name] = held.update, held.came, held.samples.size
        return _outcome(entry, came, kept, of_update, tables)

    def _check_enough(self, part: _Part, size: int) -> None:
        """Raise an error if the filters keep fewer samples of the pool than a round needs."""
        if part.candidates.size >= size:
            return
        last = self.entries[-2]
        raise ConfigError(
            f"dataflex.{last.key}.keep: {last.component.name} leaves {part.candidates.size} of the pool's "
            f"{self.pool.size} samples, and a round takes {size}. Raise keep, or lower dataflex.update_steps."
        )

    def _choose(
        self, entry: Entry[Selector], parts: list[_Part], update: int, context: ContextOf
    ) -> tuple[list[Group], list[Selection]]:
        """Return the groups that the last selector chooses from, and the selection of each."""
        selector, begin = entry.component, _Beginning(entry.component)
        may_score = self._limited_at is None or update - self._limited_at >= entry.every
        if self.limit is not None:
            self.limit.open(may_score)
            self._limited_at = update if may_score else self._limited_at
        if all(part.held is not None for part in parts) if self.limit is None else not may_score:
            self.standing.append(entry.key)
        divided = _divided(parts[0], self.pool) if len(parts) == 1 and compares_in_domains(selector) else parts
        contexts = self._contexts(entry, divided, context)
        if len(divided) > len(parts):
            self._give_budgets(entry, parts[0], divided, contexts, begin, update)
            # A domain that gives no sample is no group of the plan.
            contexts = [ctx for part, ctx in zip(divided, contexts, strict=True) if part.group.budget]
            divided = [part for part in divided if part.group.budget]
        found = []
        for part, ctx in zip(divided, contexts, strict=True):
            if overrides(type(selector), "select"):
                begin(ctx)
                found.append(selector.select(ctx, part.group))
                continue
            choose = partial(self._choice, entry, part, ctx, begin, update)
            found.append(with_whole_passes(part.candidates, part.group.budget, choose))
        if contexts[0].undecided:  # one list, shared by all contexts
            why = "; ".join(dict.fromkeys(contexts[0].undecided))
            found = [each if each.undecided is not None else replace(each, undecided=why) for each in found]
        return [part.group for part in divided], found

    def _give_budgets(
        self,
        entry: Entry[Selector],
        whole: _Part,
        divided: list[_Part],
        contexts: list[RoundContext],
        begin: _Beginning,
        update: int,
    ) -> None:
        """Divide the number of samples wanted from the pool among its domains, in proportion to their sizes.

        A domain with too few candidates that have a score gives all of them, and the other domains give more. If the
        last selector chooses by scores, it is called here, so that the number of candidates with a score is known.
        """
        selector = entry.component
        passes, rest = divmod(whole.group.budget, whole.candidates.size)
        if self.limit is None and not overrides(type(selector), "choose") and rest:
            for part, ctx in zip(divided, contexts, strict=True):
                if part.held is None:
                    scores = _scores(selector, ctx, part.candidates, begin)
                    part.held = _Held(update, part.group.start, part.group.stop, part.candidates, scores)
            if whole.held is None:
                scores = np.concatenate([_held_scores(part) for part in divided])
                self._hold(entry, whole.group, update, samples=whole.candidates, scores=scores)
        room = np.zeros(len(self.pool.domains), dtype=np.int64)
        domains = self.pool.domain_ids(np.array([part.group.start for part in divided]))
        usable = [
            self.pool.trained[part.candidates] if part.held is None else ~np.isnan(_held_scores(part))
            for part in divided
        ]
        room[domains] = [np.count_nonzero(each) for each in usable]
        if room.sum() < rest:
            known = np.where(np.concatenate(usable), np.float32(0), np.float32(np.nan))
            raise ComponentError(too_few_scores(selector, self.pool, whole.candidates, known, rest))
        sizes = self.pool.domain_sizes.astype(np.float64)
        shares = apportion(self._owed, sizes, rest, np.empty(0, dtype=np.int64), room)
        self._owed = shares.owed
        for part, domain in zip(divided, domains, strict=True):
            part.group.budget = passes * part.candidates.size + int(shares.counts[domain])

    def _choice(
        self,
        entry: Entry[Selector],
        part: _Part,
        ctx: RoundContext,
        begin: _Beginning,
        update: int,
        candidates: IndexArray,
        count: int,
    ) -> Selection:
        """Return ``count`` of a part's candidates."""
        selector = entry.component
        if self.limit is not None:
            return self.limit.choose(selector, ctx, candidates, count)
        if part.held is not None:
            return choice_by_scores(selector, ctx, candidates, _held_scores(part), count)
        begin(ctx)
        if entry.every == 1:
            return checked_choice(selector, selector.choose(ctx, candidates, count), candidates, part.group.name)
        scores = check_scores(selector, selector.score(ctx, candidates), candidates)
        self._hold(entry, part.group, update, samples=candidates, scores=scores)
        return choice_by_scores(selector, ctx, candidates, scores, count)

    def state_dict(self) -> State:
        """Return the stored results of the selectors, and the scores and costs under the limit."""
        return {
            "held": {
                entry.key: {
                    "made_with": _made_with(entry),
                    "groups": {name: held.state() for name, held in self._held[entry.key].items()},
                }
                for entry in self.entries
                if entry.key in self._held
            },
            "limited_at": self._limited_at,
            "owed": self._owed.copy(),
            "limit": {} if self.limit is None else self.limit.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned.

        The stored result of a selector with other parameters than in the state is dropped, with a warning.
        """
        self._held = {}
        for entry in self.entries:
            stored = state["held"].get(entry.key)
            if stored is None or entry.every == 1:
                continue
            if stored["made_with"] != _made_with(entry):
                if distributed.rank() == 0:
                    logger.warning(
                        "%s %s: method, keep or parameters differ from the checkpoint, so the selector decides again.",
                        entry.key,
                        entry.component.name,
                    )
                continue
            self._held[entry.key] = {name: _Held.of(each) for name, each in stored["groups"].items()}
        self._limited_at = None if state["limited_at"] is None else int(state["limited_at"])
        if "owed" in state:  # not in checkpoints of earlier versions, in which nothing was divided
            self._owed = np.array(state["owed"], dtype=np.float64)
        if self.limit is not None:
            self.limit.load_state_dict(state["limit"])


def _scores(selector: Selector, ctx: RoundContext, candidates: IndexArray, begin: _Beginning) -> ScoreArray:
    begin(ctx)
    return check_scores(selector, selector.score(ctx, candidates), candidates)


def _held_scores(part: _Part) -> ScoreArray:
    assert part.held is not None
    assert part.held.scores is not None
    return part.held.scores


def _divided(part: _Part, pool: Pool) -> list[_Part]:
    """Return one part for each domain that has candidates. With fewer than two such domains, return the part itself."""
    ends = np.searchsorted(part.candidates, pool.offsets)
    domains = np.flatnonzero(np.diff(ends))
    if domains.size < 2:
        return [part]
    found = []
    for domain in map(int, domains):
        begin, end = ends[domain], ends[domain + 1]
        start, stop = map(int, pool.offsets[domain : domain + 2])
        group = Group(pool.domains[domain], start, stop, 0, part.group.sampler)
        held = part.held
        if held is not None:
            scores = _held_scores(part)[begin:end]
            held = replace(held, start=start, stop=stop, samples=held.samples[begin:end], scores=scores)
        found.append(_Part(group, part.candidates[begin:end], part.begin_at, held))
    return found


@dataclass(frozen=True)
class _Table:
    """Result of a filter for the candidates of a group. The fields are those of :class:`StageOutcome`."""

    samples: IndexArray
    is_kept: NDArray[np.bool_]
    scores: ScoreArray | None = None
    ranks: IndexArray | None = None
    unscored: int = 0


def _counts_kept(entry: Entry[Selector], sizes: list[int]) -> list[int | None]:
    """Return how many samples of each group a filter keeps. None means its share of the samples with a score."""
    assert entry.keep is not None
    if entry.keep < 1:
        return [None] * len(sizes)
    wanted, total = int(entry.keep), sum(sizes)
    if wanted > total and sizes:
        raise ConfigError(
            f"dataflex.{entry.key}.keep: {wanted} samples are to be left, and only {total} come to "
            f"{entry.component.name}. Lower keep, or use a share below 1."
        )
    # Proportional to the sizes. The difference of rounded cumulative sums makes the total exact.
    ends = np.cumsum(sizes, dtype=np.int64) * wanted // max(total, 1)
    return [max(1, int(count)) for count in np.diff(ends, prepend=0)]


def _kept_by(entry: Entry[Selector], ctx: RoundContext, part: _Part, count: int | None, is_divided: bool) -> _Table:
    """Return the result of a filter for the candidates of a part.

    In a pool divided into domains, a domain in which no candidate has a score keeps no sample.

    Raises:
        ComponentError: if no candidate has a score.
    """
    selector, candidates = entry.component, part.candidates
    is_kept = np.zeros(candidates.size, dtype=bool)
    if overrides(type(selector), "choose"):
        wanted = entry.kept_of(candidates.size) if count is None else count
        chosen = checked_choice(selector, selector.choose(ctx, candidates, wanted), candidates, part.group.name)
        if chosen.indices.size != wanted:
            raise ComponentError(
                f"selector {selector.name!r} chose {chosen.indices.size} samples of {part.group.name!r}, but must "
                f"choose {wanted}."
            )
        is_kept[np.searchsorted(candidates, chosen.indices)] = True
        return _Table(candidates, is_kept)
    scores = check_scores(selector, selector.score(ctx, candidates), candidates)
    scored = np.flatnonzero(~np.isnan(scores))
    if is_divided and count is None and not scored.size:
        return _Table(candidates, is_kept, scores, np.zeros(candidates.size, dtype=np.int64), candidates.size)
    wanted = entry.kept_of(max(scored.size, 1)) if count is None else count
    chosen = choice_by_scores(selector, ctx, candidates, scores, wanted)
    is_kept[np.searchsorted(candidates, chosen.indices)] = True
    found = selector.rank(scores, scored)
    ranks = None
    if found is not None:
        ranks = np.zeros(candidates.size, dtype=np.int64)
        ranks[scored] = found
    return _Table(candidates, is_kept, scores, ranks, candidates.size - scored.size)


def _outcome(
    entry: Entry[Selector],
    came: dict[str, int],
    kept: dict[str, int],
    of_update: dict[str, int],
    tables: list[_Table],
) -> StageOutcome:
    """Return the result of a filter over all groups."""
    samples = np.concatenate([np.empty(0, np.int64), *(table.samples for table in tables)])
    is_kept = np.concatenate([np.empty(0, bool), *(table.is_kept for table in tables)])
    scores = [table.scores for table in tables if table.scores is not None]
    ranks = [table.ranks for table in tables if table.ranks is not None]
    return StageOutcome(
        entry.key,
        entry.component.name,
        came,
        kept,
        sum(table.unscored for table in tables),
        of_update,
        samples,
        np.concatenate(scores) if scores else None,
        np.concatenate(ranks) if ranks else None,
        is_kept,
    )


def _made_with(entry: Entry[Selector]) -> dict[str, Any]:
    """Return the part of the configuration that a selector's result depends on."""
    params = entry.component.params.model_dump(mode="json")
    return {"method": entry.component.name, "keep": entry.keep, "params": params}
