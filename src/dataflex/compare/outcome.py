"""The joint result of the runs of a comparison: the runs that can be compared, means, differences and costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dataflex.compare.experiment import STDERR, Experiment, Run, samples_per_step
from dataflex.compare.result import COSTS, Result, cost_notes, failure_of, read_result
from dataflex.compare.statistics import Difference, corrected, correction_line, difference, sentence

_DEFAULT_CLAIMS = (
    "token_weighted_loss",
    "unweighted_loss",
    "token_weighted_bits_per_byte",
    "token_weighted_accuracy",
)
_TASK_CLAIMS = ("acc", "exact_match")
_TOO_LONG = 1.05
"""Spent over budget, as a factor. Runs above it are named in a note."""


@dataclass(frozen=True)
class Row:
    """One run in the result.

    Attributes:
        run: the run.
        result: its metrics and costs. None if the run is not complete.
        problem: the reason why the run is not compared. None if it is compared.
    """

    run: Run
    result: Result | None
    problem: str | None

    @property
    def status(self) -> str:
        """One of ``compared``, ``left out``, ``failed`` and ``missing``."""
        if self.problem is None:
            return "compared"
        return "left out" if self.result is not None else "failed" if failure_of(self.run) else "missing"


@dataclass(frozen=True)
class Outcome:
    """The result of a comparison.

    Attributes:
        experiment: the comparison.
        rows: every run.
        claims: the metrics whose differences get a finding.
        differences: the difference of every variant but the baseline, for every claim.
        notes: further facts that a reader needs.
    """

    experiment: Experiment
    rows: tuple[Row, ...]
    claims: tuple[str, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def compared(self, variant: str) -> dict[int, Result]:
        """Return seed -> result for the runs of a variant that are compared."""
        return {
            row.run.seed: row.result
            for row in self.rows
            if row.run.variant == variant and row.result is not None and row.problem is None
        }

    def values(self, variant: str, metric: str) -> dict[int, float]:
        """Return seed -> value of a metric for the compared runs of a variant that have it."""
        found = self.compared(variant)
        return {seed: result.metrics[metric] for seed, result in found.items() if metric in result.metrics}

    def higher_is_better(self, metric: str) -> bool | None:
        """Return the direction of a metric, or None if no run knows it or the runs disagree."""
        known = {row.result.higher_is_better.get(metric) for row in self.rows if row.result is not None} - {None}
        return known.pop() if len(known) == 1 else None

    def costs(self, variant: str) -> dict[str, float]:
        """Return each cost of a variant as the mean over its complete runs. Empty without a complete run."""
        found = [row.result.costs for row in self.rows if row.run.variant == variant and row.result is not None]
        return {name: sum(each.get(name, 0.0) for each in found) / len(found) for name in COSTS} if found else {}

    def chosen(self, variant: str) -> dict[str, float]:
        """Return the share of each data set among the samples that a variant's runs chose, as the mean over the runs.

        Empty if no complete run of the variant decided anything.
        """
        found = [row.result.chosen for row in self.rows if row.run.variant == variant and row.result is not None]
        deciding = [counts for counts in found if sum(counts.values())]
        names = dict.fromkeys(name for counts in deciding for name in counts)
        shares = {name: [counts.get(name, 0) / sum(counts.values()) for counts in deciding] for name in names}
        return {name: sum(each) / len(each) for name, each in shares.items()}

    @property
    def sentences(self) -> list[str]:
        """One sentence per difference about the conclusion it supports, then one about their correction."""
        settings = self.experiment.settings
        made = sum(each.p_value is not None for each in self.differences)
        said = [sentence(each, str(settings.equal), len(settings.seeds), made) for each in self.differences]
        if made:
            said.append(correction_line(made))
        return said


def gather(experiment: Experiment) -> Outcome:
    """Read every complete run and compare the runs."""
    results = [(run, read_result(run, experiment)) for run in experiment.runs]
    found = [result for _, result in results if result is not None]
    claims = experiment.claims or _default_claims(found)
    fingerprint = _usual_fingerprint(found)
    needed = [metric for metric in claims if any(metric in each.metrics or metric in each.not_finite for each in found)]
    rows = tuple(Row(run, result, _problem(run, result, experiment, fingerprint, needed)) for run, result in results)
    outcome = Outcome(experiment, rows, claims, (), ())  # without differences: they are computed from its values
    baseline = experiment.settings.baseline
    differences = [
        difference(
            variant,
            baseline,
            metric,
            outcome.values(variant, metric),
            outcome.values(baseline, metric),
            outcome.higher_is_better(metric),
        )
        for variant in experiment.settings.variants
        if variant != baseline
        for metric in claims
    ]
    return Outcome(experiment, rows, claims, corrected(differences), tuple(_notes(experiment, rows)))


def _usual_fingerprint(results: Sequence[Result]) -> str | None:
    """Return the most frequent fingerprint of the runs. Of equally frequent ones the first counts."""
    counted = Counter(result.fingerprint for result in results)
    return counted.most_common(1)[0][0] if counted else None


def _problem(
    run: Run, result: Result | None, experiment: Experiment, fingerprint: str | None, needed: Sequence[str]
) -> str | None:
    """Return the reason why a run is not compared, or None if it is."""
    if result is None:
        return failure_of(run) or "the run is not complete yet"
    if result.fingerprint != fingerprint:
        return f"its evaluation data differs: fingerprint {result.fingerprint}, and {fingerprint} in the other runs"
    for metric in needed:
        if metric in result.not_finite:
            of_task = metric.partition("/")[0] in result.tasks
            return f"{metric} is not finite{'' if of_task else ': training diverged'}"
        if metric not in result.metrics:
            return f"the run has no {metric}, which other runs have"
    return budget_problem(run, result, experiment)


def budget_problem(run: Run, result: Result, experiment: Experiment) -> str | None:
    """Return how a run missed the equal budget, or None if it met the budget.

    A run with a budget of N tokens must reach N with its last step. So no earlier logged step may have reached N, and
    the excess must be below the most tokens that one step can hold (its samples times ``cutoff_len``).
    """
    equal, costs = experiment.settings.equal, result.costs
    if equal.steps is not None:
        return None if costs["steps"] == equal.steps else f"{costs['steps']:,.0f} steps, not {equal.steps:,}"
    if equal.wall_clock is not None:
        seconds = costs["train_seconds"] + costs["decision_seconds"]
        short = seconds < equal.wall_clock - 0.01  # the seconds on record are rounded
        return f"{seconds:,.1f} seconds of training and decisions, not {equal.wall_clock:,.1f}" if short else None
    assert equal.tokens is not None
    said = f"{costs['tokens']:,.0f} tokens trained on"
    if costs["tokens"] < equal.tokens:
        return f"{said}, fewer than the {equal.tokens:,} of the budget"
    before = result.spent_before
    if before is not None and before >= equal.tokens:
        return f"{said}, more than one step over the budget of {equal.tokens:,}: {before:,.0f} before the last step"
    step = samples_per_step(run.configuration, run.processes) * float(run.configuration.get("cutoff_len") or 2048)
    if costs["tokens"] - equal.tokens >= step:
        return f"{said}, more than one step over the budget of {equal.tokens:,}: a step holds {step:,.0f} at most"
    return None


def _default_claims(results: Sequence[Result]) -> tuple[str, ...]:
    """Return the losses, bits per byte and accuracy over the evaluation data, and the first metric of every task."""
    known = list(dict.fromkeys(name for result in results for name in (*result.metrics, *result.not_finite)))
    single = all(len(result.domains) < 2 for result in results)  # then both averages are equal
    claims = [name for name in _DEFAULT_CLAIMS if name in known and not (single and name == "unweighted_loss")]
    for task in dict.fromkeys(task for result in results for task in result.tasks):
        names = [name.partition("/")[2] for name in known if name.startswith(f"{task}/") and name.count("/") == 1]
        own = [name for name in names if not name.endswith(STDERR)]
        claims += [f"{task}/{name}" for name in [name for name in _TASK_CLAIMS if name in own][:1] or own[:1]]
    return tuple(claims)


def _notes(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    notes = []
    seeds = len(experiment.settings.seeds)
    left_out = [row for row in rows if row.problem is not None]
    if left_out:
        notes.append(f"{len(left_out)} of {len(rows)} runs are not compared; the table of runs has the reasons.")
    limit = experiment.settings.equal.wall_clock
    if limit is not None:
        over = [
            f"{row.run.name} ({spent:,.1f})"
            for row in rows
            if row.result is not None
            and (spent := row.result.costs["train_seconds"] + row.result.costs["decision_seconds"]) > _TOO_LONG * limit
        ]
        if over:
            notes.append(
                f"More than 5 % over the {limit:,.0f} seconds, because of a long last step or decision: "
                f"{', '.join(over)}."
            )
    tokens = experiment.settings.equal.tokens
    if tokens is not None:
        most = max((row.result.costs["tokens"] for row in rows if row.result is not None), default=0)
        if most > _TOO_LONG * tokens:
            notes.append(f"A run ends with a whole step, so up to {most:,.0f} tokens were trained on, not {tokens:,}.")
    notes += cost_notes([row.result for row in rows if row.result is not None])
    if 1 < seeds < 30:
        notes.append(
            "Findings rest on the t test of the differences by seed. The bootstrap interval is too narrow for "
            f"{seeds} seeds, so nothing is concluded from it."
        )
    for task in dict.fromkeys(name for row in rows if row.result is not None for name in row.result.chance):
        chance = next(row.result.chance[task] for row in rows if row.result and task in row.result.chance)
        notes.append(f"{task}: guessing gives {chance:.3f}.")
    return notes
