"""``dataflex-cli regmix``: small trainings on many mixtures, and the mixture their losses say is best.

RegMix (Liu et al., ICLR 2025, arXiv 2407.01492). The small trainings are runs of a comparison; the regression and the
search are :mod:`dataflex.mixers.base_regression`. Mixtures are shares of tokens throughout.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dataflex.compare.digests import expanded
from dataflex.compare.experiment import Experiment, Run, joined, planned, read_base
from dataflex.compare.merging import merged, replaced_keys, value_of
from dataflex.compare.plan_table import plan_table
from dataflex.compare.result import failure_of, read_result, state_of
from dataflex.compare.runner import PROGRAM, Workers, execute, set_aside, workers
from dataflex.compare.session import Work, carry_out, say
from dataflex.compare.settings import Base, Equal, ExperimentSettings, problem_of
from dataflex.config import checks
from dataflex.config.loading import SECTION, RunConfig
from dataflex.config.masking import masked
from dataflex.errors import ConfigError, Problem, unknown
from dataflex.files import write_atomically
from dataflex.mixers.base_mixtures import Drawing, Floats, sample_mixtures
from dataflex.mixers.base_regression import (
    INDEX,
    MIN_LIGHTGBM,
    best_mixture,
    cross_validated,
    fit,
    write_table,
)
from dataflex.report.tables import NOTHING, Table, print_tables
from dataflex.workflows.stages import (
    DOMAIN_COLUMN,
    MANAGED,
    MODEL_CHANGES,
    SAME_DATA,
    SET_ITSELF,
    Recipe,
    Stage,
    make_stage,
    read_settings,
)

MIX = f"{SECTION}.mix"
LENGTHS = {
    "max_steps": "steps",
    f"{SECTION}.train_steps": "steps",
    f"{SECTION}.train_tokens": "tokens",
    f"{SECTION}.train_seconds": "wall_clock",
}
"""Keys that say how long a proxy is trained -> the same for a comparison."""

MIXTURES_FILE, LOSSES_FILE, FINAL_FILE = "mixtures.csv", "losses.csv", "final.yaml"
FOLDS = 5
"""Parts of the cross-validation."""


class Sampling(BaseModel):
    """The keys under ``proxies`` that are no keys of a training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(64, ge=2, description="Mixtures, each trained on once.")
    seed: int = Field(1, ge=0, lt=2**32, description="Of the mixtures, the trainings and the search.")
    temperature: float = Field(0.5, ge=0, description="Exponent of the prior: 1: shares of tokens, 0: uniform.")
    min_strength: float = Field(0.1, gt=0, description="Smallest concentration: mixtures of nearly one domain.")
    max_strength: float = Field(5.0, gt=0, description="Largest concentration: mixtures near the prior.")
    strengths: int = Field(15, ge=1, description="Number of concentrations between the two.")
    min_weight: float = Field(2e-4, ge=0, description="Smaller weights become 0.")
    max_epochs: float | None = Field(15.0, gt=0, description="Passes over a domain, at most; none: no bound.")
    budget: float | None = Field(
        None, gt=0, description="Tokens of the final training, for max_epochs; none: those of all domains together."
    )

    def drawing(self, tokens: Floats) -> Drawing:
        """Return the distribution of the mixtures of domains of these tokens, shape (K,)."""
        return Drawing(**self.model_dump(exclude={"count", "seed"}), sizes=tokens)


class RegmixSettings(BaseModel):
    """The keys of a file for ``dataflex-cli regmix``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Base = Field(description="A LLaMA-Factory YAML (path from this file), or its keys.")
    output_dir: str = Field(min_length=1, description="Folder of everything the command writes.")
    proxies: dict[str, Any] = Field(
        description="What the small trainings change in the base, and how mixtures are drawn."
    )
    target: list[str] | None = Field(
        None, min_length=1, description="Evaluation data sets whose mean loss is minimised; none: all."
    )
    regressor: Literal["lightgbm", "linear"] = Field("lightgbm", description="What predicts a loss from a mixture.")
    final: dict[str, Any] = Field(default_factory=dict, description="What the final training changes in the base.")

    @field_validator("target", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("final", mode="before")
    @classmethod
    def _empty_is_the_base(cls, value: Any) -> Any:
        return {} if value is None else value


@dataclass(frozen=True)
class Plan:
    """What was asked for, without problems; no data is loaded yet.

    Attributes:
        path: the file.
        settings: what it says.
        sampling: how mixtures are drawn.
        output: folder of everything.
        proxy: what all proxies share, as a stage.
        final: the final training, with equal shares in the place of those to be found.
        equal: what each proxy is trained for.
        domains: names of the data sets; the values of ``domain_column`` take their place when the data is loaded.
        targets: names of the evaluation data sets that count.
        notes: what the user should be told.
    """

    path: Path
    settings: RegmixSettings
    sampling: Sampling
    output: Path
    proxy: Stage
    final: Stage
    equal: Equal
    domains: tuple[str, ...]
    targets: tuple[str, ...]
    notes: tuple[str, ...]


def regmix(
    path: Path,
    jobs: int | None = None,
    dry_run: bool = False,
    program: Sequence[str] = PROGRAM,
    at_once: Workers | None = None,
) -> int:
    """Train what is missing of the proxies, and write the mixture they point to.

    Args:
        path: the file.
        jobs: proxies at a time; None: one for each CUDA device, one without any.
        dry_run: only print what would be trained.
        program: the command line that trains.
        at_once: instead of ``jobs``: how many proxies go on at once, and where.

    Returns:
        0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: for what is wrong with the file or its data, before anything runs, and where too few proxies
            remain to fit.
    """

    def work() -> Work:
        plan = load(path)
        say(plan.notes)  # loading the data takes a while
        plan, tokens = _with_domains(plan)
        rng = np.random.default_rng(plan.sampling.seed)
        mixtures = sample_mixtures(tokens, plan.sampling.count, rng, plan.sampling.drawing(tokens), distinct=True)

        def table() -> list[Table]:
            experiment = _experiment(plan, mixtures)
            return [plan_table(experiment, {run: state_of(run, experiment) for run in experiment.runs})]

        def run() -> int:
            plan.proxy.write_model()
            experiment = _experiment(plan, mixtures)
            _train(experiment, jobs, program, at_once)
            _find(plan, experiment, tokens, mixtures)
            return 0

        return Work(plan.output, table, run)

    kept = "Proxies that are complete are kept, and others go on from their checkpoints where they have any"
    return carry_out(work, dry_run=dry_run, on_stop=f"stopped. {kept}: dataflex-cli regmix {path}")


def load(path: Path) -> Plan:
    """Read the file, and check the proxies and the final training.

    Raises:
        ConfigError: with every problem of both together.
    """
    settings = read_settings(path, RegmixSettings)
    problems: list[Problem] = []
    notes: list[str] = []
    sampling, changes = _sampling(settings.proxies, problems)
    base, folder = read_base(settings.base, path, problems, notes)
    notes += replaced_keys(base, (*MANAGED, MIX), "command")
    output = expanded(settings.output_dir)
    domains = checks.dataset_names(RunConfig(base, None))
    uniform = {MIX: {"method": "static", "proportions": [1.0] * len(domains), "unit": "tokens"}}
    managed = {f"{MIX}.{key}": SET_ITSELF for key in ("method", "proportions", "unit")}
    managed |= {"dataset": SAME_DATA, DOMAIN_COLUMN: SAME_DATA}
    equal = _equal(base, changes, problems)
    proxy, of_proxy = make_stage(Recipe("proxies", uniform, managed), base, changes, folder, output)
    final, of_final = make_stage(Recipe("final", uniform, managed), base, settings.final, folder, output)
    problems += joined({"proxies": of_proxy, "final": of_final})
    if value_of(base, DOMAIN_COLUMN) is None:
        problems += _domain_problems(domains, settings, sampling, f"name them, or {DOMAIN_COLUMN}.")
    targets: tuple[str, ...] = ()
    if proxy is not None:
        problems += _target_problems(settings, proxy.config)
        targets = tuple(settings.target or checks.dataset_names(proxy.config, "eval_dataset"))
    if settings.regressor == "lightgbm" and find_spec("lightgbm") is None:
        problems.append(
            Problem("regressor", 'lightgbm is not installed: pip install "dataflex[regmix]", or use linear.')
        )
    if problems or proxy is None or final is None or equal is None:
        raise ConfigError(problems=problems, source=str(path))
    plan = Plan(path, settings, sampling, output, proxy, final, equal, domains, targets, tuple(notes))
    stand_ins = replace(plan, domains=("one", "another")) if len(domains) < 2 else plan
    ramp = np.arange(1.0, len(stand_ins.domains) + 1) / sum(range(1, len(stand_ins.domains) + 1))
    _experiment(stand_ins, np.stack([ramp, ramp[::-1]]))  # what a comparison refuses shows before the data is loaded
    return plan


def _domain_problems(
    domains: Sequence[str], settings: RegmixSettings, sampling: Sampling, mend: str
) -> Iterator[Problem]:
    """Yield what keeps mixtures of these domains from being found.

    Args:
        domains: their names.
        settings: what the file says.
        sampling: how mixtures are drawn.
        mend: what to do where there are too few domains.
    """
    if len(domains) < 2:
        yield Problem("base.dataset", f"a mixture is of two or more domains, here {len(domains)}; {mend}")
    if INDEX in domains:
        yield Problem(
            "base.dataset", f"{INDEX!r} is the name of the row numbers in {MIXTURES_FILE}; rename the domain."
        )
    needed = _needed(settings.regressor, domains)
    if sampling.count < needed:
        message = f"{sampling.count}: {settings.regressor} needs {needed} or more with {len(domains)} domains."
        yield Problem("proxies.count", message)


def _sampling(given: Mapping[str, Any], problems: list[Problem]) -> tuple[Sampling, dict[str, Any]]:
    """Return how mixtures are drawn, and the other keys."""
    own = {key: value for key, value in given.items() if key in Sampling.model_fields}
    changes = {key: value for key, value in given.items() if key not in own}
    try:
        return Sampling.model_validate(own), changes
    except ValidationError as error:
        problems += [problem_of(item, ("proxies",), {(): Sampling}) for item in error.errors()]
        return Sampling(), changes


def _equal(base: Mapping[str, Any], changes: Mapping[str, Any], problems: list[Problem]) -> Equal | None:
    """Return what each proxy is trained for."""
    try:
        whole = merged(base, {key: value for key, value in changes.items() if key != MODEL_CHANGES})
    except (OmegaConfBaseException, ValueError):
        return None  # told with the stage
    said = [key for key in LENGTHS if value_of(whole, key) not in (None, -1)]
    if not said:
        problems.append(Problem("proxies", f"needed is one of {', '.join(LENGTHS)}: how long each proxy is trained."))
    if len(said) != 1:
        return None  # more than one is told with the stage
    value = value_of(whole, said[0])
    try:
        return Equal.model_validate({LENGTHS[said[0]]: value})
    except ValidationError as error:
        problems.append(Problem(f"proxies.{said[0]}", f"{error.errors()[0]['msg']}, got {value!r}."))
        return None


def _needed(regressor: str, domains: Sequence[str]) -> int:
    """Return how many proxies a regression needs; a linear one can then be fitted without any one of them."""
    return MIN_LIGHTGBM if regressor == "lightgbm" else len(domains) + 1


def _target_problems(settings: RegmixSettings, config: RunConfig) -> Iterator[Problem]:
    names = checks.dataset_names(config, "eval_dataset")
    if not names:
        yield Problem("base.eval_dataset", "the proxies' losses have to be measured on something; name data sets.")
        return
    for name in settings.target or ():
        if name not in names:
            yield Problem("target", unknown("evaluation data set", name, names))


def _experiment(plan: Plan, mixtures: Floats) -> Experiment:
    """Return the proxies as a comparison of one seed.

    Until their model folder is made, the model it is made from stands for it.

    Raises:
        ConfigError: with what a comparison refuses.
    """
    raw = plan.proxy.yaml()
    if not Path(str(raw["model_name_or_path"])).is_dir():
        raw = {**raw, "model_name_or_path": plan.proxy.source.llamafactory["model_name_or_path"]}
    named = {f"mix-{number:04d}": mixture.tolist() for number, mixture in enumerate(mixtures, 1)}
    settings = ExperimentSettings(
        base=raw,
        output_dir=str(plan.output / "proxies"),
        baseline=next(iter(named)),
        variants={
            name: {f"{MIX}.proportions": dict(zip(plan.domains, shares, strict=True))} for name, shares in named.items()
        },
        seeds=[plan.sampling.seed],
        equal=plan.equal,
    )
    try:
        return planned(settings, plan.path)
    except ConfigError as error:
        problems = [
            replace(each, key=re.sub(r"^base|^variants\.mix-\d+", "proxies", each.key)) for each in error.problems
        ]
        raise ConfigError(problems=problems, source=error.source) from error


def _sizes(plan: Plan) -> tuple[tuple[str, ...], Floats]:
    """Return the names of the domains, and the tokens of each, shape (K,); loads and tokenizes the data."""
    from dataflex.integrations.llamafactory.pool_only import pool_of

    config = plan.proxy.source
    assert config.dataflex is not None
    pool, _ = pool_of(config, config.dataflex.domain_column)
    return pool.domains, pool.domain_tokens.astype(np.float64)


def _with_domains(plan: Plan) -> tuple[Plan, Floats]:
    """Return the plan for the domains that the data has, and the tokens of each, shape (K,).

    Raises:
        ConfigError: if the data cannot be loaded, or mixtures of its domains cannot be found.
    """
    domains, tokens = _sizes(plan)
    problems = list(_domain_problems(domains, plan.settings, plan.sampling, f"{DOMAIN_COLUMN} needs more values."))
    if problems:
        raise ConfigError(problems=problems, source=str(plan.path))
    return replace(plan, domains=domains), tokens


def _train(experiment: Experiment, jobs: int | None, program: Sequence[str], at_once: Workers | None) -> None:
    states = {run: state_of(run, experiment) for run in experiment.runs}
    counts = Counter(states.values())
    print(f"{len(states)} proxies: {', '.join(f'{count} {state}' for state, count in counts.items())}", flush=True)
    missing = [run for run, state in states.items() if state != "complete"]
    if missing:
        execute(experiment, missing, at_once or workers(jobs), program, len(states))


def _find(plan: Plan, experiment: Experiment, tokens: Floats, mixtures: Floats) -> None:
    """Fit what the complete proxies measured, and write and print the mixture that is predicted to be best."""
    names = checks.dataset_names(plan.proxy.config, "eval_dataset")
    found = [_losses(run, experiment, names) for run in experiment.runs]
    left_out = [
        f"{run.variant}: {each}" for run, each in zip(experiment.runs, found, strict=True) if isinstance(each, str)
    ]
    for line in left_out:
        print(f"dataflex: left out: {line}", file=sys.stderr)
    kept = [number for number, each in enumerate(found) if not isinstance(each, str)]
    regressor, seed = plan.settings.regressor, plan.sampling.seed
    needed = _needed(regressor, plan.domains)
    if len(kept) < needed:
        raise ConfigError(
            f"{len(kept)} of {len(found)} proxies can be used, and {regressor} needs {needed}: mend what failed and "
            "give the command again, or raise proxies.count; proxies that are complete are kept."
        )
    mixtures, losses = mixtures[kept], np.array([found[number] for number in kept])
    write_table(plan.output / MIXTURES_FILE, plan.domains, mixtures)
    write_table(plan.output / LOSSES_FILE, names, losses)

    rows, regressions = [], []
    for target in plan.targets:
        values = losses[:, names.index(target)]
        regressions.append(fit(mixtures, values, regressor, seed))
        try:
            accuracy = cross_validated(mixtures, values, regressor, seed, min(FOLDS, len(kept)))
            rows.append([target, f"{accuracy.spearman:.3f}", f"{math.sqrt(accuracy.mse):.4f}"])
        except ConfigError as error:
            print(f"dataflex: {target}: not cross-validated: {error}", file=sys.stderr)
            rows.append([target, NOTHING, NOTHING])
    rng = np.random.default_rng([seed, 1])
    best = best_mixture(regressions, tokens, rng, plan.sampling.drawing(tokens))
    file = _write_final(plan, best)
    predicted = np.mean([each.predict(np.stack([best, tokens / tokens.sum()])) for each in regressions], axis=0)
    held_out = f"Of {len(kept)} proxies, each predicted by a {regressor} regression fitted without it."
    shares = [
        [name, f"{own:.4f}", f"{new:.4f}"]
        for name, own, new in zip(plan.domains, tokens / tokens.sum(), best, strict=True)
    ]
    note = (
        f"Shares of tokens. Predicted mean loss of a proxy: {predicted[0]:.4f} with the best mixture, "
        f"{predicted[1]:.4f} by size."
    )
    print_tables(
        [
            Table("Regression", ["target", "rank correlation", "error"], rows, 1, (held_out,)),
            Table("Mixture", ["domain", "by size", "best"], shares, 1, (note,)),
        ]
    )
    print(
        f"in {plan.output}: {MIXTURES_FILE}, {LOSSES_FILE}, {FINAL_FILE}\nto train with it: dataflex-cli train {file}"
    )


def _losses(run: Run, experiment: Experiment, names: Sequence[str]) -> list[float] | str:
    """Return a proxy's loss on each evaluation data set, or why it cannot be used."""
    result = read_result(run, experiment)
    if result is None:
        return failure_of(run) or "not run to its end"
    for name in names:
        if f"{name}_loss" in result.not_finite:
            return f"its loss on {name} is not finite: training diverged"
        if f"{name}_loss" not in result.metrics:
            return f"it has no loss on {name}"
    return [result.metrics[f"{name}_loss"] for name in names]


def _write_final(plan: Plan, best: Floats) -> Path:
    """Write the YAML of the final training; one that is there and says something else is kept under another name."""
    plan.final.write_model()
    raw = plan.final.yaml()
    mix = {**raw[SECTION]["mix"], "proportions": dict(zip(plan.domains, best.tolist(), strict=True))}
    raw = {**raw, SECTION: {**raw[SECTION], "mix": mix}}
    text = yaml.safe_dump(masked(raw), sort_keys=False, allow_unicode=True).encode()
    file = plan.output / FINAL_FILE
    if file.is_file() and file.read_bytes() != text:
        print(f"dataflex: the {FINAL_FILE} of before is now {set_aside(file)}", file=sys.stderr)
    write_atomically(file, text)
    return file
