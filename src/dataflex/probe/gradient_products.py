"""Exact inner products of the gradients of whole batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dataflex.api.measurement import MeasurementRun, register_measurement
from dataflex.data.rules import ScoreArray
from dataflex.errors import ComponentError, DivergenceError
from dataflex.probe.gradient_norms import GradientMeasurement

if TYPE_CHECKING:
    from torch import Tensor

    from dataflex.data.samples import Samples
    from dataflex.data.sampling import IndexArray
    from dataflex.probe.gradients import GradientPass
    from dataflex.probe.reducers import ProductReducer
    from dataflex.probe.runner import Part, Runner


@register_measurement("gradient_products")
@dataclass(frozen=True, eq=False)
class GradientProducts(GradientMeasurement[list[ScoreArray]]):
    """Inner products of update directions within groups of samples and with validation samples, without a projection.

    The measured samples form groups, in their order. Each group is one forward and backward pass over its samples and
    the validation samples. The result is an array (b, b + m) for each group of b samples. Its columns are the b samples
    of the group, then the m validation samples. The products of a sample without a trained token are NaN.

    Attributes:
        sizes: number of samples in each group; the sum is the number of measured samples.
        validation: the validation samples; None means no validation samples.
        others: indices of the validation samples to use, (m,); None means no validation samples.

    Example:
        A selector that measures the products of all candidates as one group:

        >>> from dataflex import GradientProducts, Needs, Selector, SelectorParams
        >>> class Agreeing(Selector[SelectorParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(GradientProducts(),))
        ...     def score(self, ctx, candidates):
        ...         (products,) = ctx.probe.measure(GradientProducts(sizes=(candidates.size,)), candidates)
        ...         return products.mean(axis=1)
    """

    sizes: tuple[int, ...] = ()
    validation: Samples | None = None
    others: IndexArray | None = None

    def run(self, run: MeasurementRun) -> list[ScoreArray]:
        """Return the inner products of every group.

        Raises:
            ComponentError: if a layer of the model mixes the samples of a batch, or a batch does not fit into memory.
        """
        import torch

        from dataflex import distributed
        from dataflex.probe.batches import length_batches
        from dataflex.probe.gradient_runs import new_pass, preconditioner_of, runner_of
        from dataflex.probe.reducers import ProductReducer

        if sum(self.sizes) != run.indices.size:
            raise ComponentError(
                f"gradient products: groups of {sum(self.sizes)} samples were given for {run.indices.size} samples."
            )
        runner = runner_of(run)
        probe = runner.probe
        groups = np.split(runner.indices, np.cumsum(self.sizes)[:-1]) if self.sizes else []
        others: list[Part] = [] if self.validation is None or self.others is None else [(self.validation, self.others)]
        probe.references.make(probe, self.validation)
        columns = sum(indices.size for _, indices in others)
        results = [np.zeros((group.size, group.size + columns)) for group in groups]
        reducer = ProductReducer(preconditioner_of(probe, self.settings), probe.device)
        each_alone = length_batches(np.ones(len(groups), dtype=np.int64), 1)  # batches of one group each
        mine, useful = each_alone.share(distributed.rank(), distributed.world_size())
        gradient_pass = new_pass(runner, self.settings, reducer)
        with distributed.together(), runner.unfit_noted() as noted:
            for turn, (number,) in enumerate(mine):
                group = groups[number]
                with noted():
                    products = _products(runner, gradient_pass, reducer, [(runner.samples, group), *others])
                    if turn < useful:
                        results[number] = products[: group.size].cpu().double().numpy()
        probe.count(runner.samples, runner.indices)
        if not results:
            return []
        flat = torch.from_numpy(np.concatenate([result.ravel() for result in results])).float().to(probe.device)
        whole = distributed.all_reduce_sum(flat).cpu().numpy()
        ends = np.cumsum([result.size for result in results])
        return [part.reshape(each.shape) for part, each in zip(np.split(whole, ends[:-1]), results, strict=True)]


def _products(runner: Runner, gradient_pass: GradientPass, reducer: ProductReducer, parts: list[Part]) -> Tensor:
    """Return the inner products of all pairs of samples of one batch, (B, B); NaN for a sample without a loss."""
    import torch

    from dataflex.data.token_loss import IGNORE_INDEX
    from dataflex.probe.batches import inputs_of
    from dataflex.probe.gradient_runs import wide_dtype
    from dataflex.probe.gradients import RoutedRows

    rows = [row for samples, indices in parts for row in samples.rows(indices)]
    collated = runner.probe.collate(rows)
    empty = torch.zeros(len(rows), dtype=torch.bool, device=runner.probe.device)
    reducer.begin(len(rows), wide_dtype(runner.model))
    try:
        if runner.probe.stage_loss is None:
            inputs, labels = inputs_of(collated, runner.probe.device)
            empty = (labels == IGNORE_INDEX).all(1)
            losses = gradient_pass.run(inputs, labels)
        else:
            losses = runner.differentiated(gradient_pass, runner.on_device(collated), parts)
    except RoutedRows as error:
        raise ComponentError(
            f"inner products of whole batches cannot be computed: {error} mixes the rows of its samples."
        ) from error
    except torch.OutOfMemoryError as error:
        longest = max(int(samples.lengths[indices].max()) for samples, indices in parts if indices.size)
        raise ComponentError(
            f"the device does not have enough memory for the inner products of {len(rows)} samples of "
            f"{longest} tokens, which are one batch. Set a smaller group_size, candidate_factor or "
            "validation_size, or shorten cutoff_len."
        ) from error
    runner.probe.after_backward()
    # Zeros first, because a sample without a trained token must not fail the check; NaN below marks it.
    products = reducer.result.masked_fill(empty.unsqueeze(0) | empty.unsqueeze(1), 0.0)
    if not torch.isfinite(products).all():
        raise DivergenceError(
            f"the inner products of a batch are not finite (its largest loss is {float(losses[~empty].max()):g})"
        )
    return products.masked_fill(empty.unsqueeze(0) | empty.unsqueeze(1), torch.nan)
