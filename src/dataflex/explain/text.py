"""Formatting of the answers of :mod:`dataflex.explain.explain` as lines to print."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dataflex.explain.samples import Part
from dataflex.report.tables import NOTHING, Table, to_text

if TYPE_CHECKING:
    from dataflex.explain.explain import Sample
    from dataflex.explain.filters import SelectorPart
    from dataflex.explain.tokens import Listed, SampleTokens, StepTokens

Decode = Callable[[list[int]], str]
"""Returns the text of tokens."""

_LISTED = 50
"""Number of samples found by their text whose indices are printed."""


def lines_of(found: dict[str, Any], full: bool, decode: Decode | None = None) -> list[str]:
    """Return an answer as lines to print.

    Args:
        found: the answer.
        full: whether to show texts completely, and every token on its own line.
        decode: returns the text of tokens. None without texts.
    """
    run = found["run"]
    state = "finished" if run["finished"] else "not finished"
    rounds = f", {_count(run['rounds'], 'round')}" if run["rounds"] else ""
    lines = [f"{run['path']}: {run['acting']}{rounds}, step {run['steps']:,}, {state}"]
    if run["planned_steps"] is not None and run["steps"] < run["planned_steps"]:
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
    if "recorded" in found:
        lines += _recorded_lines(found["recorded"])
    elif "tokens" in found:
        lines += _token_lines(found, full, decode)
    elif "by" in found:
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
    if sample.tokens_at:
        steps = ", ".join(map(str, sample.tokens_at))
        lines += textwrap.wrap(f"Its tokens are on record (--tokens), of step {steps}.", _width())
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


def _recorded_lines(samples: list[Listed]) -> list[str]:
    """Return the samples whose tokens are on record as lines, those of the last step first."""
    shown = sorted(samples, key=lambda sample: (-sample.last.step, sample.index))[:_LISTED]
    header = ["sample", "domain", "steps", "tokens", "count", "effective", "mean weight", "loss"]
    rows = [
        [
            str(sample.index),
            sample.domain or NOTHING,
            ", ".join(map(str, sample.steps)),
            f"{sample.trained:,}",
            f"{sample.last.counting:,}",
            f"{sample.last.effective:.1f}",
            f"{sum(sample.last.weights) / len(sample.last.weights):.4g}",
            f"{sample.last.mean_loss:.4g}",
        ]
        for sample in shown
    ]
    more = f"; the {len(shown)} recorded last are listed" if len(shown) < len(samples) else ""
    return [
        f"Tokens of {_count(len(samples), 'sample')} are on record{more}:",
        *to_text(Table("", header, rows, 3), _width()).rstrip("\n").split("\n")[1:],
        "",
        "count, effective, mean weight, loss: of the tokens on record of the last of the steps",
    ]


def _token_lines(found: dict[str, Any], full: bool, decode: Decode | None) -> list[str]:
    """Return the tokens of samples as lines, each sample in its last step."""
    lines = []
    for sample in found["tokens"]:
        where, steps = _where(sample.domain, sample.dataset, sample.row), ", ".join(map(str, sample.all_steps))
        told = f"Sample {sample.index}{where}: {_count(sample.trained, 'trained token')}, on record of step {steps}"
        lines += ["", *textwrap.wrap(told, _width()), *_text_lines(sample.text, full)]
        lines += _step_lines(sample, sample.steps[-1], full, decode)
    if found["not_on_record"]:
        known, missing = found["on_record"], ", ".join(map(str, found["not_on_record"]))
        told = f"The tokens of {missing} are not on record. On record are {_count(len(known), 'sample')}: "
        told += ", ".join(map(str, known[:_LISTED])) + (", ... (--tokens alone lists them)" if known[_LISTED:] else "")
        lines += ["", *textwrap.wrap(told, _width())]
    return lines


def _step_lines(sample: SampleTokens, step: StepTokens, full: bool, decode: Decode | None) -> list[str]:
    """Return the tokens of a sample in a step: a line for neighbours of equal weight, or with ``full`` for each."""
    number, weighted = len(step.losses), step.weighted_loss
    told = f"Step {step.step}: {step.counting:,} of {_count(number, 'token')} count ({step.counting / number:.3f}), "
    told += f"{step.effective:.1f} effective, mean loss {step.mean_loss:.4g}"
    told += "" if weighted is None else f", weighted {weighted:.4g}"
    lines = ["", *textwrap.wrap(told, _width())]
    if number < sample.trained:
        lines.append(f"Only the first {number:,} of {sample.trained:,} trained tokens are on record.")
    header = f"{'weight':>8}  {'loss':>8}  {'tokens':>6}"
    lines += ["", header if sample.ids is None else f"{header}  text"]
    begin = 0
    for _, group in groupby(range(number), key=lambda i: i if full else step.weights[i]):
        end = begin + len(list(group))
        loss = sum(step.losses[begin:end]) / (end - begin)
        start = f"{step.weights[begin]:>8.4g}  {loss:>8.4g}  {end - begin:>6,}"
        # Neighbours are decoded together, because a character may consist of several tokens.
        text = "" if sample.ids is None or decode is None else _quoted(decode(sample.ids[begin:end]))
        width = max(20, _width() - len(start) - 2)
        parts = [text[i : i + width] for i in range(0, len(text), width)] or [""]
        lines += [f"{start}  {parts[0]}".rstrip(), *(f"{'':{len(start)}}  {part}" for part in parts[1:])]
        begin = end
    return lines


def _quoted(text: str) -> str:
    """Return a text in quotes, with spaces at its ends and line breaks visible."""
    shown = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else "?" for char in shown)


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
    width = max([7, *(len(part.kind) for part in parts or ())])
    for part in parts or ():
        text = part.text.split("\n") if full else textwrap.wrap(part.text, max(20, _width() - width - 5))
        # Control characters in the data could change the terminal, so they are replaced by spaces.
        for number, line in enumerate(text):
            kind = part.kind if number == 0 else ""
            lines.append(f"  {kind:<{width}} | {''.join(c if c.isprintable() else ' ' for c in line)}".rstrip())
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
