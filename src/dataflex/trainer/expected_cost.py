"""Estimate of the cost of a run's selection, printed when training begins."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.api.components import Entry
from dataflex.api.measurement import Measurement
from dataflex.api.schedule import RunOutline
from dataflex.api.selector import Selector, overhead_limit
from dataflex.data.pool import Pool
from dataflex.data.sampling import IndexArray
from dataflex.embedding.of_model import measurements_of
from dataflex.planning.run_plan import outline_of
from dataflex.probe.gradient_features import GradientFeatures
from dataflex.probe.gradient_norms import GradientNorms
from dataflex.trainer import console
from dataflex.trainer.run import LoadedRun

if TYPE_CHECKING:
    from dataflex.probe.model import ModelProbe

_CALIBRATION_SAMPLES = 8


def expected_cost(run: LoadedRun, pool: Pool, probe: ModelProbe) -> str | None:
    """Return a text on the expected cost of the selection, after measuring a few samples; None if no selector measures.

    None is also returned if ``max_overhead`` limits the selection, because the cost is then the limit. The training is
    estimated as three forward passes over its samples, the usual cost of a forward and a backward pass.
    """
    chain = run.inputs.components.select
    if not chain or overhead_limit(chain[-1].component) is not None:
        return None
    found = [_cost_of(entry, run, pool, probe) for entry in chain]
    return " ".join(text for text in found if text is not None) or None


def _cost_of(entry: Entry[Selector], run: LoadedRun, pool: Pool, probe: ModelProbe) -> str | None:
    """Return a text on the expected cost of one selector; None if it measures nothing."""
    steps = run.steps
    selector, measurements = entry.component, measurements_of(run.inputs.needs[entry.key])
    if not measurements:
        return None
    by_length = np.argsort(pool.lengths, kind="stable")
    # Evenly spaced in the order of length, so that a few samples stand for the pool's lengths.
    some = by_length[np.linspace(0, pool.size - 1, min(pool.size, _CALIBRATION_SAMPLES)).astype(np.int64)]
    with run.clock.deciding():
        seconds = [_seconds_of(each, probe, some) for each in measurements]
    others = run.data.validation[entry.key].size if entry.key in run.data.validation else 0
    expected = replace(steps.schedule, total_steps=steps.expected)
    everything = RunOutline(expected, steps.global_batch_size, pool.size, len(pool.domains), validation=others)
    outline = outline_of(entry, run.inputs.components, everything)
    counts = [selector.measured_samples(each, outline) for each in measurements]
    total = sum(sample * count for sample, count in zip(seconds, counts, strict=True))
    forward = seconds[0] / measurements[0].forwards
    training = 3 * forward * steps.expected * steps.global_batch_size
    assert outline.pool_size is not None
    scored, passes = selector.scored_samples(outline.pool_size), selector.expected_passes(outline.decisions)
    often = "once" if passes == 1 else f"{passes} times"
    samples = f"{scored} samples" + (f" and {others} validation samples" if others else "")
    return (
        f"{entry.key} {selector.name}: scoring {samples}, {often} in this run, is expected to take "
        f"{console.duration(total)}, {total / training:.2g} times the training itself (after {some.size} samples)."
    )


def _seconds_of(measurement: Measurement[Any], probe: ModelProbe, samples: IndexArray) -> float:
    """Return the mean seconds of one measurement per sample, measured on a few samples."""
    measure = partial(probe.measure, measurement)
    # Before the first step the optimizer has no moments, so gradients are timed without a preconditioner.
    if isinstance(measurement, GradientFeatures | GradientNorms):
        plain = GradientNorms(replace(measurement.settings, preconditioner="none"))
        measure = partial(probe.measure, plain)
    # A first run, not timed, pays the one-time costs. It takes two samples: a single one does not trigger all of them.
    measure(samples[:2])
    began = time.perf_counter()
    measure(samples)
    return (time.perf_counter() - began) / samples.size
