"""Per-sample gradients under the batch runner: a forward and backward pass over a batch feeds a reducer.

Whether a model treats the samples of a batch independently is checked once, on two short samples; if the model reads
images, on two samples with different numbers of image tokens. If a layer mixes the rows of samples, or the gradients of
the two change when they share a batch, gradients are computed one sample at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dataflex import distributed
from dataflex.api.measurement import MeasuredBatch, MeasurementRun
from dataflex.api.probe import GradientSettings
from dataflex.data.rules import ScoreArray
from dataflex.errors import DivergenceError
from dataflex.probe.batches import Batches, length_batches
from dataflex.probe.gradients import GradientPass, RoutedRows
from dataflex.probe.media import image_token, unlike_samples
from dataflex.probe.mode import reshard
from dataflex.probe.particulars import COMPARED_SAMPLES, is_low_precision, short_samples
from dataflex.probe.preconditioners import Preconditioner, make_preconditioner
from dataflex.probe.projections import make_projection
from dataflex.probe.reducers import ProjectionReducer, Reducer

if TYPE_CHECKING:
    from dataflex.probe.model import ModelProbe
    from dataflex.probe.runner import Batch, Runner

logger = logging.getLogger(__name__)

_AGREEMENT = 1e-2
"""Largest relative difference of gradients at which two samples count as independent."""
_AGREEMENT_LOW_PRECISION = 0.2
"""The same in 16 bits."""


def runner_of(run: MeasurementRun) -> Runner:
    """Return the runner behind a run of a measurement; every run is a :class:`~dataflex.probe.runner.Runner`."""
    return cast("Runner", run)


def preconditioner_of(probe: ModelProbe, settings: GradientSettings) -> Preconditioner:
    """Return the preconditioner of the settings, with the optimizer's moments if it needs them."""
    return make_preconditioner(settings, None if settings.preconditioner == "none" else probe.optimizer_moments())


def projection_of(probe: ModelProbe, settings: GradientSettings) -> ProjectionReducer:
    """Return the reducer from gradients to features, (B, k)."""
    projection = make_projection(settings, probe.parameter_sizes(), probe.device, probe.signs)
    return ProjectionReducer(preconditioner_of(probe, settings), projection, probe.device)


def feature_size(probe: ModelProbe, settings: GradientSettings) -> int:
    """Return the length of a feature, k."""
    return sum(probe.parameter_sizes().values()) if settings.projection == "identity" else settings.dim


def each_gradient(
    run: MeasurementRun, settings: GradientSettings, reducer: Reducer, finish: Callable[[Tensor], Tensor]
) -> ScoreArray:
    """Return ``finish`` of the reduced gradient of every sample, (n, ...), on every process."""
    runner = runner_of(run)
    with reduced_gradients(runner, settings, reducer) as measure:
        return runner.each(lambda batch: finish(measure(batch)), gradient_batches(runner))


def gradient_batches(runner: Runner) -> Batches:
    """Return the batches of gradient passes, as positions in the runner's samples.

    The batches do not depend on the number of processes.
    """
    probe, lengths = runner.probe, runner.samples.lengths[runner.indices]
    if not probe.samples_apart:  # samples affect each other, or fewer than two samples were there to compare
        return length_batches(lengths, 1)
    return length_batches(lengths, probe.gradient_batch_tokens or probe.batch_tokens)


def new_pass(runner: Runner, settings: GradientSettings, reducer: Reducer) -> GradientPass:
    """Return a pass over the model whose gradients go to a reducer."""
    # The loss of a stage reads all logits, so the head is a layer like any other.
    head = runner.chunked_head if runner.probe.stage_loss is None else False
    reshard(runner.model)  # the pass knows parameters by id, and FSDP2's gathered parameters are other objects
    device = runner.probe.device
    return GradientPass(runner.model, reducer.add, settings.reduction, head, settings.unsupported, device)


@contextmanager
def reduced_gradients(
    runner: Runner, settings: GradientSettings, reducer: Reducer
) -> Iterator[Callable[[MeasuredBatch], Tensor]]:
    """Give a function from a batch to the reduced gradients of its samples, (B, ...)."""
    gradient_pass = new_pass(runner, settings, reducer)

    def reduced(batch: MeasuredBatch) -> tuple[Tensor, Tensor]:
        reducer.begin(batch.indices.size, wide_dtype(runner.model))
        losses = cast("Batch", batch).losses_of(gradient_pass)
        runner.probe.after_backward()
        return reducer.result, losses

    def measure(batch: MeasuredBatch) -> Tensor:
        """Return the reduced gradients of a batch, after a check that they are finite."""
        values, losses = reduced(batch)
        broken = ~torch.isfinite(values.flatten(1) if values.dim() > 1 else values[:, None]).all(1)
        # A sample without a trained token has the loss NaN, which is not an error.
        broken = (broken & ~torch.isnan(losses)) | torch.isinf(losses)
        if broken.any():
            first = batch.indices[broken.cpu().numpy()][0]
            loss = float(losses[broken][0])
            raise DivergenceError(f"the gradient of {runner.called(first)} is not finite (its loss is {loss:g})")
        return values

    _look_at_samples(runner, reduced)
    yield measure
    if gradient_pass.left_out:
        logger.warning("Parameters left out of the gradients: %s.", ", ".join(sorted(gradient_pass.left_out)))


def _look_at_samples(runner: Runner, reduced: Callable[[MeasuredBatch], tuple[Tensor, Tensor]]) -> None:
    """Find out whether two samples have the same gradients in one batch as alone; leave it open if that is unknown."""
    probe = runner.probe
    if probe.samples_apart is not None or not runner.indices.size:
        return
    found = distributed.on_each(partial(_keep_apart, runner, reduced))
    if None not in found:
        probe.samples_apart = all(found)  # all processes must agree, because the answer decides the batches


def _keep_apart(runner: Runner, reduced: Callable[[MeasuredBatch], tuple[Tensor, Tensor]]) -> bool | None:
    """Return whether two samples have the same gradients in one batch as alone; None if two cannot be compared."""
    probe = runner.probe
    token = image_token(runner.model)
    rows = (
        short_samples(runner.samples, runner.indices)
        if token is None
        else unlike_samples(runner.samples, runner.indices, token)
    )
    losses: list[Tensor] = []

    def values_of(batch: MeasuredBatch) -> Tensor:
        values, batch_losses = reduced(batch)
        losses.append(batch_losses)
        return values

    found = [runner.attempt(values_of, row[None]) for row in rows]
    alone = [values for values, loss in zip(found, losses, strict=True) if not torch.isnan(loss).any()]
    if len(alone) < COMPARED_SAMPLES:  # too few samples with a trained token: a later call compares
        return None
    apart = True
    try:
        both = runner.attempt(values_of, rows)
    except RoutedRows as error:
        logger.info("%s mixes the rows of its samples, so gradients are computed one sample at a time.", error)
        apart = False
    else:
        single = torch.cat(alone)
        low = is_low_precision(runner.model, probe.device)
        tolerance = _AGREEMENT_LOW_PRECISION if low else _AGREEMENT
        apart = bool((both - single).norm() <= tolerance * single.norm() + 1e-12)
        if not apart:
            logger.info("Samples of a batch change each other's gradients, so they are computed one sample at a time.")
    probe.after_backward()
    return apart


def wide_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the number type for sums of gradients: float64 for a float64 model, otherwise float32."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
