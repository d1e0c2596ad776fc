"""The plan of a comparison: every variant resolved for every seed, checked together, named by all it depends on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from dataflex.compare.digests import digest, digests_of_named, expanded
from dataflex.compare.merging import dotted, idle_changes, keys_of, merged, remove, replaced_keys, value_of
from dataflex.compare.settings import ExperimentSettings, read_settings
from dataflex.compare.tasks import Task, task_key, tasks_of
from dataflex.config import checks, legacy
from dataflex.config.checks.plan import planned as run_plan
from dataflex.config.loading import SECTION, RunConfig, parse_config
from dataflex.config.masking import masked
from dataflex.config.yaml_file import read_yaml
from dataflex.errors import ConfigError, Problem, unknown
from dataflex.record.versions import installed_versions

if TYPE_CHECKING:
    pass

MEASURES = ("loss", "perplexity", "bits_per_byte")
"""What is measured of every evaluation data set."""

AVERAGES = ("token_weighted", "unweighted")
"""The two ways of joining the evaluation data sets."""

MANAGED = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "do_train",
    "do_eval",
    "seed",
    "max_steps",
    "num_train_epochs",
    f"{SECTION}.seed",
    f"{SECTION}.train_steps",
    f"{SECTION}.train_tokens",
    f"{SECTION}.train_seconds",
)
"""Keys that the comparison sets or leaves out itself: in the base they are replaced, in a variant refused."""

_ONE_DEVICE = "each run is one process on one device; raise gradient_accumulation_steps to keep the global batch"

REFUSED = {
    "load_best_model_at_end": "the checkpoint would be picked by the evaluation that the variants are compared on",
    "early_stopping_steps": "the runs would not end at the equal budget",
    "tokenized_path": "all runs would share one preprocessed copy, whatever their own data keys say",
    "data_seed": "the samples would come in the same order with every seed, and the spread would look too small",
    "val_size": "what is split off changes with the seed and the data path; name a data set in eval_dataset",
    "predict_with_generate": "an evaluation that generates has no loss to compare",
    "deepspeed": _ONE_DEVICE,
    "fsdp": _ONE_DEVICE,
    "fsdp_config": _ONE_DEVICE,
}
"""Keys that no run of a comparison may have -> why."""

EVALUATION_KEYS = (
    "eval_dataset",
    "eval_on_each_dataset",
    "dataset_dir",
    "media_dir",
    "max_samples",
    "stage",
    "template",
    "cutoff_len",
    "train_on_prompt",
    "mask_history",
    "packing",
    "neat_packing",
    "tool_format",
    "default_system",
    "enable_thinking",
    "preserve_thinking",
    "ignore_pad_token_for_loss",
    "preprocessing_batch_size",
    "streaming",
    "model_name_or_path",
    "model_revision",
    "use_fast_tokenizer",
    "resize_vocab",
    "split_special_tokens",
    "add_tokens",
    "add_special_tokens",
    "new_special_tokens_config",
)
"""Keys that decide what the evaluation data is, after preprocessing: equal in all variants."""

STEP_KEYS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""Keys whose product is the samples of a step -> LLaMA-Factory's default."""

RUN_FILE, KEY_FILE, LOG_FILE, COMPLETE_FILE, FAILED_FILE, TASKS_FILE = (
    "run.yaml",
    "key.json",
    "log.txt",
    "complete.json",
    "failed.json",
    "tasks.yaml",
)
"""What the comparison writes into the folder of a run."""

FORMAT = 1
"""Version of :data:`KEY_FILE` and :data:`COMPLETE_FILE`."""


@dataclass(frozen=True, eq=False)
class Run:
    """One training of the comparison.

    Attributes:
        variant: its name.
        seed: of everything random in it.
        configuration: the YAML it is trained with, every default of the section filled in.
        contents: digests of the files the configuration names.
        key: SHA-256 of the configuration, the contents and the installed versions.
        folder: its output_dir, named by the three.
    """

    variant: str
    seed: int
    configuration: dict[str, Any]
    contents: dict[str, str]
    key: str
    folder: Path

    @property
    def name(self) -> str:
        """Variant and seed."""
        return f"{self.variant}/seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """What is needed to make runs and to know when they are complete.

    Attributes:
        configs: variant -> its configuration with the first seed, assets resolved.
        folder: of the file the base is in.
        tasks: the downstream tasks.
        evaluates: whether the runs have evaluation data.
    """

    configs: dict[str, RunConfig]
    folder: Path
    tasks: tuple[Task, ...]
    evaluates: bool


@dataclass(frozen=True)
class Experiment(Plan):
    """A comparison that has no problems.

    Attributes:
        path: the experiment file.
        settings: what it says.
        output: the folder of everything the comparison writes.
        runs: variant by variant, each with every seed.
        claims: the metrics whose differences are claimed or not; None for the default.
        notes: what the user should be told.
    """

    path: Path
    settings: ExperimentSettings
    output: Path
    runs: tuple[Run, ...]
    claims: tuple[str, ...] | None
    notes: tuple[str, ...]

    def of(self, variant: str) -> list[Run]:
        """Return the runs of a variant, by seed."""
        return [run for run in self.runs if run.variant == variant]


def load(path: Path) -> Experiment:
    """Read an experiment file, resolve every variant and check all of them.

    Assets that the configurations name are fetched.

    Raises:
        ConfigError: with every problem of every variant together.
    """
    return planned(read_settings(path), path)


def planned(settings: ExperimentSettings, path: Path) -> Experiment:
    """Do what :func:`load` does with settings that were read from ``path`` or made for what it says."""
    problems: list[Problem] = []
    notes: list[str] = []
    base, folder = read_base(settings.base, path, problems, notes)
    notes += replaced_keys(base, MANAGED, "comparison")
    tasks, task_metrics = tasks_of(settings, path.resolve().parent, problems)
    configs: dict[str, RunConfig] = {}
    found: dict[str, list[Problem]] = {}
    for variant, change in settings.variants.items():
        config, found[variant] = _variant(settings, variant, base, change, folder)
        if config is not None:
            configs[variant] = config
    problems += joined({f"variants.{variant}": each for variant, each in found.items()})
    if len(configs) == len(settings.variants):
        problems += _together(settings, configs)
        problems += [] if problems else _equal_steps(settings, configs)
        problems += _claims(settings, configs[settings.baseline], task_metrics)
    if problems:
        raise ConfigError(problems=problems, source=str(path))
    output = expanded(settings.output_dir)
    notes += _notes_of_plans(configs)
    local = {variant: config.with_assets() for variant, config in configs.items()}
    runs = tuple(_runs(settings, configs, local, folder, output))
    _refuse_identical(runs, path)
    claims = None if settings.metrics is None else tuple(settings.metrics)
    evaluates = any(_evaluates(config) for config in configs.values())
    return Experiment(local, folder, tasks, evaluates, path, settings, output, runs, claims, tuple(notes))


def _notes_of_plans(configs: Mapping[str, RunConfig]) -> Iterator[str]:
    """Yield what was asked for in a variant and will not happen in its runs; once, where it is the same of all."""
    found = {variant: run_plan(config).notes() for variant, config in configs.items()}
    shared = [note for note in next(iter(found.values())) if all(note in notes for notes in found.values())]
    yield from shared
    for variant, notes in found.items():
        yield from (f"{variant}: {note}" for note in notes if note not in shared)


def changed_file(run: Run, plan: Plan) -> str | None:
    """Return what says that a file of a run is another than when its plan was made; None where none is."""
    try:
        now = digests_of_named(plan.configs[run.variant], plan.folder)
    except ConfigError as error:
        return f"{error} It could be when the command began; give it again."
    names = (name for name in {**run.contents, **now} if now.get(name) != run.contents.get(name))
    return _changed(next(names, None))


def changed_task(tasks: Iterable[Task]) -> str | None:
    """Return what says that a file of a task is another than when the experiment was read; None where none is.

    Raises:
        OSError: if a file cannot be read.
    """
    return _changed(
        next((f"a file of task {task.name}" for task in tasks if task_key(task.settings) != task.key), None)
    )


def _changed(name: str | None) -> str | None:
    return None if name is None else f"{name} changed while the command was at work; give it again."


def read_base(
    base: str | dict[str, Any], path: Path, problems: list[Problem], notes: list[str]
) -> tuple[dict[str, Any], Path]:
    """Return the configuration all variants start from, in native keys, and the folder its relative files are in.

    Args:
        base: a file, from the folder of ``path``, or its keys.
        path: of the file that names the base.
        problems: gets those of the translation.
        notes: gets what the user should be told.

    Raises:
        ConfigError: if there is no such file, or it cannot be read.
    """
    here = path.resolve().parent
    if isinstance(base, dict):
        raw, folder = base, here
    else:
        file = here / expanded(base)
        if not file.is_file():
            raise ConfigError(problems=[Problem("base", f"no such file: {file}")], source=str(path))
        raw, folder = read_yaml(file, []), file.resolve().parent
    rest, section, said = legacy.translate(raw, folder, problems)
    notes += said
    return (rest if section is None else {**rest, SECTION: section}), folder


def _variant(
    settings: ExperimentSettings, variant: str, base: dict[str, Any], change: dict[str, Any], folder: Path
) -> tuple[RunConfig | None, list[Problem]]:
    """Return a variant's configuration with the first seed, and its problems."""
    try:
        idle = list(idle_changes(base, change))
        leaves = keys_of(change)
        raw = merged(base, change)
    except (OmegaConfBaseException, ValueError) as error:
        return None, [Problem("", f"cannot be merged into the base: {str(error).splitlines()[0]}")]
    own = [key for key in MANAGED if key in leaves]
    if own:
        return None, [Problem(key, "is set by the comparison itself; a variant may not set it.") for key in own]
    if idle:
        return None, idle
    if not isinstance(raw.get(SECTION, {}), dict):
        return None, [Problem(SECTION, f"must be a mapping, got {raw[SECTION]!r}.")]
    if SECTION not in raw:
        message = "a run needs a dataflex: section to be on record; {} trains as LLaMA-Factory does."
        return None, [Problem(SECTION, message)]
    for key in MANAGED:
        if value_of(raw, key) is not None:
            remove(raw, tuple(key.split(".")))
    seed = settings.seeds[0]
    raw |= {"do_train": True, "seed": seed, "output_dir": str(expanded(settings.output_dir) / "runs" / variant)}
    raw[SECTION] = {**raw[SECTION], "seed": seed}
    amount = settings.equal
    if amount.tokens is not None:
        raw[SECTION]["train_tokens"] = amount.tokens
    elif amount.wall_clock is not None:
        raw[SECTION]["train_seconds"] = amount.wall_clock
    else:
        raw["max_steps"] = amount.steps
    config, problems = parse_config(raw, base=folder)
    if problems:
        return None, problems
    if _evaluates(config):
        config = replace(config, llamafactory={**config.llamafactory, "do_eval": True})
    return config, [*checks.problems_of(config), *_refused(config)]


def _evaluates(config: RunConfig) -> bool:
    return bool(checks.dataset_names(config, "eval_dataset"))


def _refused(config: RunConfig) -> Iterator[Problem]:
    for key, reason in REFUSED.items():
        value = config.llamafactory.get(key)
        if value and str(value).lower() not in ("false", "0", "0.0"):
            yield Problem(key, f"{value!r}: not in a comparison: {reason}. Remove it.")


def joined(found: Mapping[str, list[Problem]]) -> Iterator[Problem]:
    """Yield every problem under the key it was found for; one that all of them have is the base's."""
    shared = [problem for problem in next(iter(found.values())) if all(problem in each for each in found.values())]
    for problem in shared:
        yield replace(problem, key=dotted("base", problem.key))
    for key, problems in found.items():
        for problem in problems:
            if problem not in shared:
                yield replace(problem, key=dotted(key, problem.key))


def _together(settings: ExperimentSettings, configs: Mapping[str, RunConfig]) -> Iterator[Problem]:
    """Yield what is wrong with the variants side by side."""
    baseline = configs[settings.baseline]
    if not any(_evaluates(config) for config in configs.values()):
        if settings.evaluate is None:
            yield Problem("base.eval_dataset", "nothing is measured: name a data set here, or tasks under evaluate.")
        return
    for variant, config in configs.items():
        for key in EVALUATION_KEYS:
            own, other = config.llamafactory.get(key), baseline.llamafactory.get(key)
            if own != other:
                yield Problem(
                    f"variants.{variant}.{key}",
                    f"{own!r} here and {other!r} in {settings.baseline!r}: it changes the evaluation data, and the "
                    "numbers could not be compared. Put it in the base.",
                )


def _equal_steps(settings: ExperimentSettings, configs: Mapping[str, RunConfig]) -> Iterator[Problem]:
    """Yield the variants of which a step is not what a step of the baseline is, where steps are what is equal."""
    if settings.equal.steps is None:
        return
    baseline = configs[settings.baseline].llamafactory
    for variant, config in configs.items():
        own, other = samples_per_step(config.llamafactory), samples_per_step(baseline)
        if own != other:
            yield Problem(
                f"variants.{variant}",
                f"trains on {own:,.0f} samples in a step ({' x '.join(STEP_KEYS)}) and {settings.baseline!r} on "
                f"{other:,.0f}: the same number of steps would not be an equal budget. Use equal: {{tokens: N}}, or "
                "put the keys in the base.",
            )
        if bool(config.llamafactory.get("packing")) != bool(baseline.get("packing")):
            yield Problem(
                f"variants.{variant}.packing",
                f"{config.llamafactory.get('packing')!r} here and {baseline.get('packing')!r} in "
                f"{settings.baseline!r}: the same number of steps would not be an equal budget. Use equal: "
                "{tokens: N}, or put it in the base.",
            )


def samples_per_step(llamafactory: Mapping[str, Any]) -> float:
    """Return how many samples an optimizer step of one process trains on."""
    given = {key: default if llamafactory.get(key) is None else llamafactory[key] for key, default in STEP_KEYS.items()}
    return prod(float(value) for value in given.values())


def _claims(
    settings: ExperimentSettings, baseline: RunConfig, task_metrics: Mapping[str, tuple[str, ...]]
) -> Iterator[Problem]:
    """Yield what is wrong with the metrics asked for; those of a task of the harness are known when it has run."""
    known: list[str] = []
    if _evaluates(baseline):
        groups = (*AVERAGES, *checks.dataset_names(baseline, "eval_dataset"))
        known += [f"{group}_{measure}" for group in groups for measure in MEASURES]
    known += [f"{task}/{metric}" for task, metrics in task_metrics.items() for metric in metrics]
    of_harness = [task for task, metrics in task_metrics.items() if not metrics]
    for metric in settings.metrics or ():
        if metric not in known and metric.partition("/")[0] not in of_harness:
            yield Problem("metrics", unknown("metric", metric, known))
    if settings.metrics is not None and len(set(settings.metrics)) < max(1, len(settings.metrics)):
        yield Problem("metrics", f"must name one or more metrics, each once; got {settings.metrics!r}.")


def _runs(
    settings: ExperimentSettings,
    configs: Mapping[str, RunConfig],
    local: Mapping[str, RunConfig],
    base: Path,
    output: Path,
) -> Iterator[Run]:
    versions = installed_versions()
    for variant, config in configs.items():
        found = digests_of_named(local[variant], base)
        for seed in settings.seeds:
            assert config.dataflex is not None
            seeded = replace(
                config,
                llamafactory={**config.llamafactory, "seed": seed},
                dataflex=config.dataflex.model_copy(update={"seed": seed}),
            )
            key, configuration = keyed(seeded, base, {"contents": found, "versions": versions})
            folder = output / "runs" / variant / f"seed-{seed}-{key[:8]}"
            yield Run(variant, seed, {**configuration, "output_dir": str(folder)}, found, key, folder)


def keyed(config: RunConfig, base: Path, depends_on: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the key of a run, and what it is trained with but for its ``output_dir``.

    Args:
        config: with a section; its ``output_dir`` does not count.
        base: folder of the file the configuration came from.
        depends_on: what else the key is a digest of.
    """
    assert config.dataflex is not None
    configuration = config.resolved()
    del configuration["output_dir"]
    key = digest({"configuration": masked(configuration), **depends_on})
    plugins = [absolute_plugin(name, base) for name in config.dataflex.plugins]
    return key, {**configuration, SECTION: {**configuration[SECTION], "plugins": plugins}}


def absolute_plugin(plugin: str, base: Path) -> str:
    """Return a plugin's path so that it is found from any folder."""
    return next(str((folder / plugin).resolve()) for folder in (Path.cwd(), base) if (folder / plugin).is_file())


def _refuse_identical(runs: tuple[Run, ...], path: Path) -> None:
    seen: dict[str, str] = {}
    problems: list[Problem] = []
    for run in runs:
        other = seen.setdefault(run.key, run.variant)
        if other != run.variant and not any(problem.key == f"variants.{run.variant}" for problem in problems):
            message = f"is the same run as {other!r}, with every default filled in; change it, or remove it."
            problems.append(Problem(f"variants.{run.variant}", message))
    if problems:
        raise ConfigError(problems=problems, source=str(path))


def run_yaml(run: Run) -> bytes:
    """Return the text of the YAML a run is trained with, also by hand: ``dataflex-cli train FOLDER/run.yaml``.

    Secrets are masked in it; the run gets them in its environment.
    """
    return yaml.safe_dump(masked(run.configuration), sort_keys=False, allow_unicode=True).encode()
