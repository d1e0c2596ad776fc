"""Formatting of the answers of :mod:`dataflex.explain.explain` as lines to print."""

from __future__ import annotations

import json
import shutil
import textwrap
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dataflex.explain.samples import Part
from dataflex.report.tables import NOTHING, Table, to_text

if TYPE_CHECKING:
    from dataflex.explain.explain import Sample
    from dataflex.explain.filters import SelectorPart

_LISTED = 50
"""Number of samples found by their text whose indices are printed."""


def lines_of(found: dict[str, Any], full: bool) -> list[str]:
    """Return an answer as lines to print."""
    run = found["run"]
    state = "finished" if run["finished"] else "not finished"
    lines = [f"{run['path']}: {run['acting']}, {_count(run['rounds'], 'round')}, step {run['steps']:,}, {state}"]
    if run["steps"] < run["planned_steps"]:
        lines.append(
            f"The plans end at step {run['planned_steps']:,}; training reached step {run['steps']:,}"
            + ("." if run["finished"] else " as far as the logs show.")
        )
    missing = run["rounds_missing"]
    if missing:
        told = f"Not on record here: {ranges(missing)}. This run continues an earlier run, whose record has them."
        lines += textwrap.wrap(told, _width())
    for change in run["changes"]:
        if change.holds:
            told = f"From step {change.step + 1} on: {change.key} is {_value(change.now)}, before "
            lines += textwrap.wrap(f"{told}{_value(change.before)}.", _width())
    if found["no_text"] not in (None, "not asked for"):
        lines.append(f"Without texts: {found['no_text']}")
    if "matches" in found:
        lines += _match_lines(found["matches"], len(found["samples"]))
    if "by" in found:
        lines += _top_lines(found, full)
    elif "samples" in found:
        for sample in found["samples"]:
            lines += ["", *_sample_lines(sample, full, bool(missing))]
    else:
        lines += _overview_lines(found, full)
    return lines


def _match_lines(matches: list[int], explained: int) -> list[str]:
    if not matches:
        return ["No sample of the pool contains the phrase."]
    shown = ", ".join(map(str, matches[:_LISTED])) + (", ..." if len(matches) > _LISTED else "")
    lines = [f"{_count(len(matches), 'sample')} with the phrase: {shown}"]
    return [*lines, f"The first {explained} of them:"] if len(matches) > explained else lines


def _value(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _sample_lines(sample: Sample, full: bool, rounds_missing: bool) -> list[str]:
    where = _where(sample.domain, sample.dataset, sample.row)
    untrained = "not trained on" if rounds_missing else "never trained on"
    trained = f"trained on {_times(sample.trained)}" if sample.trained else untrained
    never = "not planned in the rounds on record" if rounds_missing else "never planned"
    if rounds_missing and sample.planned:
        trained = f"{trained}, in the rounds on record"
    told = f"planned {_times(sample.planned)}, {trained}" if sample.planned else never
    lines = [f"Sample {sample.index}{where}: {told}", *_text_lines(sample.text, full)]
    lines += _filter_lines(sample)
    if not sample.placements:
        return lines
    header = ["round", "chosen by", "steps", "step", "trained", "position", "score", "rank", "decided", "counted"]
    rows = [
        [
            str(place.round),
            place.chosen_by,
            f"{place.steps[0]}-{place.steps[1]}",
            str(place.step),
            "yes" if place.trained else "no",
            str(place.position),
            NOTHING if place.score is None else f"{place.score:.4g}",
            _rank(place.rank, place.candidates),
            NOTHING if place.proportion is None else f"{place.proportion:.3f}",
            f"{place.share:.3f}",
        ]
        for place in sample.placements
    ]
    table = to_text(Table("", header, rows, 2), _width())
    lines += table.rstrip("\n").split("\n")[1:]
    lines += [
        "",
        f"decided, counted: share of {sample.domain} in the round; rank: among the candidates, 1 is the best",
    ]
    if sample.not_in:
        lines += textwrap.wrap(f"Not in {ranges(sample.not_in)}.", _width())
    return lines


def _filter_lines(sample: Sample) -> list[str]:
    """Return a table of the filters' decisions about a sample, as lines; empty if there are none."""
    if not sample.filtered:
        return []
    header = ["filter", "round", "holds until", "score", "rank", "result"]
    rows = [
        [
            f"{said.key} {said.method}",
            str(said.round),
            str(said.until),
            NOTHING if said.score is None else f"{said.score:.4g}",
            _rank(said.rank, said.candidates),
            "kept" if said.kept else "left out",
        ]
        for said in sample.filtered
    ]
    return to_text(Table("", header, rows, 1), _width()).rstrip("\n").split("\n")[1:]


def _top_lines(found: dict[str, Any], full: bool) -> list[str]:
    told = {
        "rank": "best first by rank",
        "score": "highest score first; this need not be the order of preference, since no ranks are on record",
        "position": "in training order: the round has no scores",
    }
    lines = [f"Round {found['round']}: {len(found['samples'])} of {found['size']:,} samples, {told[found['by']]}"]
    lines += [_part_line(part, number == len(found["selectors"]) - 1) for number, part in enumerate(found["selectors"])]
    for place in found["samples"]:
        score = "" if place["score"] is None else f", score {place['score']:.4g}"
        where = _where(place["domain"], place["dataset"], place["row"])
        rank = "" if place["rank"] is None else f", rank {_rank(place['rank'], place['candidates'])}"
        lines += ["", f"Sample {place['index']}{where}{score}{rank}, step {place['step']}"]
        lines += _text_lines(place["text"], full)
    return lines


def _part_line(part: SelectorPart, is_last: bool) -> str:
    """Return a sentence about a selector of a list in a round."""
    name = f"{part.key} {part.method}"
    of = "" if part.candidates is None or part.left is None else f"{part.left:,} of {_count(part.candidates, 'sample')}"
    earlier = "an earlier round" if part.decided_in is None else f"round {part.decided_in}"
    if part.decided:
        return f"{name} {'chose' if is_last else 'left'} {of or _count(part.left or 0, 'sample')}"
    if is_last:
        return f"{name} chose {of or _count(part.left or 0, 'sample')} by its scores up to {earlier}"
    if not of:
        return f"{name} was not called, because the result of a later selector holds; it decided last in {earlier}"
    return f"{name} left {of} in {earlier}, and this result holds"


def _overview_lines(found: dict[str, Any], full: bool) -> list[str]:
    header = ["domain", "samples", "ever planned", "never", "in all plans", "share"]
    rows = [
        [use.domain, *(NOTHING if n is None else f"{n:,}" for n in (use.pool, use.distinct, use.never, use.planned)),
         f"{use.share:.3f}"]
        for use in found["domains"]
    ]  # fmt: skip
    table = to_text(Table("", header, rows, 1), _width())
    lines = [
        f"{found['planned']:,} samples in all plans, {found['distinct']:,} different ones; "
        f"{found['trained']:,} trained on",
        *table.rstrip("\n").split("\n")[1:],
        "",
        *(
            f"{each.key} {each.method} decided in {each.decided:,} of {_count(each.rounds, 'round')}."
            for each in found["selectors"]
        ),
        "Planned most often:",
    ]
    for often in found["most_often"]:
        where = _where(often.domain, often.dataset, often.row)
        lines += [f"Sample {often.index}{where}: {_times(often.planned)}", *_text_lines(often.text, full)]
    if found["as_often_as_the_last"] > 1:
        lines.append(f"{_count(found['as_often_as_the_last'], 'sample')} in all are planned as often as the last one.")
    return lines


def _text_lines(parts: list[Part] | None, full: bool) -> list[str]:
    """Return a sample's text as lines, each span beside its kind. Full texts keep their lines; others are wrapped."""
    lines = []
    for part in parts or ():
        text = part.text.split("\n") if full else textwrap.wrap(part.text, max(20, _width() - 12))
        # Control characters in the data could change the terminal, so they are replaced by spaces.
        for number, line in enumerate(text):
            kind = part.kind if number == 0 else ""
            lines.append(f"  {kind:<7} | {''.join(c if c.isprintable() else ' ' for c in line)}".rstrip())
    return lines


def _where(domain: str | None, dataset: str | None, row: int | None) -> str:
    """Return the origin of a sample: its domain, and its row with the data set if that has another name."""
    if domain is None:
        return ""
    named = domain if dataset in (None, domain) or row is None else f"{domain}: {dataset}"
    return f" ({named})" if row is None else f" ({named} row {row})"


def _width() -> int:
    return shutil.get_terminal_size(fallback=(120, 24)).columns


def _rank(rank: int | None, candidates: int | None) -> str:
    if rank is None:
        return NOTHING
    return f"{rank:,}" if candidates is None else f"{rank:,} of {candidates:,}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number:,} times")


def ranges(numbers: list[int]) -> str:
    """Return ascending round numbers as text, with ranges: ``rounds 1-3, 5``."""
    runs = [
        [number for _, number in group] for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    told = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"round{'s' if len(numbers) > 1 else ''} {', '.join(told)}"
