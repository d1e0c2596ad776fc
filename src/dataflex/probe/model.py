"""The probe: what a decision may measure on the model in training, on all processes together, without a trace.

Batches are sorted by length and cut under a token budget, the same ones on any number of processes; each process runs
its share, and all run the same number of forwards (a repeated batch is thrown away), because under ZeRO-3 and FSDP a
forward is collective. The raw module is run in evaluation mode under the training precision; modes and random streams
are put back.

What is particular to a model is found out on two short samples: at every call whether the head may be applied chunk
by chunk (a model that changes its logits after the head is probed through its own logits from then on), and once
whether the samples of a batch keep apart in its layers (routed rows do not; then gradients are taken one sample at a
time).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataflex import distributed
from dataflex.api.measurement import Measurement, ResultT
from dataflex.api.probe import GenerationSettings, GradientSettings
from dataflex.data.pool import Pool
from dataflex.data.rules import ScoreArray
from dataflex.data.samples import Samples
from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ComponentError, DivergenceError
from dataflex.probe.batches import inputs_of, length_batches, share_of
from dataflex.probe.checkpoints import learning_rates, weights_of
from dataflex.probe.cost import Cost
from dataflex.probe.embeddings import Embeddings
from dataflex.probe.error_norms import ErrorNorms
from dataflex.probe.expert_loads import ExpertLoads
from dataflex.probe.extraction import extract
from dataflex.probe.features import GramSink, NormSink, Sink, SketchSink, make_preconditioner, make_sketch
from dataflex.probe.generation import generate_responses
from dataflex.probe.gradients import GradientPass, RoutedRows, canonical, parameter_names
from dataflex.probe.losses import Losses
from dataflex.probe.mode import probe_mode, reshard
from dataflex.probe.moments import Moments
from dataflex.probe.particulars import COMPARED_SAMPLES, is_low_precision, look_at_head, short_samples
from dataflex.probe.runner import Runner
from dataflex.probe.store import FeatureStore, similarities

logger = logging.getLogger(__name__)

_GRADIENT_AGREEMENT = 1e-2
_GRADIENT_AGREEMENT_LOW_PRECISION = 0.2

Consume = Callable[[IndexArray, Tensor], None]
"""Takes the positions of a batch in the caller's list and what was measured, (B, ...)."""


@dataclass(frozen=True)
class Tokens:
    """What generation needs of the tokenizer."""

    pad: int
    eos: tuple[int, ...]
    decode: Callable[[list[int]], str]


@dataclass
class ModelProbe:
    """Measurements on the model in training.

    Attributes:
        pool: the samples.
        model: returns the module to run (the raw one; the wrapper's own forward belongs to training).
        collate: the training collator, on rows of the pool.
        autocast: the training precision.
        device: where the model lives.
        batch_tokens: tokens, padding counted, of one forward.
        gradient_batch_tokens: the same, of one forward and backward; none: ``batch_tokens``.
        moments: returns the optimizer's moments by parameter name.
        tokens: the tokenizer's part in generation.
        sharded: whether a forward is collective (ZeRO-3, FSDP).
        after_backward: called after every backward; under ZeRO-3 it releases what DeepSpeed still holds.
        saved_moments: returns the moments a checkpoint folder holds.
        progress: whether to show a progress bar.
    """

    pool: Pool
    model: Callable[[], torch.nn.Module]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    batch_tokens: int
    gradient_batch_tokens: int | None = None
    moments: Callable[[], dict[str, Moments]] | None = None
    tokens: Tokens | None = None
    sharded: bool = False
    after_backward: Callable[[], None] = lambda: None
    saved_moments: Callable[[Path], dict[str, Moments]] | None = None
    progress: bool = False
    cost: Cost = field(default_factory=Cost)
    chunked_head: bool | None = None
    _samples_apart: bool | None = None
    most_tokens: dict[str, int] = field(default_factory=dict)
    """Lower token budgets, by the names of measurements for which a device ran out of memory."""
    _most_tokens: int | None = None

    def measure(
        self,
        measurement: Measurement[ResultT],
        indices: IndexArray,
        samples: Samples | Sequence[Mapping[str, Any]] | None = None,
    ) -> ResultT:
        """Return what a measurement gives for samples, in their order; see :class:`~dataflex.api.probe.Probe`."""
        runner = Runner(self, measurement, indices, samples)
        with probe_mode(runner.model), self.autocast():
            return measurement.run(runner)

    def losses(self, indices: IndexArray, pool: Pool | None = None) -> ScoreArray:
        """Return the token-mean loss of each sample, shape (n,), float32; NaN where no token is trained on."""
        return self.measure(Losses(), indices, pool)

    def error_norms(self, indices: IndexArray) -> ScoreArray:
        """Return each sample's token mean of ||softmax - one-hot||_2, shape (n,), float32; NaN as for losses."""
        return self.measure(ErrorNorms(), indices)

    def embeddings(self, indices: IndexArray) -> ScoreArray:
        """Return mean-pooled hidden states of the last layer scaled to length 1, shape (n, hidden), float32."""
        return self.measure(Embeddings(), indices)

    def expert_loads(self, indices: IndexArray) -> ScoreArray:
        """Return how each sample's tokens are routed in a mixture of experts, shape (n, layers * experts), float32."""
        return self.measure(ExpertLoads(), indices)

    def gradients(self, indices: IndexArray, settings: GradientSettings, pool: Pool | None = None) -> ScoreArray:
        """Return the features of a few samples, shape (n, k), float32; zero where no token is trained on."""
        size = sum(self.parameter_sizes().values()) if settings.sketch == "identity" else settings.dim
        values = torch.zeros(indices.size, size, dtype=torch.float32, device=self.device)

        def consume(batch: IndexArray, features: Tensor, losses: Tensor) -> None:
            _store(values, batch, features.masked_fill(torch.isnan(losses).unsqueeze(1), 0.0))

        self.stream(indices, settings, consume, pool)
        return distributed.all_reduce_sum(values).cpu().numpy()

    def similarities(self, indices: IndexArray, settings: GradientSettings, targets: ScoreArray) -> ScoreArray:
        """Return the inner products of each sample's feature with ``targets`` (S, k), shape (n, S), float32."""
        matrix = torch.from_numpy(np.ascontiguousarray(targets.T)).to(self.device)
        if settings.store is not None:
            store = self.extract(indices, settings)
            found = similarities(store, matrix.T, self.device)
            return found if settings.normalize else found * store.norms()[:, None]
        values = torch.zeros(indices.size, matrix.shape[1], dtype=torch.float32, device=self.device)

        def consume(batch: IndexArray, features: Tensor, losses: Tensor) -> None:
            scores = features.float() @ matrix
            scores[torch.isnan(losses)] = torch.nan
            _store(values, batch, scores)

        self.stream(indices, settings, consume)
        return distributed.all_reduce_sum(values).cpu().numpy()

    def extract(self, indices: IndexArray, settings: GradientSettings) -> FeatureStore:
        """Return the samples' features of length 1 in ``settings.store``, making what is not there yet."""
        assert settings.store is not None
        return extract(self, self.pool, indices, replace(settings, normalize=True, store=None), Path(settings.store))

    @contextmanager
    def sketching(
        self, pool: Pool, indices: IndexArray, settings: GradientSettings
    ) -> Iterator[Callable[[IndexArray], tuple[Tensor, Tensor]]]:
        """Give a function from samples of ``pool`` to features of length 1, (B, k), and their lengths before, (B,).

        The length is NaN where a sample has no token that is trained on. ``indices`` are all that will be asked for.
        """
        with self._measuring(pool, indices, settings, self._sketch_sink(settings)) as measure:

            def features_of(rows: IndexArray) -> tuple[Tensor, Tensor]:
                features, losses = measure(rows)
                lengths = features.norm(dim=1).masked_fill(torch.isnan(losses), torch.nan)
                return torch.nn.functional.normalize(features, dim=1), lengths

            yield features_of

    def gradient_norms(self, indices: IndexArray, settings: GradientSettings) -> ScoreArray:
        """Return the exact length of each sample's direction, before any sketch, shape (n,), float32."""
        values = torch.zeros(indices.size, dtype=torch.float32, device=self.device)

        def consume(batch: IndexArray, squares: Tensor, losses: Tensor) -> None:
            _store(values, batch, torch.where(torch.isnan(losses), torch.nan, squares.sqrt()).float())

        preconditioner = make_preconditioner(settings, self._moments(settings))
        self._measure(self.pool, indices, settings, NormSink(preconditioner, self.device), consume)
        return distributed.all_reduce_sum(values).cpu().numpy()

    def products(
        self, groups: list[IndexArray], settings: GradientSettings, targets: IndexArray, target_pool: Pool
    ) -> list[ScoreArray]:
        """Return the exact inner products of each group with itself and with validation samples.

        Those of a sample without a token that is trained on are NaN.
        """
        model, results = self.model(), [np.zeros((group.size, group.size + targets.size)) for group in groups]
        sink = GramSink(make_preconditioner(settings, self._moments(settings)), self.device)
        mine, useful = share_of(
            [np.array([number]) for number in range(len(groups))], distributed.rank(), distributed.world_size()
        )
        with probe_mode(model), self.autocast():
            look_at_head(self, self.pool, np.concatenate(groups))
            reshard(model)
            probe = self._pass(model, settings, sink)
            for turn, (number,) in enumerate(mine):
                group = groups[number]
                rows = self.pool.rows(group) + target_pool.rows(targets)
                products = self._whole_products(probe, sink, rows)
                if turn < useful:
                    results[number] = products[: group.size].double().cpu().numpy()
        sizes = [result.shape for result in results]
        flat = torch.from_numpy(np.concatenate([result.ravel() for result in results])).float().to(self.device)
        whole = distributed.all_reduce_sum(flat).cpu().numpy()
        self.count(self.pool, np.concatenate(groups))
        ends = np.cumsum([rows * columns for rows, columns in sizes])
        return [part.reshape(size) for part, size in zip(np.split(whole, ends[:-1]), sizes, strict=True)]

    def _whole_products(self, probe: GradientPass, sink: GramSink, rows: list[dict[str, Any]]) -> Tensor:
        """Return the inner products of all pairs of one batch, NaN for samples without a trained token."""
        inputs, labels = inputs_of(self, rows)
        sink.begin(len(rows), _wide_dtype(probe.model))
        try:
            losses = probe.run(inputs, labels)
        except RoutedRows as error:
            raise ComponentError(
                f"inner products of whole batches cannot be taken: {error} mixes the rows of its samples."
            ) from error
        except torch.OutOfMemoryError as error:
            raise ComponentError(
                f"the device has not the memory for the inner products of {len(rows)} samples of {labels.shape[1]} "
                "tokens, which are one batch. Set a smaller group_size, candidate_factor or validation_size, or "
                "shorten cutoff_len."
            ) from error
        self.after_backward()
        empty = (labels == IGNORE_INDEX).all(1)
        products = sink.result.masked_fill(empty.unsqueeze(0) | empty.unsqueeze(1), 0.0)
        if not torch.isfinite(products).all():
            raise DivergenceError(
                f"the inner products of a batch are not finite (its largest loss is {float(losses[~empty].max()):g})"
            )
        return products.masked_fill(empty.unsqueeze(0) | empty.unsqueeze(1), torch.nan)

    def generate(self, prompts: list[list[int]], settings: GenerationSettings, seed: int) -> list[list[list[int]]]:
        """Return ``settings.samples`` responses (token ids, prompt left out) of the model to each prompt."""
        assert self.tokens is not None
        model = self.model()
        with self.autocast():
            return generate_responses(
                model,
                self.tokens.pad,
                list(self.tokens.eos),
                prompts,
                settings,
                seed,
                self.batch_tokens,
                self.device,
                self.sharded,
                distributed.rank(),
                distributed.world_size(),
            )

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        assert self.tokens is not None
        return self.tokens.decode(tokens)

    @contextmanager
    def checkpoint(self, folder: str) -> Iterator[None]:
        """Measure with the weights (and moments) of a stored checkpoint for a while.

        Raises:
            ComponentError: if the parameters are spread over processes, or the checkpoint is of another model.
        """
        if self.sharded:
            raise ComponentError(
                "checkpoints: stored weights cannot be looked at while ZeRO-3 or FSDP spreads the model out. "
                "Use ZeRO-2 or DDP, or score the pool before with dataflex-cli score."
            )
        moments = self.moments
        with weights_of(self.model(), Path(folder)):
            if self.saved_moments is not None:
                self.moments = partial(self.saved_moments, Path(folder))
            try:
                yield
            finally:
                self.moments = moments

    def learning_rates(self, folders: list[str]) -> list[float]:
        """Return the mean learning rate of each stored checkpoint's stretch of its run, scaled to sum 1."""
        return learning_rates([Path(folder) for folder in folders])

    def stream(
        self,
        indices: IndexArray,
        settings: GradientSettings,
        consume: Callable[[IndexArray, Tensor, Tensor], None],
        pool: Pool | None = None,
    ) -> None:
        """Hand this process's share of the features on, batch by batch: (positions, features (B, k), losses (B,))."""
        sink = self._sketch_sink(settings)

        def scaled(batch: IndexArray, features: Tensor, losses: Tensor) -> None:
            if settings.normalize:
                features = torch.nn.functional.normalize(features, dim=1)
            with torch.autocast(self.device.type, enabled=False):  # products of features are in full precision
                consume(batch, features, losses)

        self._measure(pool or self.pool, indices, settings, sink, scaled)

    def _sketch_sink(self, settings: GradientSettings) -> SketchSink:
        preconditioner = make_preconditioner(settings, self._moments(settings))
        return SketchSink(preconditioner, make_sketch(settings, self.parameter_sizes(), self.device), self.device)

    def parameter_sizes(self) -> dict[str, int]:
        """Return the number of elements of every trainable parameter, by name, sharded or not."""
        model = self.model()
        names = parameter_names(model)
        return {
            names[id(value)]: int(getattr(value, "ds_numel", value.numel()))
            for value in model.parameters()
            if id(value) in names
        }

    def _moments(self, settings: GradientSettings) -> dict[str, Moments] | None:
        if settings.preconditioner == "none":
            return None
        return self.optimizer_moments()

    def optimizer_moments(self) -> dict[str, Moments]:
        """Return the optimizer's moments of every trainable parameter, under the names features know it by."""
        assert self.moments is not None
        return {canonical(name): value for name, value in self.moments().items()}

    def _pass(self, model: torch.nn.Module, settings: GradientSettings, sink: Sink) -> GradientPass:
        return GradientPass(model, sink.take, settings.reduction, bool(self.chunked_head), settings.unsupported)

    def _measure(
        self,
        pool: Pool,
        indices: IndexArray,
        settings: GradientSettings,
        sink: Sink,
        consume: Callable[[IndexArray, Tensor, Tensor], None],
    ) -> None:
        """Run this process's share of the gradient batches through a sink."""
        losses: list[Tensor] = []
        with self._measuring(pool, indices, settings, sink) as measure:

            def run(rows: IndexArray) -> Tensor:
                values, batch_losses = measure(rows)
                losses[:] = [batch_losses]
                return values

            self._share(
                pool,
                indices,
                self.gradient_batches(pool, indices),
                run,
                lambda batch, values: consume(batch, values, losses[0]),
            )

    @contextmanager
    def _measuring(
        self, pool: Pool, indices: IndexArray, settings: GradientSettings, sink: Sink
    ) -> Iterator[Callable[[IndexArray], tuple[Tensor, Tensor]]]:
        """Give a function from samples to what the sink makes of them, (B, ...), and their losses, (B,)."""
        model = self.model()
        with probe_mode(model), self.autocast():
            look_at_head(self, pool, indices)
            reshard(model)
            probe = self._pass(model, settings, sink)
            self._look_at_samples(probe, sink, pool, indices)

            def measure(rows: IndexArray) -> tuple[Tensor, Tensor]:
                parts = [self._gradient_batch(probe, sink, pool, part) for part in self._fitting(pool, rows)]
                values, losses = (torch.cat(both) for both in zip(*parts, strict=True))
                broken = ~torch.isfinite(values.flatten(1) if values.dim() > 1 else values[:, None]).all(1)
                broken = (broken & ~torch.isnan(losses)) | torch.isinf(losses)
                if broken.any():
                    raise DivergenceError(
                        f"the gradient of pool index {rows[broken.cpu().numpy()][0]} is not finite (its loss is "
                        f"{float(losses[broken][0]):g})"
                    )
                return values, losses

            yield measure
        if probe.left_out:
            logger.warning("Left out of the gradient features: %s.", ", ".join(sorted(probe.left_out)))

    def gradient_batches(self, pool: Pool, indices: IndexArray) -> list[IndexArray]:
        """Return the batches gradients are taken in, as positions in ``indices``; the same on any processes."""
        if not self._samples_apart:  # they do not, or no two samples were there to tell
            return length_batches(pool.lengths[indices], 1)
        return length_batches(pool.lengths[indices], self.gradient_batch_tokens or self.batch_tokens)

    def _gradient_batch(self, probe: GradientPass, sink: Sink, pool: Pool, rows: IndexArray) -> tuple[Tensor, Tensor]:
        """Return what a sink made of some samples, and their losses; halves the batch while memory runs out."""
        inputs, targets = self._collated(pool, rows)
        try:
            sink.begin(rows.size, _wide_dtype(probe.model))
            losses = probe.run(inputs, targets)
        except torch.OutOfMemoryError as error:
            if rows.size == 1 or self.sharded:
                raise ComponentError(
                    f"the device has not the memory for the gradients of {rows.size} samples of "
                    f"{targets.shape[1]} tokens. Set dataflex.probe_batch_tokens to less than {targets.numel()}"
                    + (", or shorten cutoff_len." if rows.size == 1 else ".")
                ) from error
        else:
            self.after_backward()
            return sink.result, losses
        del inputs
        torch.cuda.empty_cache()
        self._most_tokens = targets.numel() // 2
        logger.warning("Out of memory: gradient batches are cut to %d tokens from now on.", self._most_tokens)
        halves = [self._gradient_batch(probe, sink, pool, half) for half in np.array_split(rows, 2)]
        return torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])

    def _fitting(self, pool: Pool, rows: IndexArray) -> list[IndexArray]:
        """Return a batch, or the parts of it that fit once memory ran out."""
        if self._most_tokens is None:
            return [rows]
        count = max(1, self._most_tokens // max(1, int(pool.lengths[rows].max())))
        return [rows[begin : begin + count] for begin in range(0, rows.size, count)]

    def _share(
        self,
        pool: Pool,
        indices: IndexArray,
        batches: list[IndexArray],
        run: Callable[[IndexArray], Tensor],
        consume: Consume,
    ) -> None:
        mine, useful = share_of(batches, distributed.rank(), distributed.world_size())
        bar = tqdm(mine, desc="Scoring", unit="batch", disable=not self.progress, leave=False)
        for number, batch in enumerate(bar):
            values = run(indices[batch])
            if number < useful:
                consume(batch, values)
        self.count(pool, indices)

    def count(self, pool: Samples, indices: IndexArray) -> None:
        """Add samples to what was run through the model."""
        self.cost.samples += indices.size
        self.cost.tokens += int(pool.lengths[indices].sum())

    def _collated(self, pool: Pool, indices: IndexArray) -> tuple[dict[str, Any], Tensor]:
        """Return a batch's model inputs on the device, and its shifted labels (B, T)."""
        return inputs_of(self, pool.rows(indices))

    def _look_at_samples(self, probe: GradientPass, sink: Sink, pool: Pool, indices: IndexArray) -> None:
        """Find out whether two samples have the same gradients together as each alone, when there are two."""
        if self._samples_apart is not None or not indices.size:
            return
        rows = short_samples(pool, indices)
        alone = []
        for row in rows:
            values, loss = self._gradient_batch(probe, sink, pool, row[None])
            if not torch.isnan(loss).any():
                alone.append(values)
        if len(alone) < COMPARED_SAMPLES:  # nothing to compare: the question stays open
            return
        apart = True
        try:
            both = self._gradient_batch(probe, sink, pool, rows)[0]
        except RoutedRows as error:
            logger.info("%s mixes the rows of its samples: gradients are taken one sample at a time.", error)
            apart = False
        else:
            single = torch.cat(alone)
            low = (
                _GRADIENT_AGREEMENT_LOW_PRECISION if is_low_precision(probe.model, self.device) else _GRADIENT_AGREEMENT
            )
            apart = bool((both - single).norm() <= low * single.norm() + 1e-12)
            if not apart:
                logger.info("Samples change each other's gradients in a batch: they are taken one at a time.")
        self.after_backward()
        self._samples_apart = distributed.everywhere(apart, self.device)


def _store(values: Tensor, batch: IndexArray, measured: Tensor) -> None:
    values[torch.from_numpy(batch).to(values.device)] = measured.to(values.dtype)


def _wide_dtype(model: torch.nn.Module) -> torch.dtype:
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
