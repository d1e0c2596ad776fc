"""Explanation of a run from its record: which samples it trained on, when, and which component chose them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config.checks.values import dataset_names
from dataflex.config.loading import RunConfig
from dataflex.errors import ConfigError
from dataflex.explain.filters import Filtered, filtered_samples, parts_of_round, times_decided
from dataflex.explain.samples import Part, Texts, load_texts
from dataflex.explain.text import lines_of, ranges
from dataflex.explain.tokens import tokens_of
from dataflex.record.reader import RunRecord, read_run
from dataflex.record.schema import Round

_EXPLAINED = 3
"""Number of samples found by their text that are explained."""
_OFTEN = 10
"""Number of samples that are listed as planned most often."""


@dataclass(frozen=True)
class Question:
    """A question about a run. Without indices, text and top it asks for an overview of all chosen samples.

    Attributes:
        indices: pool indices of the samples to explain.
        text: phrase that the samples to explain contain.
        top: number of best samples of a round.
        round: number of the round for ``top``. None means the last round with scores, or the last round if none has.
        with_text: whether to load the data, so that the texts of samples are shown.
        full: whether to show texts completely, with special tokens.
        tokens: whether to show the losses and weights of tokens, of the samples ``indices`` or of all on record.
        step: the recorded step for ``tokens``. None means the last one.
    """

    indices: tuple[int, ...] = ()
    text: str | None = None
    top: int | None = None
    round: int | None = None
    with_text: bool = True
    full: bool = False
    tokens: bool = False
    step: int | None = None

    def problem(self) -> str | None:
        """Return the problem of a question that contradicts itself; None if there is none."""
        if self.round is not None and self.top is None:
            return (
                "--round: only has an effect with --top N, which lists the samples of one round; add --top, "
                "or leave out --round."
            )
        if self.tokens and (self.text is not None or self.top is not None):
            other = "--text" if self.text is not None else "--top"
            return f"--tokens: shows the samples that --index names, or lists those on record; leave out {other}."
        if self.step is not None and not (self.tokens and self.indices):
            return "--step: only has an effect with --tokens --index I, which shows the tokens of one recorded step."
        if self.text is not None and not self.text.strip():
            return f"--text: must be a phrase to search for, got {self.text!r}."
        if not self.with_text and (self.text is not None or self.full):
            return (
                f"--no-text: {'--full' if self.text is None else '--text'} needs the texts; leave out one of the two."
            )
        return None


@dataclass(frozen=True)
class Placement:
    """One position in the plan of a round, and the sample at this position."""

    index: int
    round: int
    steps: tuple[int, int]
    """First and last optimizer step of the round, counted from 1."""
    position: int
    """Position in the plan, counted from 0."""
    step: int
    """Optimizer step in which the position is trained, counted from 1."""
    trained: bool
    """Whether training reached that step, as far as the logs show."""
    chosen_by: str
    domain: str
    row: int | None
    """Row in the data set, counted from 0; None if the record does not have it."""
    score: float | None
    rank: int | None
    """Rank among the candidates, 1 is the best; None if the selector ranked none."""
    candidates: int | None
    """Number of candidates that were ranked."""
    proportion: float | None
    """Share of the domain in the round that was decided; None in older records, which do not have it."""
    share: float
    """Share of the domain among the samples of the plan, counted."""


@dataclass(frozen=True)
class Sample:
    """A sample and every decision of the run about it."""

    index: int
    domain: str | None
    """None if the sample was never planned and the record does not list the domains of the pool."""
    dataset: str | None
    """The data set of the domain."""
    row: int | None
    """Row in the data set, counted from 0; None if it is not known, as for packed samples."""
    planned: int
    trained: int
    placements: list[Placement]
    filtered: list[Filtered]
    """Decisions of the filters about the sample, in their order; empty if the run has no list of selectors."""
    not_in: list[int]
    """Numbers of the rounds whose plan does not have the sample."""
    tokens_at: list[int]
    """Steps in which the losses and weights of its tokens are on record."""
    text: list[Part] | None


@dataclass(frozen=True)
class DomainUse:
    """Use of a domain by a run.

    ``pool`` is the number of samples in the domain, ``distinct`` the number that were planned at least once and
    ``never`` the number that were not. These three are None if the record does not have the size of the pool.
    ``planned`` counts repeated samples each time, and ``share`` is its fraction of all planned samples.
    """

    domain: str
    pool: int | None
    distinct: int | None
    never: int | None
    planned: int
    share: float


@dataclass(frozen=True)
class Often:
    """A sample that was planned often."""

    index: int
    domain: str | None
    dataset: str | None
    row: int | None
    planned: int
    text: list[Part] | None


class Record:
    """The record of a run, in the form in which questions are answered.

    Args:
        path: ``output_dir`` of the run.
        needs_rounds: whether a run without rounds, whose samples LLaMA-Factory draws, is an error.

    Raises:
        ConfigError: if the folder has no run with plans, or if the record cannot be read.
    """

    def __init__(self, path: Path, needs_rounds: bool = True) -> None:
        self.run: RunRecord = read_run(path)
        if not self.run.rounds and needs_rounds:
            hint = " --tokens shows the tokens that the run has on record." if self.run.token_samples else ""
            raise ConfigError(
                f"{path}: the record has no round, so there is nothing to explain. Only runs with select, mix or order "
                f"plan rounds.{hint}"
            )
        if self.run.rounds and not self.run.has_plans:
            raise ConfigError(
                f"{path / 'dataflex' / 'plans'} has no plan; it must have one for each round of rounds.jsonl."
            )
        self.rounds = {each.round: each for each in self.run.rounds}
        self.pool = self.run.pool
        self.offsets = np.cumsum([0, *self.pool.values()])
        """First index of each domain, then the size of the pool; (0,) if the record does not have the sizes."""

    def facts(self) -> dict[str, Any]:
        """Return the facts about the run that are part of every answer."""
        return {
            "path": str(self.run.path),
            "components": self.run.components,
            "acting": self.run.acting,
            "rounds": len(self.rounds),
            "steps": self.run.steps,
            "planned_steps": self.run.rounds[-1].start_step + self.run.rounds[-1].steps if self.rounds else None,
            "finished": self.run.summary is not None,
            "rounds_missing": self.run.rounds_missing,
            "changes": self.run.changes,
            "pool": self.pool or None,
        }

    def check_index(self, index: int) -> None:
        """Raise a ConfigError if the pool has no sample of this index."""
        last = self.offsets[-1] - 1 if self.pool else np.iinfo(np.int64).max
        if index > last:
            raise ConfigError(f"--index: {index} is not in the pool; give an index from 0 to {last}.")

    def domain_of(self, index: int) -> str | None:
        """Return the domain of a sample; None if the record does not have the sizes of the domains."""
        if not self.pool:
            return None
        return list(self.pool)[int(np.searchsorted(self.offsets, index, side="right")) - 1]

    def dataset_of(self, domain: str | None) -> str | None:
        """Return the name of the data set that contains a domain; None if it is not known."""
        names = dataset_names(RunConfig(dict(self.run.config), None))
        if domain is None or domain in names or len(names) == 1:
            return names[0] if len(names) == 1 else domain
        return next((name for name in names if domain.startswith(f"{name}/")), None)  # a value of domain_column

    def placements(self, each: Round, positions: Sequence[int] | NDArray[np.int64]) -> list[Placement]:
        """Return the placements at some positions of a round's plan.

        Raises:
            ConfigError: if the plan does not have the size that ``rounds.jsonl`` says.
        """
        plans = self.run.plans
        indices = plans.indices(each)
        scores, ranks, rows = (plans.numbers(each, name) for name in ("score", "rank", "row"))
        ids, names = plans.labels(each)
        if not indices.size == each.size == ids.size:
            raise ConfigError(
                f"{plans.where(each)} has {indices.size} samples, but rounds.jsonl says {each.size}; the "
                "record is damaged."
            )
        found, reached = [], self.run.trained_rows(each)
        for position in map(int, positions):
            domain = names[ids[position]]
            score, rank = _number(scores, position), _number(ranks, position)
            place = Placement(
                index=int(indices[position]),
                round=each.round,
                steps=(each.start_step + 1, each.start_step + each.steps),
                position=position,
                step=each.start_step + 1 + position * each.steps // each.size,
                trained=position < reached,
                chosen_by=self._chosen_by(each, domain, score is not None or rank is not None),
                domain=domain,
                row=_whole(rows, position),
                score=score,
                rank=_whole(ranks, position),
                candidates=None if rank is None else each.candidates.get(each.group_of(domain, each.candidates)),
                proportion=each.proportions.get(domain),
                share=each.shares.get(domain, 0.0),
            )
            found.append(place)
        return found

    def _chosen_by(self, each: Round, domain: str, ranked: bool) -> str:
        """Return a text that names the component or the rule that chose the samples of a domain in a round."""
        if each.warmup:
            mixer = self.run.components.get("mix")
            return "uniform draw (warm-up)" if mixer is None else f"draw, initial shares of {mixer} (warm-up)"
        selector, mixer = each.components.get("select"), each.components.get("mix")
        why = each.not_chosen.get(each.group_of(domain, {**each.candidates, **each.not_chosen}))
        if why is not None:
            return f"not by {self.run.components.get('select')}: {why}"
        if selector is None and "mix" in each.undecided:
            return f"draw in passes (not by {self.run.components.get('mix')}: {each.undecided['mix']})"
        if selector is None:
            return "draw in passes" if mixer is None else f"draw in passes (mix {mixer})"
        size = each.pool.get(domain, 0) if mixer else sum(each.pool.values())
        wanted = each.domains.get(domain, 0) if mixer else each.size
        whole = not ranked and 0 < size <= wanted
        return f"{selector} (every sample of {domain if mixer else 'the pool'})" if whole else f"{selector}"


def explain(path: Path, question: Question, as_json: bool = False) -> None:
    """Print the answer to a question about a run.

    Args:
        path: ``output_dir`` of the run.
        question: the question.
        as_json: whether to print the answer as JSON.

    Raises:
        ConfigError: if the question does not fit the run, or if the record cannot be read.
    """
    problem = question.problem()
    if problem is not None and question.round is None:
        raise ConfigError(problem)
    record = Record(path, needs_rounds=not question.tokens)
    if question.round is not None:  # A round that is not on record is named before a missing --top.
        round_number(record, question.round)
    if problem is not None:
        raise ConfigError(problem)
    for index in question.indices:
        record.check_index(index)
    loaded: Texts | str = "not asked for"
    if question.with_text and (question.indices or not question.tokens):
        loaded = load_texts(record.run, question.full)
        if isinstance(loaded, str) and question.text is not None:
            raise ConfigError(f"--text: {loaded}")
    texts = None if isinstance(loaded, str) else loaded
    found = answer(record, question, texts)
    found["no_text"] = loaded if isinstance(loaded, str) else None
    if as_json:
        print(json.dumps(found, default=asdict, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join(lines_of(found, question.full, None if texts is None else texts.decode)))


def answer(record: Record, question: Question, texts: Texts | None) -> dict[str, Any]:
    """Return the answer to a question. ``run`` has the facts about the run; the other keys depend on the question."""
    facts = {"run": record.facts()}
    if question.tokens:
        rows = _rows_on_record(record, np.unique(question.indices).astype(np.int64)) if question.indices else {}
        return {**facts, **tokens_of(record, question.indices, question.step, rows, texts)}
    if question.top is not None:
        return {**facts, **top_of_round(record, round_number(record, question.round), question.top, texts)}
    if question.text is not None:
        assert texts is not None
        matches = texts.containing(question.text)
        return {**facts, "matches": matches, "samples": samples(record, matches[:_EXPLAINED], texts)}
    if question.indices:
        return {**facts, "samples": samples(record, question.indices, texts)}
    return {**facts, **overview(record, texts)}


def samples(record: Record, indices: Sequence[int], texts: Texts | None) -> list[Sample]:
    """Return the decisions about some samples, one entry for each sample.

    Plans are read one at a time, so memory holds a single plan.
    """
    wanted = np.unique(np.asarray(indices, dtype=np.int64))
    placed: dict[int, list[Placement]] = {int(index): [] for index in wanted}
    for each in record.run.rounds if wanted.size else ():
        positions = np.flatnonzero(np.isin(record.run.plans.indices(each), wanted))
        if positions.size:
            for place in record.placements(each, positions):
                placed[place.index].append(place)
    filtered = filtered_samples(record.run, wanted)
    tokens_at: dict[int, list[int]] = {}
    for line in record.run.token_samples:
        for index in {sample.index for sample in line.samples}:
            tokens_at.setdefault(index, []).append(line.step)
    found = []
    for index in dict.fromkeys(map(int, indices)):
        places = placed[index]
        within = {place.round for place in places}
        domain = places[0].domain if places else record.domain_of(index)
        found.append(
            Sample(
                index=index,
                domain=domain,
                dataset=record.dataset_of(domain),
                row=places[0].row if places else _row(texts, index),
                planned=len(places),
                trained=sum(place.trained for place in places),
                placements=places,
                filtered=filtered[index],
                not_in=[number for number in record.rounds if number not in within],
                tokens_at=tokens_at.get(index, []),
                text=_text(texts, index),
            )
        )
    return found


def round_number(record: Record, number: int | None) -> int:
    """Return ``number`` if it is on record. If None, return the last round with scores, or the last round.

    Raises:
        ConfigError: if the round is not on record.
    """
    if number is None:
        scored = [each for each in record.run.rounds if each.components.get("select") and not each.warmup]
        return (scored or record.run.rounds)[-1].round
    if number not in record.rounds:
        raise ConfigError(f"--round: {number} is not on record; the record has {ranges(list(record.rounds))}.")
    return number


def top_of_round(record: Record, number: int, count: int, texts: Texts | None) -> dict[str, Any]:
    """Return the best samples of a round's plan.

    They are the best by rank, or by score without ranks, or the first in training order without scores.
    """
    each = record.rounds[number]
    plans = record.run.plans
    size = plans.indices(each).size
    ranks, scores = plans.numbers(each, "rank"), plans.numbers(each, "score")
    if ranks is not None and not np.isnan(ranks).all():
        by, keys = "rank", ranks
    elif scores is not None and not np.isnan(scores).all():
        by, keys = "score", -scores
    else:
        by, keys = "position", np.arange(size)
    best = np.argsort(keys, kind="stable")[:count]
    places = record.placements(each, best)
    listed = [
        {**asdict(place), "dataset": record.dataset_of(place.domain), "text": _text(texts, place.index)}
        for place in places
    ]
    return {
        "round": number,
        "size": each.size,
        "by": by,
        "domains": each.domains,
        "selectors": parts_of_round(record.run, each),
        "samples": listed,
    }


def overview(record: Record, texts: Texts | None) -> dict[str, Any]:
    """Return counts of the planned samples by domain, and the samples planned most often. Reads one plan at a time."""
    counts = np.zeros(int(record.offsets[-1]), dtype=np.int32)
    for each in record.run.rounds:
        indices, times = np.unique(record.run.plans.indices(each), return_counts=True)
        if indices.size and indices[-1] >= counts.size:
            if record.pool:
                raise ConfigError(
                    f"{record.run.path}: the plan of round {each.round} has sample {indices[-1]}, but the pool on "
                    f"record has only {counts.size} samples; the record is damaged."
                )
            counts = np.concatenate([counts, np.zeros(indices[-1] + 1 - counts.size, dtype=np.int32)])
        counts[indices] += times.astype(np.int32)
    planned = dict.fromkeys([*record.pool, *(name for each in record.run.rounds for name in each.domains)], 0)
    for each in record.run.rounds:
        for name, number in each.domains.items():
            planned[name] += number
    total = sum(planned.values())
    uses = []
    for domain, number in planned.items():
        size = distinct = None
        if domain in record.pool:
            begin = int(record.offsets[list(record.pool).index(domain)])
            size = record.pool[domain]
            distinct = int(np.count_nonzero(counts[begin : begin + size]))
        never = None if size is None or distinct is None else size - distinct
        uses.append(DomainUse(domain, size, distinct, never, number, number / total if total else 0.0))
    often = np.argsort(-counts, kind="stable")[:_OFTEN]
    often = often[counts[often] > 0]
    rows = _rows_on_record(record, often)
    most_often = []
    for place, index in enumerate(map(int, often)):
        named, text = record.domain_of(index), _text(texts, index) if place < _EXPLAINED else None
        most_often.append(Often(index, named, record.dataset_of(named), rows.get(index), int(counts[index]), text))
    return {
        "planned": int(total),
        "trained": sum(record.run.trained_rows(each) for each in record.run.rounds),
        "distinct": int(np.count_nonzero(counts)),
        "domains": uses,
        "selectors": times_decided(record.run),
        "most_often": most_often,
        "as_often_as_the_last": int(np.count_nonzero(counts == counts[often[-1]])) if often.size else 0,
    }


def _rows_on_record(record: Record, indices: NDArray[np.int64]) -> dict[int, int]:
    """Return the rows of some samples by index, as far as the plans have them. Stops reading when all are found."""
    found: dict[int, int] = {}
    for each in record.run.rounds:
        planned, rows = record.run.plans.indices(each), record.run.plans.numbers(each, "row")
        if rows is None or len(found) == indices.size:
            break
        here = np.isin(planned, indices) & np.isfinite(rows)
        found |= dict(zip(planned[here].tolist(), rows[here].astype(np.int64).tolist(), strict=True))
    return found


def _number(column: NDArray[Any] | None, position: int) -> float | None:
    """Return a value of a column; None if the column is missing or the value is not finite."""
    return None if column is None or not np.isfinite(column[position]) else float(column[position])


def _whole(column: NDArray[Any] | None, position: int) -> int | None:
    value = _number(column, position)
    return None if value is None else int(value)


def _row(texts: Texts | None, index: int) -> int | None:
    """Return a sample's row according to the data loaded again; None if it is not known."""
    rows = None if texts is None or index >= texts.pool.size else texts.pool.row_numbers(np.array([index]))
    return None if rows is None or rows[0] < 0 else int(rows[0])


def _text(texts: Texts | None, index: int) -> list[Part] | None:
    return None if texts is None or index >= texts.pool.size else texts.parts(index)
