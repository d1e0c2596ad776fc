"""The plan of a comparison: every variant resolved for every seed, checked together, named by all it depends on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from dataflex.compare.digests import BESIDE, digest, digests_of_named, expanded, without_places
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

MEASURES = {
    "loss": False,
    "perplexity": False,
    "bits_per_byte": False,
    "accuracy": True,
    "margin": True,
}
"""Measures of an evaluation data set -> whether higher is better. A training stage has some of them."""

AVERAGES = ("token_weighted", "unweighted")
"""The two averages over the evaluation data sets."""

STDERR = "_stderr"
"""End of the name of a metric's standard error over the samples. No finding is made of a standard error."""

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
"""Keys that the comparison sets or removes. Values in the base are replaced, values in a variant are refused."""

REFUSED = {
    "load_best_model_at_end": "the checkpoint would be picked by the evaluation that the variants are compared on",
    "early_stopping_steps": "the runs would not end at the equal budget",
    "tokenized_path": "all runs would share one preprocessed copy, even if their data keys differ",
    "data_seed": "the samples would come in the same order with every seed, and the spread would look too small",
    "val_size": "the split depends on the seed and on how the data is loaded; name a data set in eval_dataset",
    "predict_with_generate": "an evaluation that generates has no loss to compare",
}
"""Keys that no run of a comparison may have -> the reason."""

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
"""Keys that change the preprocessed evaluation data. They must be equal in all variants."""

STEP_KEYS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""Keys whose product is the number of samples in a step -> LLaMA-Factory's default."""

RUN_FILE, KEY_FILE, LOG_FILE, COMPLETE_FILE, FAILED_FILE, TASKS_FILE = (
    "run.yaml",
    "key.json",
    "log.txt",
    "complete.json",
    "failed.json",
    "tasks.yaml",
)
"""Files that the comparison writes into the folder of a run."""

FORMAT = 2
"""Version of :data:`KEY_FILE` and :data:`COMPLETE_FILE`."""


@dataclass(frozen=True, eq=False)
class Run:
    """One training run of the comparison.

    Attributes:
        variant: name of the variant.
        seed: seed of everything random in the run.
        configuration: the YAML of the training, with every default of the section filled in.
        contents: digests of the files that the configuration names.
        key: SHA-256 of the configuration, the contents, the installed versions and the number of processes.
        folder: output_dir of the run. Its path has the variant, the seed and the start of the key.
        processes: processes of its training.
    """

    variant: str
    seed: int
    configuration: dict[str, Any]
    contents: dict[str, str]
    key: str
    folder: Path
    processes: int = 1

    @property
    def name(self) -> str:
        """Variant and seed."""
        return f"{self.variant}/seed {self.seed}"

    @property
    def torchrun(self) -> bool:
        """Whether torchrun starts the training. DeepSpeed needs it even for a single process."""
        return self.processes > 1 or bool(self.configuration.get("deepspeed"))


@dataclass(frozen=True)
class Plan:
    """Everything needed to make runs and to tell whether they are complete.

    Attributes:
        configs: variant -> its configuration with the first seed, assets resolved.
        folder: folder of the file that the base is in.
        tasks: the downstream tasks.
        evaluates: whether the runs have evaluation data.
    """

    configs: dict[str, RunConfig]
    folder: Path
    tasks: tuple[Task, ...]
    evaluates: bool


@dataclass(frozen=True)
class Experiment(Plan):
    """A comparison without problems.

    Attributes:
        path: the experiment file.
        settings: the contents of the experiment file.
        output: the folder of everything that the comparison writes.
        runs: all runs, variant by variant, each with every seed.
        claims: the metrics whose differences get a finding. None means the default ones.
        notes: messages for the user.
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
    """Return the experiment of settings that were read from ``path``, or made by a caller, as :func:`load` does.

    Raises:
        ConfigError: with every problem of every variant together.
    """
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
        problems += [] if problems else _equal_steps(settings, configs)  # needs valid numbers in the keys
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
    """Yield settings of each variant that have no effect in its runs. A note that all variants share comes once."""
    found = {variant: run_plan(config).notes() for variant, config in configs.items()}
    shared = [note for note in next(iter(found.values())) if all(note in notes for notes in found.values())]
    yield from shared
    for variant, notes in found.items():
        yield from (f"{variant}: {note}" for note in notes if note not in shared)


def changed_file(run: Run, plan: Plan) -> str | None:
    """Return an error text if a file of a run has changed since the run was planned, else None."""
    try:
        now = digests_of_named(plan.configs[run.variant], plan.folder)
    except ConfigError as error:
        return f"{error} It could be read when the command started. Run the command again."
    names = (name for name in {**run.contents, **now} if now.get(name) != run.contents.get(name))
    name = next(names, None)
    if name is not None and name.startswith(BESIDE):
        name = str(plan.folder / name.removeprefix(BESIDE))
    return _changed(name)


def changed_task(tasks: Iterable[Task]) -> str | None:
    """Return an error text if a file of a task has changed since the experiment was read, else None.

    Raises:
        OSError: if a file cannot be read.
    """
    return _changed(
        next((f"a file of task {task.name}" for task in tasks if task_key(task.settings) != task.key), None)
    )


def _changed(name: str | None) -> str | None:
    return None if name is None else f"{name} changed while the command was running. Run the command again."


def read_base(
    base: str | dict[str, Any], path: Path, problems: list[Problem], notes: list[str]
) -> tuple[dict[str, Any], Path]:
    """Return the configuration that all variants start from, in native keys, and the folder of its relative paths.

    Args:
        base: a file, relative to the folder of ``path``, or the keys themselves.
        path: the file that names the base.
        problems: the problems of translating legacy keys are appended.
        notes: messages for the user are appended.

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
    """Return a variant's configuration with the first seed, and the problems of the variant."""
    try:
        idle = list(idle_changes(base, change))
        leaves = keys_of(change)
        raw = merged(base, change)
    except (OmegaConfBaseException, ValueError) as error:
        return None, [Problem("", f"cannot be merged into the base: {str(error).splitlines()[0]}")]
    own = [key for key in MANAGED if key in leaves]
    if own:
        return None, [
            Problem(key, f"is set by the comparison; variant {variant!r} may not set it. Remove it.") for key in own
        ]
    if idle:
        return None, idle
    if not isinstance(raw.get(SECTION, {}), dict):
        return None, [Problem(SECTION, f"must be a mapping, got {raw[SECTION]!r}.")]
    if SECTION not in raw:
        message = "a run needs a dataflex: section to write its record; an empty one, {}, trains as LLaMA-Factory does."
        return None, [Problem(SECTION, message)]
    for key in MANAGED:
        if value_of(raw, key) is not None:
            remove(raw, tuple(key.split(".")))
    seed = settings.seeds[0]
    # Only for the checks: each run gets a separate output_dir when its key is known.
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
    config = replace(config, processes=settings.processes)
    if _evaluates(config):
        config = replace(config, llamafactory={**config.llamafactory, "do_eval": True})
    return config, [*checks.problems_of(config), *_refused(config)]


def _evaluates(config: RunConfig) -> bool:
    return bool(checks.dataset_names(config, "eval_dataset"))


def _refused(config: RunConfig) -> Iterator[Problem]:
    for key, reason in REFUSED.items():
        value = config.llamafactory.get(key)
        if value and str(value).lower() not in ("false", "0", "0.0"):
            yield Problem(key, f"{value!r} is not allowed in a comparison: {reason}. Remove it.")
    if config.llamafactory.get("fsdp") and config.processes == 1:
        yield Problem(
            "fsdp",
            "shards the model over processes, and each run has one process. Set processes of the comparison to 2 or "
            "more, or remove it.",
        )


def joined(found: Mapping[str, list[Problem]]) -> Iterator[Problem]:
    """Yield every problem under the key it was found for. A problem of all keys is yielded once, under ``base``."""
    shared = [problem for problem in next(iter(found.values())) if all(problem in each for each in found.values())]
    for problem in shared:
        yield replace(problem, key=dotted("base", problem.key))
    for key, problems in found.items():
        for problem in problems:
            if problem not in shared:
                yield replace(problem, key=dotted(key, problem.key))


def _together(settings: ExperimentSettings, configs: Mapping[str, RunConfig]) -> Iterator[Problem]:
    """Yield the problems that show only if the variants are compared with each other."""
    baseline = configs[settings.baseline]
    if not any(_evaluates(config) for config in configs.values()):
        if settings.evaluate is None:
            yield Problem("base.eval_dataset", "nothing is measured; name a data set here, or tasks under evaluate.")
        return
    for variant, config in configs.items():
        for key in EVALUATION_KEYS:
            own, other = config.llamafactory.get(key), baseline.llamafactory.get(key)
            if own != other:
                yield Problem(
                    f"variants.{variant}.{key}",
                    f"{own!r} here and {other!r} in {settings.baseline!r}: the key changes the evaluation data, so the "
                    "results could not be compared. Set it in the base.",
                )


def _equal_steps(settings: ExperimentSettings, configs: Mapping[str, RunConfig]) -> Iterator[Problem]:
    """Yield the variants whose steps hold other samples than the baseline's, if the budget is a number of steps."""
    if settings.equal.steps is None:
        return
    baseline = configs[settings.baseline].llamafactory
    factors = " x ".join((*STEP_KEYS, "processes") if settings.processes > 1 else STEP_KEYS)
    for variant, config in configs.items():
        own, other = (samples_per_step(keys, settings.processes) for keys in (config.llamafactory, baseline))
        if own != other:
            yield Problem(
                f"variants.{variant}",
                f"trains on {own:,.0f} samples in a step ({factors}) and {settings.baseline!r} on {other:,.0f}: the "
                "same number of steps would not be an equal budget. Use equal: {tokens: N}, or "
                "set the keys in the base.",
            )
        if bool(config.llamafactory.get("packing")) != bool(baseline.get("packing")):
            yield Problem(
                f"variants.{variant}.packing",
                f"{config.llamafactory.get('packing')!r} here and {baseline.get('packing')!r} in "
                f"{settings.baseline!r}: the same number of steps would not be an equal budget. Use equal: "
                "{tokens: N}, or set it in the base.",
            )


def samples_per_step(llamafactory: Mapping[str, Any], processes: int) -> float:
    """Return the number of samples that an optimizer step of all processes trains on."""
    given = {key: default if llamafactory.get(key) is None else llamafactory[key] for key, default in STEP_KEYS.items()}
    return processes * prod(float(value) for value in given.values())


def _claims(
    settings: ExperimentSettings, baseline: RunConfig, task_metrics: Mapping[str, tuple[str, ...]]
) -> Iterator[Problem]:
    """Yield the problems of ``metrics``. Metrics of a task of the harness are unknown until the task has run."""
    known: list[str] = []
    if _evaluates(baseline):
        groups = (*AVERAGES, *checks.dataset_names(baseline, "eval_dataset"))
        known += [f"{group}_{measure}" for group in groups for measure in checks.measures(baseline)]
    known += [f"{task}/{metric}" for task, metrics in task_metrics.items() for metric in metrics]
    of_harness = [task for task, metrics in task_metrics.items() if not metrics]
    for metric in settings.metrics or ():
        of_task = metric.partition("/")[0] in of_harness and not metric.endswith(STDERR)
        if metric not in known and not of_task:
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
    # A run of one process keeps the key that it has without `processes`.
    many = {"processes": settings.processes} if settings.processes > 1 else {}
    for variant, config in configs.items():
        found = digests_of_named(local[variant], base)
        for seed in settings.seeds:
            assert config.dataflex is not None
            seeded = replace(
                config,
                llamafactory={**config.llamafactory, "seed": seed},
                dataflex=config.dataflex.model_copy(update={"seed": seed}),
            )
            key, configuration = keyed(seeded, base, {"contents": found, "versions": versions, **many})
            folder = output / "runs" / variant / f"seed-{seed}-{key[:8]}"
            own = {**configuration, "output_dir": str(folder)}
            yield Run(variant, seed, own, found, key, folder, settings.processes)


def keyed(config: RunConfig, base: Path, depends_on: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the key of a run, and the configuration of its training without ``output_dir``.

    Args:
        config: with a section. Its ``output_dir`` does not count.
        base: folder of the file that the configuration came from.
        depends_on: further values that the key depends on.
    """
    assert config.dataflex is not None
    configuration = config.resolved()
    plugins = [absolute_plugin(name, base) for name in config.dataflex.plugins]
    configuration = {**configuration, SECTION: {**configuration[SECTION], "plugins": plugins}}
    key = digest({"configuration": _of_key(configuration, base), **depends_on})
    del configuration["output_dir"]
    return key, configuration


def _of_key(configuration: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Return the part of a configuration that makes the key of a run, so without ``output_dir``.

    Secrets are masked, so that another token does not make another run.
    """
    found: dict[str, Any] = without_places(masked(configuration), base, {})
    return {key: value for key, value in found.items() if key != "output_dir"}


def inputs_of(run: Run, plan: Plan) -> dict[str, Any]:
    """Return everything that the key of a run was made of, for its :data:`KEY_FILE`."""
    configuration = _of_key(run.configuration, plan.folder)
    return {
        "versions": installed_versions(),
        "contents": run.contents,
        "configuration": configuration,
        "processes": run.processes,
    }


def absolute_plugin(plugin: str, base: Path) -> str:
    """Return a plugin's absolute path, which is valid from any folder."""
    return next(str((folder / plugin).resolve()) for folder in (Path.cwd(), base) if (folder / plugin).is_file())


def _refuse_identical(runs: tuple[Run, ...], path: Path) -> None:
    seen: dict[str, str] = {}
    problems: list[Problem] = []
    for run in runs:
        other = seen.setdefault(run.key, run.variant)
        if other != run.variant and not any(problem.key == f"variants.{run.variant}" for problem in problems):
            message = f"is the same run as {other!r} after every default is filled in; change it, or remove it."
            problems.append(Problem(f"variants.{run.variant}", message))
    if problems:
        raise ConfigError(problems=problems, source=str(path))


def run_yaml(run: Run) -> bytes:
    """Return the YAML that a run is trained with. ``dataflex-cli train FOLDER/run.yaml`` trains it by hand.

    Secrets are masked in the text. The run gets them through its environment.
    """
    return yaml.safe_dump(masked(run.configuration), sort_keys=False, allow_unicode=True).encode()
