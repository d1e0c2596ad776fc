"""``dataflex-cli regmix``: trains small models (proxies) on many mixtures, and predicts the best mixture.

Source: RegMix (Liu et al., ICLR 2025, arXiv 2407.01492). The small trainings are runs of a comparison. The regression
and the search are in :mod:`dataflex.mixers.base_regression`. All mixtures are shares of tokens.
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
"""Key that sets the length of a proxy's training -> the corresponding key of a comparison's ``equal``."""

MIXTURES_FILE, LOSSES_FILE, FINAL_FILE = "mixtures.csv", "losses.csv", "final.yaml"
FOLDS = 5
"""Number of parts in the cross-validation."""


class Sampling(BaseModel):
    """The keys under ``proxies`` that control how mixtures are drawn. All other keys there change the base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(64, ge=2, description="Number of mixtures. One proxy is trained on each.")
    seed: int = Field(1, ge=0, lt=2**32, description="Seed of the mixtures, of the trainings and of the search.")
    temperature: float = Field(
        0.5, ge=0, description="Exponent of the prior mixture. 1 gives shares by tokens, 0 gives equal shares."
    )
    min_strength: float = Field(
        0.1, gt=0, description="Smallest concentration of the draws. It gives mixtures of nearly one domain."
    )
    max_strength: float = Field(
        5.0, gt=0, description="Largest concentration of the draws. It gives mixtures near the prior."
    )
    strengths: int = Field(15, ge=1, description="Number of concentrations from min_strength to max_strength.")
    min_weight: float = Field(2e-4, ge=0, description="Shares below this value become 0.")
    max_epochs: float | None = Field(
        15.0, gt=0, description="Most passes over a domain that a mixture may cause. If null, there is no limit."
    )
    budget: float | None = Field(
        None,
        gt=0,
        description="Tokens of the final training, from which max_epochs is computed. If null, the tokens of "
        "all domains.",
    )

    def drawing(self, tokens: Floats) -> Drawing:
        """Return the distribution from which mixtures are drawn.

        Args:
            tokens: number of tokens of each domain, shape (K,).
        """
        return Drawing(**self.model_dump(exclude={"count", "seed"}), sizes=tokens)


class RegmixSettings(BaseModel):
    """The keys of a file for ``dataflex-cli regmix``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Base = Field(description="A LLaMA-Factory YAML, as a path relative to this file, or its keys.")
    output_dir: str = Field(min_length=1, description="Folder to which the command writes.")
    proxies: dict[str, Any] = Field(
        description="Keys that the small trainings change in the base, and the keys that control how "
        "mixtures are drawn."
    )
    target: list[str] | None = Field(
        None, min_length=1, description="Evaluation data sets whose mean loss is minimised. If null, all of them."
    )
    regressor: Literal["lightgbm", "linear"] = Field(
        "lightgbm", description="Regression that predicts a loss from a mixture."
    )
    final: dict[str, Any] = Field(default_factory=dict, description="Keys that the final training changes in the base.")

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
    """The checked settings of a regmix command, before the data is loaded.

    Attributes:
        path: the file with the settings.
        settings: content of the file.
        sampling: settings of the draw of mixtures.
        output: folder to which the command writes.
        proxy: the settings that all proxies share, as a stage.
        final: the final training, with equal shares as a stand-in for the shares to be found.
        equal: length of each proxy's training.
        domains: names of the data sets. With ``domain_column`` its values replace them when the data is loaded.
        targets: names of the evaluation data sets whose mean loss is minimised.
        notes: notes for the user.
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
    """Train the proxies that are not complete, and write a YAML with the mixture that is predicted to be best.

    Args:
        path: the file with the settings.
        jobs: number of proxies trained at the same time. None means one for each CUDA device, or one without CUDA.
        dry_run: only print the state of each proxy.
        program: command line that trains.
        at_once: number of proxies trained at the same time and their devices; replaces ``jobs``.

    Returns:
        The exit status: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: with the problems of the file or its data, before a training starts, or if too few proxies have
            usable losses for the regression.
    """

    def work() -> Work:
        plan = load(path)
        say(plan.notes)  # printed before the data is loaded, which may take minutes
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

    kept = "Complete proxies are kept, and proxies with a checkpoint are resumed"
    return carry_out(work, dry_run=dry_run, on_stop=f"stopped. {kept}. To continue: dataflex-cli regmix {path}")


def load(path: Path) -> Plan:
    """Read the file, and check the proxies and the final training.

    Raises:
        ConfigError: with the problems of proxies and final training together.
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
        problems += _domain_problems(domains, settings, sampling, f"name them, or set {DOMAIN_COLUMN}.")
    targets: tuple[str, ...] = ()
    if proxy is not None:
        problems += _target_problems(settings, proxy.config)
        targets = tuple(settings.target or checks.dataset_names(proxy.config, "eval_dataset"))
    if settings.regressor == "lightgbm" and find_spec("lightgbm") is None:
        problems.append(
            Problem(
                "regressor", 'lightgbm is not installed; run pip install "dataflex[regmix]", or set regressor: linear.'
            )
        )
    if problems or proxy is None or final is None or equal is None:
        raise ConfigError(problems=problems, source=str(path))
    plan = Plan(path, settings, sampling, output, proxy, final, equal, domains, targets, tuple(notes))
    stand_ins = replace(plan, domains=("one", "another")) if len(domains) < 2 else plan
    ramp = np.arange(1.0, len(stand_ins.domains) + 1) / sum(range(1, len(stand_ins.domains) + 1))
    # Two arbitrary mixtures, so that the problems that a comparison finds show before the data is loaded.
    _experiment(stand_ins, np.stack([ramp, ramp[::-1]]))
    return plan


def _domain_problems(
    domains: Sequence[str], settings: RegmixSettings, sampling: Sampling, mend: str
) -> Iterator[Problem]:
    """Yield the reasons why no mixture of these domains can be found.

    Args:
        domains: names of the domains.
        settings: content of the file.
        sampling: settings of the draw of mixtures.
        mend: advice for too few domains, as the end of a message.
    """
    if len(domains) < 2:
        yield Problem("base.dataset", f"a mixture needs two or more domains, got {len(domains)}; {mend}")
    if INDEX in domains:
        yield Problem("base.dataset", f"{INDEX!r} is the column of row numbers in {MIXTURES_FILE}; rename the domain.")
    needed = _needed(settings.regressor, domains)
    if sampling.count < needed:
        message = (
            f"must be at least {needed} for {settings.regressor} with {len(domains)} domains, got {sampling.count}."
        )
        yield Problem("proxies.count", message)


def _sampling(given: Mapping[str, Any], problems: list[Problem]) -> tuple[Sampling, dict[str, Any]]:
    """Return the settings of the draw of mixtures, and the other keys under ``proxies``."""
    own = {key: value for key, value in given.items() if key in Sampling.model_fields}
    changes = {key: value for key, value in given.items() if key not in own}
    try:
        return Sampling.model_validate(own), changes
    except ValidationError as error:
        problems += [problem_of(item, ("proxies",), {(): Sampling}) for item in error.errors()]
        return Sampling(), changes


def _equal(base: Mapping[str, Any], changes: Mapping[str, Any], problems: list[Problem]) -> Equal | None:
    """Return the length of each proxy's training; None if it is missing, wrong or given twice."""
    try:
        whole = merged(base, {key: value for key, value in changes.items() if key != MODEL_CHANGES})
    except (OmegaConfBaseException, ValueError):
        return None  # make_stage reports it
    said = [key for key in LENGTHS if value_of(whole, key) not in (None, -1)]
    if not said:
        problems.append(
            Problem("proxies", f"the length of a proxy's training is missing; set one of {', '.join(LENGTHS)}.")
        )
    if len(said) != 1:
        return None  # make_stage reports more than one
    value = value_of(whole, said[0])
    try:
        return Equal.model_validate({LENGTHS[said[0]]: value})
    except ValidationError as error:
        problems.append(Problem(f"proxies.{said[0]}", f"{error.errors()[0]['msg']}, got {value!r}."))
        return None


def _needed(regressor: str, domains: Sequence[str]) -> int:
    """Return the number of proxies that a regression needs.

    A linear regression gets one more than it has coefficients, so that it can also be fitted without one of the
    proxies.
    """
    return MIN_LIGHTGBM if regressor == "lightgbm" else len(domains) + 1


def _target_problems(settings: RegmixSettings, config: RunConfig) -> Iterator[Problem]:
    names = checks.dataset_names(config, "eval_dataset")
    if not names:
        yield Problem(
            "base.eval_dataset", "needed: the names of data sets on which the losses of the proxies are measured."
        )
        return
    for name in settings.target or ():
        if name not in names:
            yield Problem("target", unknown("evaluation data set", name, names))


def _experiment(plan: Plan, mixtures: Floats) -> Experiment:
    """Return the proxies as a comparison with one seed.

    If the proxies' model folder is not written yet, the model from which it is derived is used instead, so that the
    comparison can be checked.

    Raises:
        ConfigError: with the problems that the comparison finds.
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
    """Load and tokenize the data, and return the names of the domains and their tokens, shape (K,)."""
    from dataflex.integrations.llamafactory.pool_only import pool_of

    config = plan.proxy.source
    assert config.dataflex is not None
    pool, _ = pool_of(config, config.dataflex.domain_column)
    return pool.domains, pool.domain_tokens.astype(np.float64)


def _with_domains(plan: Plan) -> tuple[Plan, Floats]:
    """Return the plan with the domains of the loaded data, and the tokens of each domain, shape (K,).

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
    """Fit the regressions on the complete proxies, and write and print the mixture that is predicted to be best."""
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
            f"{len(kept)} of {len(found)} proxies have usable losses, but {regressor} needs {needed}. Fix the failed "
            "proxies and run the command again, or raise proxies.count. Complete proxies are kept."
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
            print(f"dataflex: {target}: cannot be cross-validated: {error}", file=sys.stderr)
            rows.append([target, NOTHING, NOTHING])
    # A stream of random numbers that is independent of the stream that drew the proxies' mixtures.
    rng = np.random.default_rng([seed, 1])
    best = best_mixture(regressions, tokens, rng, plan.sampling.drawing(tokens))
    file = _write_final(plan, best)
    predicted = np.mean([each.predict(np.stack([best, tokens / tokens.sum()])) for each in regressions], axis=0)
    held_out = f"From {len(kept)} proxies. Each is predicted by a {regressor} regression that was fitted without it."
    shares = [
        [name, f"{own:.4f}", f"{new:.4f}"]
        for name, own, new in zip(plan.domains, tokens / tokens.sum(), best, strict=True)
    ]
    note = (
        f"Shares of tokens. Predicted mean loss of a proxy: {predicted[0]:.4f} with the best mixture, "
        f"{predicted[1]:.4f} with shares by size."
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
    """Return a proxy's loss on each evaluation data set, or the reason why the proxy cannot be used."""
    result = read_result(run, experiment)
    if result is None:
        return failure_of(run) or "did not finish"
    for name in names:
        if f"{name}_loss" in result.not_finite:
            return f"the loss on {name} is not finite, so training diverged"
        if f"{name}_loss" not in result.metrics:
            return f"there is no loss on {name} in the record"
    return [result.metrics[f"{name}_loss"] for name in names]


def _write_final(plan: Plan, best: Floats) -> Path:
    """Write the YAML of the final training. An existing file with other content is kept under another name."""
    plan.final.write_model()
    raw = plan.final.yaml()
    mix = {**raw[SECTION]["mix"], "proportions": dict(zip(plan.domains, best.tolist(), strict=True))}
    raw = {**raw, SECTION: {**raw[SECTION], "mix": mix}}
    text = yaml.safe_dump(masked(raw), sort_keys=False, allow_unicode=True).encode()
    file = plan.output / FINAL_FILE
    if file.is_file() and file.read_bytes() != text:
        print(f"dataflex: the earlier {FINAL_FILE} is kept as {set_aside(file)}", file=sys.stderr)
    write_atomically(file, text)
    return file
