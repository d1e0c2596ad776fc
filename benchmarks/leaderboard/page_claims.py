"""Claims about methods, judged by the findings of the comparisons or by the spread of the ratios of costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from page_form import Claim, Comparison, CostPart, CostRatio, Difference, TableResult, TierResult

from dataflex.compare.statistics import number, title

Side = Literal["above 1", "below 1", "around 1", "no spread"]
Verdict = Literal["supported", "refuted", "mixed", "open"]

RULES = (
    "A claim about methods is judged by its comparisons with the baseline, one for each method that the claim names. "
    "Supported: at least one finding is better, none is worse. Refuted: at least one is worse, none is better. "
    "Mixed: there are both. Open: there is neither. So a supported claim holds for the methods that are named as "
    "better, and open does not mean that there is no difference.",
    "A finding is better or worse if the p value of the paired t test over the seeds, corrected by Holm's method, is "
    "below 0.05. Each interval holds for one comparison alone, so it can exclude 0 although the finding is unclear.",
    "A claim about costs is judged by measured ratios: seconds of the other implementation divided by those of "
    "DataFlex. Supported: the whole spread of every measured ratio is above 1, and every part has one. Mixed: some "
    "spreads are above and some below 1. Refuted: at least one spread is below 1, none is above. Open: anything else. "
    "A ratio of a single pair of measurements has no spread and does not count, nor does a reckoned one.",
)

LONG_DECISIONS = 0.5
"""Seconds of decisions over seconds of training from which on a sentence about a better method names them."""

OTHER_STEPS = 0.1
"""Difference of the steps, as a share of the baseline's, from which on a sentence about a better method names them."""


_SAID = {"better": "better", "worse": "worse", "unclear": "unclear", "none": "without a finding"}
"""Finding -> its words, in the order of a sentence."""


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    Attributes:
        claim: the claim.
        verdict: one of supported, refuted, mixed and open.
        counts: number of comparisons, and of those for the claim, against the claim and for neither.
        sentence: the findings, or the ratios, in one sentence.
    """

    claim: Claim
    verdict: Verdict
    counts: tuple[int, int, int, int]
    sentence: str


def judged(result: TierResult) -> list[Judged]:
    """Return every claim of a result file with its verdict."""
    return [
        _of_costs(claim, claim.costs, result.costs.parts if result.costs else {})
        if claim.costs is not None
        else _of_findings(claim, result.table(str(claim.table)), result)
        for claim in result.claims
    ]


def verdict(supporting: int, opposing: int) -> Verdict:
    """Return the verdict for the numbers of comparisons for and against a claim."""
    if supporting:
        return "mixed" if opposing else "supported"
    return "refuted" if opposing else "open"


def side(ratio: CostRatio) -> Side:
    """Return the side of 1 on which the whole spread of a ratio is."""
    if ratio.low == ratio.high:
        return "no spread"
    return "above 1" if ratio.low > 1 else "below 1" if ratio.high < 1 else "around 1"


def joined(names: Sequence[str]) -> str:
    """Return names as "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _of_findings(claim: Claim, table: TableResult, result: TierResult) -> Judged:
    wanted, comparison = claim.variants or [], table.comparison
    found = {each.variant: each for each in comparison.differences if each.metric == claim.metric}
    named: dict[str, list[str]] = {}
    clear: list[str] = []
    for variant in wanted:
        finding = found[variant].finding if variant in found else "no data"
        said = _with_seeds(variant, found.get(variant), comparison)
        if finding in ("better", "worse"):
            clear.append(variant)
            said += _by(found[variant])
        named.setdefault("none" if finding in ("no claim", "no data") else finding, []).append(said)
    better, worse = len(named.get("better", [])), len(named.get("worse", []))
    parts = [
        f"{len(named[finding])} {said} ({joined(named[finding])})"
        for finding, said in _SAID.items()
        if finding in named
    ]
    about = (
        f"{table.title}: {_counted(len(wanted), 'comparison')} with {comparison.baseline} in {title(str(claim.metric))}"
    )
    said = [joined(parts), *_not_ruled_out([name for name in wanted if name not in clear], found)]
    helped = [name for name in clear if found[name].finding == "better"]
    sentence = " ".join([f"{about}, {'; '.join(said)}.", *cautions(table, helped, result)])
    counts = (len(wanted), better, worse, len(wanted) - better - worse)
    return Judged(claim, verdict(better, worse), counts, sentence)


def _by(found: Difference) -> str:
    """Return the interval of a difference that is better or worse, as its size."""
    if found.t_interval_95 is None:
        return ""
    low, high = sorted(map(abs, found.t_interval_95))
    return f" by {number(low)} to {number(high)}"


def cautions(table: TableResult, better: Sequence[str], result: TierResult) -> Iterator[str]:
    """Yield sentences on other differences between the runs of better methods and of the baseline."""
    baseline, costs = table.comparison.baseline, {name: table.comparison.variants[name].costs for name in better}
    before = table.steps(baseline)
    for name, own in costs.items():
        if own and before and abs(own["steps"] / before - 1) > OTHER_STEPS:
            yield f"{name} took {own['steps']:.1f} steps with the same tokens, {baseline} {before:.1f}."
        if own and own["decision_seconds"] > LONG_DECISIONS * own["train_seconds"]:
            yield f"{name} decides {own['decision_seconds'] / own['train_seconds']:.1f} times as long as it trains."
    yield from partial_pass(table, baseline, result)


def partial_pass(table: TableResult, name: str, result: TierResult) -> Iterator[str]:
    """Yield a sentence if a plain training ends before it has seen the whole pool."""
    seen = table.samples(name) if result.methods.get(name) == {} else None
    if seen is not None and table.pool_samples is not None and seen < table.pool_samples:
        yield f"At this budget {name} trains on about {seen:,.0f} of the {table.pool_samples:,} samples of the pool."


def _with_seeds(variant: str, found: Difference | None, comparison: Comparison) -> str:
    """Return the name of a variant, with its number of seeds if runs are missing."""
    seeds = len(found.seeds) if found else 0
    few = seeds < len(comparison.seeds)
    return f"{variant} with {seeds} of {len(comparison.seeds)} seeds" if few else variant


def _not_ruled_out(wanted: Sequence[str], differences: Mapping[str, Difference]) -> Iterator[str]:
    """Yield the largest differences, to either side, that the intervals contain, and the variants without one."""
    ends: dict[str, tuple[float, str]] = {}
    known = {name: each for name, each in differences.items() if name in wanted and each.t_interval_95 is not None}
    for each in known.values():
        assert each.t_interval_95 is not None
        low, high = each.t_interval_95
        sides = {"higher": high, "lower": -low}
        if each.higher_is_better is not None:
            better, worse = ("higher", "lower") if each.higher_is_better else ("lower", "higher")
            sides = {"better": sides[better], "worse": sides[worse]}
        for name, size in sides.items():
            if size > 0:
                ends[name] = max(ends.get(name, (0.0, "")), (size, each.variant), key=lambda end: end[0])
    unknown = [variant for variant in wanted if variant not in known]
    if ends:
        sizes = [f"{number(size)} {name} ({variant})" for name, (size, variant) in ends.items()]
        yield f"differences of up to {joined(sizes)} cannot be ruled out"
    if unknown:
        yield f"without an interval, no difference can be ruled out for {joined(unknown)}"


def _of_costs(claim: Claim, names: Sequence[str], costs: dict[str, CostPart]) -> Judged:
    every = [(name, pair, ratio) for name in names if name in costs for pair, ratio in costs[name].ratios.items()]
    measured = [each for each in every if not each[2].reckoned]
    reckoned = [each for each in every if each[2].reckoned]
    sides = [side(ratio) for *_, ratio in measured]
    above, below, around = (sides.count(each) for each in ("above 1", "below 1", "around 1"))
    counts = (len(measured), above, below, len(measured) - above - below)
    said = (
        f"{_counted(len(measured), 'measured ratio')} of seconds, {above} above 1, {below} below 1 and {counts[3]} "
        f"neither{_listed(measured)}."
    )
    if reckoned:
        said += f" {_counted(len(reckoned), 'reckoned ratio')}, not counted{_listed(reckoned)}."
        said += "".join(f" {each}" for each in checks_of_reckoning(costs))
    missing = [name for name in names if name not in costs]
    said += f" Not measured: {joined(missing)}." if missing else ""
    # One implementation that is not shown to be slower leaves a claim about all of them open.
    whole = {name for name, *_ in measured} == set(names)
    found = "open" if above and not below and (around or not whole) else verdict(above, below)
    return Judged(claim, found, counts, said)


def _listed(ratios: Sequence[tuple[str, str, CostRatio]]) -> str:
    """Return ratios and the ends of all their spreads, as the rest of a sentence."""
    if not ratios:
        return ""
    each = "; ".join(f"{name}, {pair}, {short(ratio.median)} ({_spread(ratio)})" for name, pair, ratio in ratios)
    low, high = min(ratio.low for *_, ratio in ratios), max(ratio.high for *_, ratio in ratios)
    return f", from {short(low)} to {short(high)}: {each}"


def checks_of_reckoning(costs: Mapping[str, CostPart]) -> Iterator[str]:
    """Yield a sentence for each work whose seconds were both measured as a whole and reckoned."""
    for name, part in costs.items():
        for what, found in part.agreement.items():
            if isinstance(found, dict) and found.keys() >= {"whole", "reckoned"}:
                whole, reckoned = float(found["whole"]), float(found["reckoned"])
                share = 100 * (reckoned / whole - 1)
                yield (
                    f"A check of the reckoning ({name}, {what}): {short(whole)} s measured as a whole, "
                    f"{short(reckoned)} s reckoned, {abs(share):.0f} % {'more' if share > 0 else 'less'}."
                )


def _spread(ratio: CostRatio) -> str:
    single = side(ratio) == "no spread"
    return "a single pair" if single else f"{short(ratio.low)} to {short(ratio.high)}"


def short(value: float) -> str:
    """Return a number with three significant digits, or without decimals from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _counted(number_of: int, thing: str) -> str:
    return f"{number_of} {thing}{'' if number_of == 1 else 's'}"
