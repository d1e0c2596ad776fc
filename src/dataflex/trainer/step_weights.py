"""Weights of the weighters in the loss of a step: their inputs, and their outputs, checked and multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from dataflex import distributed
from dataflex.api.components import Entry
from dataflex.api.context import EmbeddingArray, StepBatch, StepStart, TokenLosses
from dataflex.api.source import label_of
from dataflex.api.weighter import Weighter
from dataflex.data.given_weights import GivenWeights
from dataflex.data.pool import Pool
from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ComponentError


@dataclass(frozen=True)
class MicroBatch:
    """Results of the forward pass of one micro-batch, detached.

    Attributes:
        labels: shifted labels, (B, T).
        per_token: loss of every position, (B, T); 0 at positions that do not count in the loss.
        means: token-mean loss of each sample, (B,); NaN for a sample without a counted token.
        places: pool index of each sample, (B,); None if the data is streamed.
        references: configuration key -> reference loss of each position that counts, (c,), row after row.
        pooled: configuration key -> one pooled hidden-state vector per sample, (B, H).
        attention: attention of each token to its prompt, (B, T), if a weighter reads it; 0 at positions that do not
            count in the loss.
        margins: reward margin of each pair, (B,), in a stage that has margins.
    """

    labels: Tensor
    per_token: Tensor
    means: Tensor
    places: Tensor | None = None
    references: Mapping[str, Tensor] = field(default_factory=dict)
    pooled: Mapping[str, Tensor] = field(default_factory=dict)
    attention: Tensor | None = None
    margins: Tensor | None = None

    def reference(self, key: str) -> Tensor:
        """Return the reference loss of every position, (B, T); 0 at positions that do not count in the loss."""
        values = torch.zeros_like(self.per_token)
        values[self.labels != IGNORE_INDEX] = self.references[key].to(values)
        return values

    def given(self, weights: GivenWeights) -> Tensor:
        """Return the weight of every position that the data gives, (B, T); 1 at positions that do not count.

        Raises:
            ComponentError: if the labels have another number of trained tokens than the samples of the pool.
        """
        assert self.places is not None  # streaming data is refused before the run
        rows = weights.rows(self.places.cpu().numpy())
        counted = self.labels != IGNORE_INDEX
        counts = counted.sum(1).tolist()
        if counts != [row.size for row in rows]:
            raise ComponentError(
                f"the data gives weights to {[row.size for row in rows]} tokens of the samples of a batch, which has "
                f"{counts} trained tokens: the collator has changed the labels. Use LLaMA-Factory's collator."
            )
        values = torch.ones(counted.shape, device=counted.device)
        values[counted] = torch.from_numpy(np.concatenate(rows)).to(values)
        return values


@dataclass
class Watched:
    """Values that weighters read in a forward pass. The pass fills them in.

    Attributes:
        pooled: as in :class:`MicroBatch`.
        attention: as in :class:`MicroBatch`.
        margins: as in :class:`MicroBatch`.
    """

    pooled: dict[str, Tensor] = field(default_factory=dict)
    attention: Tensor | None = None
    margins: Tensor | None = None

    def clear(self) -> None:
        """Forget the values of the last forward pass."""
        self.pooled, self.attention, self.margins = {}, None, None


@dataclass(frozen=True)
class Weighing:
    """A weighter of the run and its inputs.

    Attributes:
        entry: the weighter, its configuration key and its cadence.
        tokens: whether it reads the losses of tokens.
        reference: whether it reads reference losses.
        validation: its validation samples, if it needs some.
        embeddings: returns embeddings, if it needs some.
        pooled: whether it reads hidden states of the step's forward pass.
        given: the weights of tokens that the data gives, if it needs some.
        attention: whether it reads the attention of tokens to their prompts.
        margins: whether it reads the reward margins of pairs.
    """

    entry: Entry[Weighter]
    tokens: bool = False
    reference: bool = False
    validation: Pool | None = None
    embeddings: Callable[[IndexArray, Pool | None], EmbeddingArray] | None = None
    pooled: bool = False
    given: GivenWeights | None = None
    attention: bool = False
    margins: bool = False

    def acts_in(self, step: int) -> bool:
        """Return whether the weighter acts in step number ``step`` (from 0)."""
        return step % self.entry.every == 0


@dataclass(frozen=True)
class _Samples:
    """Samples of a step, padded to the token columns of the longest one."""

    means: Tensor
    places: Tensor | None
    per_token: Tensor | None = None
    trained: Tensor | None = None
    references: Mapping[str, Tensor] = field(default_factory=dict)
    pooled: Mapping[str, Tensor] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    attention: Tensor | None = None
    margins: Tensor | None = None

    def changed(self, change: Callable[[Tensor], Tensor]) -> _Samples:
        """Return a copy with ``change`` applied to every tensor."""
        pooled = {key: change(values) for key, values in self.pooled.items()}
        places, margins = (None if each is None else change(each) for each in (self.places, self.margins))
        return replace(
            self.changed_tokens(change), means=change(self.means), places=places, pooled=pooled, margins=margins
        )

    def changed_tokens(self, change: Callable[[Tensor], Tensor]) -> _Samples:
        """Return a copy with ``change`` applied to the tensors that have a column for each token."""
        references = {key: change(values) for key, values in self.references.items()}
        given = {key: change(values) for key, values in self.given.items()}
        own = (self.per_token, self.trained, self.attention)
        per_token, trained, attention = (None if each is None else change(each) for each in own)
        return replace(
            self, per_token=per_token, trained=trained, references=references, given=given, attention=attention
        )


MakeBatch = Callable[[Tensor, Tensor | None, TokenLosses | None], StepBatch]
"""Makes a weighter's input from the sample losses, the pool indices and the token losses."""


class StepWeights:
    """Asks the weighters of a run for their weights, step after step.

    Args:
        weighings: the weighters, in the order of the configuration.
        make_batch: makes the input of a weighter.
    """

    def __init__(self, weighings: Sequence[Weighing], make_batch: MakeBatch) -> None:
        self.weighings, self.make_batch = tuple(weighings), make_batch
        self.by_sample = any(each.entry.component.params.normalization == "sample" for each in weighings)
        """Whether the loss is the mean over samples of their token means."""
        self._last: tuple[Tensor, Tensor | None] | None = None
        """The weights decided last, and a mask of the trained tokens if the weights are of tokens."""

    @property
    def last(self) -> Tensor | None:
        """The weights decided last, of samples or of trained tokens, as a flat tensor."""
        if self._last is None:
            return None
        weights, trained = self._last
        return weights if trained is None else weights[trained]

    def needs_all(self, step: int) -> bool:
        """Return whether the weights of step number ``step`` (from 0) depend on all samples of the step together."""
        return any(each.acts_in(step) and not each.entry.component.elementwise for each in self.weighings)

    def known_before(self, step: int) -> bool:
        """Return whether no weight of step number ``step`` (from 0) depends on a loss."""
        return not any(each.acts_in(step) and each.entry.component.reads_losses for each in self.weighings)

    def reference_keys(self, step: int) -> list[str]:
        """Return the configuration keys of the weighters that read a reference in step number ``step`` (from 0)."""
        return [each.entry.key for each in self.weighings if each.reference and each.acts_in(step)]

    def pooled_keys(self, step: int) -> list[str]:
        """Return the configuration keys of the weighters that read hidden states in step number ``step`` (from 0)."""
        return [each.entry.key for each in self.weighings if each.pooled and each.acts_in(step)]

    def reads_attention(self, step: int) -> bool:
        """Return whether a weighter reads the attention to prompts in step number ``step`` (from 0)."""
        return any(each.attention and each.acts_in(step) for each in self.weighings)

    def begin(self, step: int, start: Callable[[Entry[Weighter]], StepStart]) -> None:
        """Let the weighters that act in step number ``step`` (from 0) measure; called on all processes.

        Args:
            step: number of optimizer steps done so far.
            start: makes the input of a weighter.
        """
        for each in self.weighings:
            if each.acts_in(step):
                each.entry.component.begin_step(start(each.entry))

    def decide(self, batches: Sequence[MicroBatch], step: int) -> list[Tensor] | None:
        """Return the weights of each micro-batch, (B,) or (B, T); None if no weighter acts in the step.

        Args:
            batches: micro-batches of this process; all of the step if weights depend on all of its samples.
            step: number of optimizer steps done so far.
        """
        acting = [each for each in self.weighings if each.acts_in(step)]
        if not acting:
            return None
        samples, order = _side_by_side(batches, acting), None
        together = self.needs_all(step)
        if together and distributed.world_size() > 1:
            samples, order = _of_all_processes(samples, [batch.means.numel() for batch in batches])
        weights = self._product(acting, samples, step, together)
        if order is not None:  # undo the order of the plan, and take this process's samples
            own = torch.empty_like(weights)
            own[order] = weights
            count = sum(batch.means.numel() for batch in batches)
            weights = own[distributed.rank() * count : (distributed.rank() + 1) * count]
        parts = weights.split([batch.means.numel() for batch in batches])
        return [
            part if part.dim() == 1 else part[:, : batch.labels.shape[1]]
            for part, batch in zip(parts, batches, strict=True)
        ]

    def _product(self, acting: Sequence[Weighing], samples: _Samples, step: int, together: bool) -> Tensor:
        """Return the product of the weighters' weights, (n,) or (n, T).

        It is 1 for samples and tokens that are not trained on.
        """
        # Weighters never see a loss that is not finite. `check_step` ends the run for such a loss, on all processes.
        scored = torch.isfinite(samples.means).nonzero().squeeze(1)
        if not scored.numel():
            return torch.ones_like(samples.means)
        shown = samples.changed(lambda values: values[scored])
        factors = [self._given(each, shown) for each in acting]
        product = reduce(times, factors)
        trained = None if product.dim() == 1 else shown.trained
        counted = product > 0 if trained is None else (product > 0) & trained
        # All checks are read from the device at once, because each read makes the CPU wait for the device.
        answers = [*((torch.isfinite(each) & (each >= 0)).all() for each in factors), counted.any()]
        *are_weights, weighs = torch.stack(answers).tolist()
        for each, weights, is_right in zip(acting, factors, are_weights, strict=True):
            if not is_right:
                raise ComponentError(_no_weights(each.entry.component, weights, shown.trained))
        if together and not weighs:
            raise ComponentError(_no_weight(acting, step + 1))
        self._last = product, trained
        all_weights = product.new_ones((samples.means.numel(), *product.shape[1:]))
        all_weights[scored] = product
        return all_weights

    def _given(self, each: Weighing, shown: _Samples) -> Tensor:
        """Return a weighter's weights on the losses' device, after checking their shape.

        Tokens that are not trained on have weight 1.
        """
        weighter, tokens = each.entry.component, None
        if each.tokens:
            assert shown.per_token is not None
            assert shown.trained is not None
            reference = shown.references[each.entry.key] if each.reference else None
            attention = shown.attention if each.attention else None
            per_token = shown.per_token if weighter.reads_losses else torch.full_like(shown.per_token, torch.nan)
            tokens = TokenLosses(per_token, shown.trained, reference, attention)
        losses = shown.means if weighter.reads_losses else torch.full_like(shown.means, torch.nan)
        batch = self.make_batch(losses, shown.places, tokens)
        pooled = shown.pooled[each.entry.key] if each.pooled else None
        of_data = None if each.given is None else shown.given[each.entry.key]
        batch = replace(
            batch,
            validation_pool=each.validation,
            embedding_source=each.embeddings,
            pooled=pooled,
            given=of_data,
            margins=shown.margins if each.margins else None,
        )
        given = weighter.weigh(batch)
        reads_tokens = each.tokens or each.given is not None
        check_shape(weighter, given, shown.means.numel(), shown.trained if reads_tokens else None)
        weights = given.to(shown.means)
        if weights.dim() == 1:
            return weights
        assert shown.trained is not None
        return torch.where(shown.trained, weights, 1.0)


def times(first: Tensor, second: Tensor) -> Tensor:
    """Return the product of two weights, each of samples (n,) or of tokens (n, T)."""
    if first.dim() == second.dim():
        return first * second
    return first * second.unsqueeze(1) if first.dim() == 2 else first.unsqueeze(1) * second


def _no_weight(acting: Sequence[Weighing], step: int) -> str:
    """Return the error message for weighters whose weights are all 0 in a step."""
    labels = " and ".join(label_of(each.entry.component, ("weigh",)) for each in acting)
    returned = "returned" if len(acting) == 1 else "together give"
    return (
        f"{labels} {returned} weight 0 for every sample of step {step}, which would train nothing; give at least one a "
        "weight above 0."
    )


def _side_by_side(batches: Sequence[MicroBatch], acting: Sequence[Weighing]) -> _Samples:
    """Return the samples of micro-batches, with the tensors that the weighters read."""
    means = torch.cat([batch.means for batch in batches])
    known = [batch.places for batch in batches if batch.places is not None]
    places = torch.cat(known) if known else None
    looking = [each.entry.key for each in acting if each.pooled]
    pooled = {key: torch.cat([batch.pooled[key] for batch in batches]) for key in looking}
    margins = None
    if any(each.margins for each in acting):
        margins = torch.cat([batch.margins for batch in batches if batch.margins is not None])
    if not any(each.tokens or each.given is not None for each in acting):
        return _Samples(means, places, pooled=pooled, margins=margins)
    columns = max(batch.labels.shape[1] for batch in batches)

    def joined(values: Callable[[MicroBatch], Tensor]) -> Tensor:
        return torch.cat([_widened(values(batch), columns) for batch in batches])

    keys = [each.entry.key for each in acting if each.reference]
    given = {
        each.entry.key: joined(lambda batch, weights=each.given: batch.given(weights))  # type: ignore[misc]
        for each in acting
        if each.given is not None
    }
    attention = joined(_attention_of) if any(each.attention for each in acting) else None
    return _Samples(
        means,
        places,
        joined(lambda batch: batch.per_token),
        joined(lambda batch: batch.labels != IGNORE_INDEX),
        {key: joined(lambda batch, key=key: batch.reference(key)) for key in keys},  # type: ignore[misc]
        pooled,
        given,
        attention,
        margins,
    )


def _attention_of(batch: MicroBatch) -> Tensor:
    assert batch.attention is not None
    return batch.attention


def _widened(values: Tensor, columns: int) -> Tensor:
    """Return (B, T) values padded with zeros to ``columns`` columns."""
    return torch.nn.functional.pad(values, (0, columns - values.shape[1]))


def _of_all_processes(samples: _Samples, sizes: Sequence[int]) -> tuple[_Samples, Tensor]:
    """Return the samples of all processes in the order of the plan, and their positions among the gathered samples.

    The plan is dealt to the processes one micro-batch after another. If the micro-batches differ in size, as at the end
    of a pass without a plan, the samples stay in the order of the processes.
    """
    if samples.per_token is not None:
        columns = samples.per_token.shape[1]
        widths = distributed.all_gather(torch.tensor([columns], device=samples.means.device))
        columns = int(widths.max())
        samples = samples.changed_tokens(lambda values: _widened(values, columns))
    samples = samples.changed(distributed.all_gather)
    order = plan_order(sizes, samples.means.numel(), samples.means.device)
    return samples.changed(lambda values: values[order]), order


def plan_order(sizes: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return the positions that bring a step's samples, gathered process after process, into the order of the plan.

    Args:
        sizes: number of samples in each micro-batch of this process.
        count: number of samples on all processes.
        device: device of the positions, (count,).
    """
    order = torch.arange(count, device=device)
    if len(set(sizes)) == 1:
        order = order.view(distributed.world_size(), len(sizes), sizes[0]).transpose(0, 1).reshape(-1)
    return order


def _no_weights(weighter: Weighter, weights: Tensor, trained: Tensor | None) -> str:
    """Return the error message for weights that are NaN, infinite or negative."""
    counted = weights if weights.dim() == 1 or trained is None else weights[trained]
    label = label_of(weighter, ("weigh",))
    return (
        f"{label} returned weights that are NaN, infinite or negative: {counted.tolist()}; every weight must be a "
        "finite number of at least 0."
    )


def check_shape(weighter: Weighter, weights: Tensor, count: int, trained: Tensor | None) -> None:
    """Check that a weighter returned one weight for each sample or for each token.

    Args:
        weighter: the weighter that returned the weights.
        weights: the returned value.
        count: number of samples.
        trained: mask of the trained tokens, (n, T), if the weighter reads tokens.

    Raises:
        ComponentError: naming the weighter and the returned value.
    """
    label = label_of(weighter, ("weigh",))
    if not isinstance(weights, torch.Tensor):
        raise ComponentError(
            f"{label} returned {'None' if weights is None else f'a {type(weights).__name__}'}; it must return a tensor "
            f"of {count} weights, one per sample."
        )
    if weights.shape != (count,) and (trained is None or weights.shape != trained.shape):
        tokens = "" if trained is None else f", or {tuple(trained.shape)}, one per token"
        raise ComponentError(
            f"{label} returned weights of shape {tuple(weights.shape)}; the shape must be ({count},), one per "
            f"sample{tokens}."
        )
