"""Scoring a pool once, without training: ``dataflex-cli features`` and ``dataflex-cli score``.

The model, the adapter, the data sets and the validation samples are loaded by LLaMA-Factory's own run of the YAML, up
to where training would begin. There the selector of the ``dataflex:`` section scores the whole pool, with the optimizer
moments saved beside the adapter or the checkpoints where its preconditioner needs them.
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
    """How much of the pool is selected: a share in (0, 1], or a number of samples."""

    fraction: float = 0.05
    count: int | None = None

    def of(self, scored: int, size: int) -> int:
        """Return the number of samples, at least 1, of a pool of ``size`` samples of which ``scored`` have a score.

        Raises:
            ConfigError: if fewer have one.
        """
        if self.count is None:
            return max(1, round(exactly(self.fraction) * scored))
        if self.count > scored:
            there = f"the pool has {size}" if scored == size else f"only {scored} of the pool's {size} have a score"
            raise ConfigError(f"--count: {self.count} samples are wanted, {there}.")
        return self.count


def prepared(config: RunConfig, output: Path, feature_dir: Path | None) -> RunConfig:
    """Return a training configuration as one that only scores, writing under ``output``.

    Raises:
        ConfigError: if the configuration has no selector that scores, or spreads the model over processes.
    """
    chain = config.build_components().select
    if len(chain) > 1:
        raise ConfigError(f"{config.source}: dataflex.select is a list of methods; a pool is scored by one, name it.")
    selector = chain[0].component if chain else None
    if selector is None:
        raise ConfigError(f"{config.source}: dataflex.select must name a method that scores samples, e.g. perplexity.")
    if not selector.scores_samples or type(selector).score is Selector.score:
        raise ConfigError(
            f"{config.source}: dataflex.select: {selector.name} has no score of a sample by itself; it chooses in a "
            "training run only. Choose a method that scores, e.g. perplexity."
        )
    params = dict(config.params)
    if isinstance(selector, InfluenceSelector):
        cls, given = params["select"]
        kept = str(feature_dir or selector.params.feature_dir or output / "features")
        params["select"] = (cls, given.model_copy(update={"feature_dir": kept}))
    return alone(replace(config, params=params), output, "scoring")


def alone(config: RunConfig, output: Path, doing: str) -> RunConfig:
    """Return a training configuration as one that loads everything and does not train, writing under ``output``.

    Args:
        config: the configuration.
        output: folder.
        doing: what is done instead, for messages.

    Raises:
        ConfigError: if it spreads the model over processes.
    """
    for key in _SHARDED:
        if config.llamafactory.get(key):
            raise ConfigError(f"{key}: {doing} without training holds the whole model on every process; leave it out.")
    changes = {"do_train": True, "output_dir": str(output), "overwrite_output_dir": True, "report_to": "none"}
    return replace(config, llamafactory={**config.llamafactory, **changes}, offline=True)


def run(config: RunConfig, command: str, output: Path, amount: Amount) -> None:
    """Do what ``dataflex-cli features`` or ``score`` does, and print where things are.

    Raises:
        ConfigError: for ``features``, if the selector does not read those of the whole pool.
    """
    from dataflex.integrations.llamafactory.run import load_only

    selector = config.build_components().select[0].component
    reads_all = isinstance(selector, InfluenceSelector) and not isinstance(selector, ClusterLessSelector)
    if command == "features" and not reads_all:
        raise ConfigError(
            f"{config.source}: dataflex.select: features are made for less, icons, tracin, nice and the like; "
            f"{selector.name!r} does not read those of every sample. Use dataflex-cli score."
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
    """What ``dataflex-cli score`` found: samples, how many of them have no score, and what was written."""

    samples: int
    unscored: int
    selected: Selected


def _scores(run: LoadedRun, model: LoadedModel, output: Path, amount: Amount) -> list[str]:
    found = score_pool(run, model, output, amount)
    first = f"scores of {found.samples} samples ({found.unscored} without one): {output / TABLE}"
    return [first, *found.selected.lines()]


def make_features(run: LoadedRun, model: LoadedModel) -> list[Path]:
    """Make the pool's features under every checkpoint (or the model as it is), and return their folders."""
    selector = run.inputs.components.select[0].component
    assert isinstance(selector, InfluenceSelector)
    ctx = _context(run, model, selector)
    return [store.folder for store in selector.extract(ctx, np.arange(ctx.pool.size))]


def score_pool(run: LoadedRun, model: LoadedModel, output: Path, amount: Amount) -> Scored:
    """Score the pool, write the table and the selected data set under ``output``, and return what was found.

    Raises:
        ConfigError: if more samples are wanted than have a score.
        DataFlexError: if none has one.
    """
    selector = run.inputs.components.select[0].component
    size = model.probe.pool.size
    amount.of(size, size)  # too many shows before the dear part
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
            f"selector {selector.name!r} has no score for any of the pool's {size} samples: no token of theirs is "
            "trained on. Check the template, cutoff_len and mask_history."
        )
    count = amount.of(scored, size)
    ranks = np.concatenate([ranks_of_all(scores[group], ctx.rng) for group in groups])
    counts = counts_chosen([scores[group] for group in groups], count)
    is_chosen = ranks <= np.repeat(counts, [group.size for group in groups])
    return distributed.on_main(partial(_write, run.inputs.config, pool, output, scores, ranks, is_chosen))


def ranks_of_all(scores: ScoreArray, rng: np.random.Generator) -> IndexArray:
    """Return the rank of each score, 1 the best, ties in random order; those without one (NaN) come last."""
    ranks = np.empty(scores.size, dtype=np.int64)
    ranks[best_first(scores, rng)] = np.arange(1, scores.size + 1)
    return ranks


def counts_chosen(scores: list[ScoreArray], count: int) -> IndexArray:
    """Return how many samples each group gives, in proportion to its size; none more than have a score."""
    sizes = np.array([group.size for group in scores], dtype=np.float64)
    room = np.array([np.count_nonzero(~np.isnan(group)) for group in scores], dtype=np.int64)
    return apportion(np.zeros(sizes.size), sizes, count, np.empty(0, dtype=np.int64), room).counts


def best_first(scores: ScoreArray, rng: np.random.Generator) -> IndexArray:
    """Return all positions by falling score, ties in random order, and last those without one (NaN)."""
    return np.lexsort((rng.random(scores.size), -scores))


def _context(run: LoadedRun, model: LoadedModel, selector: Selector) -> RoundContext:
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
