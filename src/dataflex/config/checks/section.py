"""Checks of the ``dataflex:`` section against LLaMA-Factory's keys."""

from __future__ import annotations

from collections.abc import Iterator

from dataflex.api.component import Component
from dataflex.config.checks.chains import problems_of_chains
from dataflex.config.checks.embeddings import problems_of_embeddings
from dataflex.config.checks.given_weights import problems_of_given_weights
from dataflex.config.checks.preference import problems_of_preference
from dataflex.config.checks.ptx import problems_of_ptx
from dataflex.config.checks.references import problems_of_references
from dataflex.config.checks.values import dataset_names, number, truthy
from dataflex.config.loading import LIGER, SECTION, TRAINER_CLASS, RunConfig
from dataflex.data.stages import STAGES, loss_per_sample
from dataflex.embedding.of_model import measurements_of
from dataflex.errors import Problem

SPECIAL_LOSSES = {
    "use_asft_loss": "it needs the logits of a second model, and averages within a micro-batch",
    "label_smoothing_factor": "the Trainer's smoothed loss is a mean per micro-batch, not over the tokens of the step",
    "use_unsloth": "Unsloth's own loss gives no loss per token",
}
"""Key of LLaMA-Factory with its own computation of the loss -> the reason why loss weights cannot be applied to it."""

_SUPERVISED_LOSSES = ("use_dft_loss", "use_eaft_loss")
"""Keys of losses of the supervised stage whose token weights multiply with those of DataFlex."""

_LAYERWISE = ("galore_layerwise", "apollo_layerwise")


def problems_of_section(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of the section together with LLaMA-Factory's keys."""
    for check in (
        _stage,
        _data_path,
        _domains,
        _order,
        _columns,
        _loss,
        _components,
        problems_of_chains,
        problems_of_references,
        problems_of_embeddings,
        problems_of_given_weights,
        problems_of_preference,
        problems_of_ptx,
        _validation,
        _neat_packing,
        _best_model,
    ):
        yield from check(config)


def _stage(config: RunConfig) -> Iterator[Problem]:
    stage = config.llamafactory.get("stage", "sft")
    if stage not in STAGES:
        yield Problem("stage", f"{stage!r} is not supported with {SECTION}:; use one of {', '.join(STAGES)}.")
    for key in ("use_hyper_parallel", "auto_find_batch_size"):
        if truthy(config, key):
            yield Problem(
                key,
                f"is not supported with {SECTION}:, because rounds need the standard training loop and a known batch "
                "size; remove it.",
            )
    yield from _length(config)


def _length(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of the keys that set the length of training.

    At most one key may set the length. With a budget of tokens or seconds the number of steps is not known in advance,
    so every schedule has to be one whose length can be adjusted.
    """
    settings = config.dataflex
    if settings is None:
        return
    ours = ("train_steps", "train_tokens", "train_seconds")
    given = [f"{SECTION}.{key}" for key in ours if getattr(settings, key) is not None]
    if number(config, "max_steps", -1) > 0:
        given.append("max_steps")
    if len(given) > 1:
        yield Problem(
            given[0], f"cannot be combined with {' and '.join(given[1:])}: each sets the length of training; keep one."
        )
    if settings.train_tokens is None and settings.train_seconds is None:
        return
    budget = f"{SECTION}.train_tokens" if settings.train_tokens is not None else f"{SECTION}.train_seconds"
    schedule = str(config.llamafactory.get("lr_scheduler_type", "linear"))
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        yield Problem(
            "lr_scheduler_type",
            f"{schedule!r} has no length that could be adjusted to {budget}; use another schedule (cosine, say).",
        )
    for key in _LAYERWISE:
        if truthy(config, key):
            yield Problem(
                key, f"has its own schedules, which cannot be adjusted to {budget}; use {SECTION}.train_steps."
            )
    for block in ("optimizer", "scheduler"):
        if block in (config.deepspeed or {}):
            yield Problem(
                "deepspeed",
                f"the {block!r} block has a schedule that cannot be adjusted to {budget}; remove the block.",
            )
    if truthy(config, "streaming"):
        yield Problem(
            "streaming", f"{budget} needs the lengths of all samples; set streaming: false, or use max_steps."
        )


def _data_path(config: RunConfig) -> Iterator[Problem]:
    """Yield the keys that choose or order samples and so contradict select, mix and order."""
    plans = [key for key in ("select", "mix", "order") if key in config.families]
    if not plans:
        return
    who = f"{SECTION}.{plans[0]}"
    if truthy(config, "streaming"):
        yield Problem(
            "streaming", f"{who} needs the whole pool, and streamed data has no length; set streaming: false."
        )
    if str(config.llamafactory.get("mix_strategy", "concat")) != "concat":
        yield Problem(
            "mix_strategy",
            f"interleaving fixes the mixture before training; remove mix_strategy, and set shares with {SECTION}.mix.",
        )
    sequential = truthy(config, "disable_shuffling")
    strategy = config.llamafactory.get("train_sampling_strategy", "random")
    if "mix" in config.families and (sequential or strategy == "sequential"):
        key = "disable_shuffling" if sequential else "train_sampling_strategy"
        yield Problem(
            key,
            f"{SECTION}.mix shuffles the samples of the domains, so the order of the files cannot be kept; "
            f"remove {key}.",
        )
    if "order" in config.families and (sequential or strategy != "random"):
        key = "disable_shuffling" if sequential else "train_sampling_strategy"
        yield Problem(key, f"{SECTION}.order decides the order of samples; remove {key} or {SECTION}.order.")
    accelerator = config.llamafactory.get("accelerator_config")
    if isinstance(accelerator, dict) and (accelerator.get("split_batches") or accelerator.get("dispatch_batches")):
        yield Problem(
            "accelerator_config",
            "split_batches and dispatch_batches change which process trains which sample; remove them.",
        )
    column = None if config.dataflex is None else config.dataflex.domain_column
    if number(config, "val_size", 0.0) > 1 and (column is not None or len(dataset_names(config)) > 1):
        parts = "data sets" if column is None else f"the values of {SECTION}.domain_column"
        yield Problem(
            "val_size",
            f"a number of samples cannot be divided between {parts}; set a fraction below 1, or eval_dataset.",
        )


def _domains(config: RunConfig) -> Iterator[Problem]:
    components, column = config.build_components(), None if config.dataflex is None else config.dataflex.domain_column
    if column is not None:
        if not components.plans_data:
            yield Problem(
                f"{SECTION}.domain_column",
                "only has an effect with select, mix or order; add one of them, or remove it.",
            )
        if config.llamafactory.get("tokenized_path"):
            yield Problem(
                "tokenized_path",
                f"{SECTION}.domain_column is read from the raw data, and tokenized data has none; remove "
                "one of the two keys.",
            )
        return  # check_domains follows when the data is loaded and the names of the domains are known
    for key, component in (("mix", components.mix), ("order", components.order)):
        if component is not None and dataset_names(config):
            problem = component.check_domains(dataset_names(config))
            if problem is not None:
                yield Problem(f"{SECTION}.{key}.{problem[0]}", problem[1])


def _order(config: RunConfig) -> Iterator[Problem]:
    components = config.build_components()
    if components.order is None:
        return
    if components.order.draws and (components.select or components.mix is not None):
        other = "mix" if components.mix is not None else components.select[-1].key
        yield Problem(
            f"{SECTION}.order",
            f"{components.order.name!r} itself decides which samples are trained when, so {other} has nothing to "
            "decide; remove one of the two.",
        )
    if components.order.walks and components.select:
        yield Problem(
            f"{SECTION}.order",
            f"{components.order.name!r} orders the whole pool, but {components.select[-1].key} chooses the samples of "
            "every round. Order each round alone (scope: round), or remove the selector.",
        )
    if not components.order.reads_scores:
        return
    if not components.select or not components.select[-1].component.scores_samples:
        yield Problem(
            f"{SECTION}.order",
            f"{components.order.name!r} reads the scores of a selector here; add a selector that gives scores, for "
            "example select: {method: loss}.",
        )


def _columns(config: RunConfig) -> Iterator[Problem]:
    """Yield the keys that make it impossible to assign a raw row to its sample."""
    wanted = config.wanted_columns()
    if not wanted:
        return
    column, key = next((name, each.key) for name, each in wanted.items())
    if config.families & {"select", "mix", "order"}:
        return  # _data_path already refuses the same keys
    if truthy(config, "streaming"):
        yield Problem(
            "streaming",
            f"{key} keeps {column!r} of every sample, and streamed data has no samples yet; set streaming: false.",
        )
    if str(config.llamafactory.get("mix_strategy", "concat")) != "concat":
        yield Problem(
            "mix_strategy",
            f"{key} keeps {column!r}, but interleaving does not tell which row a sample is from; use concat.",
        )


def _components(config: RunConfig) -> Iterator[Problem]:
    for key, component in config.build_components().items():
        found = list(component.problems(config))
        needs = component.needs(config)
        for measurement in measurements_of(needs):
            found += measurement.problems(config)
        if needs.step_embeddings is not None and needs.step_embeddings not in needs.measurements:
            found += needs.step_embeddings.problems(config)
        yield from (Problem(f"{SECTION}.{key}.{parameter}", message) for parameter, message in found)


def _validation(config: RunConfig) -> Iterator[Problem]:
    for key, component in config.build_components().items():
        asked = component.needs(config).validation
        if asked is not None and component.family == "weighter" and truthy(config, "streaming"):
            yield Problem(
                "streaming",
                f"{SECTION}.{key} measures samples with the model, and streamed samples are not known; "
                "set streaming: false.",
            )
        if asked is not None and asked.validation is None:
            yield from _without_validation(config, f"{SECTION}.{key}.validation", component)


def _without_validation(config: RunConfig, key: str, component: Component) -> Iterator[Problem]:
    """Yield a problem if a component names no validation samples and cannot use the evaluation data instead."""
    if dataset_names(config, "eval_dataset"):
        return
    if not number(config, "val_size", 0.0):
        remedy = "name data sets here, or set eval_dataset or val_size"
        if TRAINER_CLASS in config.llamafactory:
            remedy = "give the Trainer some as validation={'NAME': DATASET}, or an eval_dataset"
        yield Problem(key, f"{component.name!r} needs validation samples; {remedy}.")
        return
    if truthy(config, "predict_with_generate"):
        yield Problem(
            "predict_with_generate",
            f"the samples that val_size splits off then have prompts only, and {component.name!r} needs their answers; "
            f"name validation data sets in {key}.",
        )
        return
    packing = [name for name in ("packing", "neat_packing") if truthy(config, name)]
    if packing and config.llamafactory.get("stage", "sft") == "sft":
        yield Problem(
            packing[0],
            f"the samples that val_size splits off are then packed too, and {component.name!r} needs single samples; "
            f"name validation data sets in eval_dataset or {key}.",
        )


def _best_model(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem if the Trainer would choose the worst checkpoint as the best one.

    The Trainer assumes that more is better for every metric whose name does not end in ``loss``.
    """
    metric = str(config.llamafactory.get("metric_for_best_model") or "")
    is_set = config.llamafactory.get("greater_is_better") is not None
    if metric.endswith(("_accuracy", "_margin")) and is_set and not truthy(config, "greater_is_better"):
        yield Problem("greater_is_better", f"must not be false with metric_for_best_model: {metric}; remove it.")
    if metric.endswith(("_perplexity", "_bits_per_byte")) and not is_set:
        yield Problem("greater_is_better", f"needed with metric_for_best_model: {metric}; set it to false.")


def _neat_packing(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem if components measure several samples at once and the collator accepts only one."""
    if not truthy(config, "neat_packing") or config.llamafactory.get("flash_attn") != "fa2":
        return
    components = config.build_components()
    measuring = []
    for key, component in components.items():
        asked = component.needs(config)
        makes_table = asked.reference is not None and asked.reference.reference_losses is not None
        if measurements_of(asked) or asked.validation is not None or makes_table:
            measuring.append(f"{SECTION}.{key}.method: {component.name}")
    if measuring:
        yield Problem(
            "neat_packing",
            "with flash_attn: fa2 LLaMA-Factory's batches have one sample, but several are measured at once by "
            f"{' and '.join(measuring)}. Set flash_attn: sdpa, or packing: true instead of neat_packing.",
        )


def _loss(config: RunConfig) -> Iterator[Problem]:
    components = config.build_components()
    mixer, weighs = components.mix, [f"{SECTION}.weight"] if components.weight else []
    if mixer is not None and mixer.weighs_loss:
        weighs.append(f"{SECTION}.mix.method: {mixer.name}")
    for key, component in components.items():
        if component.needs(config).step_losses != "nothing":
            weighs.append(f"{SECTION}.{key}.method: {component.name}")
    if loss_per_sample(str(config.llamafactory.get("stage"))):
        # The other keys have no effect, because the stage computes the losses of samples from logits.
        if weighs and truthy(config, "use_unsloth"):
            yield Problem("use_unsloth", f"cannot be combined with {weighs[0]}: {SPECIAL_LOSSES['use_unsloth']}.")
        return
    if config.fused_loss:
        weighs.append(next(_liger(config), f"{SECTION}.fused_loss"))
    for key, reason in SPECIAL_LOSSES.items():
        if weighs and truthy(config, key):
            yield Problem(key, f"cannot be combined with {weighs[0]}: {reason}.")
    for key in () if config.fused_loss or not weighs else _liger(config):
        yield Problem(
            key,
            f"with {SECTION}.fused_loss: false, LLaMA-Factory's fused loss gives no loss per token, which {weighs[0]} "
            f"needs. Leave out {SECTION}.fused_loss.",
        )
    for key in _SUPERVISED_LOSSES if config.llamafactory.get("stage", "sft") == "pt" else ():
        if truthy(config, key):
            yield Problem(key, "has no effect in stage pt; remove it.")


def _liger(config: RunConfig) -> Iterator[str]:
    """Yield the keys that switch on the kernels of Liger."""
    return (key for key in LIGER if truthy(config, key))
