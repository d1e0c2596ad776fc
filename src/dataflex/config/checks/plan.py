"""The plan of a run as far as it is known before anything is loaded, and checks that the run decides something."""

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
    """Yield a problem if the run would do nothing, or would train nothing although components are set."""
    if config.offline:
        return
    if not any(truthy(config, key) for key in _WORK) and str(config.llamafactory.get("eval_strategy") or "no") == "no":
        if config.params:
            yield Problem(
                "do_train",
                f"not set, so nothing would be trained and {_who(config)} would never decide; set do_train: true.",
            )
        elif not config.llamafactory.get("tokenized_path"):
            yield Problem(
                "do_train", f"none of {', '.join(_WORK)} is true, so nothing would be done; set do_train: true."
            )
    elif not truthy(config, "do_train"):
        if config.params:
            yield Problem(
                "do_train",
                f"not true, so nothing would be trained and {_who(config)} would never decide. Set do_train: true, or "
                f"remove the {SECTION}: section from a file that only evaluates or predicts.",
            )
    elif config.dataflex is not None:
        yield from _length(config, config.dataflex)


def problems_of_plan(config: RunConfig) -> list[Problem]:
    """Return the reasons why a run would decide nothing, as far as the number of rows shows.

    Only for a configuration without other problems, because the plan is computed from all of its keys.
    """
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
    """Yield a problem if ``num_train_epochs`` is 0 and no other key sets the length of training."""
    given = config.llamafactory.get("num_train_epochs")
    steps = settings.train_steps is not None or number(config, "max_steps", -1) > 0
    if given is None or steps or settings.train_tokens is not None:
        return
    epochs = number(config, "num_train_epochs", 3.0)
    if not 0 < epochs < float("inf"):
        yield Problem(
            "num_train_epochs",
            f"must be above 0, got {given}. The length of training can also be set with max_steps, "
            f"{SECTION}.train_steps or {SECTION}.train_tokens.",
        )


def trainer_keys(config: RunConfig, certain: bool = False) -> TrainerKeys:
    """Return the keys of LLaMA-Factory that the plan depends on, with defaults filled in.

    Args:
        config: configuration of the run.
        certain: use a lower bound of the number of processes if the environment decides it.
    """
    given = config.llamafactory
    logging_steps = number(config, "logging_steps", 500)
    return TrainerKeys(
        max_steps=int(number(config, "max_steps", -1)),
        epochs=number(config, "num_train_epochs", 3.0),
        per_device=max(1, int(number(config, "per_device_train_batch_size", 8))),
        accumulation=max(1, int(number(config, "gradient_accumulation_steps", 1))),
        processes=config.processes or planned_processes(certain),
        eval_strategy=str(given.get("eval_strategy") or "no"),
        eval_steps=number(config, "eval_steps", logging_steps),
        evaluates_at_end=truthy(config, "do_eval") or str(given.get("eval_strategy") or "no") != "no",
        save_strategy=str(given.get("save_strategy") or "steps"),
        save_steps=number(config, "save_steps", 500),
        fused_loss=config.fused_loss,
    )


def planned(config: RunConfig, certain: bool = False) -> RunPlan:
    """Return the plan of a run that trains.

    Args:
        config: configuration of the run.
        certain: use a lower bound of the number of processes if the environment decides it, so that the plan has at
            least as many steps as the run, and rounds that are no larger.
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
