"""Reader of a run folder: the decisions of each round, their cost, and the losses.

A run folder is LLaMA-Factory's ``output_dir``. DataFlex's record is the folder ``dataflex`` in it. Small files are read
at once and checked. Plans are read only when they are requested, one round and one column at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataflex.data.stages import loss_per_sample
from dataflex.errors import ConfigError
from dataflex.record.configuration import read_configuration
from dataflex.record.environment import read_environment
from dataflex.record.files import json_lines, read_object
from dataflex.record.identity import FOLDER
from dataflex.record.loss_weights import LossWeights, read_loss_weights
from dataflex.record.plans import PlanReader
from dataflex.record.schema import (
    CHANGES,
    DOMAIN_WEIGHTS,
    EVALUATIONS,
    FILTERS,
    HEADER,
    LOSS_WEIGHTS,
    PLANS,
    ROUNDS,
    SUMMARY,
    TASKS,
    TOKEN_SAMPLES,
    TOKEN_WEIGHTS,
    VERSION,
    Change,
    DomainWeights,
    Evaluation,
    Filtering,
    Header,
    Round,
    Start,
    Summary,
    Task,
    TokensOfStep,
    TokenWeights,
    from_json,
)
from dataflex.record.trainer_log import (
    Curve,
    curves,
    eval_curves,
    read_log,
    seconds_at,
    tokens_at,
    train_curve,
    train_seconds_at,
)

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")
L = TypeVar("L", Evaluation, TokenWeights, TokensOfStep)

FAMILIES = ("select", "mix", "order", "weight")
"""The kinds of decision, in the order in which a round makes them."""


@dataclass(frozen=True)
class Coverage:
    """Statistics of the samples that the plans of a run name."""

    samples: int
    """Number of rows of all plans."""
    distinct: int
    """Number of different pool indices among them."""
    overlap: Curve
    """(round, Jaccard similarity of its set of samples with the set of the round before)."""
    repeats: Curve
    """(round, share of its samples that were planned before, in an earlier round or earlier in the same round)."""
    seen: dict[str, Curve]
    """Domain -> (round, number of distinct samples of the domain in the plans up to and including this round)."""
    times: NDArray[np.int64]
    """``times[k]``: number of samples that are in the plans exactly ``k`` times, k >= 1. ``times[0]`` is 0."""

    @property
    def mean_overlap(self) -> float | None:
        """Mean over consecutive rounds; None if there is only one round."""
        return sum(value for _, value in self.overlap) / len(self.overlap) if self.overlap else None


@dataclass(frozen=True)
class RunRecord:
    """Contents of a run folder. Plans stay on disk until a method reads them."""

    path: Path
    name: str
    config: Mapping[str, Any]
    """LLaMA-Factory's keys, and the ``dataflex`` section under that key."""
    starts: list[Start]
    """Entries of ``environment.json``, first start first; empty in older records."""
    rounds: list[Round]
    changes: list[Change]
    """Lines of ``changes.jsonl``: settings that were changed at a resume."""
    summary: Summary | None
    """None while the run is unfinished."""
    steps: int
    """Number of optimizer steps done, as far as the folder shows."""
    train_loss: Curve
    eval_loss: dict[str, Curve]
    """Evaluation set (``eval`` if it has no name) -> its loss, as the Trainer logged it."""
    evaluations: list[Evaluation]
    """Evaluations, ascending by step, one per step; empty in older records and for a run without evaluation."""
    tasks: list[Task]
    """Results of downstream tasks, sorted by name."""
    domain_loss: dict[str, Curve]
    domain_tokens: dict[str, Curve]
    """Domain -> (step, number of its tokens trained on up to this step); empty in older records."""
    loss_weights: LossWeights | None
    """Weights of the domains in the loss; None if the loss is not weighted by domain."""
    domain_weights: DomainWeights | None
    """Final weights of a run whose loss is weighted by domain; None while the run is unfinished."""
    weights: dict[str, Curve]
    """``min`` and ``max`` of the sample weights, if a weighter logged them."""
    token_weights: list[TokenWeights]
    """Lines of ``token_weights.jsonl``, ascending by step; empty without a weighter, and in older records."""
    tokens_at: dict[int, int]
    """Logged step -> number of tokens trained on up to this step; empty in older records."""
    seconds_at: dict[int, float]
    """Step with a training loss -> seconds of training, decisions and evaluation up to this step.

    Empty in older records.
    """
    logged_train_seconds: Curve
    """(step, seconds of training steps up to this step), as far as logged; empty in older records."""

    @property
    def counted(self) -> str:
        """Things that weights and the losses of domains count: ``tokens``, or ``samples`` if a sample has one loss."""
        return "samples" if loss_per_sample(str(self.config.get("stage", "sft"))) else "tokens"

    @property
    def components(self) -> dict[str, str]:
        """Method of each kind of decision of the run, in the order of :data:`FAMILIES`."""
        # For a list of selectors or weighters, the section names no single method. Then the rounds name the methods.
        found: dict[str, str] = {}
        for each in self.rounds:
            found |= {family: name for family, name in each.components.items() if name}
        for family in FAMILIES:
            section = self.config["dataflex"].get(family)
            if isinstance(section, dict) and isinstance(section.get("method"), str):
                found[family] = section["method"]
            elif isinstance(section, list) and family not in found:  # a run of weighters has no rounds
                found[family] = ", ".join(str(each["method"]) for each in section)
        return {family: found[family] for family in FAMILIES if family in found}

    @property
    def rounds_missing(self) -> list[int]:
        """Numbers of the rounds before the last recorded round that are not on record.

        They belong to another run, from whose checkpoint this run resumed.
        """
        there = {each.round for each in self.rounds}
        return [number for number in range(max(there, default=0)) if number not in there]

    @property
    def acting(self) -> str:
        """The methods as text.

        A method that did not act in all rounds after warm-up is followed by the number of rounds in which it acted.
        """
        decided = [each for each in self.rounds if not each.warmup]
        texts = []
        for family, name in self.components.items():
            idle = sum(family in each.undecided for each in decided)
            note = f" (acted in {len(decided) - idle} of {len(decided)} rounds)" if idle else ""
            texts.append(f"{family}={name}{note}")
        return " ".join(texts)

    @property
    def decision_seconds(self) -> float:
        """Seconds spent on decisions: the summary's value, or the sum over the rounds so far."""
        if self.summary:
            return self.summary.decision_seconds
        return sum(each.cost.seconds for each in self.rounds)

    @property
    def evaluate_seconds(self) -> float | None:
        """Seconds spent on evaluations so far; None if they are not on record."""
        if self.summary and self.summary.evaluate_seconds is not None:
            return self.summary.evaluate_seconds
        return self.evaluations[-1].evaluate_seconds if self.evaluations else None

    @property
    def train_seconds(self) -> float | None:
        """Seconds of training steps so far; None if they are not on record."""
        found = self.trained
        return None if found is None else found[1]

    @property
    def trained(self) -> tuple[int, float] | None:
        """Last step for which the seconds of training steps are known, and these seconds; None if none is on record.

        For a run without a summary, they are known up to its last evaluation or the last log of its newest checkpoint.
        """
        if self.summary:
            return self.steps, self.summary.train_seconds
        known = [*self.logged_train_seconds, *((each.step, each.train_seconds) for each in self.evaluations)]
        return max(known, key=lambda each: each[1], default=None)

    @property
    def tokens(self) -> int | None:
        """Number of tokens trained on so far; None if it is not on record yet."""
        if self.summary:
            return self.summary.tokens
        known = [*self.tokens_at.values(), *(each.tokens for each in self.evaluations)]
        return max(known, default=None)

    @property
    def pool(self) -> dict[str, int]:
        """Number of samples of each domain in the pool; empty if it is not on record."""
        return next((each.pool for each in reversed(self.rounds) if each.pool), {})

    @cached_property
    def passes(self) -> dict[str, NDArray[np.float64]]:
        """Domain -> number of passes over it up to and including each of :attr:`rounds`, shape (rounds,).

        The number is the recorded one, or else planned samples / samples in the pool. It is NaN if neither is known. A
        domain without any number is left out.
        """
        names = dict.fromkeys(name for each in self.rounds for name in each.domains)
        found = {name: np.full(len(self.rounds), np.nan) for name in names}
        planned = dict.fromkeys(names, 0)
        for i, each in enumerate(self.rounds):
            for name, count in each.domains.items():
                planned[name] += count
            sizes = each.pool or self.pool
            for name, values in found.items():
                if name in each.epochs:
                    values[i] = each.epochs[name]
                elif sizes.get(name):
                    values[i] = planned[name] / sizes[name]
        return {name: values for name, values in found.items() if not np.isnan(values).all()}

    @property
    def mean_loss_weights(self) -> dict[str, float]:
        """Mean weight of each domain in the loss over the steps so far; empty if the loss is not weighted by domain."""
        if self.domain_weights:
            return self.domain_weights.proportions
        if self.loss_weights:
            return dict(zip(self.loss_weights.names, self.loss_weights.mean.tolist(), strict=True))
        return {}

    @property
    def has_plans(self) -> bool:
        """Whether the folder holds the plans."""
        return bool(self.rounds) and bool(self.plans)

    @cached_property
    def plans(self) -> PlanReader:
        """The plans of the rounds."""
        return PlanReader(self.path / FOLDER / PLANS)

    @cached_property
    def filters(self) -> PlanReader:
        """The samples that filters decided on.

        A round's samples are read with the rounds that :meth:`filtered` returns.
        """
        return PlanReader(self.path / FOLDER / FILTERS)

    @cached_property
    def token_samples(self) -> list[TokensOfStep]:
        """Lines of ``token_samples.jsonl``, ascending by step; empty without a weighter, and in older records."""
        return _by_step(TokensOfStep, self.path / FOLDER / TOKEN_SAMPLES)

    def filtered(self, each: Round) -> list[tuple[Filtering, Round]]:
        """Return the filters that decided in a round, each with the round to pass to :attr:`filters`.

        That round names the table of the filter instead of the plan, because both are stored in the same format.
        """
        return [(one, replace(each, plan=one.table, size=one.size)) for one in each.filters if one.table is not None]

    @cached_property
    def _by_number(self) -> dict[int, Round]:
        return {each.round: each for each in self.rounds}

    def round(self, number: int) -> Round:
        """Return the decisions of round ``number``.

        Raises:
            ConfigError: if the round is not on record.
        """
        if number not in self._by_number:
            raise ConfigError(f"{self.path}: round {number} is not on record.")
        return self._by_number[number]

    def trained_rows(self, each: Round) -> int:
        """Return how many positions of a round's plan training reached."""
        done = min(max(self.steps - each.start_step, 0), each.steps)
        return each.size * done // each.steps if each.steps else 0

    def plan(self, number: int) -> pyarrow.Table:
        """Return the plan of round ``number``: round, position, index, domain, row, score and rank of each sample."""
        return self.plans.table(self.round(number))

    def plan_indices(self, number: int) -> NDArray[np.int64]:
        """Return the pool indices of round ``number`` in training order, shape (size,)."""
        return self.plans.indices(self.round(number))

    def plan_scores(self, number: int) -> NDArray[np.float32] | None:
        """Return the finite scores of round ``number``, or None if there are none."""
        scores = self.plans.numbers(self.round(number), "score")
        if scores is None:
            return None
        finite = scores[np.isfinite(scores)].astype(np.float32, copy=False)
        return finite if finite.size else None

    def coverage(self) -> Coverage | None:
        """Count distinct and repeated samples and the overlap of rounds, with one plan in memory at a time.

        Returns:
            None if the folder has no plans.
        """
        if not self.has_plans:
            return None
        planned = np.zeros(0, dtype=np.int32)  # number of times each pool index was planned so far
        seen = {name: 0 for each in self.rounds for name in each.domains}
        seen_after: dict[str, Curve] = {name: [] for name in seen}
        before: NDArray[np.int64] | None = None
        overlap: Curve = []
        repeats: Curve = []
        samples = distinct = 0
        for each in self.rounds:
            indices = self.plans.indices(each)
            domains, names = self.plans.labels(each)
            current, first, counts = np.unique(indices, return_index=True, return_counts=True)
            planned = _extended(planned, current)
            new = planned[current] == 0
            planned[current] += counts.astype(np.int32)
            for name, found in zip(names, np.bincount(domains[first[new]], minlength=len(names)), strict=True):
                if found and name not in seen:
                    raise ConfigError(f"{self.plans.where(each)}: domain {name!r} is not in rounds.jsonl.")
                seen[name] = seen.get(name, 0) + int(found)
            for name, curve in seen_after.items():
                curve.append((each.round, seen[name]))
            fresh = int(np.count_nonzero(new))
            samples, distinct = samples + indices.size, distinct + fresh
            if indices.size:
                repeats.append((each.round, 1 - fresh / indices.size))
            if before is not None:
                overlap.append((each.round, _jaccard(before, current)))
            before = current
        times = np.bincount(planned[planned > 0])
        return Coverage(samples, distinct, overlap, repeats, seen_after, times)


def read_run(path: Path) -> RunRecord:
    """Read the small files of a run folder.

    Args:
        path: LLaMA-Factory's ``output_dir`` of a DataFlex run, finished or not.

    Raises:
        ConfigError: if ``path`` is no output folder of a DataFlex run, or if a file in it is malformed.
    """
    config = read_configuration(path)
    folder = path / FOLDER
    header = read_header(folder)
    summary = _read(Summary, folder / SUMMARY)
    total = summary.steps if summary else None
    log, reached = read_log(path, finished=summary is not None, steps=total)
    steps = reached if total is None else total
    weights = read_loss_weights(folder / LOSS_WEIGHTS)
    results = path / "all_results.json"
    # Earlier results are removed when a run begins or resumes. So in a finished run, the file is from this run.
    final = read_object(results) if summary else None
    return RunRecord(
        path=path,
        name=path.resolve().name,
        config=config,
        starts=read_environment(folder).starts,
        rounds=read_rounds(folder, header),
        changes=[from_json(Change, value, where) for where, value in json_lines(folder / CHANGES)],
        summary=summary,
        steps=steps,
        train_loss=train_curve(log),
        eval_loss=eval_curves(log, final or {}, steps),
        evaluations=_by_step(Evaluation, folder / EVALUATIONS),
        tasks=[_read_task(file) for file in sorted((folder / TASKS).glob("*.json"))],
        domain_loss=curves(log, r"dataflex/loss/(.+)"),
        domain_tokens=curves(log, r"dataflex/domain_tokens/(.+)"),
        loss_weights=weights,
        domain_weights=_read_domain_weights(folder / DOMAIN_WEIGHTS, weights),
        weights=curves(log, r"dataflex/weight_(min|max)"),
        token_weights=_by_step(TokenWeights, folder / TOKEN_WEIGHTS, header),
        tokens_at=tokens_at(log),
        seconds_at=seconds_at(log),
        logged_train_seconds=train_seconds_at(log),
    )


def read_header(folder: Path) -> Header | None:
    """Return the header of a record: the fields that all rounds share. None for a record of version 1.

    Args:
        folder: folder of the record.

    Raises:
        ConfigError: if the record has a later version, or is not readable.
    """
    file = folder / HEADER
    value = read_object(file)
    if value is None:
        return None
    version = value.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ConfigError(
            f"{file}: the record is of version {version}, this release of DataFlex reads up to {VERSION}. Read it with "
            "the release that wrote it, or a later one."
        )
    return from_json(Header, value, file)


def _read(kind: type[T], file: Path) -> T | None:
    """Return the object in a JSON file; None if the file does not exist."""
    value = read_object(file)
    return None if value is None else from_json(kind, value, file)


def _read_task(file: Path) -> Task:
    """Return the results of one downstream task."""
    return from_json(Task, read_object(file) or {}, file)


def _read_domain_weights(path: Path, weights: LossWeights | None) -> DomainWeights | None:
    """Return the final domain weights, after checking their domains."""
    found = _read(DomainWeights, path)
    if found and weights and found.proportions.keys() != set(weights.names):
        raise ConfigError(f"{path}: 'proportions' does not name the domains of {LOSS_WEIGHTS}.")
    return found


def read_rounds(folder: Path, header: Header | None) -> list[Round]:
    """Return the rounds by number. If a round was planned again after a resume, the last plan counts.

    Args:
        folder: folder of the record.
        header: header of the record; None for version 1, whose lines hold all fields themselves.

    Raises:
        ConfigError: if a line is malformed.
    """
    rounds: dict[int, Round] = {}
    pool: dict[str, int] = {}
    for where, value in json_lines(folder / ROUNDS):
        each = from_json(Round, value, where, header)
        if header is not None:
            each = replace(each, pool=header.domains, components=_acting(each, header))
        elif each.pool == pool:  # share one dictionary, because there may be many domains and many rounds
            each = replace(each, pool=pool)
        pool = each.pool
        rounds[each.round] = each
    return [rounds[number] for number in sorted(rounds)]


def _acting(each: Round, header: Header) -> dict[str, str | None]:
    """Return the methods that acted in a round."""
    methods = {} if each.warmup else header.methods_at(each.round)
    return {key: name for key, name in methods.items() if key not in each.undecided}


def _by_step(kind: type[L], path: Path, header: Header | None = None) -> list[L]:
    """Return the lines of a file by step. Of several at one step, for example after a resume, the last counts."""
    found: dict[int, L] = {}
    for where, value in json_lines(path):
        each = from_json(kind, value, where, header)
        found[each.step] = each
    return [found[step] for step in sorted(found)]


def _extended(planned: NDArray[np.int32], indices: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the counts, extended with zeros so that they include the last of ``indices`` (ascending)."""
    if not indices.size or indices[-1] < planned.size:
        return planned
    # A quarter more than before, so that many small extensions do not copy the counts each time.
    longer = np.zeros(max(int(indices[-1]) + 1, planned.size * 5 // 4), dtype=np.int32)
    longer[: planned.size] = planned
    return longer


def _jaccard(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Return the size of the intersection over the size of the union of two arrays without repetitions."""
    common = np.intersect1d(first, second, assume_unique=True).size
    union = first.size + second.size - common
    return common / union if union else math.nan
