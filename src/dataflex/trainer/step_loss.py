"""Loss coefficients of a training step: the measurements and decisions that precede its forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex import distributed
from dataflex.api.components import Entry, family_key
from dataflex.api.context import EmbeddingArray, StepBatch, StepContext, StepStart, TokenLosses
from dataflex.data.pool import Pool
from dataflex.data.rng import derive_rng
from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX, sample_means, shifted
from dataflex.errors import ConfigError
from dataflex.probe.hidden_states import consumer_of, watched
from dataflex.probe.mode import probe_mode
from dataflex.probe.particulars import head_agrees
from dataflex.probe.prompt_attention import PromptAttention
from dataflex.probe.routing import real_tokens
from dataflex.trainer.domain_loss import DomainLoss
from dataflex.trainer.fused_head import FusedHead
from dataflex.trainer.loss import MIX, WeightedLoss, as_tokens
from dataflex.trainer.references import References
from dataflex.trainer.rounds import INDEX_KEY
from dataflex.trainer.sample_losses import SampleLosses
from dataflex.trainer.stage_losses import causal_losses, chunked_losses
from dataflex.trainer.statistics import StepAccumulator, domain_sums
from dataflex.trainer.step_weights import MicroBatch, StepWeights, Watched, Weighing, plan_order

if TYPE_CHECKING:
    from dataflex.api.needs import Needs
    from dataflex.api.reference import Reference
    from dataflex.api.weighter import Weighter
    from dataflex.trainer.mixin import DynamicTrainerMixin


class StepLoss:
    """Decides the loss coefficients of each step, and adds up the losses of its forward passes.

    Args:
        trainer: trainer of the run.
    """

    def __init__(self, trainer: DynamicTrainerMixin) -> None:
        self._trainer, self._run = trainer, trainer.dataflex
        run, args = self._run, trainer.args
        self.accumulator = StepAccumulator(
            run.data.offsets, args.device, _kept(run.inputs.needs), bool(run.inputs.components.weight)
        )
        self.references = References(trainer)
        mixer = run.inputs.components.mix
        self.domain_loss: DomainLoss | None = None
        if mixer is not None and mixer.weighs_loss:
            needs = run.inputs.needs["mix"]
            self.domain_loss = DomainLoss(mixer, needs, run.data.domains, args.device, self._step_context)
        weighings, model = [], trainer.causal_model()
        self._consumers: dict[str, torch.nn.Module] = {}
        """Modules that receive the hidden states that weighters read, by configuration key of the weighter."""
        for entry in run.inputs.components.weight:
            needs = run.inputs.needs[entry.key]
            reference = needs.reference is not None and entry.component.step_reference
            validation, embeddings = run.data.validation.get(entry.key), None
            if needs.embeddings is not None:
                embeddings = partial(self._embeddings, entry.key)
            pooled, attention = needs.step_embeddings, needs.prompt_attention
            tokens = reference or attention or needs.step_losses == "tokens"
            given = None if run.data.samples is None else run.data.samples.given_weights.get(entry.key)
            weighings.append(
                Weighing(
                    entry,
                    tokens,
                    reference,
                    validation,
                    embeddings,
                    pooled=pooled is not None,
                    given=given,
                    attention=attention,
                    margins=needs.step_margins,
                )
            )
            if pooled is not None:
                self._consumers[entry.key] = consumer_of(model, pooled.layer)
        self._attention = PromptAttention(model) if any(each.attention for each in weighings) else None
        size = run.steps.global_batch_size
        self.loss = WeightedLoss(
            samples_per_step=size if args.average_tokens_across_devices else size // args.world_size,
            observe=self.accumulator.add,
            weights=StepWeights(weighings, self._step_batch) if weighings else None,
            domain_loss=self.domain_loss,
            global_batch_size=size,
            special=trainer.special_loss,
        )
        if run.inputs.config.fused_loss:
            statistic = None if trainer.special_loss is None else trainer.special_loss.statistic
            self.loss.fused = FusedHead(model, statistic)
        self._head_agrees = False
        """Whether a comparison has shown that the losses of chunks are the model's own."""

    def begin(self, samples: list[dict[str, Any]]) -> None:
        """Begin a step, and decide all coefficients that the training forward pass cannot decide on the way.

        With a single micro-batch, the coefficients are decided from the losses of its training forward pass. With
        several, a coefficient that depends on all of them needs their losses in advance, from forward passes without
        gradients.

        Args:
            samples: the step's micro-batches on this process.
        """
        loss, schedule, domain_loss = self.loss, self._trainer.started.steps.schedule, self.domain_loss
        if loss.fused is not None and not self._head_agrees:
            self._check_head(samples[0])
        loss.step = self._trainer.state.global_step
        loss.active = schedule.slot_at(min(loss.step, schedule.total_steps - 1)).update is not None
        loss.decided.clear()
        if self._trainer.embeddings is not None:
            self._trainer.embeddings.forget()
        if not loss.active:
            return
        with self._run.clock.deciding():
            if loss.weights is not None:
                loss.weights.begin(loss.step, partial(self._step_start, samples))
            if domain_loss is not None:
                self._count_tokens(domain_loss, samples)
            of_domains = domain_loss is not None and not domain_loss.decided
            of_samples = loss.weights is not None and loss.weights.needs_all(loss.step)
            if len(samples) > 1 and (of_domains or of_samples):
                batches = self._look_ahead(samples)
                if domain_loss is not None and of_domains:
                    self._decide_domains(domain_loss, batches)
                if loss.weights is not None and of_samples:
                    loss.decided.extend(loss.weights.decide(batches, loss.step) or ())

    def prepare(self, inputs: dict[str, Any], places: Tensor | None) -> None:
        """Provide the inputs of a micro-batch's loss other than the logits.

        Args:
            inputs: inputs of the model.
            places: pool index of each sample, (B,); None if the data is streamed.
        """
        loss, domain_loss = self.loss, self.domain_loss
        self.accumulator.indices = places if self._run.data.pool is not None else None
        loss.places, loss.references = places, {}
        if not loss.active:
            return
        keys = []
        if domain_loss is not None:
            assert places is not None
            loss.domains = self.accumulator.domains_of(places)
            if domain_loss.uses_reference and (domain_loss.follows or not domain_loss.decided):
                keys.append(MIX)
        if loss.weights is not None and not loss.decided:
            keys += loss.weights.reference_keys(loss.step)
        if keys:
            with self._run.clock.deciding(inside_step=True):
                loss.references = self.references.look_up(keys, inputs, places)

    def _check_head(self, batch: dict[str, Any]) -> None:
        """Compare losses in chunks with those of the model's own logits, on a micro-batch without gradients.

        Raises:
            ConfigError: if they differ.
        """
        trainer = self._trainer
        model = trainer.raw_model()
        inputs = dict(trainer._prepare_inputs(batch))
        inputs.pop(INDEX_KEY, None)
        labels = shifted(inputs.pop("labels"))
        with probe_mode(model), trainer.accelerator.autocast():
            found = distributed.on_each(partial(head_agrees, model, inputs, labels, labels.device))
        if False in found:
            raise ConfigError(
                f"dataflex.fused_loss: {type(trainer.causal_model()).__name__} changes its logits after the head in a "
                "way that its configuration does not describe, so the loss cannot be computed in chunks. Set "
                "dataflex.fused_loss: false."
            )
        self._head_agrees = True in found

    @contextmanager
    def fusing(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Compute token losses in place of logits during a training forward pass, if the loss of the run is fused."""
        if self.loss.fused is None:
            yield
            return
        with self.loss.fused.active(shifted(inputs["labels"]), self.loss.coefficients_before):
            yield

    @contextmanager
    def watching(self, inputs: dict[str, Any], found: Watched) -> Iterator[None]:
        """Fill in the values that weighters read in a micro-batch's forward pass.

        Args:
            inputs: inputs of the model, with labels.
            found: the values of the last forward pass; they are replaced.
        """
        found.clear()
        loss = self.loss
        weights = None if not loss.active or loss.decided else loss.weights
        with ExitStack() as stack:
            if weights is not None:
                stack.enter_context(self._watching_states(inputs, weights.pooled_keys(loss.step), found.pooled))
            # The first forward pass of the run is read even if no weighter acts in it: a model whose attention cannot
            # be read is an error in the first step, and not after the warm-up.
            attention = self._attention
            if attention is not None and (
                not attention.was_read or (weights is not None and weights.reads_attention(loss.step))
            ):
                stack.enter_context(attention.read(inputs["labels"], partial(setattr, found, "attention")))
            yield

    @contextmanager
    def _watching_states(self, inputs: dict[str, Any], keys: list[str], found: dict[str, Tensor]) -> Iterator[None]:
        """Fill in one pooled hidden-state vector per sample, by configuration key, during a forward pass."""
        mask, labels = real_tokens(inputs, inputs["labels"]), shifted(inputs["labels"])

        def see(key: str, hidden: Tensor) -> None:
            wanted = self._run.inputs.needs[key].step_embeddings
            assert wanted is not None
            found[key] = wanted.reduce(hidden.float(), wanted.tokens(mask, labels))

        with watched({key: self._consumers[key] for key in keys}, see):
            yield

    def _count_tokens(self, domain_loss: DomainLoss, samples: list[dict[str, Any]]) -> None:
        """Begin a step of the domain weights with its number of tokens in each domain."""
        if self._trainer.stage_loss is None:
            counts = torch.cat([(shifted(batch["labels"]) != IGNORE_INDEX).sum(1) for batch in samples])
        else:  # a sample counts as one token
            counts = torch.cat([torch.ones_like(batch[INDEX_KEY]) for batch in samples])
        domains = self.accumulator.domains_of(torch.cat([batch[INDEX_KEY] for batch in samples]))
        column = counts.to(domains.device, domain_loss.dtype).unsqueeze(1)
        domain_loss.begin(domain_sums(domains, column, len(domain_loss.domains))[:, 0])

    def _look_ahead(self, samples: list[dict[str, Any]]) -> list[MicroBatch]:
        """Return the losses of several micro-batches from forward passes that need no gradients and leave no trace."""
        trainer, loss = self._trainer, self.loss
        keys = loss.weights.reference_keys(loss.step) if loss.weights is not None else []
        if self.domain_loss is not None and self.domain_loss.uses_reference and not self.domain_loss.decided:
            keys.append(MIX)
        model, found = trainer.raw_model(), []
        with probe_mode(model), trainer.accelerator.autocast():
            for batch in samples:
                inputs = dict(trainer._prepare_inputs(batch))
                places = inputs.pop(INDEX_KEY, None)
                references = self.references.look_up(keys, inputs, places)
                if trainer.stage_loss is not None:
                    with trainer.of_step(places):
                        of_samples = trainer.losses_of_step(model, inputs)
                    labels, per_token = as_tokens(of_samples.losses)
                    means, margins = of_samples.losses, of_samples.margins
                    found.append(MicroBatch(labels, per_token, means, places, margins=margins))
                    continue
                seen = Watched()
                with self.watching(inputs, seen):
                    losses_of = causal_losses if loss.fused is None else chunked_losses
                    labels, per_token = losses_of(model, inputs)
                means = _means(per_token, labels)
                found.append(MicroBatch(labels, per_token, means, places, references, seen.pooled, seen.attention))
        return found

    def _decide_domains(self, domain_loss: DomainLoss, batches: list[MicroBatch]) -> None:
        """Decide the domain weights from the micro-batches of a whole step."""
        places = torch.cat([batch.places for batch in batches if batch.places is not None])
        sums = torch.cat([batch.per_token.sum(1) for batch in batches])
        excess = [
            domain_loss.excess_sums(batch.per_token, batch.labels, batch.references.get(MIX)) for batch in batches
        ]
        compared = [each for each in excess if each is not None]
        domain_loss.decide(self.accumulator.domains_of(places), sums, torch.cat(compared) if compared else None)

    def _step_context(self, tokens: np.ndarray, losses: np.ndarray, excess: np.ndarray) -> StepContext:
        """Return the mixer's context of the step that is about to begin or has just ended."""
        return self._trainer.started.step_context(self.loss.step, tokens, losses, excess)

    def _step_start(self, samples: list[dict[str, Any]], entry: Entry[Weighter]) -> StepStart:
        """Return a weighter's context before the forward passes of the step that is about to begin."""
        run, step = self._trainer.started, self.loss.step
        # Several weighters of one method must not share random numbers. A single one is keyed by its method alone.
        weighter, place = entry.component, () if entry.key == family_key(entry.key) else (entry.key,)
        return StepStart(
            step=step,
            total_steps=max(run.steps.expected, step + 1),
            rng=derive_rng(run.inputs.settings.seed, weighter.family, weighter.name, *place, step),
            pool=run.data.samples,
            probe=self._trainer.probe,
            validation_pool=run.data.validation.get(entry.key),
            reference_losses=self._reference_losses.get(entry.key),
            index_source=None if run.data.samples is None else partial(self._indices_of, samples),
        )

    @cached_property
    def _reference_losses(self) -> Mapping[str, Reference]:
        """The reference of each component in its measurements before a step, by configuration key."""
        return self.references.of_samples()

    def _indices_of(self, samples: list[dict[str, Any]]) -> IndexArray:
        """Return the pool indices of a step's samples on all processes, in the order of the plan."""
        places = [batch[INDEX_KEY] for batch in samples]
        device = self._trainer.args.device
        found = distributed.all_gather(torch.cat(places).to(device))
        order = plan_order([part.numel() for part in places], found.numel(), device)
        indices: IndexArray = found[order].cpu().numpy()
        return indices

    def _step_batch(self, losses: Tensor, places: Tensor | None, tokens: TokenLosses | None) -> StepBatch:
        """Return a weighter's view of the step that is about to begin."""
        run, step = self._trainer.started, self.loss.step
        total = max(run.steps.expected, step + 1)
        return StepBatch(losses, step, total, run.data.samples, self._trainer.probe, places, tokens)

    def _embeddings(self, key: str, indices: IndexArray, samples: Pool | None) -> EmbeddingArray:
        """Return the embeddings that a weighter requests."""
        service = self._trainer.embeddings
        source = None if service is None else service.of_some(key)
        assert source is not None, "weights with embeddings are decided in training alone"
        return source(indices, samples)


def _kept(wanted: dict[str, Needs]) -> SampleLosses | None:
    """Return the store of the losses of samples or tokens of every step; None if no component needs them.

    Weighters do not count: they receive the losses of their step in a :class:`StepBatch`.
    """
    asked = {needs.step_losses for key, needs in wanted.items() if family_key(key) != "weight"}
    return SampleLosses("tokens") if "tokens" in asked else SampleLosses("samples") if "samples" in asked else None


def _means(per_token: Tensor, labels: Tensor) -> Tensor:
    """Return the token-mean loss of each sample, (B,); NaN for a sample without a counted token."""
    return sample_means(per_token.sum(1), (labels != IGNORE_INDEX).sum(1))
