"""The tables of the results page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml
from page_claims import RULES, Judged, checks_of_reckoning, joined, partial_pass, short
from page_form import Comparison, CostPart, Costs, Run, SharedCost, TableResult, TierResult

from dataflex.compare.statistics import number, signed, title
from dataflex.report.tables import NOTHING, Table

AVERAGES = ("token_weighted", "unweighted")

FAMILIES = ("select", "mix", "order", "weight")

TRACKS = {"A": "instruction tuning towards a target", "B": "pre-training on a mixture of domains"}

_CONTROLS: list[tuple[dict[str, Any], str]] = [
    ({"select": {"method": "random"}}, "a control: the samples of each round are drawn at random from the pool"),
    ({}, "a control: plain training on the pool in a random order, each sample once, until the budget is used up"),
    ({"mix": {"method": "proportional", "size": "tokens"}}, "a control: the shares of the domains are their tokens"),
]
"""Section -> what it stands for."""

_WORDS = {
    "validation": "the validation samples of the target",
    "embeddings": "a folder that all runs share",
    "reference": "a model that is trained on samples outside the pool",
    "answer": "the pattern of the target's answers",
    "doremi": "the average weights that DoReMi's proxy found",
    "doge": "the average weights that DoGE's proxy found",
    "regmix_mixtures": "the mixtures of RegMix's small models",
    "regmix_losses": "the losses of RegMix's small models",
}
"""Word in braces -> what a setting has instead."""

_NOT_SHOWN = ("The bootstrap interval is too narrow", "complete runs were taken over from")
"""Parts of the comparison's notes that the page leaves out: it has no bootstrap intervals, and it says itself which
runs tables have in common."""

_QUANTITIES = {
    "largest_difference": "the largest absolute difference.",
    "rms_difference": "the root of the mean squared difference.",
    "bound_of_the_standard_deviation": "1 / sqrt(k) for k projected dimensions, the largest standard deviation of a "
    "projected cosine. The rms_difference should not be far above it.",
    "spearman": "the rank correlation of the scores. Of a handful of samples it says little.",
    "largest_difference_of_the_mean": "of the weights of the domains, averaged over the steps.",
    "largest_difference_of_the_last": "of the weights of the domains after the last step.",
    "largest_distance_from_equal_weights": "how far the last weights are from equal ones. Near 0 an agreement would "
    "say nothing.",
}
"""Name of a figure in the table of agreement -> its meaning."""


def summary_tables(results: Mapping[str, TierResult]) -> list[Table]:
    """Return one table per tier and track, with one row per task and method: its findings and its costs."""
    found = []
    for tier, result in results.items():
        for track, name in TRACKS.items():
            tables = [table for table in result.tables if table.track == track and not table.name.endswith("-orders")]
            if tables:
                found.append(_summary_table(f"{tier.replace('_', ' ').capitalize()} tier: {name}", tables, result))
    return found


def _summary_table(name: str, tables: Sequence[TableResult], result: TierResult) -> Table:
    baselines = list(dict.fromkeys(table.comparison.baseline for table in tables))
    subjects: dict[str, dict[str, TableResult]] = {}
    for table in tables:
        subjects.setdefault(table.subject, {})[table.comparison.baseline] = table
    header = ["task", "method", *(f"against {each}" for each in baselines)]
    rows = []
    for own in subjects.values():
        first = next(iter(own.values()))
        task = first.title.partition(": against")[0]
        for variant in first.comparison.variants:
            cells = [_summary_cell(own.get(baseline), variant) for baseline in baselines]
            train, decide, ratio, _, steps = _cost_cells(first.comparison.variants[variant].costs)
            rows.append([task, variant, *cells, train, decide, ratio, _once(variant, _shared(first, result)), steps])
    metrics = dict.fromkeys(title(table.comparison.claims[0]) for table in tables)
    notes = (
        f"Findings, and the mean difference from the baseline, in {joined(list(metrics))}. The seconds are means of "
        "the complete runs. Once s: seconds of work that all runs of a method share. The sections of the tables have "
        "the intervals.",
    )
    columns = ["train s", "decide s", "decide / train", "once s", "steps"]
    return Table(name, [*header, *columns], rows, len(header), notes)


def _summary_cell(table: TableResult | None, variant: str) -> str:
    if table is None:
        return NOTHING
    comparison = table.comparison
    if variant == comparison.baseline:
        return "baseline"
    metric = comparison.claims[0]
    found = [each for each in comparison.differences if (each.variant, each.metric) == (variant, metric)]
    return NOTHING if not found or found[0].mean is None else f"{found[0].finding} ({signed(found[0].mean)})"


def method_table(results: Mapping[str, TierResult], pages: Sequence[str]) -> Table:
    """Return one row per method: its section in the board, and its pages, paths from the folder of the docs.

    Args:
        results: tier -> its result.
        pages: the pages that exist.
    """
    sections = {name: section for result in results.values() for name, section in result.methods.items()}
    rows = []
    for name, section in sections.items():
        wanted = [f"methods/{family}-{section[family]['method']}.md" for family in FAMILIES if family in section]
        setting = yaml.safe_dump(section, default_flow_style=True, sort_keys=False, width=1000).strip()[1:-1]
        rows.append([name, setting or NOTHING, " ".join(each for each in wanted if each in pages) or NOTHING])
    controls = [f"{name}: {said}." for name, own in sections.items() for section, said in _CONTROLS if own == section]
    words = [f"{{{word}}}: {said}." for word, said in _WORDS.items() if any(f"{{{word}}}" in row[1] for row in rows)]
    return Table("Methods", ["method", "setting", "page"], rows, 3, (*controls, *words))


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


def tier_table(results: Mapping[str, TierResult], tiers: Mapping[str, str]) -> Table:
    """Return one row per tier: how, when and where it was run.

    Args:
        results: tier -> its result.
        tiers: tier -> the command that runs it.
    """
    rows = []
    for tier in tiers:
        found = results.get(tier)
        if found is None:
            rows.append([tier, tiers[tier], "not run", *[NOTHING] * 4])
        else:
            machine = _machine(found.machine)
            made = [tiers[tier], found.command, found.date, machine, _listed(found.versions)]
            rows.append([tier, *made, duration(found.seconds)])
    notes = ("The last command as recorded is that of run.py, which the command starts.",)
    header = ["tier", "command", "last command as recorded", "date", "machine", "versions", "wall time"]
    return Table("Tiers", header, rows, 6, notes)


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
    found = [finding_table(table, result), cost_table(table, _shared(table, result))]
    if table.track == "A":
        found.append(seed_table("Losses on the other data sets", comparison, other_losses(comparison), "_loss"))
        found.append(seed_table("Accuracy in tasks", comparison, accuracies(comparison), ""))
    else:
        for ending, name in (("_bits_per_byte", "Bits per byte by domain"), ("_perplexity", "Perplexity by domain")):
            found.append(seed_table(name, comparison, _measured(comparison, ending), ending))
    if table.name in result.chosen:
        found.append(chosen_table(result.chosen[table.name]))
    return [each for each in found if each.rows]


def _shared(table: TableResult, result: TierResult) -> list[SharedCost]:
    return [each for each in result.shared_costs if each.tables is None or table.name in each.tables]


def finding_table(table: TableResult, result: TierResult) -> Table:
    """Return one row per variant and claimed metric, the baseline first."""
    comparison = table.comparison
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
    notes += [each for name in comparison.variants for each in partial_pass(table, name, result)]
    notes += _not_compared(comparison)
    notes += [note for note in comparison.notes if not any(part in note for part in _NOT_SHOWN)]
    return Table("Findings", header, rows, 3, (*notes, *_origins(table, result)))


def own_runs(table: TableResult) -> list[Run]:
    """Return the complete runs that were made for a table, and not for another one."""
    return [run for run in table.comparison.runs if run.metrics and run.taken_over_from is None]


def _origins(table: TableResult, result: TierResult) -> Iterator[str]:
    """Yield sentences on the runs that were made for other tables, or elsewhere."""
    titles = {each.name: each.title for each in result.tables}
    complete = [run for run in table.comparison.runs if run.metrics]
    siblings: list[str] = []
    others: list[str] = []
    for run in complete:
        if run.taken_over_from is not None:
            origin, own = PurePath(run.taken_over_from), PurePath(run.folder).parents[2]
            known = origin.parent == own.parent and origin.name in titles
            (siblings if known else others).append(titles[origin.name] if known else run.taken_over_from)
    if siblings:
        named = joined([f'"{each}"' for each in dict.fromkeys(siblings)])
        yield f"{len(siblings)} of {len(complete)} runs are those of {named}: a run that tables share is made once."
    if others:
        yield (
            f"{len(others)} of {len(complete)} runs were taken over from {joined(list(dict.fromkeys(others)))}. "
            "Seconds of different machines cannot be compared."
        )


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


def cost_table(table: TableResult, shared: Sequence[SharedCost]) -> Table:
    """Return one row per variant with the means of its complete runs, and the seconds of work shared by its runs."""
    comparison = table.comparison
    header = ["method", "runs", "at once", "train s", "decide s", "decide / train", "tokens", "steps", "once s"]
    rows = []
    for variant, found in comparison.variants.items():
        own = [run for run in comparison.runs if run.variant == variant and run.metrics]
        at_once = sorted({run.runs_at_once for run in own if run.runs_at_once is not None})
        counts = " to ".join(str(each) for each in dict.fromkeys((at_once[0], at_once[-1]))) if at_once else NOTHING
        rows.append([variant, str(len(own)), counts, *_cost_cells(found.costs), _once(variant, shared)])
    notes = ["At once: runs at a time. If there are several, the seconds include waiting for each other."]
    if table.step_samples is not None:
        notes.append(f"A step has {table.step_samples} samples.")
    notes += [
        f"Once: {each.what}, {each.seconds:,.1f} s, done once for all runs of {', '.join(users)}."
        for each in shared
        if (users := [variant for variant in each.used_by if variant in comparison.variants])
    ]
    return Table("Cost, mean of the complete runs", header, rows, 1, tuple(notes))


def _cost_cells(costs: Mapping[str, float]) -> list[str]:
    """Return seconds of training and decisions, their ratio, tokens and steps."""
    if not costs:
        return [NOTHING] * 5
    train, decide = costs["train_seconds"], costs["decision_seconds"]
    ratio = f"{decide / train:.3f}" if train else NOTHING
    return [f"{train:,.1f}", f"{decide:,.1f}", ratio, f"{costs['tokens']:,.0f}", f"{costs['steps']:,.1f}"]


def _once(variant: str, shared: Sequence[SharedCost]) -> str:
    seconds = [each.seconds for each in shared if variant in each.used_by]
    return f"{sum(seconds):,.1f}" if seconds else NOTHING


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


def chance_table(result: TierResult) -> Table:
    """Return one row per task and model: whether the model is above the accuracy of guessing before any training."""
    header = ["task", "model", "above chance", "questions", "accuracy", "std. error", "chance"]
    rows = []
    for each in result.above_chance:
        half = 1.96 * each.stderr
        above = "yes" if each.accuracy - half > each.chance else "no"
        said = f"{above} ({each.accuracy:.2f} ± {half:.2f})"
        rows.append([each.task, each.model, said, f"{each.questions:,}"])
        rows[-1] += [number(each.accuracy), number(each.stderr), number(each.chance)]
    tasks = dict.fromkeys(each.task for each in result.above_chance)
    unused = [task for task in tasks if not any(f"-{task}-" in table.name for table in result.tables)]
    notes = ["Above chance: accuracy minus 1.96 standard errors is above chance. If not, the task measures little."]
    if unused:
        notes.append(
            "All targets of the board that have choices are checked. No table of this tier has the target "
            f"{joined(unused)}."
        )
    return Table("Accuracy before the training", header, rows, 3, tuple(notes))


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
    meanings = [
        f"{name}: {said}"
        for name, said in _QUANTITIES.items()
        if any(row[1].endswith(f", {name}") for row in agreement)
    ]
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
        Table(
            "Agreement of the results",
            ["part", "quantity", "value"],
            agreement,
            2,
            (*meanings, *checks_of_reckoning(costs)),
        ),
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
