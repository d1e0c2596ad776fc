"""Claims about methods, judged by the findings of the comparisons or by the spread of the ratios of costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    "A claim about costs is judged by ratios: seconds of the other implementation divided by those of DataFlex. "
    "Supported: the whole measured spread of every ratio is above 1, and every part is measured. Mixed: some spreads "
    "are above and some below 1. Refuted: at least one spread is below 1, none is above. Open: anything else. A ratio "
    "of a single pair of measurements has no spread and does not count.",
)


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
        else _of_findings(claim, result.table(str(claim.table)))
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


def _of_findings(claim: Claim, table: TableResult) -> Judged:
    wanted, comparison = claim.variants or [], table.comparison
    found = {each.variant: each for each in comparison.differences if each.metric == claim.metric}
    named: dict[str, list[str]] = {}
    for variant in wanted:
        finding = found[variant].finding if variant in found else "no data"
        named.setdefault("none" if finding in ("no claim", "no data") else finding, []).append(
            _with_seeds(variant, found.get(variant), comparison)
        )
    better, worse = len(named.get("better", [])), len(named.get("worse", []))
    parts = [
        f"{len(named[finding])} {said} ({joined(named[finding])})"
        for finding, said in _SAID.items()
        if finding in named
    ]
    about = (
        f"{table.title}: {_counted(len(wanted), 'comparison')} with {comparison.baseline} in {title(str(claim.metric))}"
    )
    sentence = f"{about}, {joined(parts)}; {_not_ruled_out(wanted, found)}."
    counts = (len(wanted), better, worse, len(wanted) - better - worse)
    return Judged(claim, verdict(better, worse), counts, sentence)


def _with_seeds(variant: str, found: Difference | None, comparison: Comparison) -> str:
    """Return the name of a variant, with its number of seeds if runs are missing."""
    seeds = len(found.seeds) if found else 0
    few = seeds < len(comparison.seeds)
    return f"{variant} with {seeds} of {len(comparison.seeds)} seeds" if few else variant


def _not_ruled_out(wanted: Sequence[str], differences: Mapping[str, Difference]) -> str:
    """Return the largest differences, to either side, that the intervals contain, and the variants without one."""
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
    said = []
    if ends:
        sizes = [f"{number(size)} {name} ({variant})" for name, (size, variant) in ends.items()]
        said.append(f"differences of up to {joined(sizes)} cannot be ruled out")
    if unknown:
        said.append(f"without an interval, no difference can be ruled out for {joined(unknown)}")
    return "; ".join(said)


def _of_costs(claim: Claim, names: Sequence[str], costs: dict[str, CostPart]) -> Judged:
    missing = [name for name in names if name not in costs]
    ratios = [(name, pair, ratio) for name in names if name in costs for pair, ratio in costs[name].ratios.items()]
    sides = [side(ratio) for *_, ratio in ratios]
    above, below, around = (sides.count(each) for each in ("above 1", "below 1", "around 1"))
    counts = (len(ratios), above, below, len(ratios) - above - below)
    said = [
        f"{name}, {pair}, {short(ratio.median)} ({_spread(ratio)}{', reckoned' if ratio.reckoned else ''})"
        for name, pair, ratio in ratios
    ]
    said += [f"{joined(missing)} not measured"] if missing else []
    reach = ""
    if ratios:
        low, high = min(ratio.low for *_, ratio in ratios), max(ratio.high for *_, ratio in ratios)
        reach = f"; the measured ratios reach from {short(low)} to {short(high)}"
    sentence = (
        f"{_counted(len(ratios), 'ratio')} of seconds, {above} above 1, {below} below 1 and {counts[3]} neither: "
        f"{'; '.join(said)}{reach}."
    )
    # One implementation that is not shown to be slower leaves a claim about all of them open.
    found = "open" if above and not below and (around or missing) else verdict(above, below)
    return Judged(claim, found, counts, sentence)


def _spread(ratio: CostRatio) -> str:
    single = side(ratio) == "no spread"
    return "a single pair" if single else f"{short(ratio.low)} to {short(ratio.high)}"


def short(value: float) -> str:
    """Return a number with three significant digits, or without decimals from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _counted(number_of: int, thing: str) -> str:
    return f"{number_of} {thing}{'' if number_of == 1 else 's'}"
