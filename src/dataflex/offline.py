"""Scoring a pool once, without training: ``dataflex-cli features`` and ``dataflex-cli score``.

The model, the adapter, the data sets and the validation samples are loaded by LLaMA-Factory's own run of the YAML, up
to where training would begin. There the selector of the ``dataflex:`` section scores the whole pool, with the optimizer
moments saved beside the adapter or the checkpoints where its preconditioner needs them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex import distributed
from dataflex.components import RoundContext, Selector, check_scores
from dataflex.config import RunConfig
from dataflex.data.sampling import IndexArray
from dataflex.errors import ConfigError, DataFlexError
from dataflex.files import json_text, write_atomically
from dataflex.influence import InfluenceSelector
from dataflex.rng import derive_rng
from dataflex.selection import ScoreArray
from dataflex.selectors.cluster_less import ClusterLessSelector

if TYPE_CHECKING:
    from dataflex.trainer.run import DynamicRun

TABLE = "scores.parquet"
SELECTED = "selected"
_SHARDED = ("deepspeed", "fsdp", "use_unsloth")
_SOURCE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")
_SHAPE_KEYS = ("subset", "split", "folder", "num_samples")


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
            return max(1, round(self.fraction * scored))
        if self.count > scored:
            there = f"the pool has {size}" if scored == size else f"only {scored} of the pool's {size} have a score"
            raise ConfigError(f"--count: {self.count} samples are wanted, {there}.")
        return self.count


def prepared(config: RunConfig, output: Path, feature_dir: Path | None) -> RunConfig:
    """Return a training configuration as one that only scores, writing under ``output``.

    Raises:
        ConfigError: if the configuration has no selector that scores, or spreads the model over processes.
    """
    selector = config.build_components().select
    if selector is None or not selector.scores_samples or type(selector).score is Selector.score:
        raise ConfigError(
            f"{config.source}: dataflex.select must name a selector that scores samples, e.g. {{method: less}}."
        )
    for key in _SHARDED:
        if config.llamafactory.get(key):
            raise ConfigError(f"{key}: scoring without training holds the whole model on every process; leave it out.")
    params = dict(config.params)
    if isinstance(selector, InfluenceSelector):
        cls, given = params["select"]
        kept = str(feature_dir or selector.params.feature_dir or output / "features")
        params["select"] = (cls, given.model_copy(update={"feature_dir": kept}))
    changes = {"do_train": True, "output_dir": str(output), "overwrite_output_dir": True, "report_to": "none"}
    return replace(config, llamafactory={**config.llamafactory, **changes}, params=params, offline=True)


def run(config: RunConfig, command: str, output: Path, amount: Amount) -> None:
    """Do what ``dataflex-cli features`` or ``score`` does, and print where things are.

    Raises:
        ConfigError: for ``features``, if the selector does not read those of the whole pool.
    """
    from dataflex import bridge

    selector = config.build_components().select
    reads_all = isinstance(selector, InfluenceSelector) and not isinstance(selector, ClusterLessSelector)
    if command == "features" and selector is not None and not reads_all:
        raise ConfigError(
            f"{config.source}: dataflex.select: features are made for less, icons, tracin, nice and the like; "
            f"{selector.name!r} does not read those of every sample. Use dataflex-cli score."
        )

    def look(dynamic: DynamicRun) -> None:
        lines = _features(dynamic) if command == "features" else _scores(dynamic, output, amount)
        if distributed.rank() == 0:
            print("\n".join(f"dataflex: {line}" for line in lines))

    bridge.look(config, look)


def _features(dynamic: DynamicRun) -> list[str]:
    return [f"features of {dynamic.pool.size} samples: {folder}" for folder in make_features(dynamic)]  # type: ignore


def _scores(dynamic: DynamicRun, output: Path, amount: Amount) -> list[str]:
    found = score_pool(dynamic, output, amount)
    lines = [f"scores of {found['samples']} samples ({found['unscored']} without one): {output / TABLE}"]
    for name, count in found["selected"].items():
        lines.append(f"selected {count} of {found['pool'][name]} samples of {name}")
    if "tokenized_path" in found:
        names = ", ".join(found["not_row_by_row"])
        lines.append(f"the rows of {names} cannot be told apart after preprocessing, so what is kept is tokenized")
        return [*lines, f"to train on them: tokenized_path: {found['tokenized_path']}"]
    return [*lines, f"to train on them: dataset_dir: {found['dataset_dir']}, dataset: {found['dataset']}"]


def make_features(run: DynamicRun) -> list[Path]:
    """Make the pool's features under every checkpoint (or the model as it is), and return their folders."""
    selector = run.components.select
    assert isinstance(selector, InfluenceSelector)
    ctx = _context(run, selector)
    return [store.folder for store in selector.extract(ctx, np.arange(ctx.pool.size))]


def score_pool(run: DynamicRun, output: Path, amount: Amount) -> dict[str, Any]:
    """Score the pool, write the table and the selected data set under ``output``, and return what was found.

    Raises:
        ConfigError: if more samples are wanted than have a score.
        DataFlexError: if none has one.
    """
    selector = run.components.select
    assert selector is not None
    assert run.pool is not None
    size = run.pool.size
    amount.of(size, size)  # too many shows before the dear part
    ctx = _context(run, selector)
    everyone = np.arange(size)
    scores = check_scores(selector, selector.score(ctx, everyone), everyone, selector.leaves_out_unscored)
    scored = int(np.count_nonzero(~np.isnan(scores)))
    if not scored:
        raise DataFlexError(
            f"selector {selector.name!r} has no score for any of the pool's {size} samples: no token of theirs is "
            "trained on. Check the template, cutoff_len and mask_history."
        )
    count = amount.of(scored, size)
    best = best_first(scores, ctx.rng)
    return distributed.on_main(partial(_write, run, output, scores, best, count))


def best_first(scores: ScoreArray, rng: np.random.Generator) -> IndexArray:
    """Return all positions by falling score, ties in random order, and last those without one (NaN)."""
    return np.lexsort((rng.random(scores.size), -scores))


def _context(run: DynamicRun, selector: Selector) -> RoundContext:
    assert run.pool is not None
    assert run.probe is not None
    return RoundContext(
        pool=run.pool,
        probe=run.probe,
        rng=derive_rng(run.settings.seed, selector.family, selector.name, "offline"),
        round=0,
        update=0,
        num_updates=1,
        start_step=0,
        steps=1,
        size=run.pool.size,
        total_steps=1,
        targets=run.targets.get("select"),
    )


def _write(run: DynamicRun, output: Path, scores: ScoreArray, best: IndexArray, count: int) -> dict[str, Any]:
    pool = run.pool
    assert pool is not None
    output.mkdir(parents=True, exist_ok=True)
    everyone = np.arange(pool.size)
    ids, chosen = pool.domain_ids(everyone), np.sort(best[:count])
    ranks = np.empty(pool.size, dtype=np.int64)
    ranks[best] = everyone
    columns = {
        "index": pa.array(everyone),
        "dataset": pa.DictionaryArray.from_arrays(ids.astype(np.int32), list(pool.domains)),
        "row": pa.array(everyone - pool.offsets[ids]),
        "score": pa.array(scores, from_pandas=True),
        "rank": pa.array(ranks),
        "selected": pa.array(ranks < count),
        "tokens": pa.array(pool.lengths),
    }
    temporary = output / f".{TABLE}"
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(output / TABLE)
    written = _write_selected(run, output / SELECTED, chosen)
    counts = pool.domain_counts(chosen)
    return {
        "samples": pool.size,
        "unscored": int(np.isnan(scores).sum()),
        "selected": {name: int(count) for name, count in zip(pool.domains, counts, strict=True)},
        "pool": {name: int(count) for name, count in zip(pool.domains, pool.domain_sizes, strict=True)},
        **written,
    }


def _write_selected(run: DynamicRun, folder: Path, chosen: IndexArray) -> dict[str, Any]:
    """Write the selected rows for LLaMA-Factory: the raw ones where each is one sample, else the tokenized ones."""
    pool = run.pool
    assert pool is not None
    folder.mkdir(exist_ok=True)
    info_path = Path(str(run.config.llamafactory.get("dataset_dir", "data"))) / "dataset_info.json"
    sizes = {name: len(rows) for name, rows in run.raw.items()}
    names = [name for name, size in zip(pool.domains, pool.domain_sizes, strict=True) if sizes.get(name) != size]
    if names or not info_path.is_file():
        from datasets import DatasetDict

        DatasetDict({"train": pool.dataset.select(chosen)}).save_to_disk(str(folder / "tokenized"))
        return {"tokenized_path": str(folder / "tokenized"), "not_row_by_row": names}
    info = json.loads(info_path.read_text(encoding="utf-8"))
    entries, kept = {}, []
    for number, name in enumerate(pool.domains):
        low, high = pool.offsets[number], pool.offsets[number + 1]
        rows = chosen[(chosen >= low) & (chosen < high)] - low
        if not rows.size:
            continue
        lines = (json_text(row, ensure_ascii=False, default=str) + "\n" for row in run.raw[name].select(rows))
        write_atomically(folder / f"{name}.jsonl", "".join(lines).encode())
        entry = {key: value for key, value in info[name].items() if key not in (*_SOURCE_KEYS, *_SHAPE_KEYS)}
        entries[name] = {"file_name": f"{name}.jsonl", **entry}
        kept.append(name)
    write_atomically(folder / "dataset_info.json", (json_text(entries, indent=2) + "\n").encode())
    return {"dataset_dir": str(folder), "dataset": ",".join(kept)}
