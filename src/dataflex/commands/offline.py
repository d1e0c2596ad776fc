"""Scoring a pool once, without training: ``dataflex-cli features`` and ``dataflex-cli score``.

LLaMA-Factory's own run of the YAML file loads the model, the adapter, the data sets and the validation samples. Before
the training would begin, the selector of the ``dataflex:`` section scores the whole pool. If its preconditioner needs
optimizer moments, they are read from the files beside the adapter or in the checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.api.context import RoundContext
from dataflex.api.selector import Selector, check_scores, compares_in_domains
from dataflex.config.loading import RunConfig
from dataflex.data.apportion import apportion
from dataflex.data.pool import Pool
from dataflex.data.rng import derive_rng
from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray, exactly
from dataflex.errors import ConfigError, DataFlexError
from dataflex.record.selected import Selected, row_column, write_selected
from dataflex.selectors.base_gradients import InfluenceSelector
from dataflex.selectors.cluster_less import ClusterLessSelector

if TYPE_CHECKING:
    from dataflex.trainer.run import LoadedModel, LoadedRun

TABLE = "scores.parquet"
SELECTED = "selected"
_SHARDED = ("deepspeed", "fsdp", "use_unsloth")


@dataclass(frozen=True)
class Amount:
    """Amount of samples to select.

    Attributes:
        fraction: share of the samples that have a score, in (0, 1]. It counts if ``count`` is None.
        count: number of samples.
    """

    fraction: float = 0.05
    count: int | None = None

    def of(self, scored: int, size: int) -> int:
        """Return the number of samples to select, at least 1.

        Args:
            scored: number of samples that have a score.
            size: number of samples in the pool.

        Raises:
            ConfigError: if ``count`` is larger than ``scored``.
        """
        if self.count is None:
            return max(1, round(exactly(self.fraction) * scored))
        if self.count > scored:
            there = f"the pool has {size}" if scored == size else f"only {scored} of the pool's {size} have a score"
            raise ConfigError(f"--count: {self.count} samples are wanted, but {there}.")
        return self.count


def prepared(config: RunConfig, output: Path, feature_dir: Path | None) -> RunConfig:
    """Return the configuration for scoring only, made from the configuration of a training.

    Args:
        config: the configuration of the training.
        output: folder of the results.
        feature_dir: folder of the stored features. None means the selector's ``feature_dir``, or ``features`` in
            ``output``.

    Raises:
        ConfigError: if the configuration has no selector that scores, or shards the model over processes.
    """
    chain = config.build_components().select
    if len(chain) > 1:
        raise ConfigError(f"{config.source}: dataflex.select is a list of methods. Name one method to score with.")
    selector = chain[0].component if chain else None
    if selector is None:
        raise ConfigError(f"{config.source}: dataflex.select must name a method that scores samples, e.g. perplexity.")
    if not selector.scores_samples or type(selector).score is Selector.score:
        raise ConfigError(
            f"{config.source}: dataflex.select: {selector.name} gives single samples no score. It chooses only in a "
            "training run. Choose a method that scores, e.g. perplexity."
        )
    params = dict(config.params)
    if isinstance(selector, InfluenceSelector):
        cls, given = params["select"]
        kept = str(feature_dir or selector.params.feature_dir or output / "features")
        params["select"] = (cls, given.model_copy(update={"feature_dir": kept}))
    return alone(replace(config, params=params), output, "scoring")


def alone(config: RunConfig, output: Path, doing: str) -> RunConfig:
    """Return a configuration that loads everything and does not train, made from the configuration of a training.

    Args:
        config: the configuration of the training.
        output: folder that replaces the ``output_dir``.
        doing: the work that replaces the training, as a word for messages, for example ``scoring``.

    Raises:
        ConfigError: if the configuration shards the model over processes.
    """
    for key in _SHARDED:
        if config.llamafactory.get(key):
            raise ConfigError(f"{key}: {doing} without training loads the whole model in every process. Remove {key}.")
    changes = {"do_train": True, "output_dir": str(output), "overwrite_output_dir": True, "report_to": "none"}
    return replace(config, llamafactory={**config.llamafactory, **changes}, offline=True)


def run(config: RunConfig, command: str, output: Path, amount: Amount) -> None:
    """Compute the features or the scores of a pool, and print the paths of the results.

    Args:
        config: the configuration that :func:`prepared` returned.
        command: ``features`` or ``score``.
        output: folder of the results.
        amount: number of samples to select.

    Raises:
        ConfigError: if the command is ``features`` and the selector does not read the features of the whole pool.
    """
    from dataflex.integrations.llamafactory.run import load_only

    selector = config.build_components().select[0].component
    reads_all = isinstance(selector, InfluenceSelector) and not isinstance(selector, ClusterLessSelector)
    if command == "features" and not reads_all:
        raise ConfigError(
            f"{config.source}: dataflex.select: {selector.name!r} does not read gradient features of every sample. "
            "Use dataflex-cli score, or a selector that reads them (less, icons, tracin, nice)."
        )

    def when_loaded(run: LoadedRun, model: LoadedModel) -> None:
        lines = _features(run, model) if command == "features" else _scores(run, model, output, amount)
        if distributed.rank() == 0:
            print("\n".join(f"dataflex: {line}" for line in lines))

    load_only(config, when_loaded)


def _features(run: LoadedRun, model: LoadedModel) -> list[str]:
    return [f"features of {model.probe.pool.size} samples: {folder}" for folder in make_features(run, model)]


@dataclass(frozen=True)
class Scored:
    """The result of ``dataflex-cli score``.

    Attributes:
        samples: number of samples in the pool.
        unscored: number of samples without a score.
        selected: the data set that was written.
    """

    samples: int
    unscored: int
    selected: Selected


def _scores(run: LoadedRun, model: LoadedModel, output: Path, amount: Amount) -> list[str]:
    found = score_pool(run, model, output, amount)
    first = f"scores of {found.samples} samples ({found.unscored} without one): {output / TABLE}"
    return [first, *found.selected.lines()]


def make_features(run: LoadedRun, model: LoadedModel) -> list[Path]:
    """Compute the features of the pool for each checkpoint, or for the loaded model, and return their folders."""
    selector = run.inputs.components.select[0].component
    assert isinstance(selector, InfluenceSelector)
    ctx = _context(run, model, selector)
    return [store.folder for store in selector.extract(ctx, np.arange(ctx.pool.size))]


def score_pool(run: LoadedRun, model: LoadedModel, output: Path, amount: Amount) -> Scored:
    """Score the pool, and write the table of scores and the selected data set.

    Args:
        run: the loaded run.
        model: the loaded model.
        output: folder of the results.
        amount: number of samples to select.

    Returns:
        The counts and the data set that was written.

    Raises:
        ConfigError: if more samples are requested than have a score.
        DataFlexError: if no sample has a score.
    """
    selector = run.inputs.components.select[0].component
    size = model.probe.pool.size
    amount.of(size, size)  # so that a count that is too large fails before the expensive part
    ctx = _context(run, model, selector)
    pool = ctx.pool
    ends = pool.offsets if compares_in_domains(selector) else np.array([0, size])
    groups = [np.arange(begin, end) for begin, end in pairwise(ends.tolist())]
    selector.begin(ctx)
    scores = np.concatenate([check_scores(selector, selector.score(ctx, group), group) for group in groups])
    if distributed.rank() == 0:
        print(*(f"dataflex: {note}" for note in ctx.notes), sep="\n", end="\n" if ctx.notes else "")
    scored = int(np.count_nonzero(~np.isnan(scores)))
    if not scored:
        raise DataFlexError(
            f"selector {selector.name!r} has no score for any of the pool's {size} samples, because none of their "
            "tokens is trained on. Check the template, cutoff_len and mask_history."
        )
    count = amount.of(scored, size)
    ranks = np.concatenate([ranks_of_all(scores[group], ctx.rng) for group in groups])
    counts = counts_chosen([scores[group] for group in groups], count)
    is_chosen = ranks <= np.repeat(counts, [group.size for group in groups])
    return distributed.on_main(partial(_write, run.inputs.config, pool, output, scores, ranks, is_chosen))


def ranks_of_all(scores: ScoreArray, rng: np.random.Generator) -> IndexArray:
    """Return the rank of each score. Rank 1 is the highest score, ties are in random order, and NaN comes last."""
    ranks = np.empty(scores.size, dtype=np.int64)
    ranks[best_first(scores, rng)] = np.arange(1, scores.size + 1)
    return ranks


def counts_chosen(scores: list[ScoreArray], count: int) -> IndexArray:
    """Return the number of samples to select from each group, shape (groups,).

    The numbers are in proportion to the sizes of the groups, and no group gives more samples than have a score.

    Args:
        scores: the scores of each group, NaN for samples without a score.
        count: number of samples to select from all groups together.
    """
    sizes = np.array([group.size for group in scores], dtype=np.float64)
    room = np.array([np.count_nonzero(~np.isnan(group)) for group in scores], dtype=np.int64)
    return apportion(np.zeros(sizes.size), sizes, count, np.empty(0, dtype=np.int64), room).counts


def best_first(scores: ScoreArray, rng: np.random.Generator) -> IndexArray:
    """Return all indices by falling score. Ties are in random order, and samples without a score (NaN) come last."""
    return np.lexsort((rng.random(scores.size), -scores))


def _context(run: LoadedRun, model: LoadedModel, selector: Selector) -> RoundContext:
    """Return the context of a single decision over the whole pool."""
    pool = model.probe.pool
    return RoundContext(
        pool=pool,
        probe=model.probe,
        rng=derive_rng(run.inputs.settings.seed, selector.family, selector.name, "offline"),
        round=0,
        update=0,
        num_updates=1,
        start_step=0,
        steps=1,
        size=pool.size,
        total_steps=1,
        candidates=np.arange(pool.size),
        validation_pool=run.data.validation.get("select"),
        reference_losses=model.references.get("select"),
        embedding_source=model.embeddings.of_all("select"),
    )


def _write(
    config: RunConfig, pool: Pool, output: Path, scores: ScoreArray, ranks: IndexArray, is_chosen: NDArray[np.bool_]
) -> Scored:
    """Write the table of scores and the selected samples, and return their numbers."""
    output.mkdir(parents=True, exist_ok=True)
    everyone = np.arange(pool.size)
    ids, chosen = pool.domain_ids(everyone), np.flatnonzero(is_chosen)
    columns = {
        "index": pa.array(everyone),
        "dataset": pa.DictionaryArray.from_arrays(ids.astype(np.int32), list(pool.domains)),
        "row": row_column(pool, everyone),
        "score": pa.array(scores, from_pandas=True),
        "rank": pa.array(ranks),
        "selected": pa.array(is_chosen),
        "tokens": pa.array(pool.lengths),
    }
    temporary = output / f".{TABLE}"
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(output / TABLE)
    written = write_selected(pool, chosen, output / SELECTED, config.llamafactory)
    return Scored(pool.size, int(np.isnan(scores).sum()), written)
