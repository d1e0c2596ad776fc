"""The plan of a run as far as it shows before anything is loaded, and whether it would decide anything."""

from __future__ import annotations

from collections.abc import Iterator

from dataflex.config.checks.rows import rows_of, training_samples
from dataflex.config.checks.values import dataset_names, number, truthy
from dataflex.config.loading import SECTION, DataFlexConfig, RunConfig
from dataflex.config.processes import planned_processes
from dataflex.errors import Problem
from dataflex.planning.run_plan import DataOutline, RunPlan, TrainerKeys, plan_of, problems_of, problems_of_warmup

_WORK = ("do_train", "do_eval", "do_predict")


def problems_of_work(config: RunConfig) -> Iterator[Problem]:
    """Return that nothing would be done, or trained, where that is so."""
    if config.offline:
        return
    if not any(truthy(config, key) for key in _WORK) and str(config.llamafactory.get("eval_strategy") or "no") == "no":
        if config.params:
            yield Problem("do_train", f"not set, so nothing would be trained and {_who(config)} would never decide.")
        elif not config.llamafactory.get("tokenized_path"):
            yield Problem("do_train", f"none of {', '.join(_WORK)} is true, so nothing would be done; set do_train.")
    elif not truthy(config, "do_train"):
        if config.params:
            yield Problem(
                "do_train",
                f"not true, so nothing would be trained and {_who(config)} would never decide. Set it, or remove the "
                f"{SECTION}: section from a file that only evaluates or predicts.",
            )
    elif config.dataflex is not None:
        yield from _length(config, config.dataflex)


def problems_of_plan(config: RunConfig) -> list[Problem]:
    """Return why nothing would be decided, as far as the rows of the data tell; for a file without other problems."""
    settings = config.dataflex
    if config.offline or settings is None or not truthy(config, "do_train"):
        return []
    plan = planned(config, certain=True)
    if plan.run is not None:
        return problems_of(settings, plan.components, plan.run)
    return [] if plan.total is None else problems_of_warmup(settings, plan.components, plan.total)


def _who(config: RunConfig) -> str:
    return " and ".join(f"{SECTION}.{key} ({cls.name})" for key, (cls, _) in config.params.items())


def _length(config: RunConfig, settings: DataFlexConfig) -> Iterator[Problem]:
    """No passes over the data, where nothing else says how long training lasts."""
    given = config.llamafactory.get("num_train_epochs")
    steps = settings.train_steps is not None or number(config, "max_steps", -1) > 0
    if given is None or steps or settings.train_tokens is not None:
        return
    epochs = number(config, "num_train_epochs", 3.0)
    if not 0 < epochs < float("inf"):
        yield Problem(
            "num_train_epochs",
            f"{given} trains nothing; give a number above 0, or the length with max_steps, {SECTION}.train_steps or "
            f"{SECTION}.train_tokens.",
        )


def trainer_keys(config: RunConfig, certain: bool = False) -> TrainerKeys:
    """Return LLaMA-Factory's keys, defaults filled in; ``certain``: with no more processes than there will be."""
    given = config.llamafactory
    logging_steps = number(config, "logging_steps", 500)
    return TrainerKeys(
        max_steps=int(number(config, "max_steps", -1)),
        epochs=number(config, "num_train_epochs", 3.0),
        per_device=max(1, int(number(config, "per_device_train_batch_size", 8))),
        accumulation=max(1, int(number(config, "gradient_accumulation_steps", 1))),
        processes=planned_processes(certain),
        eval_strategy=str(given.get("eval_strategy") or "no"),
        eval_steps=number(config, "eval_steps", logging_steps),
        evaluates_at_end=truthy(config, "do_eval") or str(given.get("eval_strategy") or "no") != "no",
        save_strategy=str(given.get("save_strategy") or "steps"),
        save_steps=number(config, "save_steps", 500),
    )


def planned(config: RunConfig, certain: bool = False) -> RunPlan:
    """Return the plan of a run that trains.

    Args:
        config: of the run.
        certain: take no more processes than there will be, so that the run is not shorter than it says, nor a round
            smaller.
    """
    samples, reason = training_samples(config)
    settings = config.dataflex or DataFlexConfig()
    components, validation = config.build_components(), {}
    needs = components.needs(config)
    for key, asked in needs.items():
        if asked.validation is not None:
            names = tuple(asked.validation.validation or ()) or dataset_names(config, "eval_dataset")
            counts = [rows_of(config, name) for name in names]
            validation[key] = sum(count for count in counts if count is not None)
    data = DataOutline(
        samples=sum(samples.values()) if samples else None,
        domains=None if settings.domain_column else samples or dict.fromkeys(dataset_names(config), 0),
        validation=validation,
        unknown=reason,
        about=True,
    )
    return plan_of(settings, components, trainer_keys(config, certain), needs, data)
