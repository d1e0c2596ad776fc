"""Planning of rounds: the planner calls the components of each round in the order select, mix, order.

A plan has exactly ``steps x global batch size`` indices. The number of samples of each domain follows the mixer's
proportions, and the rounding error is carried to the next round. Without a selector, samples are drawn in passes. A
pass contains every sample of the pool (with a mixer: of a domain) once, and every pass has a new random order.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.api.component import Component, State
from dataflex.api.components import Components, Entry, family_key
from dataflex.api.context import RoundContext
from dataflex.api.mixer import Mixer
from dataflex.api.order import Order
from dataflex.api.probe import Probe
from dataflex.api.schedule import RoundSlot, Schedule
from dataflex.api.selection import Group, Selection, check_form, join
from dataflex.api.selector import Selector
from dataflex.api.source import label_of
from dataflex.data.apportion import LATER_ROUNDS, Apportioned, apportion
from dataflex.data.pool import Pool, some
from dataflex.data.rng import derive_rng, key_of
from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray, KeyedPermutation, PassOrder, PassSampler, Walk, exactly
from dataflex.errors import ComponentError, ConfigError
from dataflex.planning.arrangement import arranged, in_passes, maker_of
from dataflex.planning.budget import LimitedDecision
from dataflex.planning.chain import SelectorChain, StageOutcome
from dataflex.planning.overhead import LimitedScoring

if TYPE_CHECKING:
    from dataflex.api.reference import Reference
    from dataflex.embedding.service import EmbeddingService

Arrangement = Literal["shuffle", "sequential", "group_by_length"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The samples of one round, in training order, and the decisions that led to them."""

    slot: RoundSlot
    indices: IndexArray
    """Pool indices, shape (steps * global batch size,)."""
    scores: ScoreArray | None = None
    """The selector's score of each sample, in the same order. NaN for a sample without a score."""
    proportions: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Share of each domain, shape (K,): the shares in force with a mixer, else the shares counted in the plan."""
    unscored: int = 0
    """Number of candidates left out because they have no score."""
    budget: LimitedDecision | None = None
    """Record of the decision under ``max_overhead``."""
    ranks: IndexArray | None = None
    """Rank of each sample among the candidates of its group, in the same order. 1 is the best, 0 means no rank."""
    candidates: dict[str, int] = field(default_factory=dict)
    """Number of ranked candidates by group. The group is ``pool`` without a mixer, else the name of a domain."""
    epochs: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Planned samples of each domain up to the end of this round / size of the domain, shape (K,). Empty if unknown."""
    clipped_shares: dict[str, float] = field(default_factory=dict)
    """The domains whose share ``max_epochs_per_domain`` reduced, with the share that the mixer wanted."""
    undecided: dict[str, str] = field(default_factory=dict)
    """Why a component decided nothing in this round, by configuration key."""
    not_chosen: dict[str, str] = field(default_factory=dict)
    """Why the selector chose nothing from a group, by name of the group (see :attr:`candidates`)."""
    stages: tuple[StageOutcome, ...] = ()
    """Result of each filter of a chain of selectors, in the order of the chain."""
    standing: tuple[str, ...] = ()
    """Keys of the selectors that reused an earlier result in this round because of ``every``."""

    @property
    def sha256(self) -> str:
        """Digest of the indices in order, as little-endian int64."""
        return hashlib.sha256(self.indices.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Readings:
    """Inputs of the components' contexts that are neither the pool nor the progress of the rounds.

    Attributes:
        validation: validation samples of the components that need some, by configuration key.
        references: references of the components that need one, by configuration key.
        learning_rate: returns the optimizer's present learning rate.
        total_steps: expected steps of the run. None means the steps of the schedule.
        embeddings: source of embeddings for the components that need some. None if no component does.
    """

    validation: Mapping[str, Pool] = field(default_factory=dict)
    references: Mapping[str, Reference] = field(default_factory=dict)
    learning_rate: Callable[[], float] = lambda: 0.0
    total_steps: int | None = None
    embeddings: EmbeddingService | None = None


class Planner:
    """Plans each round. All its methods must be called in the same order on every rank.

    Args:
        pool: the samples.
        components: the run's components. Weighters are not used here.
        schedule: the rounds.
        seed: the run's seed.
        global_batch_size: samples of one optimizer step.
        arrangement: training order of a plan without an ``order`` component.
        limit: calls the last selector's ``score`` under ``max_overhead``. None means no limit.
        readings: inputs of the components' contexts. None means no inputs.
    """

    def __init__(
        self,
        pool: Pool,
        components: Components,
        schedule: Schedule,
        *,
        seed: int,
        global_batch_size: int,
        arrangement: Arrangement = "shuffle",
        limit: LimitedScoring | None = None,
        readings: Readings | None = None,
    ) -> None:
        self.pool, self.components, self.schedule = pool, components, schedule
        self.readings = readings or Readings()
        self.chain = SelectorChain(components.select, pool, limit) if components.select else None
        total = self.readings.total_steps
        # Under a budget of tokens or seconds, the total of `schedule` is only an upper bound of the expected total.
        self.expected = schedule if total is None else replace(schedule, total_steps=total)
        self._mixer_idle: list[str] = []
        """Reasons why the mixer decided nothing in the present round. The mixer's context appends to this list."""
        self.notes: list[str] = []
        """Messages of components to the user. The caller of :meth:`plan` reads and clears this list."""
        self.seed, self.global_batch_size, self.arrangement = seed, global_batch_size, arrangement
        shuffle = arrangement != "sequential"
        self._pool_sampler = PassSampler(pool.size, seed=seed, name="pool", shuffle=shuffle)
        self._domain_samplers = [
            PassSampler(int(size), seed=seed, name=f"domain/{name}", shuffle=shuffle)
            for name, size in zip(pool.domains, pool.domain_sizes, strict=True)
        ]
        self.planned = np.zeros(len(pool.domains), dtype=np.int64)
        """Samples of each domain planned so far, shape (K,)."""
        self.owed = np.zeros(len(pool.domains))
        """Rounding error with a mixer, shape (K,): share x samples, summed over the rounds, minus planned samples."""
        self._shares = np.empty(0)
        """Latest shares that the mixer returned, shape (K,). Empty before the first round."""
        self._limits = epoch_limits(components.mix, pool)
        """Most samples of each domain in the whole run, shape (K,). None means no limit."""
        self._warned: set[str] = set()
        """Domains for which the user was warned that ``max_epochs_per_domain`` is reached."""

    def plan(self, slot: RoundSlot, probe: Probe) -> Plan:
        """Return the plan of a round.

        The components may measure the model, which all ranks must do together.

        Raises:
            ComponentError: if a component returns an invalid result.
        """
        self._mixer_idle = []
        groups, shares, clipped = self._groups(slot, probe)
        chain = self.chain if slot.update is not None else None  # warm-up rounds (no update) select nothing
        groups, parts = self._select(slot, probe, groups, chain)
        selection = join(parts)
        arranged = self._arrange(slot, probe, selection)
        sequence = self._sequence_in_groups(slot, selection)
        if arranged is not None and sequence is not None:
            # Put the samples of each group into ascending sequence. Each group keeps its positions in the permutation.
            sizes = [part.indices.size for part in parts]
            arranged = in_passes(arranged, np.repeat(np.arange(len(parts)), sizes), sequence)
        indices, scores, ranks = selection.indices, selection.scores, selection.ranks
        if arranged is not None:
            indices = indices[arranged]
            scores = scores[arranged] if scores is not None else None
            ranks = ranks[arranged] if ranks is not None else None
        if ranks is not None:
            ranks = ranks.astype(np.int64, copy=False)
        if shares is None:  # without a mixer, the domains are counted afterwards
            counts = self.pool.domain_counts(indices)
            shares = counts / counts.sum()
            self.planned += counts
        else:
            self.planned += self._counts(groups)
        limit = None if chain is None else chain.limit
        budget = None if limit is None else limit.done
        ranked = {
            group.name: int(part.ranked) for group, part in zip(groups, parts, strict=True) if part.ranks is not None
        }
        not_chosen = {
            group.name: part.undecided for group, part in zip(groups, parts, strict=True) if part.undecided is not None
        }
        return Plan(
            slot,
            indices,
            scores,
            shares,
            int(selection.unscored),
            budget,
            ranks,
            ranked,
            self.epochs,
            clipped,
            self._undecided(slot, not_chosen, len(groups)),
            not_chosen,
            () if chain is None else tuple(chain.outcomes),
            () if chain is None else tuple(chain.standing),
        )

    def _undecided(self, slot: RoundSlot, not_chosen: dict[str, str], groups: int) -> dict[str, str]:
        """Return why a component decided nothing in a round, by configuration key.

        Args:
            slot: the round.
            not_chosen: why the selector chose nothing from a group, by group.
            groups: number of groups that samples were chosen from.
        """
        found, mixer = dict[str, str](), self.components.mix
        if slot.update is None:
            return found
        if not_chosen and len(not_chosen) == groups:  # a selector that chose from one group did decide
            found["select"] = "; ".join(dict.fromkeys(not_chosen.values()))
        if mixer is not None and len(self.pool.domains) == 1:
            found["mix"] = "there is one domain"
        elif self._mixer_idle:
            found["mix"] = self._mixer_idle[-1]
        return found

    @property
    def epochs(self) -> NDArray[np.float64]:
        """Planned samples of each domain so far / size of the domain, shape (K,)."""
        return self.planned / self.pool.domain_sizes

    def state_dict(self) -> State:
        """Return the positions in all passes, the planned samples, and the state of the selector chain."""
        return {
            "pool": self._pool_sampler.drawn,
            "domains": {
                name: sampler.drawn for name, sampler in zip(self.pool.domains, self._domain_samplers, strict=True)
            },
            "planned": self.planned.copy(),
            "owed": self.owed.copy(),
            "shares": self._shares.copy(),
            "warned": sorted(self._warned),
            "chain": None if self.chain is None else self.chain.state_dict(),
            "orders": {name: vars(sampler.decided) for name, sampler in self._samplers.items() if sampler.decided},
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._pool_sampler.drawn = int(state["pool"])
        for name, sampler in zip(self.pool.domains, self._domain_samplers, strict=True):
            sampler.drawn = int(state["domains"][name])
        self.planned = np.array(state["planned"], dtype=np.int64)
        self.owed = np.array(state["owed"], dtype=np.float64)
        self._shares = np.array(state["shares"], dtype=np.float64)
        self._warned = set(state["warned"])
        if self.chain is not None and state["chain"] is not None:
            self.chain.load_state_dict(state["chain"])
        for name, order in state.get("orders", {}).items():  # older checkpoints have no orders
            self._samplers[name].decided = PassOrder(**order)

    @property
    def _samplers(self) -> dict[str, PassSampler]:
        """The samplers of the pool and of the domains, by their name."""
        return {sampler.name: sampler for sampler in (self._pool_sampler, *self._domain_samplers)}

    def context(self, component: Component, slot: RoundSlot, probe: Probe, group: str = "pool") -> RoundContext:
        """Return the context of a component in a round, for one group. Every group has separate random numbers."""
        key = next(key for key, own in self.components.items() if own is component)
        embeddings = self.readings.embeddings
        # A chain may use a method twice, and each use needs other random numbers. A single component needs no key.
        use = () if key == family_key(key) else (key,)
        return RoundContext(
            pool=self.pool,
            probe=probe,
            rng=derive_rng(self.seed, component.family, component.name, *use, slot.number, group),
            round=slot.number,
            update=slot.update or 0,
            # A budget may last longer than expected. The totals then grow with the run, to include this round.
            num_updates=max(self.expected.num_updates, (slot.update or 0) + 1),
            start_step=slot.start_step,
            steps=slot.steps,
            size=slot.steps * self.global_batch_size,
            total_steps=max(self.expected.total_steps, slot.start_step + slot.steps),
            validation_pool=self.readings.validation.get(key),
            reference_losses=self.readings.references.get(key),
            learning_rate=self.readings.learning_rate(),
            embedding_source=None if embeddings is None else embeddings.of_all(key),
            notes=self.notes,
        )

    def _groups(
        self, slot: RoundSlot, probe: Probe
    ) -> tuple[list[Group], NDArray[np.float64] | None, dict[str, float]]:
        """Return the groups with the number of samples wanted from each, the shares in force, and the reduced shares.

        The shares in force are None without a mixer. The reduced shares are the mixer's shares of the domains whose
        share ``max_epochs_per_domain`` reduced, by domain.

        Raises:
            ConfigError: if ``max_epochs_per_domain`` leaves too few samples for the round.
        """
        size = slot.steps * self.global_batch_size
        mixer = self.components.mix
        if mixer is None:
            return [Group("pool", 0, self.pool.size, size, self._pool_sampler)], None, {}
        ctx = self.context(mixer, slot, probe)
        self._mixer_idle = ctx.undecided
        given = mixer.initial(ctx) if slot.update is None else mixer.mix(ctx)
        wanted = check_proportions(mixer, given, self.pool, "initial" if slot.update is None else "mix")
        found = self._apportioned(slot, wanted, size)
        clipped = {self.pool.domains[number]: float(wanted[number]) for number in np.flatnonzero(found.cut)}
        self._warn_of_limits(slot, clipped)
        bounds = zip(self.pool.domains, self.pool.offsets[:-1], self.pool.offsets[1:], found.counts, strict=True)
        groups = [
            Group(name, int(start), int(stop), int(count), sampler)
            for (name, start, stop, count), sampler in zip(bounds, self._domain_samplers, strict=True)
            if count
        ]
        return groups, found.shares, clipped

    def _counts(self, groups: list[Group]) -> NDArray[np.int64]:
        """Return the number of samples wanted from each domain, shape (K,), if every group is a domain."""
        counts = np.zeros(len(self.pool.domains), dtype=np.int64)
        counts[self.pool.domain_ids(np.array([group.start for group in groups]))] = [group.budget for group in groups]
        return counts

    def _apportioned(self, slot: RoundSlot, wanted: NDArray[np.float64], size: int) -> Apportioned:
        """Return the number of samples of each domain in a round, and store the rounding error for the next round.

        Raises:
            ConfigError: if ``max_epochs_per_domain`` leaves too few samples.
        """
        # Rounding looks ahead only while the shares stay the same, because later shares are unknown otherwise.
        is_same = not self._shares.size or np.array_equal(wanted, self._shares)
        later = self._samples_of_later_rounds(slot) if is_same else np.empty(0, dtype=np.int64)
        left = None if self._limits is None else np.maximum(self._limits - self.planned, 0)
        try:
            found = apportion(self.owed, wanted, size, later, left)
        except ValueError as error:
            assert left is not None  # only limits raise this error
            raise ConfigError(self._too_few_left(slot, wanted, left)) from error
        self.owed, self._shares = found.owed, wanted
        return found

    def _samples_of_later_rounds(self, slot: RoundSlot) -> NDArray[np.int64]:
        """Return the number of samples from the end of ``slot`` to the end of each of the next rounds, ascending."""
        begin = end = slot.start_step + slot.steps
        ends: list[int] = []
        while end < self.schedule.total_steps and len(ends) < LATER_ROUNDS:
            following = self.schedule.slot_at(end)
            end = following.start_step + following.steps
            ends.append((end - begin) * self.global_batch_size)
        return np.array(ends, dtype=np.int64)

    def _warn_of_limits(self, slot: RoundSlot, clipped: dict[str, float]) -> None:
        """Warn of the domains whose share ``max_epochs_per_domain`` reduced, once for each domain."""
        newly = [name for name in clipped if name not in self._warned]
        if newly and distributed.rank() == 0:
            logger.warning(
                "mix: max_epochs_per_domain is reached by %s in round %d; the rest of the share of %s goes to the "
                "other domains, in proportion to their shares.",
                some(newly),
                slot.number,
                "this domain" if len(newly) == 1 else "these domains",
            )
        self._warned.update(newly)

    def _too_few_left(self, slot: RoundSlot, wanted: NDArray[np.float64], left: NDArray[np.int64]) -> str:
        """Return the error for a round that needs more samples than ``max_epochs_per_domain`` leaves."""
        assert self._limits is not None
        names = [name for name, share in zip(self.pool.domains, wanted, strict=True) if share > 0]
        rest, size = int(left[wanted > 0].sum()), slot.steps * self.global_batch_size
        return (
            f"dataflex.mix.max_epochs_per_domain: round {slot.number} needs {size} samples, but only {rest} are left "
            f"in the domains to which the mixer gives a share ({some(names)}). They are enough for "
            f"{rest // self.global_batch_size} of the round's {slot.steps} steps, until step "
            f"{slot.start_step + rest // self.global_batch_size} of the run. Raise max_epochs_per_domain, give other "
            "domains a share, or train less (train_steps, max_steps, num_train_epochs)."
        )

    def _select(
        self, slot: RoundSlot, probe: Probe, groups: list[Group], chain: SelectorChain | None
    ) -> tuple[list[Group], list[Selection]]:
        """Return the groups that samples are chosen from, and the selection of each."""
        order = self.components.order
        if order is not None and order.draws:  # such a run has no mixer, so its only group is the pool
            return groups, [self._drawn(order, slot, probe, *groups)]
        if chain is None or slot.update is None:
            return groups, [group.draw_passes(self._walk(slot, probe, group)) for group in groups]

        def context(entry: Entry[Selector], group: str) -> RoundContext:
            return self.context(entry.component, slot, probe, group)

        groups, found = chain.select(groups, slot.update, slot.steps * self.global_batch_size, context)
        label = label_of(chain.entries[-1].component, ("select", "choose", "score"))
        for group, selection in zip(groups, found, strict=True):
            self._check_selection(label, selection, group)
        return groups, found

    def _check_selection(self, label: str, selection: Selection, group: Group) -> None:
        """Check a component's selection from a group.

        Args:
            label: name of the component's method, for the error.
            selection: the selection.
            group: the group.

        Raises:
            ComponentError: if an index, a score or a rank is invalid, or if their number is wrong.
        """
        check_form(label, selection)
        indices = selection.indices
        if indices.shape != (group.budget,) or not np.issubdtype(indices.dtype, np.integer):
            raise ComponentError(
                f"{label} returned {indices.dtype} indices of shape {indices.shape}; needed are {group.budget} "
                "integers."
            )
        if indices.min() < group.start or indices.max() >= group.stop:
            raise ComponentError(
                f"{label} returned indices outside {group.name!r}, whose range is [{group.start}, {group.stop})."
            )
        if selection.scores is not None and selection.scores.shape != indices.shape:
            raise ComponentError(
                f"{label} returned scores of shape {selection.scores.shape} for indices of shape {indices.shape}."
            )
        ranks = selection.ranks
        if ranks is None:
            return
        if ranks.shape != indices.shape or not np.issubdtype(ranks.dtype, np.integer):
            raise ComponentError(
                f"{label} returned {ranks.dtype} ranks of shape {ranks.shape} for indices of shape {indices.shape}; "
                "needed are integers of the same shape."
            )
        if ranks.min() < 0 or ranks.max() > selection.ranked:
            raise ComponentError(
                f"{label} returned ranks outside the range from 0 (no rank) to {selection.ranked}, the number of "
                "ranked candidates."
            )

    def _arrange(self, slot: RoundSlot, probe: Probe, selection: Selection) -> IndexArray | None:
        """Return the permutation that puts a selection into training order. None means that it is in that order.

        In a warm-up round, and for an order that draws or walks, the run's ``arrangement`` decides here.
        """
        size = selection.indices.size
        order = self.components.order
        if order is not None and slot.update is not None and not (order.walks or order.draws):
            return arranged(order, self.context(order, slot, probe), selection)
        if self.arrangement == "sequential" or (self.arrangement == "shuffle" and selection.shuffled):
            return None
        if self.arrangement == "group_by_length":
            return self._group_by_length(slot, selection.indices)
        return KeyedPermutation(size, key_of(self.seed, "shuffle", slot.number))(np.arange(size, dtype=np.int64))

    def _sequence_in_groups(self, slot: RoundSlot, selection: Selection) -> IndexArray | None:
        """Return a number for each sample, shape (n,): a group's samples must be trained in ascending order of it.

        The number is the sample's pass, so that a pass ends before the next one begins. For an order that walks it is
        the position in the walk. None means that any order is allowed.
        """
        order = self.components.order
        if order is None or slot.update is None:
            return selection.passes
        if order.walks:
            return np.arange(selection.indices.size)
        return selection.passes if order.keeps_passes else None

    def _drawn(self, order: Order, slot: RoundSlot, probe: Probe, group: Group) -> Selection:
        """Return the samples that an order draws, in training order."""
        rng = derive_rng(self.seed, order.family, order.name, "run")  # the same in every round, as `draw` promises
        context = replace(self.context(order, slot, probe), rng=rng)
        found = Selection(order.draw(context), shuffled=True)
        self._check_selection(label_of(order, ("draw",)), found, group)
        return found

    def _walk(self, slot: RoundSlot, probe: Probe, group: Group) -> Walk | None:
        """Return the walk that arranges a group's passes. None if no order arranges them in this round."""
        order = self.components.order
        if order is None or slot.update is None or not order.walks:
            return None

        def arrange(number: int, samples: IndexArray) -> IndexArray:
            # Keyed by the pass instead of the round, so that the order does not depend on the length of rounds.
            round_number = (slot.number,) if order.renews else ()
            rng = derive_rng(self.seed, order.family, order.name, "pass", number, group.name, *round_number)
            context = replace(self.context(order, slot, probe), rng=rng)
            return arranged(order, context, Selection(group.start + samples))

        # The sampler keeps the order of a pass while `maker` stays the same. With the round in `maker`, it arranges the
        # rest of the pass again in every round.
        maker = f"{maker_of(order)} {slot.number}" if order.renews else maker_of(order)
        return Walk(maker, arrange, order.repeats)

    def _group_by_length(self, slot: RoundSlot, indices: IndexArray) -> IndexArray:
        """Return the permutation by which the Trainer's own function groups a plan by length, in global batches."""
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(key_of(self.seed, "group_by_length", slot.number) % 2**63)
        lengths = self.pool.lengths[indices].tolist()
        return np.asarray(
            get_length_grouped_indices(lengths, self.global_batch_size, generator=generator), dtype=np.int64
        )


def epoch_limits(mixer: Mixer | None, pool: Pool) -> NDArray[np.int64] | None:
    """Return the most samples of each domain that a run may plan, shape (K,). None means no limit."""
    if mixer is None or mixer.params.max_epochs_per_domain is None:
        return None
    passes = exactly(mixer.params.max_epochs_per_domain)
    return np.array([math.floor(passes * size) for size in pool.domain_sizes.tolist()], dtype=np.int64)


def check_proportions(
    component: Component, given: NDArray[np.float64], pool: Pool, method: str = "mix"
) -> NDArray[np.float64]:
    """Check the proportions that a method returned, and return them scaled to sum 1, shape (K,).

    Raises:
        ComponentError: if they are not K finite, non-negative numbers with a positive sum.
    """
    count = len(pool.domains)
    label = label_of(component, (method,))
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ComponentError(
            f"{label} returned a {type(given).__name__}; needed is an array of {count} numbers, one for each of "
            f"{some(pool.domains)}, in this order."
        ) from error
    if values.shape != (count,) or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        shown = f"[{some([repr(float(share)) for share in values.ravel()])}]"
        raise ComponentError(
            f"{label} returned proportions {shown}; needed are {count} finite, non-negative numbers "
            f"with a positive sum, one for each of {some(pool.domains)}."
        )
    return values / values.sum()
