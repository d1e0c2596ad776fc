"""Stand-ins for the objects that a component receives, so that each part is tested alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataflex import Measurement
from dataflex.api.component import Component
from dataflex.api.components import Components, only
from dataflex.api.context import RoundContext
from dataflex.api.probe import GradientSettings
from dataflex.api.schedule import Schedule
from dataflex.api.selection import Group, Selection
from dataflex.api.selector import Selector
from dataflex.data.pool import Pool
from dataflex.data.rng import derive_rng
from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray, PassSampler
from dataflex.planning.planner import Plan, Planner
from dataflex.probe.gradient_products import GradientProducts
from dataflex.record.checkpoint import STATE_VERSION, mark_complete, write_state
from dataflex.record.writer import RunWriter


class FakeDataset:
    """Rows in a list, read as a ``datasets.Dataset`` is."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self.rows[index] for index in indices]


def make_pool(sizes: dict[str, int], lengths: Sequence[int] | None = None, rows: Sequence[Any] = ()) -> Pool:
    """Return a pool of the given domain sizes; every sample has length 7 if no lengths are given."""
    pool = Pool(FakeDataset(rows), tuple(sizes), np.array(list(sizes.values())))  # type: ignore[arg-type]
    values = np.full(pool.size, 7) if lengths is None else np.asarray(lengths)
    assert values.shape == (pool.size,)
    pool.__dict__["lengths"] = values.astype(np.int32)  # in place of the cached property
    pool.__dict__["trained"] = np.ones(pool.size, dtype=bool)
    pool.__dict__["trained_tokens"] = np.maximum(pool.lengths - 1, 0)
    return pool


class MeasuringProbe:
    """Answers a measurement by the method of its name, with (measurement, indices, samples)."""

    def measure(self, measurement: Measurement[Any], indices: IndexArray, samples: Any = None) -> Any:
        return getattr(self, measurement.name)(measurement, indices, samples)


class FakeProbe(MeasuringProbe):
    """Returns given values, and records the indices and settings of the measurements.

    Args:
        losses: Loss of every sample, which is also its error norm and the length of its gradient.
        features: Feature of every sample, (N, k). NaN for a sample without a trained token.
        targets: Features of the validation samples.
    """

    def __init__(
        self,
        losses: Sequence[float] | NDArray[Any] = (),
        features: NDArray[Any] | None = None,
        targets: NDArray[Any] | None = None,
    ) -> None:
        self.values = np.asarray(losses, dtype=np.float32)
        self.features, self.targets = features, targets
        self.asked: list[IndexArray] = []
        self.settings: list[GradientSettings] = []

    def losses(self, measurement: Any, indices: IndexArray, samples: None) -> NDArray[np.float32]:
        self.asked.append(np.asarray(indices))
        return self.values[indices]

    error_norms = losses

    def gradient_norms(self, measurement: Any, indices: IndexArray, samples: None) -> NDArray[np.float32]:
        self.settings.append(measurement.settings)
        return self.losses(measurement, indices, samples)

    def gradient_features(self, measurement: Any, indices: IndexArray, samples: Pool) -> NDArray[np.float32]:
        assert self.targets is not None
        assert samples.size == len(self.targets)
        self.settings.append(measurement.settings)
        return np.asarray(self.targets[indices], dtype=np.float32)

    def gradient_similarities(self, measurement: Any, indices: IndexArray, samples: None) -> NDArray[np.float32]:
        assert self.features is not None
        self.settings.append(measurement.settings)
        self.asked.append(np.asarray(indices))
        return np.asarray(self.features[indices] @ measurement.others.T, dtype=np.float32)


def products_of(probe: Any, groups: list[IndexArray], settings: GradientSettings, others: IndexArray) -> Any:
    """Return the inner products of gradients in groups of the pool, and with other samples of it."""
    sizes = tuple(group.size for group in groups)
    return probe.measure(GradientProducts(settings, sizes, probe.pool, others), np.concatenate(groups))


def context(pool: Pool, losses: Sequence[float] | NDArray[Any] = (), **changes: Any) -> RoundContext:
    """Return a context of the only decision of a run. ``round`` also keys its random numbers."""
    number = int(changes.get("round", 0))
    given = RoundContext(
        pool=pool,
        probe=FakeProbe(losses),
        rng=derive_rng(int(changes.pop("seed", 1)), "test", number),
        round=number,
        update=0,
        num_updates=1,
        start_step=0,
        steps=1,
        size=1,
        total_steps=1,
        candidates=changes.pop("candidates") if "candidates" in changes else np.arange(pool.size),
    )
    return dataclasses.replace(given, **changes)


def embedded(size: int = 60, queries: int = 5, seed: int = 0, width: int = 6, **changes: Any) -> RoundContext:
    """Return a context of random embeddings of length 1."""
    rng = np.random.default_rng(seed)
    pool, held = make_pool({"a": size // 3, "b": size - size // 3}), make_pool({"x": 2, "y": queries - 2})
    vectors = [rng.standard_normal((each.size, width)).astype(np.float32) for each in (pool, held)]
    for each in vectors:
        each /= np.linalg.norm(each, axis=1, keepdims=True)
    source = lambda samples: vectors[0] if samples is None else vectors[1]  # noqa: E731
    return context(pool, validation_pool=held, embedding_source=source, **changes)


def decided(selector: Selector, ctx: RoundContext, group: Group) -> Selection:
    """Return the selection of a selector in a decision about one group alone."""
    ctx = dataclasses.replace(ctx, candidates=group.candidates)
    selector.begin(ctx)
    chosen = selector.select(ctx, group)
    return dataclasses.replace(chosen, undecided="; ".join(ctx.undecided)) if ctx.undecided else chosen


def scores_of(selector: Selector, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
    """Return a selector's scores in a decision about some candidates."""
    selector.begin(dataclasses.replace(ctx, candidates=candidates))
    return selector.score(ctx, candidates)


def group_of(pool: Pool, budget: int, start: int = 0, stop: int | None = None) -> Group:
    """Return a group over a range of the pool (all of it by default)."""
    stop = pool.size if stop is None else stop
    return Group("pool", start, stop, budget, PassSampler(stop - start, seed=1, name="pool"))


def build(cls: type[Component], /, **params: Any) -> Any:
    """Return a component with the given parameters."""
    return cls(cls.Params(**params))


def in_chains(given: dict[str, Any]) -> Components:
    """Return components by family. A single selector or weighter becomes a chain of one entry."""
    chains = {key: only(key, given[key]) for key in ("select", "weight") if isinstance(given.get(key), Component)}
    return Components(**{**given, **chains})


def make_planner(
    pool: Pool, steps: int = 2, batch: int = 4, rounds: int = 10, warmup: int = 0, seed: int = 42, **given: Any
) -> Planner:
    """Return a planner of ``rounds`` rounds of ``steps`` steps; ``given`` has components and the arrangement."""
    arrangement = given.pop("arrangement", "shuffle")
    schedule = Schedule(warmup, steps, -1, warmup + steps * rounds)
    return Planner(pool, in_chains(given), schedule, seed=seed, global_batch_size=batch, arrangement=arrangement)


def raw_plans(run: Path) -> list[pa.Table]:
    """Return the plan of each recorded round, read with pyarrow alone."""
    files = sorted((run / "dataflex" / "plans").glob("*.arrows"))
    table = pa.concat_tables([pa.ipc.open_stream(file.read_bytes()).read_all() for file in files])
    numbers = table.column("round").to_numpy()
    return [table.filter(pa.array(numbers == number)) for number in np.unique(numbers)]


def as_version_1(run: Path) -> Path:
    """Rewrite a record in the format of version 1: lines with all names, and a Parquet file for each plan."""
    folder = run / "dataflex"
    header = json.loads((folder / "record.json").read_text())
    (methods,) = header["methods"]
    lines = []
    for text in (folder / "rounds.jsonl").read_text().splitlines():
        line = json.loads(text)
        del line["plan"]
        for key in ("domains", "proportions", "epochs", "candidates"):
            if isinstance(line.get(key), list):
                line[key] = {k: v for k, v in zip(header["domains"], line[key], strict=True) if v is not None}
        line["pool"] = header["domains"]
        acting = {} if line.get("warmup") else methods["methods"]
        line["components"] = {key: name for key, name in acting.items() if key not in line.get("undecided", {})}
        if "clipped_shares" in line:
            line["capped"] = line.pop("clipped_shares")
        lines.append(json.dumps(line) + "\n")
    for table in raw_plans(run):
        number, empty = table.column("round")[0].as_py(), [n for n in table.column_names if table.column(n).null_count]
        absent = [name for name in empty if table.column(name).null_count == table.num_rows]
        pq.write_table(table.drop_columns(["round", *absent]), folder / "plans" / f"round-{number:05d}.parquet")
    for file in (folder / "record.json", *(folder / "plans").glob("*.arrows")):
        file.unlink()
    (folder / "rounds.jsonl").write_text("".join(lines))
    return run


def begin_record(
    output: Path, pool: Pool, methods: dict[str, str] | None = None, configuration: dict[str, Any] | None = None
) -> RunWriter:
    """Return the writer of a new run's record, which rounds of ``pool`` can be written to."""
    writer = RunWriter(output)
    domains = dict(zip(pool.domains, pool.domain_sizes.tolist(), strict=True))
    writer.begin(configuration or {"dataflex": {}}, None, domains=domains, methods=methods)
    return writer


def plans(planner: Planner, count: int, probe: Any = None, first: int = 0) -> list[Plan]:
    """Return the plans of ``count`` rounds from number ``first`` on."""
    made: list[Plan] = []
    step = 0
    for number in range(first + count):
        slot = planner.schedule.slot_at(step)
        step = slot.start_step + slot.steps
        if number >= first:
            made.append(planner.plan(slot, probe or FakeProbe()))
    return made


class ScoreSelector(Selector):
    """Selector whose scores are a given function of the candidates."""

    family, name = "selector", "scores"

    def __init__(self, score: Callable[[IndexArray], Any], **params: Any) -> None:
        super().__init__(self.Params(**params))
        self.function = score

    def score(self, ctx: RoundContext, candidates: IndexArray) -> Any:
        return self.function(candidates)


RUN = "0a" * 16
"""Identity of a run."""
CHECKPOINT_PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def make_checkpoint(
    folder: Path,
    complete: bool = True,
    run: str = RUN,
    parts: tuple[str, ...] = CHECKPOINT_PARTS,
    config: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    **marker: Any,
) -> Path:
    """Write a folder with the files of a checkpoint, and return the folder."""
    for name in (*parts, "empty"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name == "empty" else b"x" * 100)
    write_state(folder, {"version": STATE_VERSION, **(state or {})})
    if complete:
        step = int(folder.name.removeprefix("checkpoint-"))
        mark_complete(folder, run, step, {"stage": "sft"} if config is None else config, **marker)
    return folder
