"""The tables of the results page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from page_claims import RULES, Judged, joined, short
from page_form import AboveChance, Comparison, CostPart, Costs, SharedCost, TableResult, TierResult

from dataflex.compare.statistics import number, signed, title
from dataflex.report.tables import NOTHING, Table

AVERAGES = ("token_weighted", "unweighted")


def claim_table(claims: Mapping[str, Sequence[Judged]]) -> Table:
    """Return one row per tier and claim."""
    header = ["tier", "claim", "source", "metric", "verdict", "comparisons", "for", "against", "neither"]
    rows = [
        [
            tier,
            each.claim.text,
            each.claim.source or NOTHING,
            title(each.claim.metric) if each.claim.metric else "seconds",
            each.verdict,
            *map(str, each.counts),
        ]
        for tier, found in claims.items()
        for each in found
    ]
    return Table("Claims", header, rows, 5, RULES)


def tier_table(results: Mapping[str, TierResult], tiers: Sequence[str]) -> Table:
    """Return one row per tier: how, when and where it was run."""
    rows = []
    for tier in tiers:
        found = results.get(tier)
        if found is None:
            rows.append([tier, "not run", *[NOTHING] * 4])
        else:
            machine = _machine(found.machine)
            rows.append([tier, found.command, found.date, machine, _listed(found.versions), duration(found.seconds)])
    return Table("Tiers", ["tier", "command", "date", "machine", "versions", "wall time"], rows, 5)


def _machine(machine: Mapping[str, Any]) -> str:
    return _listed({key: value for key, value in machine.items() if key != "versions"})


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def duration(seconds: float) -> str:
    """Return seconds as a text in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def tables_of(table: TableResult, result: TierResult) -> list[Table]:
    """Return the tables of one comparison."""
    comparison = table.comparison
    shared = [each for each in result.shared_costs if each.tables is None or table.name in each.tables]
    found = [finding_table(comparison), cost_table(comparison, shared)]
    if table.track == "A":
        found.append(seed_table("Losses on the other data sets", comparison, other_losses(comparison), "_loss"))
        found.append(seed_table("Accuracy in tasks", comparison, accuracies(comparison), ""))
    else:
        for ending, name in (("_bits_per_byte", "Bits per byte by domain"), ("_perplexity", "Perplexity by domain")):
            found.append(seed_table(name, comparison, _measured(comparison, ending), ending))
    if table.name in result.chosen:
        found.append(chosen_table(result.chosen[table.name]))
    return [each for each in found if each.rows]


def finding_table(comparison: Comparison) -> Table:
    """Return one row per variant and claimed metric, the baseline first."""
    header = [
        "method",
        "metric",
        "finding",
        "seeds",
        "mean",
        "eval std. error",
        "difference",
        "95 % interval",
        "p (Holm)",
    ]
    rows = []
    for metric in comparison.claims:
        differences = [each for each in comparison.differences if each.metric == metric]
        higher = {each.higher_is_better for each in differences} - {None}
        better = f"{'higher' if higher.pop() else 'lower'} is better" if len(higher) == 1 else "direction not known"
        named = f"{title(metric)} ({better})"
        seeds = str(len(_seeds(comparison, comparison.baseline, metric)))
        start = [comparison.baseline, named, "baseline", seeds]
        rows.append([*start, *_mean_and_error(comparison, comparison.baseline, metric), *[NOTHING] * 3])
        for each in differences:
            interval = each.t_interval_95
            rows.append(
                [
                    each.variant,
                    named,
                    each.finding,
                    str(len(each.seeds)),
                    *_mean_and_error(comparison, each.variant, metric),
                    NOTHING if each.mean is None else signed(each.mean),
                    NOTHING if interval is None else f"[{signed(interval[0])}, {signed(interval[1])}]",
                    _probability(each.p_holm),
                ]
            )
    notes = [
        f"Difference: method minus {comparison.baseline}, mean over the seeds. Eval std. error: of one model's "
        "mean over the samples of the evaluation set. It is not the error of the difference, whose seeds share these "
        "samples."
    ]
    return Table("Findings", header, rows, 3, (*notes, *_not_compared(comparison), *comparison.notes))


def _not_compared(comparison: Comparison) -> Iterator[str]:
    """Yield a line for the runs of a variant that are left out for the same reason."""
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for run in comparison.runs:
        if run.problem is not None:
            seeds.setdefault((run.variant, run.status, " ".join(run.problem.split())), []).append(str(run.seed))
    for (variant, status, problem), own in seeds.items():
        yield f"Not compared: {variant}, seed{'s' if len(own) > 1 else ''} {joined(own)} ({status}): {problem}"


def _seeds(comparison: Comparison, variant: str, metric: str) -> list[float]:
    """Return the values of a metric in the compared runs of a variant."""
    compared = (run for run in comparison.runs if run.variant == variant and run.problem is None)
    return [run.metrics[metric] for run in compared if metric in run.metrics]


def _mean_and_error(comparison: Comparison, variant: str, metric: str) -> list[str]:
    own = comparison.variants[variant]
    return [_number(own.means[metric]), _number(own.stderr.get(metric))]


def _number(value: float | None) -> str:
    return NOTHING if value is None else number(value)


def _probability(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4f}" if value >= 0.0001 else "<0.0001"


def cost_table(comparison: Comparison, shared: Sequence[SharedCost]) -> Table:
    """Return one row per variant with the means of its complete runs, and the seconds of work shared by its runs."""
    header = ["method", "runs", "at once", "train s", "decide s", "decide / train", "tokens", "steps", "once s"]
    rows = []
    for variant, found in comparison.variants.items():
        costs = found.costs
        own = [run for run in comparison.runs if run.variant == variant and run.metrics]
        once = [each.seconds for each in shared if variant in each.used_by]
        measured = [NOTHING] * 5
        if costs:
            train, decide = costs["train_seconds"], costs["decision_seconds"]
            ratio = f"{decide / train:.3f}" if train else NOTHING
            measured = [f"{train:,.1f}", f"{decide:,.1f}", ratio, f"{costs['tokens']:,.0f}", f"{costs['steps']:,.1f}"]
        at_once = sorted({run.runs_at_once for run in own if run.runs_at_once is not None})
        counts = " to ".join(str(each) for each in dict.fromkeys((at_once[0], at_once[-1]))) if at_once else NOTHING
        rows.append([variant, str(len(own)), counts, *measured, f"{sum(once):,.1f}" if once else NOTHING])
    notes = ["At once: runs at a time. If there are several, the seconds include waiting for each other."]
    notes += [
        f"Once: {each.what}, {each.seconds:,.1f} s, done once for all runs of {', '.join(users)}."
        for each in shared
        if (users := [variant for variant in each.used_by if variant in comparison.variants])
    ]
    return Table("Cost, mean of the complete runs", header, rows, 1, tuple(notes))


def other_losses(comparison: Comparison) -> list[str]:
    """Return the losses of single data sets that have no findings."""
    averages = [f"{average}_loss" for average in AVERAGES]
    return [each for each in _measured(comparison, "_loss") if each not in [*comparison.claims, *averages]]


def accuracies(comparison: Comparison) -> list[str]:
    """Return the accuracies of tasks that have no findings."""
    found = dict.fromkeys(metric for run in comparison.runs if run.problem is None for metric in run.metrics)
    return [each for each in found if each.endswith(("/acc", "/exact_match")) and each not in comparison.claims]


def _measured(comparison: Comparison, ending: str) -> list[str]:
    """Return the metrics of the compared runs with an ending, averages first, in the order of the runs."""
    found = dict.fromkeys(
        metric
        for run in comparison.runs
        if run.problem is None
        for metric in run.metrics
        if metric.endswith(ending) and "/" not in metric
    )
    return sorted(found, key=lambda metric: metric.removesuffix(ending) not in AVERAGES)


def seed_table(name: str, comparison: Comparison, metrics: Sequence[str], ending: str) -> Table:
    """Return one row per variant and one column per metric, whose name is given without its ending."""
    header = ["method", *(title(metric.removesuffix(ending)) for metric in metrics)]
    rows = [
        [variant, *(_spread(_seeds(comparison, variant, metric)) for metric in metrics)]
        for variant in comparison.variants
    ]
    notes = ("Mean ± standard deviation over the seeds. Only the metrics in the table of findings have findings.",)
    return Table(name, header, rows if metrics else [], 1, notes)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return NOTHING
    mean = number(statistics.fmean(values))
    return f"{mean} ± {number(statistics.stdev(values))}" if len(values) > 1 else mean


def chosen_table(chosen: Mapping[str, Mapping[str, float]]) -> Table:
    """Return one row per variant with the share of each source among its chosen samples."""
    sources = list(dict.fromkeys(source for shares in chosen.values() for source in shares))
    rows = [
        [variant, *(f"{shares[source]:.3f}" if source in shares else NOTHING for source in sources)]
        for variant, shares in chosen.items()
    ]
    return Table("Shares of the sources among the chosen samples", ["method", *sources], rows, 1)


def chance_table(found: Sequence[AboveChance]) -> Table:
    """Return one row per task and model: whether the model is above the accuracy of guessing before any training."""
    header = ["task", "model", "above chance", "questions", "accuracy", "std. error", "chance"]
    rows = []
    for each in found:
        above = "yes" if each.accuracy - 1.96 * each.stderr > each.chance else "not shown"
        rows.append([each.task, each.model, above, f"{each.questions:,}"])
        rows[-1] += [number(each.accuracy), number(each.stderr), number(each.chance)]
    note = "Above chance: accuracy minus 1.96 standard errors is above chance. Otherwise the task measures little."
    return Table("Accuracy before the training", header, rows, 3, (note,))


def cost_lines(costs: Costs) -> list[str]:
    """Return the commands that measured the costs, with their machines, and the parts that were skipped."""
    lines = [
        f"{name}: {run.command} ({_machine(run.machine)}, {duration(run.seconds)})"
        for name, run in costs.measured.items()
    ]
    lines.append(
        "The steps of other implementations (authors, earlier release) were written for this benchmark from their "
        "published descriptions. bergson is the package itself."
    )
    return [*lines, *(f"Not measured: {name} ({reason})" for name, reason in costs.skipped.items())]


def cost_part_tables(costs: Mapping[str, CostPart]) -> list[Table]:
    """Return the seconds and the memory of both sides, the ratios, and the agreement of the results."""
    measured = [
        [
            part,
            name,
            "reckoned" if each.reckoned else "measured",
            f"{each.samples:,}",
            short(statistics.median(each.seconds)) if each.seconds else NOTHING,
            f"{short(min(each.seconds))} to {short(max(each.seconds))}" if each.seconds else NOTHING,
            str(len(each.seconds)),
            NOTHING if each.peak_bytes is None else f"{each.peak_bytes / 1e9:.2f}",
        ]
        for part, found in costs.items()
        for name, each in found.variants.items()
    ]
    ratios = [
        [
            part,
            name,
            "reckoned" if each.reckoned else "measured",
            short(each.median),
            f"{short(each.low)} to {short(each.high)}",
        ]
        for part, found in costs.items()
        for name, each in found.ratios.items()
    ]
    agreement = [[part, *each] for part, found in costs.items() for each in _leaves(found.agreement)]
    header = ["part", "implementation", "figures", "samples", "median s", "spread s", "repeats", "peak GB"]
    reckoned = "Reckoned: a part of the seconds is computed from a smaller measurement."
    tables = [
        Table(
            "Seconds and memory",
            header,
            measured,
            3,
            (*(f"{part}: {each.about}." for part, each in costs.items()), reckoned),
        ),
        Table(
            "Ratios of seconds",
            ["part", "ratio", "figures", "median", "spread"],
            ratios,
            3,
            ("Above 1, DataFlex is faster.", reckoned),
        ),
        Table("Agreement of the results", ["part", "quantity", "value"], agreement, 2),
    ]
    return [table for table in tables if table.rows]


def _leaves(value: Any, name: str = "") -> Iterator[list[str]]:
    """Yield name and text of every value in nested mappings and lists."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _leaves(inside, f"{name}, {key}".removeprefix(", "))
    elif isinstance(value, list):
        yield [name, ", ".join(_leaf(each) for each in value)]
    else:
        yield [name, _leaf(value)]


def _leaf(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
